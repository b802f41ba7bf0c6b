//! What a settlement does at the server: acks that reach no neighbour, retries and dead letters that are placed before the
//! ack, counts.
//!
//! Numbers are those of semantics.md section 4; the traps are clients.md section 3.1.

mod rabbit;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use hapax::{Broker, ErrorKind, Outgoing, Publisher, Settlement};
use hapax_rabbitmq::lapin::BasicProperties;
use hapax_rabbitmq::lapin::options::QueueDeclareOptions;
use hapax_rabbitmq::lapin::types::{AMQPValue, FieldArray, FieldTable};
use hapax_rabbitmq::{RabbitPublisher, Topology};
use rabbit::{QUIET, Rabbit, event, ids, letter, limits, receive, settle, short, silence, soon};
use tokio::time::Instant;

const SHORT: Duration = Duration::from_millis(500);
/// Shorter than the longest, and long enough to look at what waits.
const SHORTER: Duration = Duration::from_millis(1_500);
const LONG: Duration = Duration::from_secs(3);

/// Bug 38 (JasperFx/wolverine GH-3706): every ack was `multiple`, so finishing N acked the unfinished below it.
#[tokio::test]
async fn ack_is_single() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    rabbit.publish(0..3).await;
    let held = receive(&broker, 3).await;
    settle(&broker, held[2].receipt, Settlement::Ack).await.expect("it is acked");
    drop(broker);
    let again = rabbit.opened().await;
    assert_eq!(ids(&receive(&again, 2).await), ["0", "1"]);
    silence(&again, QUIET).await;
    again.close().await.expect("it closes");
}

#[tokio::test]
async fn multiple_is_for_a_contiguous_done_prefix_only() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    rabbit.publish(0..6).await;
    let held = receive(&broker, 6).await;
    // 0 and 1 are a prefix, 2 still runs, 3 waits for its retry to be placed in the same batch, 4 is done behind the gap.
    let batch = [
        (held[4].receipt, Settlement::Ack),
        (held[3].receipt, Settlement::Retry { after: LONG }),
        (held[1].receipt, Settlement::Ack),
        (held[0].receipt, Settlement::Ack),
    ];
    for answer in soon("settle", broker.settle(&batch)).await {
        answer.expect("it is settled");
    }
    broker.close().await.expect("it closes");
    let again = rabbit.opened().await;
    assert_eq!(ids(&receive(&again, 2).await), ["2", "5"]);
    silence(&again, QUIET).await;
    again.close().await.expect("it closes");
}

/// A tag that was covered by `multiple` and is acked once more closes the channel (406). Many tasks at once must not do that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settling_from_many_tasks_keeps_the_channel() {
    const EVENTS: usize = 600;
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    rabbit.publish(0..EVENTS).await;
    let held = receive(&broker, EVENTS).await;
    let session = held[0].session.clone();
    let mut tasks = Vec::new();
    for task in 0..8 {
        let mine: Vec<_> = held.iter().skip(task).step_by(8).map(|delivery| delivery.receipt).collect();
        let broker = Arc::clone(&broker);
        tasks.push(tokio::spawn(async move {
            for some in mine.chunks(5) {
                let batch: Vec<_> = some.iter().map(|receipt| (*receipt, Settlement::Ack)).collect();
                for answer in broker.settle(&batch).await {
                    answer.expect("it is acked");
                }
            }
        }));
    }
    for task in tasks {
        soon("settle", task).await.expect("no task panics");
    }
    // The server answers a wrong ack by and by.
    silence(&broker, QUIET).await;
    assert!(session.is_live(), "the channel was closed");
    broker.close().await.expect("it closes");
    assert_eq!(rabbit.messages(&rabbit.queue).await, Some(0));
}

