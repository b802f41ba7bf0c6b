//! Cases of `open`, `receive`, `stop` and `close`: what arrives, how much of it, and when no more.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use hapax::{Limits, Message, Want};
use tokio::time::timeout;

use super::{
    BrokerFixture, WANT, ack_all, assert_ended, event, headers, id, ids, limits, names, opened, publish, receive,
    receive_all, silence,
};

/// Nothing is received before `open` returned.
pub async fn nothing_arrives_before_open<F: BrokerFixture>(fixture: &F) {
    publish(fixture, [event(1)]).await;
    let broker = fixture.broker().await;
    if let Ok(Ok(deliveries)) = timeout(F::UNIT * 3, broker.receive(WANT)).await {
        panic!("{:?} arrived before open", ids(&deliveries));
    }
    broker.open(limits::<F>(1024)).await.expect("the broker opens");
    assert_eq!(ids(&receive_all(&broker, 1).await), names([1]));
}

/// A broker that was opened before is opened again after `close`.
pub async fn open_after_close_receives_again<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, [event(1)]).await;
    ack_all(&broker, &receive_all(&broker, 1).await).await;
    broker.stop().await.expect("the broker stops");
    broker.close().await.expect("the broker closes");
    publish(fixture, [event(2)]).await;
    broker.open(limits::<F>(1024)).await.expect("the broker opens again");
    let again = receive_all(&broker, 1).await;
    assert_eq!(ids(&again), names([2]));
    assert!(again[0].session.is_live(), "the deliveries of an open broker belong to a live session");
    ack_all(&broker, &again).await;
}

/// Everything that was published arrives.
pub async fn every_message_arrives<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, (0..150).map(event)).await;
    let mut seen = BTreeSet::new();
    for half in [150..300, 300..300] {
        publish(fixture, half.map(event)).await;
        while seen.len() < 300 {
            let deliveries = receive(&broker).await;
            ack_all(&broker, &deliveries).await;
            seen.extend(ids(&deliveries));
        }
    }
    assert_eq!(seen, names(0..300));
}

/// Attributes, headers and data arrive byte for byte.
pub async fn a_message_arrives_byte_for_byte<F: BrokerFixture>(fixture: &F) {
    let mut sent = Message::event("/a source/ü", "id with spaces, \"quotes\" and ü", "com.example.tested.v2")
        .with_data("application/octet-stream", (0..=255).collect::<Vec<u8>>())
        .with_subject("order/42")
        .with_partition_key("tenant 7")
        .with_header("x-tenant", "7")
        .with_header("X-Case", "kept as it is")
        .with_header("x-empty", "")
        .with_header("x-binary", vec![0, 159, 146, 150, 255]);
    if !fixture.quirks().one_header_a_name {
        sent = sent.with_header("x-twice", "first").with_header("x-twice", "second");
    }
    let a = &mut sent.attributes;
    a.time = Some("2026-02-28T23:59:60Z".into());
    a.data_schema = Some("https://schemas.example/order#2".into());
    a.correlation_id = Some("conversation 1".into());
    a.causation_id = Some("cause 1".into());
    a.sequence = Some("0000017".into());
    a.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
    a.tracestate = Some("vendor=value".into());
    let bare = Message::event("s", "bare", "t");

    let broker = opened(fixture).await;
    publish(fixture, [sent.clone(), bare.clone()]).await;
    let arrived = receive_all(&broker, 2).await;
    for sent in [sent, bare] {
        let found = arrived.iter().find(|delivery| delivery.message.attributes.id == sent.attributes.id);
        let message = &found.expect("the id arrives as it was sent").message;
        assert_eq!(message.attributes, sent.attributes);
        assert_eq!(message.data, sent.data);
        assert_eq!(headers(message), headers(&sent));
        assert_eq!(message.defect(), None);
        assert_eq!(message.reopen(), None);
    }
}

/// A message that cannot be decoded arrives with a defect, its body as it travelled.
pub async fn an_undecodable_message_arrives_with_its_defect<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    let body = fixture.publish_undecodable().await;
    publish(fixture, [event(1)]).await;
    let arrived = receive_all(&broker, 2).await;
    let defective: Vec<_> = arrived.iter().filter(|delivery| delivery.message.defect().is_some()).collect();
    assert_eq!(defective.len(), 1, "the defective message, and it alone, has a defect");
    assert_eq!(defective[0].message.data, body);
    ack_all(&broker, &arrived).await;
}

/// Never more than asked for, in events and in bytes.
pub async fn receive_returns_no_more_than_wanted<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    let sized = |id: usize, bytes: usize| event(id).with_data("text/plain", vec![b'x'; bytes]);
    publish(fixture, (0..12).map(|id| sized(id, 100))).await;
    let mut left = 12;
    while left > 0 {
        let want = if left > 6 { Want { events: 3, bytes: 1 << 20 } } else { Want { events: 64, bytes: 250 } };
        let deliveries = broker.receive(want).await.expect("the broker delivers");
        let bytes: usize = deliveries.iter().map(|delivery| delivery.message.bytes()).sum();
        assert!((1..=want.events).contains(&deliveries.len()), "{} events for {want:?}", deliveries.len());
        assert!(bytes <= want.bytes || deliveries.len() == 1, "{bytes} bytes for {want:?}");
        ack_all(&broker, &deliveries).await;
        left -= deliveries.len();
    }
    publish(fixture, [sized(12, 4_000), sized(13, 10)]).await;
    for _ in 0..2 {
        let deliveries = broker.receive(Want { events: 64, bytes: 1_000 }).await.expect("the broker delivers");
        assert_eq!(deliveries.len(), 1, "a message larger than the wanted bytes comes alone");
        ack_all(&broker, &deliveries).await;
    }
}

