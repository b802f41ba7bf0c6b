//! A member that goes for other reasons than a close, on librdkafka's mock of a cluster.

use std::sync::mpsc::sync_channel;

use hapax::{Limits, MessageLimits};
use rdkafka::mocking::MockCluster;

use super::*;
use crate::places::Places;

const SOON: Duration = Duration::from_secs(20);

fn task(servers: &str) -> Task {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", servers).set("group.id", "billing").set("enable.auto.commit", "false");
    config.set("partition.assignment.strategy", "cooperative-sticky").set("session.timeout.ms", "6000");
    Task { config, commit_interval: Duration::from_millis(20), poll_interval_max: Duration::from_secs(60) }
}

fn shared() -> Arc<Shared> {
    let places = Places::new(&["orders".into()], "billing", &[]).expect("good names");
    let limits = Limits {
        events: 100,
        bytes: 1 << 20,
        held_max: Duration::from_secs(60),
        drain: Duration::from_secs(1),
        message: MessageLimits::DEFAULT,
    };
    Arc::new(Shared::new(Arc::new(places), limits, Arc::default()))
}

/// librdkafka waits for an answer to the revocation, and dropping its client waits for librdkafka.
#[test]
fn a_member_that_is_replaced_or_panicked_lets_its_client_go() {
    let mock = MockCluster::new(1).expect("a mock");
    mock.create_topic("orders", 1, 1).expect("a topic");
    for panics in [false, true] {
        let (task, shared) = (task(&mock.bootstrap_servers()), shared());
        let (gone, told) = sync_channel(1);
        std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                let mut poller = Poller::new(&shared, &task).expect("a member");
                while shared.lock().assigned.is_empty() {
                    assert!(poller.poll(POLL).is_none());
                }
                let went = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
                    let _poller = poller;
                    assert!(!panics, "a panic of the polling thread");
                }));
                gone.send(went.is_err()).expect("the test waits");
            }
        });
        assert_eq!(told.recv_timeout(SOON).expect("it goes"), panics);
        assert_eq!(shared.is_closing(), panics, "nobody waits for what does not come");
    }
}

/// In the midst of a rebalance partitions could be left that are fetched and nobody's: the member is replaced.
#[test]
fn a_member_that_did_not_poll_in_time_is_replaced() {
    let mock = MockCluster::new(1).expect("a mock");
    let (task, shared) = (task(&mock.bootstrap_servers()), shared());
    let mut poller = Poller::new(&shared, &task).expect("a member");
    assert!(poller.noted(KafkaError::MessageConsumption(Code::PollExceeded)).is_some());
    assert!(poller.noted(KafkaError::MessageConsumption(Code::BrokerTransportFailure)).is_none());
    shared.stop(true);
}