/// A confirm is positive for a message that no queue takes.
#[tokio::test]
async fn an_unroutable_dead_letter_is_not_acked() {
    let rabbit = Rabbit::fresh();
    rabbit.broker().declare().await.expect("the queues are declared");
    let broker = rabbit.builder().topology(Topology::Check).build().expect("the settings hold");
    broker.open(limits(8)).await.expect("the broker opens");
    rabbit.publish([1]).await;
    let held = receive(&broker, 1).await.remove(0);
    rabbit.delete(&rabbit.dead()).await;
    for settlement in [letter(), letter()] {
        let error = settle(&broker, held.receipt, settlement).await.expect_err("there is no queue for it");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains(&rabbit.dead()), "{error}");
    }
    assert!(held.session.is_live());
    broker.close().await.expect("it closes");
    assert_eq!(rabbit.messages(&rabbit.queue).await, Some(1), "it is still there");
}

#[tokio::test]
async fn places_that_were_deleted_are_created_again_where_hapax_creates() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    rabbit.publish(0..2).await;
    let held = receive(&broker, 2).await;
    settle(&broker, held[0].receipt, Settlement::Retry { after: SHORT }).await.expect("it waits");
    let back = receive(&broker, 1).await.remove(0);
    rabbit.delete(&rabbit.wait("500ms")).await;
    rabbit.delete(&rabbit.dead()).await;
    for (receipt, settlement) in [(back.receipt, Settlement::Retry { after: SHORT }), (held[1].receipt, letter())] {
        // The first try finds that the place is gone, the second creates it.
        if settle(&broker, receipt, settlement.clone()).await.is_err() {
            settle(&broker, receipt, settlement).await.expect("it is placed");
        }
    }
    assert_eq!(ids(&receive(&broker, 1).await), ["0"]);
    assert_eq!(rabbit.messages(&rabbit.dead()).await, Some(1));
    broker.close().await.expect("it closes");
}

/// With a time to live of each message's own, the short delay would wait behind the long one.
#[tokio::test]
async fn a_short_retry_overtakes_a_long_one() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    rabbit.publish(0..2).await;
    let held = receive(&broker, 2).await;
    let start = Instant::now();
    settle(&broker, held[0].receipt, Settlement::Retry { after: LONG }).await.expect("it waits");
    settle(&broker, held[1].receipt, Settlement::Retry { after: SHORTER }).await.expect("it waits");
    assert_eq!(broker.waiting_for_retry().await.expect("it counts"), 2);
    assert_eq!(ids(&receive(&broker, 1).await), ["1"]);
    assert!(start.elapsed() >= SHORTER, "after {:?}", start.elapsed());
    assert_eq!(ids(&receive(&broker, 1).await), ["0"]);
    assert!(start.elapsed() >= LONG);
    assert_eq!(broker.waiting_for_retry().await.expect("it counts"), 0);
    broker.close().await.expect("it closes");
}

/// RabbitMQ drops what goes in a circle of dead-lettering without a rejection (its cycle detection).
#[tokio::test]
async fn a_retry_goes_round_again_and_again() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    rabbit.publish([1]).await;
    let first = receive(&broker, 1).await.remove(0);
    let mut held = first.clone();
    for _ in 0..4 {
        settle(&broker, held.receipt, Settlement::Retry { after: SHORT }).await.expect("it waits");
        held = receive(&broker, 1).await.remove(0);
        assert_eq!(held.message, first.message, "it comes back as it was");
    }
    settle(&broker, held.receipt, Settlement::Ack).await.expect("it is acked");
    broker.close().await.expect("it closes");
}

#[tokio::test]
async fn a_retry_beyond_the_longest_step_is_refused_and_not_shortened() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    assert_eq!(broker.capabilities().retry_max, LONG);
    rabbit.publish([1]).await;
    let held = receive(&broker, 1).await.remove(0);
    let kind = settle(&broker, held.receipt, Settlement::Retry { after: LONG * 2 }).await.map_err(|e| e.kind());
    assert_eq!(kind, Err(ErrorKind::Rejected));
    settle(&broker, held.receipt, Settlement::Ack).await.expect("it is still held");
    broker.close().await.expect("it closes");
}

