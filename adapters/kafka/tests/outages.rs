//! Faults that a real server does not show on request, from librdkafka's own mock of a cluster: servers that go away, a
//! member that the group gives up, commits and records that are refused.
//!
//! The mock is no server: nothing about Kafka is proved here, only what this adapter does about errors.

mod support;

use std::time::Duration;

use hapax::{Broker, DeadLetter, ErrorKind, Outgoing, Publisher, Reason, SessionState, Settlement};
use hapax_kafka::KafkaBroker;
use hapax_kafka::rdkafka::mocking::{MockCluster, MockCoordinator};
use hapax_kafka::rdkafka::producer::DefaultProducerContext;
use hapax_kafka::rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr as Refusal};
use support::{SOON, Topic, ack, event, id, ids, limits, receive, until};
use tokio::time::{sleep, timeout};

struct Cluster {
    topic: Topic,
    mock: MockCluster<'static, DefaultProducerContext>,
}

impl Cluster {
    /// One server, one partition.
    fn new() -> Self {
        let mock = MockCluster::new(1).expect("a mock");
        let url = format!("kafka://{}", mock.bootstrap_servers()).parse().expect("a url");
        let topic = Topic::at(url, 1);
        for name in [topic.topic.clone(), topic.retry(), topic.dead()] {
            mock.create_topic(&name, 1, 1).expect("a topic");
        }
        Self { topic, mock }
    }

    async fn opened(&self, commit_interval: Duration) -> KafkaBroker {
        let builder = self.topic.builder().session_timeout(Duration::from_secs(4)).commit_interval(commit_interval);
        let broker = builder.build().expect("good settings");
        broker.open(limits()).await.expect("the broker opens");
        broker
    }
}

/// clients.md 3.2: error items are mostly transient. During an outage there is a series of them, and then it goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_outage_consumption_resumes_without_a_restart() {
    let cluster = Cluster::new();
    let broker = cluster.opened(Duration::from_millis(20)).await;
    cluster.topic.publish(0..3).await;
    let held = receive(&broker, 3).await;
    cluster.mock.broker_down(1).expect("it goes");
    let told = timeout(SOON, broker.receive(support::WANT)).await.expect("it is told");
    assert!(told.is_err_and(|error| error.kind() == ErrorKind::Unavailable));
    ack(&broker, &held).await;
    sleep(Duration::from_secs(1)).await;
    cluster.mock.broker_up(1).expect("it is back");
    cluster.topic.publish(3..6).await;
    let mut seen = Vec::new();
    let goes_on = async {
        let is_committed = async || cluster.topic.committed(&cluster.topic.topic).await[0] >= Some(3);
        while !(3..6).all(|id| seen.contains(&id)) || !is_committed().await {
            let more = timeout(Duration::from_millis(100), broker.receive(support::WANT)).await;
            for delivery in more.ok().and_then(Result::ok).unwrap_or_default() {
                seen.push(id(&delivery));
                // Refused where the group had given this member up, and then it comes again.
                let _ = broker.settle(&[(delivery.receipt, Settlement::Ack)]).await;
            }
        }
    };
    timeout(2 * SOON, goes_on).await.expect("it goes on, and what was done in the outage is committed");
    // What was settled last may be confirmed too late for `close`, which says so then.
    let closed = broker.close().await.map_err(|error| error.kind());
    assert!(matches!(closed, Ok(()) | Err(ErrorKind::Unavailable)), "{closed:?}");
}

