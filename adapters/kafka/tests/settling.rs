//! Retries and dead letters against Apache Kafka: where they go, when they come back, and what a topic that is gone or
//! forged does to them.

mod support;

use std::num::NonZeroU64;
use std::time::{Duration, SystemTime};

use hapax::{Broker, DeadLetter, Delivery, ErrorKind, Reason, Settlement};
use hapax_kafka::rdkafka::admin::{AdminClient, AdminOptions};
use hapax_kafka::rdkafka::client::DefaultClientContext;
use hapax_kafka::rdkafka::message::{Header, Headers as _, Message as _, OwnedHeaders};
use support::{SOON, Topic, ack, event, id, ids, receive, settle, silence};
use tokio::time::{Instant, timeout};

fn letter(delivery: &Delivery) -> Settlement {
    Settlement::DeadLetter(Box::new(DeadLetter {
        reason: Reason::Permanent,
        error: "no such order".into(),
        consumer: "billing".into(),
        attempts: 1,
        first: SystemTime::UNIX_EPOCH,
        last: SystemTime::UNIX_EPOCH,
        origin: delivery.origin.clone(),
        reopen: NonZeroU64::new(7),
    }))
}

fn header(name: &'static str, value: &str) -> OwnedHeaders {
    OwnedHeaders::new().insert(Header { key: name, value: Some(value) })
}

async fn delete(topic: &Topic, name: &str) {
    let admin: AdminClient<DefaultClientContext> = topic.config().create().expect("an admin client");
    let deleted = admin.delete_topics(&[name], &AdminOptions::new()).await.expect("the server answers");
    deleted.into_iter().next().expect("one answer").expect("it is deleted");
}

/// Bug 52 of semantics.md section 4 (spring-projects/spring-kafka#4504): of two that failed in one partition the earlier
/// was never delivered again, and its offset was committed past.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_failures_one_partition() {
    let topic = Topic::new(1);
    let broker = topic.opened().await;
    topic.publish(0..6).await;
    let held = receive(&broker, 6).await;
    for delivery in &held {
        let settlement = match id(delivery) {
            1 | 3 => Settlement::Retry { after: Duration::from_millis(700) },
            4 => Settlement::Release { counted: true },
            _ => Settlement::Ack,
        };
        settle(&broker, delivery, settlement).await;
    }
    topic.until_committed(4).await;
    let mut back = receive(&broker, 3).await;
    back.sort_by_key(id);
    assert_eq!(ids(&back), [1, 3, 4]);
    for (delivery, offset) in back.iter().zip(["1", "3", "4"]) {
        let origin = delivery.origin.as_ref().expect("it stands somewhere");
        assert_eq!((&*origin.place, &*origin.position), (&*format!("{}/0", topic.topic), offset), "its own place");
    }
    ack(&broker, &back).await;
    topic.until_committed(6).await;
    let retries = topic.committed(&topic.retry()).await;
    broker.close().await.expect("it closes");
    assert!(retries[0].is_none_or(|offset| offset <= 2), "{retries:?}");
    assert_eq!(topic.committed(&topic.retry()).await, [Some(2)]);
}

/// A delay is longer than anything else here, and it costs neither membership nor the others their way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_that_waits_holds_up_nobody() {
    let topic = Topic::new(1);
    let broker = topic.opened().await;
    topic.publish(0..2).await;
    let held = receive(&broker, 2).await;
    let long = Duration::from_secs(4);
    settle(&broker, &held[0], Settlement::Retry { after: long }).await;
    settle(&broker, &held[1], Settlement::Retry { after: Duration::from_millis(300) }).await;
    let since = Instant::now();
    topic.publish(10..12).await;
    let mut soon = receive(&broker, 3).await;
    soon.sort_by_key(id);
    assert_eq!(ids(&soon), [id(&held[1]), 10, 11]);
    assert!(since.elapsed() < long, "the shorter delay, and what came later, pass the longer one");
    ack(&broker, &soon).await;
    let last = receive(&broker, 1).await;
    assert!(since.elapsed() + Duration::from_millis(50) >= long);
    // Again and again: one set of headers, the same place.
    settle(&broker, &last[0], Settlement::Retry { after: Duration::ZERO }).await;
    let again = receive(&broker, 1).await;
    assert_eq!((&again[0].origin, &again[0].message), (&held[0].origin, &held[0].message));
    ack(&broker, &again).await;
    let records = topic.records(&topic.retry()).await;
    let hops: Vec<_> = records
        .iter()
        .map(|record| {
            let headers = record.headers().expect("they have headers");
            let own: Vec<_> = headers.iter().filter(|header| header.key.starts_with("hapax-")).collect();
            assert_eq!(own.len(), 5, "{own:?}");
            let hops = own.iter().find(|header| header.key == "hapax-retry-hops").and_then(|header| header.value);
            String::from_utf8_lossy(hops.expect("it counts")).into_owned()
        })
        .collect();
    assert_eq!(hops, ["1", "1", "2"]);
    broker.close().await.expect("it closes");
}