/// The server keeps what is beyond the prefetch, so that lapin's unbounded buffer is bounded by it.
#[tokio::test]
async fn no_more_than_the_prefetch_leaves_the_server() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.broker();
    broker.open(limits(5)).await.expect("the broker opens");
    rabbit.publish(0..20).await;
    receive(&broker, 1).await;
    until_left(&rabbit, 15).await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(rabbit.messages(&rabbit.queue).await, Some(15));
    broker.close().await.expect("it closes");
    let capped = rabbit.builder().prefetch_max(3).build().expect("the settings hold");
    capped.open(limits(1024)).await.expect("the broker opens");
    receive(&capped, 1).await;
    until_left(&rabbit, 17).await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(rabbit.messages(&rabbit.queue).await, Some(17));
    capped.close().await.expect("it closes");
}

/// Waits until no more than this many messages are with the server.
async fn until_left(rabbit: &Rabbit, most: u32) {
    let waiting = async {
        while rabbit.messages(&rabbit.queue).await.expect("the queue is there") > most {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon("the prefetch is filled", waiting).await;
}

/// `basic.cancel` alone leaves what was prefetched with a consumer that will not work on it.
#[tokio::test]
async fn stop_gives_back_what_nobody_has_seen() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    rabbit.publish(0..10).await;
    let held = receive(&broker, 2).await;
    broker.stop().await.expect("it stops");
    let other = rabbit.opened().await;
    let given_back = receive(&other, 8).await;
    assert_eq!(ids(&given_back).into_iter().collect::<BTreeSet<_>>().len(), 8);
    for delivery in &held {
        settle(&broker, delivery.receipt, Settlement::Ack).await.expect("settling works after stop");
    }
    broker.close().await.expect("it closes");
    other.close().await.expect("it closes");
    assert_eq!(rabbit.messages(&rabbit.queue).await, Some(8));
}

/// Bug 50 (BrighterCommand/Brighter@ac6e10301) and its kin: what a sender may set would vanish, be refused, or go to more
/// queues when it is sent again.
#[tokio::test]
async fn requeue_roundtrips_headers() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    let mut table = FieldTable::default();
    let copies = FieldArray::from(vec![AMQPValue::LongString(rabbit.queue.as_str().into())]);
    table.insert("x-number".into(), AMQPValue::LongInt(7));
    table.insert("x-flag".into(), AMQPValue::Boolean(true));
    table.insert("BCC".into(), AMQPValue::FieldArray(FieldArray::from(Vec::new())));
    table.insert("CC".into(), AMQPValue::FieldArray(copies));
    let user = rabbit.url.expose().split("://").nth(1).and_then(|rest| rest.split(':').next()).expect("it has a user");
    let properties = BasicProperties::default()
        .with_headers(table)
        .with_content_type("application/json".into())
        .with_message_id("m-1".into())
        .with_expiration("60000".into())
        .with_delivery_mode(1)
        .with_user_id(short(user));
    rabbit.send(properties, b"{\"a\":1}").await;
    let first = receive(&broker, 1).await.remove(0);
    assert_eq!(first.message.headers.get_str("message-id"), Some("m-1"));
    assert_eq!(first.message.headers.get_str("x-number"), Some("7"));
    settle(&broker, first.receipt, Settlement::Retry { after: SHORT }).await.expect("it waits");
    let second = receive(&broker, 1).await.remove(0);
    silence(&broker, QUIET).await;
    settle(&broker, second.receipt, letter()).await.expect("it is set aside");
    silence(&broker, QUIET).await;
    let dead = rabbit.peek(&rabbit.dead()).await.remove(0);
    let headers = dead.properties.headers().clone().expect("it has headers");
    assert_eq!(headers.inner().get("x-number"), Some(&AMQPValue::LongInt(7)), "types are kept");
    assert_eq!(headers.inner().get("x-flag"), Some(&AMQPValue::Boolean(true)));
    assert_eq!(headers.inner().get("hapax-reason"), Some(&AMQPValue::LongString("permanent".into())));
    assert_eq!(dead.properties.message_id().as_ref().map(|id| id.as_str()), Some("m-1"));
    assert_eq!((dead.properties.expiration(), dead.properties.delivery_mode()), (&None, &Some(2)));
    assert_eq!(dead.data, b"{\"a\":1}");
    broker.close().await.expect("it closes");
}