/// Bug 58 of semantics.md section 4 (confluentinc/librdkafka#5604): a commit for partitions that were lost. A member that
/// the group gave up commits nothing, not even what is done, and does not drain.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_commit_after_lost() {
    let cluster = Cluster::new();
    let broker = cluster.opened(Duration::from_secs(50)).await;
    cluster.topic.publish(0..6).await;
    let held = receive(&broker, 6).await;
    ack(&broker, &held[..2]).await;
    cluster.topic.until_committed(2).await;
    // Done, and not committed for a long while.
    ack(&broker, &held[2..4]).await;
    cluster.mock.request_errors(RDKafkaApiKey::Heartbeat, &[Refusal::RD_KAFKA_RESP_ERR_UNKNOWN_MEMBER_ID]);
    let mut drained = false;
    until("the session ends", || {
        drained |= held[5].session.state() == SessionState::Draining;
        held[5].session.state() == SessionState::Ended
    })
    .await;
    assert!(!drained, "there is nothing to drain into");
    let late = broker.settle(&[(held[5].receipt, Settlement::Ack)]).await.remove(0);
    assert_eq!(late.map_err(|error| error.kind()), Err(ErrorKind::Stale));
    let again = receive(&broker, 4).await;
    assert_eq!(ids(&again), [2, 3, 4, 5], "from where the group stands");
    assert_eq!(cluster.topic.committed(&cluster.topic.topic).await, [Some(2)]);
    broker.close().await.expect("it closes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_commit_is_made_again() {
    let cluster = Cluster::new();
    let broker = cluster.opened(Duration::from_millis(20)).await;
    cluster.topic.publish(0..3).await;
    let held = receive(&broker, 3).await;
    let refusals = [
        Refusal::RD_KAFKA_RESP_ERR_REBALANCE_IN_PROGRESS,
        Refusal::RD_KAFKA_RESP_ERR_COORDINATOR_LOAD_IN_PROGRESS,
        Refusal::RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
    ];
    cluster.mock.request_errors(RDKafkaApiKey::OffsetCommit, &refusals);
    ack(&broker, &held).await;
    cluster.topic.until_committed(3).await;
    broker.close().await.expect("it closes");
}

/// Bug 70 (JasperFx/wolverine GH-3926): a record that is refused for good was tried for ever as if it were an outage.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permanent_publish_error_is_permanent() {
    let cluster = Cluster::new();
    let broker = cluster.opened(Duration::from_millis(20)).await;
    cluster.topic.publish(0..1).await;
    let held = receive(&broker, 1).await;
    cluster.mock.request_errors(RDKafkaApiKey::Produce, &[Refusal::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE]);
    let refused = broker.settle(&[(held[0].receipt, letter())]).await.remove(0);
    assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::Rejected));
    assert!(held[0].session.is_live());
    broker.settle(&[(held[0].receipt, letter())]).await.remove(0).expect("it can be settled still");
    broker.close().await.expect("it closes");
}

fn letter() -> Settlement {
    Settlement::DeadLetter(Box::new(DeadLetter {
        reason: Reason::Permanent,
        error: "".into(),
        consumer: "billing".into(),
        attempts: 1,
        first: std::time::SystemTime::UNIX_EPOCH,
        last: std::time::SystemTime::UNIX_EPOCH,
        origin: None,
        reopen: None,
    }))
}

/// The runtime gives a whole call up when its time is over. What was confirmed until then is done all the same, or else
/// every round would send it once more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_settle_that_is_given_up_loses_no_confirmed_copy() {
    let mock = MockCluster::new(2).expect("a mock");
    let url = format!("kafka://{}", mock.bootstrap_servers()).parse().expect("a url");
    let topic = Topic::at(url, 1);
    for (name, server) in [(topic.topic.clone(), 1), (topic.retry(), 1), (topic.dead(), 2)] {
        mock.create_topic(&name, 1, 1).expect("a topic");
        mock.partition_leader(&name, 0, Some(server)).expect("a leader");
    }
    mock.coordinator(MockCoordinator::Group(topic.group.clone()), 1).expect("a coordinator");
    let broker = topic.builder().build().expect("good settings");
    broker.open(limits()).await.expect("the broker opens");
    topic.publish(0..4).await;
    let held = receive(&broker, 4).await;
    let retry = || Settlement::Retry { after: Duration::from_secs(5) };
    // Both servers are known to the producer.
    for answer in broker.settle(&[(held[0].receipt, retry()), (held[1].receipt, letter())]).await {
        answer.expect("both servers answer");
    }
    mock.broker_round_trip_time(2, Duration::from_secs(30)).expect("it hangs");
    let batch = [(held[2].receipt, letter()), (held[3].receipt, retry())];
    timeout(Duration::from_secs(3), broker.settle(&batch)).await.expect_err("the dead letter has no answer");
    let again = broker.settle(&[(held[3].receipt, retry())]).await.remove(0);
    assert_eq!(again.map_err(|error| error.kind()), Err(ErrorKind::Stale), "the retry was placed, and is done");
    let _ = broker.close().await;
}