/// Bug 75 (spring-projects/spring-kafka#4493): a time far away in a header paused a listener for as long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_retry_headers_are_clamped() {
    let mut topic = Topic::new(1);
    topic.step = Duration::from_secs(1);
    let broker = topic.opened().await;
    for due in ["18446744073709551615", "-1", "", "tomorrow"] {
        let headers = header("hapax-retry-due-unix-ms", due)
            .insert(Header { key: "hapax-retry-topic", value: Some("payments") })
            .insert(Header { key: "hapax-retry-partition", value: Some("-7") })
            .insert(Header { key: "hapax-reopen", value: Some("-1") });
        topic.raw(&topic.retry(), None, None, Some(due.as_bytes()), headers).await;
    }
    let mut arrived = Vec::new();
    while arrived.len() < 4 {
        arrived.extend(timeout(SOON, broker.receive(support::WANT)).await.expect("soon").expect("the broker delivers"));
    }
    for delivery in &arrived {
        let origin = delivery.origin.as_ref().expect("it stands somewhere");
        assert_eq!(&*origin.place, format!("{}/0", topic.retry()), "not where a forger says");
        assert_eq!((delivery.message.reopen(), delivery.message.headers.len()), (None, 0));
    }
    ack(&broker, &arrived).await;
    broker.close().await.expect("it closes");
}

/// Bug 54 (spring-projects/spring-kafka#1918): a dead letter that could not be placed was sent to itself for ever, and one
/// that nobody placed was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dlq_failure_never_loops() {
    let topic = Topic::new(1).with("message.timeout.ms", "1500");
    let broker = topic.opened().await;
    topic.publish(0..2).await;
    let held = receive(&broker, 2).await;
    delete(&topic, &topic.dead()).await;
    let refused = broker.settle(&[(held[0].receipt, letter(&held[0])), (held[1].receipt, Settlement::Ack)]).await;
    assert!(refused[0].as_ref().is_err_and(hapax::Error::is_retryable), "{refused:?}");
    assert!(refused[1].is_ok(), "its neighbour is spared");
    silence(&broker, Duration::from_secs(1)).await;
    assert!(held[0].session.is_live(), "it is still ours");
    topic.builder().build().expect("good settings").check().await.expect("the topic is created again");
    let placing = async {
        while broker.settle(&[(held[0].receipt, letter(&held[0]))]).await.remove(0).is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(SOON, placing).await.expect("the same receipt settles it when the topic is there");
    topic.until_committed(2).await;
    assert_eq!(topic.records(&topic.dead()).await.len(), 1);
    assert_eq!(topic.records(&topic.topic).await.len(), 2, "nothing was sent to where it came from");
    broker.close().await.expect("it closes");
}

/// A settle whose future is dropped half-way leaves the delivery to be settled again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_settle_can_be_repeated() {
    let topic = Topic::new(1);
    let broker = topic.opened().await;
    topic.publish(0..1).await;
    let held = receive(&broker, 1).await;
    let batch = [(held[0].receipt, letter(&held[0]))];
    {
        let mut dropped = Box::pin(broker.settle(&batch));
        assert!(futures_util::poll!(&mut dropped).is_pending());
    }
    broker.settle(&batch).await.remove(0).expect("it is settled");
    let again = broker.settle(&batch).await.remove(0);
    assert_eq!(again.map_err(|error| error.kind()), Err(ErrorKind::Stale));
    topic.until_committed(1).await;
    broker.close().await.expect("it closes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tombstone_and_raw_bytes_go_through_retry_and_dead_letters_as_they_are() {
    let topic = Topic::new(1);
    let broker = topic.opened().await;
    let odd = header("x-empty", "").insert(Header { key: "x-null", value: None::<&str> });
    topic.raw(&topic.topic, None, Some(&[0, 255]), None, odd).await;
    for _ in 0..2 {
        let held = receive(&broker, 1).await;
        assert!(held[0].message.data.is_empty() && held[0].message.attributes.partition_key.is_none());
        settle(&broker, &held[0], Settlement::Retry { after: Duration::ZERO }).await;
    }
    let held = receive(&broker, 1).await;
    settle(&broker, &held[0], letter(&held[0])).await;
    let dead = topic.records(&topic.dead()).await.remove(0);
    assert_eq!((dead.key(), dead.payload()), (Some([0, 255].as_slice()), None));
    let headers: Vec<_> = dead
        .headers()
        .expect("they are there")
        .iter()
        .map(|one| (one.key.to_owned(), one.value.map(<[u8]>::to_vec)))
        .collect();
    assert!(headers.contains(&("x-empty".to_owned(), Some(vec![]))), "{headers:?}");
    assert!(headers.contains(&("x-null".to_owned(), None)), "{headers:?}");
    assert!(!headers.iter().any(|(name, _)| name.starts_with("hapax-retry")), "{headers:?}");
    broker.close().await.expect("it closes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_publisher_cannot_send_spares_its_neighbours() {
    use hapax::{Outgoing, Publisher};
    let topic = Topic::new(1);
    topic.broker().check().await.expect("the topics are created");
    let publisher = topic.publisher();
    let large = event(1).with_data("text/plain", vec![b'x'; 5 << 20]);
    let batch = vec![
        Outgoing::new(event(0)),
        Outgoing::new(large),
        Outgoing::new(event(2)).to("no topic at all"),
        Outgoing::new(event(3)),
    ];
    let answers = publisher.publish(batch).await;
    let kinds: Vec<_> = answers.into_iter().map(|answer| answer.err().map(|error| error.kind())).collect();
    assert_eq!(kinds, [None, Some(ErrorKind::Rejected), Some(ErrorKind::Rejected), None]);
    assert_eq!(topic.records(&topic.topic).await.len(), 2);
}
