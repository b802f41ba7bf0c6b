//! Retries and dead letters: S20 RetryNotEarly, S21 RetryNotLost, S22 DlqComplete at the broker.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod broker;

use std::collections::BTreeSet;
use std::time::Duration;

use broker::{Client, ack, event, id, letter, member, opened, publish, receive, server, settle, silence, unique};
use hapax::{Broker, Delivery, ErrorKind, Outgoing, Publisher, Settlement};
use hapax_redis::{RedisBroker, RedisPublisher};
use tokio::time::Instant;

const SOON: Duration = Duration::from_millis(300);

async fn retry_all(broker: &RedisBroker, deliveries: &[Delivery], after: Duration) {
    let batch: Vec<_> = deliveries.iter().map(|one| (one.receipt, Settlement::Retry { after })).collect();
    for answer in broker.settle(&batch).await {
        answer.unwrap();
    }
}

/// svix/omniqueue-rs#145, #146: workers raced for delayed messages and duplicated them. sidekiq/sidekiq Pro #3371: of many
/// with the same due time some were lost.
#[tokio::test]
async fn delayed_requeue_is_atomic() {
    let stream = unique("due");
    let first = member(&stream).await;
    publish(&stream, 0..200).await;
    retry_all(&first, &receive(&first, 200).await, SOON).await;
    let second = member(&stream).await;
    let third = member(&stream).await;
    let mut seen = Vec::new();
    let begun = Instant::now();
    while seen.len() < 200 && begun.elapsed() < Duration::from_secs(10) {
        let arrived = tokio::select! {
            arrived = first.receive(broker::WANT) => (arrived, &first),
            arrived = second.receive(broker::WANT) => (arrived, &second),
            arrived = third.receive(broker::WANT) => (arrived, &third),
        };
        let deliveries = arrived.0.unwrap();
        ack(arrived.1, &deliveries).await;
        seen.extend(deliveries.iter().map(id));
    }
    tokio::join!(silence(&first, SOON * 2), silence(&second, SOON * 2), silence(&third, SOON * 2));
    assert_eq!(seen.len(), 200, "each was moved once");
    assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), (0..200).collect());
}

/// The due set is the server's: whoever is there moves what others put in.
#[tokio::test]
async fn a_retry_survives_its_consumer_and_is_not_early() {
    let stream = unique("survives");
    let first = member(&stream).await;
    publish(&stream, 0..1).await;
    let held = receive(&first, 1).await;
    let after = Duration::from_secs(1);
    let settled = Instant::now();
    settle(&first, held[0].receipt, Settlement::Retry { after }).await;
    drop(first);
    let second = member(&stream).await;
    let again = receive(&second, 1).await;
    let waited = settled.elapsed();
    assert!(waited >= after, "after {waited:?}");
    assert_eq!(again[0].message, held[0].message);
    assert_eq!(again[0].count, Some(2), "the count goes on");
    assert_eq!(again[0].origin, held[0].origin, "its place is where it stood first: an id by position stays the same");
    ack(&second, &again).await;
    let client = Client::connect().await;
    assert_eq!(client.number(&["XLEN", second.retry_streams()[0]]).await, 0, "retries that are done are deleted");
    assert_eq!(client.number(&["ZCARD", second.due_sets()[0]]).await, 0);
}

/// Retries go through a stream of the group's own: other groups see each event once.
#[tokio::test]
async fn a_retry_is_not_seen_by_another_group() {
    let stream = unique("groups");
    let ours = member(&stream).await;
    let theirs = opened(RedisBroker::builder(server(), stream.as_str(), "other").build().unwrap()).await;
    publish(&stream, 0..1).await;
    ack(&theirs, &receive(&theirs, 1).await).await;
    retry_all(&ours, &receive(&ours, 1).await, Duration::ZERO).await;
    ack(&ours, &receive(&ours, 1).await).await;
    silence(&theirs, SOON * 2).await;
}

/// BrighterCommand/Brighter@ac6e10301 and @b5db68fc9: fields were written again on requeue, doubled or in another case.
#[tokio::test]
async fn requeue_roundtrips_headers() {
    let stream = unique("headers");
    let broker = member(&stream).await;
    let sent = event(1).with_header("X-Case", "kept").with_header("twice", "1").with_header("twice", "2");
    let sent = sent.with_header("binary", vec![0, 255, 10, 13]).with_header("empty", "");
    let publisher = RedisPublisher::new(server(), stream.as_str()).unwrap();
    publisher.publish(vec![Outgoing::new(sent.clone())]).await.remove(0).unwrap();
    for round in 1..=3 {
        let arrived = receive(&broker, 1).await;
        assert_eq!(*arrived[0].message, sent);
        assert_eq!(arrived[0].count, Some(round));
        retry_all(&broker, &arrived, Duration::ZERO).await;
    }
    let client = Client::connect().await;
    let last = receive(&broker, 1).await;
    settle(&broker, last[0].receipt, Settlement::DeadLetter(letter())).await;
    let dead = client.entries(broker.dead_letter_streams()[0]).await;
    let foreign: Vec<_> = dead[0].iter().filter(|(name, _)| !name.starts_with("hapax-")).cloned().collect();
    assert_eq!(foreign, client.entries(&stream).await[0], "the dead letter's fields are those of the entry");
}

