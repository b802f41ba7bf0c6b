//! Invariant: an event's identity is what the message bears, or what was explicitly asked for; never random, never folded,
//! never the record key, never the same for two messages of two places. Without one a message is not run.

use hapax::{BrokerOrder, Capabilities, IdFrom, Message, MissingId, Reason};
use hapax_memory::MemoryBroker;

use crate::rig::{Rig, Runs, TYPE, event};

fn nameless(data: &'static str) -> Message {
    let mut message = event("").with_data("application/json", data);
    message.attributes.id = None;
    message.attributes.source = None;
    message
}

#[tokio::test(start_paused = true)]
async fn a_message_without_an_id_is_set_aside_without_asking_the_store() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.send(nameless("1")).await;
    rig.send(Message::event("/shop", "", TYPE)).await;
    rig.send(Message::event("", "1", TYPE)).await;
    rig.settled().await;
    assert_eq!((runs.len(), rig.journal.round_trips()), (0, 0));
    let reasons: Vec<_> = rig.dead().into_iter().map(|(_, reason)| reason).collect();
    assert!(reasons.iter().all(|reason| matches!(reason, Reason::MissingId | Reason::Undecodable)), "{reasons:?}");
    assert_eq!((reasons.len(), reasons[0]), (3, Reason::MissingId));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_message_without_an_id_is_acked_where_that_is_the_rule() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok()).missing_id(MissingId::Ignore)).await;
    rig.send(nameless("1")).await;
    rig.settled().await;
    assert_eq!((runs.len(), rig.dead().len(), rig.journal.round_trips()), (0, 0, 0));
    assert_eq!(billing.statistics().ignored, 1);
    billing.stop().await;
}

/// Holes of mq-bridge: a 16-byte record key becomes the id, so that later records of that key vanish; without an id there
/// is a fresh one on each read, so that nothing is ever a duplicate.
#[tokio::test(start_paused = true)]
async fn a_record_key_is_no_id_and_nothing_is_made_up() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    for data in ["1", "2", "3"] {
        rig.send(nameless(data).with_partition_key("0123456789abcdef")).await;
    }
    for id in ["1", "2"] {
        rig.send(event(id).with_partition_key("0123456789abcdef")).await;
    }
    rig.settled().await;
    assert_eq!((runs.ids(), rig.dead().len()), (vec!["1".into(), "2".to_owned()], 3));
    assert!(rig.dead().iter().all(|(_, reason)| *reason == Reason::MissingId));
    billing.stop().await;
}

/// Hole of mq-bridge: ids are folded by FNV-1a, and "123" equals "0123". And keys beyond 127 bytes overflow a column.
#[tokio::test(start_paused = true)]
async fn ids_are_taken_as_they_are() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    let long = "x".repeat(511);
    let ids = ["123", "0123", "123 ", "1.23e2", "ID", "id", "İd", &format!("{long}1"), &format!("{long}2")];
    rig.send_all(ids).await;
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates), (ids.len(), 0), "{:?}", rig.dead());
    rig.send_all(ids).await;
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates), (ids.len(), ids.len() as u64));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_header_is_the_id_where_it_was_asked_for() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok()).id_from(IdFrom::header("x-order"))).await;
    for order in ["17", "17", "18", ""] {
        rig.send(nameless("1").with_header("x-order", order)).await;
    }
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates), (2, 1));
    assert_eq!(rig.dead(), [(String::new(), Reason::MissingId)]);
    assert_ne!(runs.all()[0].key, runs.all()[1].key);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pointer_into_the_data_is_the_id_where_it_was_asked_for() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok()).id_from(IdFrom::json_pointer("/order/id"))).await;
    let data = [
        r#"{"order":{"id":"17"}}"#,
        r#"{"order":{"id":"17"}}"#,
        r#"{"order":{"id":12345678901234567890123}}"#,
        r#"{"order":{"id":12345678901234567890124}}"#,
        r#"{"order":{}}"#,
    ];
    for data in data {
        rig.send(nameless(data)).await;
    }
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates), (3, 1), "integers as their exact text");
    assert_eq!(rig.dead(), [(String::new(), Reason::MissingId)]);
    billing.stop().await;
}

/// Hole of mq-bridge: partition and offset are the id, without the topic, so that two topics collide.
#[tokio::test(start_paused = true)]
async fn a_position_is_one_with_its_topic() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let returns = MemoryBroker::builder("returns").group("billing").build();
    let (publisher, capabilities) = (returns.publisher(), hapax::Broker::capabilities(&returns));
    assert!(matches!(capabilities, Capabilities { position_is_stable: true, order: BrokerOrder::None, .. }));
    let orders = rig.start("billing", |c| c.on_any(runs.ok()).id_from(IdFrom::Position)).await;
    let other = hapax::Consumer::builder("billing", returns, rig.journaled_store());
    let other = other.on_any(runs.ok()).id_from(IdFrom::Position).build().await.unwrap();
    let running = tokio::spawn(other.run(std::future::pending()));
    rig.send(nameless("1")).await;
    publisher.send(nameless("1")).await;
    rig.until("both ran", || runs.len() == 2).await;
    rig.settled().await;
    assert_ne!(runs.all()[0].key, runs.all()[1].key);
    running.abort();
    orders.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_position_survives_redelivery_and_tells_two_publications_apart() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let wire = |c: crate::rig::Builder| c.on_any(runs.ok()).id_from(IdFrom::Position);
    rig.broker.duplicate(2);
    let billing = rig.start("billing", wire).await;
    rig.send(nameless("1")).await;
    rig.send(nameless("1")).await;
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates), (2, 2));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_hash_of_the_body_is_the_id_only_where_it_was_asked_for() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok()).id_from(IdFrom::BodyHash)).await;
    assert!(billing.handle.guarantee().to_string().contains("equal data"), "said at start: equal events vanish");
    for data in ["1", "2", "1"] {
        rig.send(nameless(data)).await;
    }
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates), (2, 1));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn several_places_are_tried_in_order_and_ids_of_two_places_never_meet() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let wire = |c: crate::rig::Builder| {
        let c = c.on_any(runs.ok()).id_from(IdFrom::CloudEvents);
        c.id_from(IdFrom::header("x-order")).id_from(IdFrom::json_pointer("/id"))
    };
    let billing = rig.start("billing", wire).await;
    rig.send(event("7").with_header("x-order", "8")).await;
    rig.send(event("7").with_header("x-order", "9")).await;
    rig.send(nameless(r#"{"id":"7"}"#).with_header("x-order", "7")).await;
    rig.send(nameless(r#"{"id":"7"}"#)).await;
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates, rig.dead()), (3, 1, vec![]));
    billing.stop().await;
}
