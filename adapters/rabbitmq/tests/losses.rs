//! Every way to lose a session, and what must hold after it: a new session, what was unsettled again, nothing of the old one.
//!
//! Numbers are those of semantics.md section 4; the traps are clients.md section 3.1.

mod rabbit;

use std::time::Duration;

use hapax::{Broker, ErrorKind, SessionState, Settlement};
use hapax_rabbitmq::RabbitBroker;
use rabbit::{Rabbit, ids, limits, receive, settle, silence, soon};
use tokio::time::{Instant, timeout};

/// Receives one, breaks the link as told, and looks at both sessions.
async fn a_new_session_after(rabbit: &Rabbit, broker: &RabbitBroker, broken: impl AsyncFnOnce()) {
    rabbit.publish([1]).await;
    let old = receive(broker, 1).await.remove(0);
    broken().await;
    soon("the old session ends", old.session.not_live()).await;
    assert_eq!(old.session.state(), SessionState::Ended);
    let kind = settle(broker, old.receipt, Settlement::Ack).await.map_err(|error| error.kind());
    assert_eq!(kind, Err(ErrorKind::Stale), "an ack of an ended session");
    let again = receive(broker, 1).await.remove(0);
    assert_ne!(again.receipt.session, old.receipt.session);
    assert!(again.session.is_live());
    assert_eq!(again.message, old.message);
    settle(broker, again.receipt, Settlement::Ack).await.expect("the new session settles");
}

/// Bugs 43 (JasperFx/wolverine GH-3391: open, connected, no consumer) and 44 (amqp-rs/lapin#222, #283: the stream of a
/// killed connection neither ended nor woke).
#[tokio::test]
async fn every_reconnect_path_reconsumes() {
    let rabbit = Rabbit::fresh();
    let (proxy, behind) = rabbit.through_proxy("").await;
    let broker = behind.opened().await;
    for _ in 0..3 {
        a_new_session_after(&rabbit, &broker, async || proxy.drop_connections()).await;
    }
    a_new_session_after(&rabbit, &broker, async || {
        proxy.cut();
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        proxy.heal();
    })
    .await;
    broker.close().await.expect("it closes");
    assert_eq!(rabbit.messages(&rabbit.queue).await, Some(0));
}

/// A half-cut connection says nothing at all: only heartbeats find it.
#[tokio::test]
async fn a_silent_connection_is_found_by_its_heartbeats() {
    let rabbit = Rabbit::fresh();
    let (proxy, behind) = rabbit.through_proxy("?heartbeat=1").await;
    let broker = behind.opened().await;
    a_new_session_after(&rabbit, &broker, async || {
        proxy.freeze();
        // RabbitMQ, too, takes the connection for dead, and only then gives the message to another.
        tokio::time::sleep(Duration::from_secs(4)).await;
        proxy.cut();
        proxy.heal();
    })
    .await;
    broker.close().await.expect("it closes");
}