/// A dead letter that is retried keeps its token until it is done.
#[tokio::test]
async fn a_redriven_dead_letter_keeps_its_token_over_a_retry() {
    let stream = unique("token");
    let broker = member(&stream).await;
    let client = Client::connect().await;
    client.add(&stream, &[("ce_specversion", b"1.0"), ("hapax-reopen", b"42"), ("data", b"x")]).await;
    let first = receive(&broker, 1).await;
    retry_all(&broker, &first, Duration::ZERO).await;
    let again = receive(&broker, 1).await;
    assert_eq!(again[0].message.reopen().map(u64::from), Some(42));
}

/// JasperFx/wolverine GH-3644: entries nobody can read stayed for ever; GH-3613: or were removed before they were read.
#[tokio::test]
async fn unreadable_goes_to_dlq_after_n_raw_bytes() {
    let stream = unique("junk");
    let broker = member(&stream).await;
    let client = Client::connect().await;
    let due = broker.due_sets()[0].to_owned();
    client.command(&["ZADD", &due, "1", "not an entry", "2", "neither this"]).await;
    publish(&stream, 0..1).await;
    retry_all(&broker, &receive(&broker, 1).await, Duration::ZERO).await;
    assert_eq!(receive(&broker, 1).await.len(), 1, "what is behind the junk comes");
    let dead = client.messages(broker.dead_letter_streams()[0]).await;
    assert_eq!(dead.iter().map(|one| &one.data[..]).collect::<Vec<_>>(), [&b"not an entry"[..], b"neither this"]);
    assert_eq!(client.number(&["ZCARD", &due]).await, 0);
}

/// A write that is refused leaves everything where it was: nothing is acked before its letter is placed.
#[tokio::test]
async fn a_dead_letter_that_cannot_be_placed_stays_in_hand() {
    let stream = unique("refused");
    let broker = member(&stream).await;
    let client = Client::connect().await;
    let dead = broker.dead_letter_streams()[0].to_owned();
    client.command(&["SET", &dead, "not a stream"]).await;
    publish(&stream, 0..2).await;
    let held = receive(&broker, 2).await;
    let batch = [(held[0].receipt, Settlement::DeadLetter(letter())), (held[1].receipt, Settlement::Ack)];
    let answers = broker.settle(&batch).await;
    assert_eq!(answers[0].as_ref().unwrap_err().kind(), ErrorKind::Configuration);
    assert!(answers[1].is_ok(), "its neighbour is settled");
    assert_eq!(client.pending(&stream).await, 1);
    client.command(&["DEL", &dead]).await;
    settle(&broker, held[0].receipt, Settlement::DeadLetter(letter())).await;
    assert_eq!((client.number(&["XLEN", &dead]).await, client.pending(&stream).await), (1, 0));
}

/// One step: whoever looks at any moment finds the entry pending or among the dead letters, never both and never neither.
#[tokio::test]
async fn dead_lettering_is_one_step() {
    let stream = unique("one-step");
    let broker = member(&stream).await;
    assert!(broker.capabilities().dead_letter_in_one_step);
    publish(&stream, 0..40).await;
    let held = receive(&broker, 40).await;
    let client = Client::connect().await;
    let dead = broker.dead_letter_streams()[0].to_owned();
    let look = "return #redis.call('XPENDING', KEYS[1], 'g', '-', '+', 1000) + redis.call('XLEN', KEYS[2])";
    let looking = async {
        for _ in 0..200 {
            assert_eq!(client.number(&["EVAL", look, "2", &stream, &dead]).await, 40);
        }
    };
    let settling = async {
        for delivery in &held {
            settle(&broker, delivery.receipt, Settlement::DeadLetter(letter())).await;
        }
    };
    tokio::join!(looking, settling);
    assert_eq!(client.number(&["XLEN", &dead]).await, 40);
}

/// What is given back is for any member, uncounted where that is asked for, and does not come back to a sleeper only.
#[tokio::test]
async fn a_released_entry_is_taken_by_whoever_is_there() {
    let stream = unique("released");
    // So long that nothing is taken over in this test: it comes at once, not when it is abandoned.
    let build = || RedisBroker::builder(server(), stream.as_str(), "g").take_over_after(Duration::from_secs(600));
    let first = opened(build().build().unwrap()).await;
    publish(&stream, 0..2).await;
    let held = receive(&first, 2).await;
    first.stop().await.unwrap();
    settle(&first, held[0].receipt, Settlement::Release { counted: false }).await;
    settle(&first, held[1].receipt, Settlement::Release { counted: true }).await;
    let second = opened(build().build().unwrap()).await;
    let mut again = receive(&second, 2).await;
    again.sort_by_key(id);
    assert_eq!(again.iter().map(|one| one.count).collect::<Vec<_>>(), [Some(1), Some(2)]);
    ack(&second, &again).await;
}

#[tokio::test]
async fn a_retry_beyond_the_longest_is_rejected() {
    let stream = unique("longest");
    let broker = member(&stream).await;
    publish(&stream, 0..1).await;
    let held = receive(&broker, 1).await;
    let after = broker.capabilities().retry_max + Duration::from_secs(1);
    let answer = broker.settle(&[(held[0].receipt, Settlement::Retry { after })]).await.remove(0);
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::Rejected);
    ack(&broker, &held).await;
}