/// An idempotent producer that failed for good never sends again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_is_lost_for_good_is_replaced() {
    let cluster = Cluster::new();
    let refusal = Refusal::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED;
    cluster.mock.request_errors(RDKafkaApiKey::InitProducerId, &[refusal]);
    let publisher = cluster.topic.publisher();
    let lost = timeout(SOON, publisher.publish(vec![Outgoing::new(event(0))])).await.expect("bounded").remove(0);
    assert!(lost.as_ref().is_err_and(hapax::Error::is_retryable), "{lost:?}");
    publisher.publish(vec![Outgoing::new(event(0))]).await.remove(0).expect("another producer sends it");
}

/// The answer to what was sent is lost: it may have been written, and is sent again by the idempotent producer once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_never_answers_is_an_unknown_outcome_in_bounded_time() {
    let cluster = Cluster::new();
    let publisher = hapax_kafka::KafkaPublisher::builder(cluster.topic.url.clone())
        .topic(cluster.topic.topic.as_str())
        .property("message.timeout.ms", "2000")
        .build()
        .expect("good settings");
    // Connected and identified, which may take longer than a record has.
    let sent = async { while publisher.publish(vec![Outgoing::new(event(0))]).await.remove(0).is_err() {} };
    timeout(SOON, sent).await.expect("it is there");
    cluster.mock.broker_round_trip_time(1, Duration::from_secs(30)).expect("it hangs");
    let answer = timeout(SOON, publisher.publish(vec![Outgoing::new(event(1))])).await.expect("bounded").remove(0);
    assert_eq!(answer.map_err(|error| error.kind()), Err(ErrorKind::Unknown));
}

/// A close while the server is away ends, in bounded time, and never on the runtime's threads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_during_an_outage_ends() {
    let cluster = Cluster::new();
    let broker = cluster.opened(Duration::from_millis(20)).await;
    cluster.topic.publish(0..2).await;
    let held = receive(&broker, 2).await;
    cluster.mock.broker_down(1).expect("it goes");
    ack(&broker, &held).await;
    let closed = timeout(SOON, broker.close()).await.expect("bounded");
    let told = closed.expect_err("what is done is not committed");
    assert!(told.kind() == ErrorKind::Unavailable && told.to_string().contains("of 1 partitions"), "{told}");
    assert_eq!(held[0].session.state(), SessionState::Ended);
}

/// Nothing is left that a commit could keep, so a worker that is told to stop in an outage has not failed; and it is done
/// before the runtime gives up on it (1.5 s).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_during_an_outage_with_everything_committed_is_no_error() {
    let cluster = Cluster::new();
    let broker = cluster.opened(Duration::from_millis(20)).await;
    cluster.topic.publish(0..2).await;
    let held = receive(&broker, 2).await;
    ack(&broker, &held[..1]).await;
    cluster.topic.until_committed(1).await;
    // The answer to the commit has come, too.
    sleep(Duration::from_millis(500)).await;
    cluster.mock.broker_down(1).expect("it goes");
    timeout(Duration::from_millis(1_500), broker.close()).await.expect("in time").expect("nothing is left to commit");
}
