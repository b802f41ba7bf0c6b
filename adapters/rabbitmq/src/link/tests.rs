//! Losses that only the channel's owner can cause: the server closes the channel, the connection lives on.

use std::sync::Arc;
use std::time::Duration;

use hapax::{Broker, Delivery, ErrorKind, MessageLimits, Outgoing, Publisher, SecretUrl, Settlement, Want};
use hapax_testkit::servers::Server;
use lapin::options::{BasicAckOptions, QueueDeleteOptions};
use tokio::time::timeout;

use super::*;
use crate::RabbitBroker;

const SOON: Duration = Duration::from_secs(10);
const WANT: Want = Want { events: 64, bytes: 1 << 20 };

async fn opened(queue: &str) -> Arc<RabbitBroker> {
    let url = SecretUrl::parse(Server::RabbitMq.url()).unwrap();
    let broker = RabbitBroker::builder(url, queue, "billing").retry_steps([Duration::from_secs(1)]).build().unwrap();
    let (second, message) = (Duration::from_secs(1), MessageLimits::DEFAULT);
    broker.open(Limits { events: 64, bytes: 1 << 20, held_max: second, drain: second, message }).await.unwrap();
    Arc::new(broker)
}

async fn one(broker: &RabbitBroker) -> Delivery {
    timeout(SOON, broker.receive(WANT)).await.expect("in time").expect("it delivers").remove(0)
}

async fn deleted(broker: &RabbitBroker, names: &[&str]) {
    let connection = broker.shared.address.connect("test").await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    for name in names {
        channel.queue_delete(wire::short(name).unwrap(), QueueDeleteOptions::default()).await.unwrap();
    }
    connection.close(200, "done".into()).await.unwrap();
}

/// What RabbitMQ does with a tag that it does not know: 406, the channel is closed, the connection is not. lapin's stream ends
/// with that error; with its own recovery it would hang (clients.md section 3.1).
#[tokio::test]
async fn a_channel_error_rebuilds_channel_and_consumer() {
    let queue = format!("hapax-test-{:016x}", fastrand::u64(..));
    let broker = opened(&queue).await;
    let publisher = broker.publisher();
    publisher.publish(vec![Outgoing::new(hapax::Message::event("/s", "1", "t"))]).await.remove(0).unwrap();
    let old = one(&broker).await;
    let channel = broker.shared.channel().expect("there is a session");
    // The frame is written; the answer closes the channel.
    channel.basic_ack(4_711, BasicAckOptions::default()).await.unwrap();
    timeout(SOON, old.session.not_live()).await.expect("the session ends");
    let answer = broker.settle(&[(old.receipt, Settlement::Ack)]).await.remove(0);
    assert_eq!(answer.map_err(|error| error.kind()), Err(ErrorKind::Stale), "a lost ack");
    let again = one(&broker).await;
    assert_eq!(again.message, old.message);
    assert_ne!(again.receipt.session, old.receipt.session);
    broker.settle(&[(again.receipt, Settlement::Ack)]).await.remove(0).unwrap();
    broker.close().await.unwrap();
    publisher.close().await;
    deleted(&broker, &[&queue, &format!("{queue}.billing.dead"), &format!("{queue}.billing.retry.1s")]).await;
}

/// Between the server's end of the channel and our hearing of it, nothing of the old channel is handed out: `usable()` is asked
/// once more at the last moment.
#[tokio::test]
async fn a_delivery_that_died_before_it_was_handed_out_is_not_handed_out() {
    let queue = format!("hapax-test-{:016x}", fastrand::u64(..));
    let broker = opened(&queue).await;
    let publisher = broker.publisher();
    let batch = (0..50).map(|id| Outgoing::new(hapax::Message::event("/s", id.to_string(), "t"))).collect();
    for sent in publisher.publish(batch).await {
        sent.unwrap();
    }
    let first = timeout(SOON, broker.receive(Want { events: 1, ..WANT })).await.unwrap().unwrap().remove(0);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let channel = broker.shared.channel().expect("there is a session");
    channel.basic_ack(4_711, BasicAckOptions::default()).await.unwrap();
    // As soon as lapin knows, which is before the supervisor does.
    while channel.status().connected() {
        tokio::task::yield_now().await;
    }
    let mut seen = 0;
    while seen < 50 {
        for delivery in timeout(SOON, broker.receive(WANT)).await.expect("in time").expect("it delivers") {
            assert_ne!(delivery.receipt.session, first.receipt.session, "dead on arrival");
            seen += 1;
        }
    }
    broker.close().await.unwrap();
    publisher.close().await;
    deleted(&broker, &[&queue, &format!("{queue}.billing.dead"), &format!("{queue}.billing.retry.1s")]).await;
}

/// A session that looks alive and has nobody behind it would hold its deliveries for ever.
#[tokio::test]
async fn a_supervisor_that_panics_ends_its_session_and_is_told() {
    let queue = format!("hapax-test-{:016x}", fastrand::u64(..));
    let broker = opened(&queue).await;
    let publisher = broker.publisher();
    publisher.publish(vec![Outgoing::new(hapax::Message::event("/s", "1", "t"))]).await.remove(0).unwrap();
    let old = one(&broker).await;
    let waiting = tokio::spawn({
        let broker = Arc::clone(&broker);
        async move { broker.receive(WANT).await }
    });
    tokio::task::yield_now().await;
    broker.order(Order::Panic);
    timeout(SOON, old.session.not_live()).await.expect("the session ends");
    let error = timeout(SOON, waiting).await.expect("it is woken").unwrap().expect_err("nobody consumes");
    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Internal, false));
    assert!(error.to_string().contains("panicked"), "{error}");
    let answer = broker.settle(&[(old.receipt, Settlement::Ack)]).await.remove(0);
    assert_eq!(answer.map_err(|error| error.kind()), Err(ErrorKind::Stale));
    timeout(Duration::from_secs(1), broker.stop()).await.expect("in time").unwrap();
    assert!(broker.receive(WANT).await.expect("stop is no error").is_empty());
    timeout(SOON, broker.close()).await.expect("in time").unwrap();
    let (second, message) = (Duration::from_secs(1), MessageLimits::DEFAULT);
    broker.open(Limits { events: 64, bytes: 1 << 20, held_max: second, drain: second, message }).await.unwrap();
    let again = one(&broker).await;
    assert_eq!(again.message, old.message);
    broker.settle(&[(again.receipt, Settlement::Ack)]).await.remove(0).unwrap();
    broker.close().await.unwrap();
    publisher.close().await;
    deleted(&broker, &[&queue, &format!("{queue}.billing.dead"), &format!("{queue}.billing.retry.1s")]).await;
}

/// Else the runtime drops the call and never hears what the adapter knows: which place is silent.
#[test]
fn by_default_the_adapter_answers_before_its_caller_gives_up() {
    let longest = crate::RabbitBrokerBuilder::ANSWER_TIMEOUT + GOODBYE * 2;
    assert!(longest + GOODBYE < hapax::Settings::CALL_TIMEOUT, "{longest:?}");
}