/// The server cancels the consumer: the stream ends with `None`, the channel stays open, there is no error.
#[tokio::test]
async fn a_deleted_queue_is_declared_again_and_consumed() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    rabbit.publish([1]).await;
    let old = receive(&broker, 1).await.remove(0);
    rabbit.delete(&rabbit.queue).await;
    soon("the old session ends", old.session.not_live()).await;
    for attempt in 0..100 {
        if rabbit.messages(&rabbit.queue).await.is_some() {
            break;
        }
        assert!(attempt < 99, "the queue is not declared again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    rabbit.publish([2]).await;
    assert_eq!(ids(&receive(&broker, 1).await), ["2"]);
    broker.close().await.expect("it closes");
}

/// lapin hands out what it buffered before the loss, dead on arrival.
#[tokio::test]
async fn deliveries_buffered_before_the_loss_are_not_handed_out_after_it() {
    let rabbit = Rabbit::fresh();
    let (proxy, behind) = rabbit.through_proxy("").await;
    let broker = behind.opened().await;
    rabbit.publish(0..200).await;
    let first = receive(&broker, 1).await.remove(0);
    // The other 199 are here by now, and nobody has seen them.
    tokio::time::sleep(Duration::from_millis(300)).await;
    proxy.drop_connections();
    soon("the old session ends", first.session.not_live()).await;
    let again = receive(&broker, 200).await;
    for delivery in &again {
        assert!(delivery.session.is_live() && delivery.receipt.session != first.receipt.session);
    }
    let batch: Vec<_> = again.iter().map(|delivery| (delivery.receipt, Settlement::Ack)).collect();
    for answer in soon("settle", broker.settle(&batch)).await {
        answer.expect("what was handed out can be settled");
    }
    broker.close().await.expect("it closes");
    assert_eq!(rabbit.messages(&rabbit.queue).await, Some(0));
}

/// Bug 39 (JasperFx/wolverine GH-3687): a settlement went to the *current* channel after a reconnect, where tags begin at 1
/// again, and acked another delivery.
#[tokio::test]
async fn settle_on_delivering_channel_only() {
    let rabbit = Rabbit::fresh();
    let (proxy, behind) = rabbit.through_proxy("").await;
    let broker = behind.opened().await;
    rabbit.publish([1]).await;
    let old = receive(&broker, 1).await.remove(0);
    proxy.drop_connections();
    soon("the old session ends", old.session.not_live()).await;
    let new = receive(&broker, 1).await.remove(0);
    assert_eq!(old.receipt.position, new.receipt.position, "the test is about equal tags");
    for settlement in [Settlement::Ack, Settlement::Release { counted: true }, rabbit::letter()] {
        let kind = settle(&broker, old.receipt, settlement).await.map_err(|error| error.kind());
        assert_eq!(kind, Err(ErrorKind::Stale));
    }
    broker.close().await.expect("it closes");
    assert_eq!(rabbit.messages(&rabbit.queue).await, Some(1), "the stale settlements did nothing");
    assert_eq!(rabbit.messages(&rabbit.dead()).await, Some(0));
}

/// Bugs 45 (amqp-rs/lapin#327: an ack after a close hung) and 46 (amqp-rs/lapin#409, #434: a publish hung on a forced
/// close).
#[tokio::test]
async fn settle_never_hangs() {
    let rabbit = Rabbit::fresh();
    let (proxy, behind) = rabbit.through_proxy("").await;
    let broker = behind.builder().answer_timeout(Duration::from_secs(1)).build().expect("the settings hold");
    broker.open(limits(1024)).await.expect("the broker opens");
    rabbit.publish(0..4).await;
    let held = receive(&broker, 4).await;
    proxy.freeze();
    let retry = Settlement::Retry { after: Duration::from_millis(500) };
    let settlements = [Settlement::Ack, rabbit::letter(), retry, Settlement::Release { counted: true }];
    let batch: Vec<_> = held.iter().map(|delivery| delivery.receipt).zip(settlements).collect();
    for place in ["known", "doubted"] {
        let asked = Instant::now();
        soon("settle", broker.settle(&batch[1..3])).await;
        // A second for the frames and one for what is hung up, so that the caller's own deadline comes later.
        assert!(asked.elapsed() < Duration::from_millis(3_500), "{place}: {:?}", asked.elapsed());
    }
    let answers = soon("settle", broker.settle(&batch)).await;
    let kind = |at: usize| answers[at].as_ref().err().map(hapax::Error::kind);
    // An ack is written into the void; what needs an answer says that there was none.
    assert!(matches!(kind(1), Some(ErrorKind::Unavailable | ErrorKind::Unknown)), "{answers:?}");
    assert!(matches!(kind(2), Some(ErrorKind::Unavailable | ErrorKind::Unknown)), "{answers:?}");
    soon("stop", broker.stop()).await.expect("it stops");
    soon("close", broker.close()).await.expect("it closes");
    proxy.cut();
}

/// Bug 46, for publishers.
#[tokio::test]
async fn publish_confirm_has_deadline() {
    use hapax::{Outgoing, Publisher};
    let rabbit = Rabbit::fresh();
    rabbit.broker().declare().await.expect("the queues are declared");
    let (proxy, behind) = rabbit.through_proxy("").await;
    let builder = hapax_rabbitmq::RabbitPublisher::builder(behind.url.clone()).default_key(rabbit.queue.clone());
    let publisher = builder.answer_timeout(Duration::from_secs(1)).build().expect("the settings hold");
    let one = |id| vec![Outgoing::new(rabbit::event(id))];
    publisher.publish(one(1)).await.remove(0).expect("it is sent");
    proxy.freeze();
    let frozen = soon("publish", publisher.publish(one(2))).await.remove(0);
    assert!(frozen.is_err_and(|error| error.is_retryable()));
    proxy.cut();
    let refused = soon("publish", publisher.publish(one(3))).await.remove(0);
    assert!(refused.is_err_and(|error| error.is_retryable()));
    proxy.heal();
    soon("publish", publisher.publish(one(4))).await.remove(0).expect("it connects again");
    publisher.close().await;
}

/// The attempt is cut off from outside while the first node is waited for: the next one must not begin there again.
#[tokio::test]
async fn a_node_that_hangs_does_not_hide_the_next_one() {
    use hapax::{Outgoing, Publisher};
    let rabbit = Rabbit::fresh();
    // The kernel takes connections, and nobody ever answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let first = format!("@{},", silent.local_addr().expect("bound"));
    let several = rabbit.at(&format!("{}?connection_timeout=60000", rabbit.url.expose().replacen('@', &first, 1)));

    let broker = several.broker();
    assert!(timeout(Duration::from_millis(300), broker.open(limits(8))).await.is_err(), "the first node is silent");
    soon("open", broker.open(limits(8))).await.expect("the second node is tried");

    let builder = hapax_rabbitmq::RabbitPublisher::builder(several.url.clone()).default_key(rabbit.queue.clone());
    let publisher = builder.answer_timeout(Duration::from_secs(2)).build().expect("the settings hold");
    let one = || vec![Outgoing::new(rabbit::event(1))];
    let cut = soon("publish", publisher.publish(one())).await.remove(0);
    assert!(cut.is_err_and(|error| error.is_retryable()), "the first node is silent");
    soon("publish", publisher.publish(one())).await.remove(0).expect("the second node is tried");
    assert_eq!(ids(&receive(&broker, 1).await), ["1"]);
    publisher.close().await;
    broker.close().await.expect("it closes");
}

/// What `receive` answers while the server is away is retryable, and consumption resumes without anybody's doing.
#[tokio::test]
async fn an_outage_is_told_and_ends_by_itself() {
    let rabbit = Rabbit::fresh();
    let (proxy, behind) = rabbit.through_proxy("").await;
    let broker = behind.opened().await;
    proxy.cut();
    let told = loop {
        match soon("receive", broker.receive(rabbit::WANT)).await {
            Err(error) => break error,
            Ok(arrived) => assert!(arrived.is_empty()),
        }
    };
    assert_eq!(told.kind(), ErrorKind::Unavailable);
    rabbit.publish([1]).await;
    proxy.heal();
    assert_eq!(ids(&receive(&broker, 1).await), ["1"]);
    broker.close().await.expect("it closes");
}

/// `stop` and `close` while there is no server end in time, and `open` works again afterwards.
#[tokio::test]
async fn stop_and_close_need_no_server() {
    let rabbit = Rabbit::fresh();
    let (proxy, behind) = rabbit.through_proxy("").await;
    let broker = behind.opened().await;
    proxy.cut();
    soon("stop", broker.stop()).await.expect("it stops");
    let after = soon("receive", broker.receive(rabbit::WANT)).await.expect("stop is no error");
    assert!(after.is_empty());
    soon("close", broker.close()).await.expect("it closes");
    assert!(broker.open(limits(8)).await.is_err_and(|error| error.is_retryable()));
    proxy.heal();
    broker.open(limits(8)).await.expect("the broker opens again");
    rabbit.publish([1]).await;
    assert_eq!(ids(&receive(&broker, 1).await), ["1"]);
    broker.close().await.expect("it closes");
    // Nothing is left of it: the server has no consumer that would keep the message.
    assert_eq!(rabbit.messages(&rabbit.queue).await, Some(1));
    silence_of_a_closed(&broker).await;
}

async fn silence_of_a_closed(broker: &RabbitBroker) {
    let answer = soon("receive", broker.receive(rabbit::WANT)).await;
    assert!(answer.is_err_and(|error| error.kind() == ErrorKind::Configuration));
    silence(broker, Duration::from_millis(10)).await;
}