/// Bug 40 (JasperFx/wolverine GH-2510): a header mapper failed, and the message was logged, acked and lost.
#[tokio::test]
async fn undecodable_envelope_reaches_dlq() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    let mut table = FieldTable::default();
    table.insert("cloudEvents_specversion".into(), AMQPValue::LongString("1.0".into()));
    table.insert("cloudEvents_id".into(), AMQPValue::ByteArray(vec![0xff, 0xfe].into()));
    table.insert("cloudEvents_source".into(), AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::Void])));
    table.insert("cloudEvents_type".into(), AMQPValue::LongString("t".into()));
    rabbit.send(BasicProperties::default().with_headers(table), b"body").await;
    let held = receive(&broker, 1).await.remove(0);
    assert!(held.message.defect().is_some());
    settle(&broker, held.receipt, letter()).await.expect("it is set aside");
    let dead = rabbit.peek(&rabbit.dead()).await.remove(0);
    assert_eq!(dead.data, b"body");
    broker.close().await.expect("it closes");
}

/// Returned messages arrive beside the confirms, not with the one they belong to; and one that the server refuses by
/// closing the channel takes its neighbours' confirms with it.
#[tokio::test]
async fn one_bad_message_of_a_batch_spares_the_others() {
    let rabbit = Rabbit::fresh();
    rabbit.broker().declare().await.expect("the queues are declared");
    let publisher = RabbitPublisher::builder(rabbit.url.clone()).default_key(rabbit.queue.clone()).build().expect("ok");
    let full = rabbit.wait("1s");
    let connection = rabbit.connection().await;
    let channel = connection.create_channel().await.expect("a channel");
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(0));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let options = QueueDeclareOptions::default();
    channel.queue_declare(short(&full), options, arguments).await.expect("a full queue");

    let message = Outgoing::new(event(1));
    let batch = vec![
        message.clone(),
        message.clone().to("hapax-test-no-such-queue"),
        message.clone(),
        Outgoing::new(event(2).with_header("CC", "elsewhere")),
        message.clone().to(full),
        // Bug 70 (JasperFx/wolverine GH-3926): what can never be sent was tried for ever.
        Outgoing::new(event(3).with_header("x-large", vec![b'x'; 200_000])),
        message.clone(),
    ];
    let answers = soon("publish", publisher.publish(batch)).await;
    let kinds: Vec<_> = answers.iter().map(|answer| answer.as_ref().err().map(hapax::Error::kind)).collect();
    use ErrorKind::{Full, Rejected, Unavailable};
    assert_eq!(kinds, [None, Some(Unavailable), None, Some(Rejected), Some(Full), Some(Rejected), None], "{answers:?}");
    assert_eq!(rabbit.messages(&rabbit.queue).await, Some(3));

    let to_exchange = RabbitPublisher::builder(rabbit.url.clone()).exchange("hapax-test-no-such-exchange");
    let to_exchange = to_exchange.default_key("k").build().expect("ok");
    let answers = soon("publish", to_exchange.publish(vec![message.clone(), message])).await;
    for answer in answers {
        let error = answer.expect_err("there is no such exchange");
        assert_eq!(error.kind(), Unavailable);
        assert!(error.to_string().contains("hapax-test-no-such-exchange"), "{error}");
    }
    connection.close(200, "done".into()).await.expect("it closes");
    publisher.close().await;
    to_exchange.close().await;
}

/// Bug 41 (JasperFx/wolverine GH-3767): what was not settled stayed with a live consumer.
#[tokio::test]
async fn what_a_failed_settlement_held_can_be_settled_later() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    rabbit.publish([1]).await;
    let held = receive(&broker, 1).await.remove(0);
    // Dropped half way, at any await: the delivery is either settled or still held.
    for patience in [0, 1, 2, 5, 10, 20, 40] {
        let batch = [(held.receipt, letter())];
        let _ = tokio::time::timeout(Duration::from_millis(patience), broker.settle(&batch)).await;
    }
    let last = settle(&broker, held.receipt, letter()).await;
    assert!(last.is_ok() || last.is_err_and(|error| error.kind() == ErrorKind::Stale));
    broker.close().await.expect("it closes");
    assert_eq!(rabbit.messages(&rabbit.queue).await, Some(0));
    assert!(rabbit.messages(&rabbit.dead()).await >= Some(1), "set aside at least once");
}