/// Never more unsettled deliveries than [`Limits::events`].
pub async fn unsettled_deliveries_are_bounded<F: BrokerFixture>(fixture: &F) {
    let broker = fixture.broker().await;
    broker.open(limits::<F>(5)).await.expect("the broker opens");
    publish(fixture, (0..20).map(event)).await;
    let mut held = Vec::new();
    while let Ok(more) = timeout(F::UNIT * 3, broker.receive(WANT)).await {
        held.extend(more.expect("the broker delivers"));
        assert!(held.len() <= 5, "{} are unsettled, 5 may be", held.len());
    }
    assert!(!held.is_empty());
    let mut seen = ids(&held);
    while seen.len() < 20 {
        ack_all(&broker, &std::mem::take(&mut held)).await;
        held = receive(&broker).await;
        assert!(held.len() <= 5, "{} are unsettled, 5 may be", held.len());
        seen.extend(ids(&held));
    }
    ack_all(&broker, &held).await;
}

/// Dropping the future of `receive` loses nothing.
pub async fn dropping_receive_loses_nothing<F: BrokerFixture>(fixture: &F) {
    let broker = fixture.broker().await;
    // Held for so long that nothing comes back because the broker took it for abandoned.
    let held_max = Duration::from_secs(3600);
    broker.open(Limits { held_max, ..limits::<F>(1024) }).await.expect("the broker opens");
    let few = Want { events: 3, bytes: 1 << 20 };
    let mut seen = BTreeSet::new();
    for round in 0..20 {
        publish(fixture, (round * 5..round * 5 + 5).map(event)).await;
        for patience in [Duration::ZERO, F::UNIT / 50, F::UNIT / 10] {
            // Once polled a single time and dropped, once dropped while it waits.
            let at_once = broker.receive(few).now_or_never();
            let soon = timeout(patience, broker.receive(few)).await.ok();
            for deliveries in [at_once, soon].into_iter().flatten() {
                let deliveries = deliveries.expect("the broker delivers");
                ack_all(&broker, &deliveries).await;
                seen.extend(ids(&deliveries));
            }
        }
    }
    while seen.len() < 100 {
        let deliveries = receive(&broker).await;
        ack_all(&broker, &deliveries).await;
        seen.extend(ids(&deliveries));
    }
}

/// After `stop`, `receive` returns an empty vector at once; so does one that was waiting.
pub async fn after_stop_receive_returns_empty<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    let waiting = tokio::spawn({
        let broker = Arc::clone(&broker);
        async move { broker.receive(WANT).await }
    });
    tokio::time::sleep(F::UNIT).await;
    broker.stop().await.expect("the broker stops");
    let waited = timeout(F::UNIT * 10, waiting).await.expect("a waiting receive ends with stop");
    assert_eq!(waited.expect("it does not panic").expect("stop is no error").len(), 0);
    publish(fixture, [event(1)]).await;
    for _ in 0..3 {
        let after = timeout(F::UNIT * 10, broker.receive(WANT)).await.expect("receive returns at once after stop");
        assert_eq!(ids(&after.expect("stop is no error")), names([]));
    }
}

/// What a crashed consumer left unsettled is delivered again, and only that.
pub async fn unsettled_deliveries_come_back<F: BrokerFixture>(fixture: &F) {
    let first = opened(fixture).await;
    publish(fixture, (0..3).map(event)).await;
    let deliveries = receive_all(&first, 3).await;
    let (done, left): (Vec<_>, Vec<_>) = deliveries.into_iter().partition(|delivery| id(delivery) == "0");
    ack_all(&first, &done).await;
    drop((done, left));
    fixture.crash(first).await;
    let second = opened(fixture).await;
    let again = receive_all(&second, 2).await;
    assert_eq!(ids(&again), names([1, 2]));
    silence(&second, F::UNIT * 3).await;
    ack_all(&second, &again).await;
}

/// `close` gives back what is unsettled and ends the sessions; repeating it is allowed.
pub async fn close_gives_back_what_is_unsettled<F: BrokerFixture>(fixture: &F) {
    let first = opened(fixture).await;
    publish(fixture, (0..4).map(event)).await;
    let deliveries = receive_all(&first, 4).await;
    let (done, left): (Vec<_>, Vec<_>) = deliveries.into_iter().partition(|delivery| id(delivery) == "0");
    ack_all(&first, &done).await;
    first.close().await.expect("the broker closes");
    first.close().await.expect("closing twice is closing once");
    assert_ended(&left[0].session);
    let second = opened(fixture).await;
    let again = receive_all(&second, 3).await;
    assert_eq!(ids(&again), names([1, 2, 3]));
    ack_all(&second, &again).await;
    silence(&second, F::UNIT * 3).await;
}
