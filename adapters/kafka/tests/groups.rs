//! Membership against Apache Kafka: partitions come and go while handlers run, and nothing that finished runs again.
//!
//! Holds up the rows on Kafka of semantics.md section 4 and the traps of clients.md 3.2, with both protocols of the
//! group.

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hapax::{Broker, ErrorKind, Limits, SessionState, Settlement};
use hapax_kafka::KafkaBroker;
use hapax_kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use support::{SOON, Topic, WANT, ack, id, ids, limits, receive, settle, silence, until};
use tokio::time::timeout;

/// Longer than any test.
const SELDOM: Duration = Duration::from_secs(50);
const NEXT: (&str, &str) = ("group.protocol", "consumer");

/// A thread or two for the tasks of a test, as many as a service has at least.
macro_rules! for_both_protocols {
    ($($name:ident)*) => {
        mod classic_group {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$name(super::Topic::new(2)).await;
                }
            )*
        }
        mod next_generation_group {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::$name(super::Topic::new(2).with(super::NEXT.0, super::NEXT.1)).await;
                }
            )*
        }
    };
}

for_both_protocols! {
    drain_then_fence_per_partition
    what_is_not_settled_in_time_goes_to_the_next_member
    nothing_finished_runs_again_while_members_come_and_go
    after_a_graceful_stop_nothing_that_finished_runs_again
    commit_only_terminal
}

/// Bug 59 of semantics.md section 4 (PostHog/posthog#80897): fenced first and drained second, finished work was thrown
/// away and run again; and all partitions were fenced where one went.
async fn drain_then_fence_per_partition(topic: Topic) {
    let topic = topic.without_retries();
    // Commits by the way come too late for this: only that of the revocation is left.
    let first = Arc::new(topic.builder().commit_interval(SELDOM).build().expect("good settings"));
    first.open(limits()).await.expect("the broker opens");
    topic.publish(0..20).await;
    let held = receive(&first, 20).await;
    let second = Arc::new(topic.broker());
    let joining = tokio::spawn({
        let second = Arc::clone(&second);
        async move { second.open(limits()).await }
    });
    let state = |partition: u32| {
        let of = held.iter().find(|delivery| delivery.receipt.partition == partition);
        of.expect("both partitions have some").session.state()
    };
    until("one partition is to go", || (0..2).any(|partition| state(partition) == SessionState::Draining)).await;
    let gone = u32::from(state(1) == SessionState::Draining);
    assert_eq!(state(1 - gone), SessionState::Live, "the other stays");
    // What runs is finished and settled, the last while it drains.
    let leaving: Vec<_> = held.iter().filter(|delivery| delivery.receipt.partition == gone).cloned().collect();
    ack(&first, &leaving).await;
    until("it is let go when it is settled", || state(gone) == SessionState::Ended).await;
    joining.await.expect("no panic").expect("the second opens");
    until("the second has partitions", || second.assigned().is_some_and(|partitions| partitions > 0)).await;
    silence(&second, Duration::from_secs(1)).await;
    assert_eq!(state(1 - gone), SessionState::Live);
    let stays: Vec<_> = held.iter().filter(|delivery| delivery.receipt.partition != gone).cloned().collect();
    ack(&first, &stays).await;
    close([first, second]).await;
    topic.until_committed(20).await;
}

async fn what_is_not_settled_in_time_goes_to_the_next_member(topic: Topic) {
    let topic = topic.without_retries();
    let first = Arc::new(topic.broker());
    first.open(Limits { drain: Duration::from_millis(300), ..limits() }).await.expect("the broker opens");
    topic.publish(0..20).await;
    let held = receive(&first, 20).await;
    let second = topic.opened().await;
    let gone = |held: &[hapax::Delivery]| -> Vec<hapax::Delivery> {
        held.iter().filter(|delivery| delivery.session.state() == SessionState::Ended).cloned().collect()
    };
    until("a session ends", || !gone(&held).is_empty()).await;
    let gone = gone(&held);
    let again = receive(&second, gone.len()).await;
    assert_eq!(ids(&again), ids(&gone), "what was not settled comes again, and nothing else");
    for delivery in &gone {
        let late = first.settle(&[(delivery.receipt, Settlement::Ack)]).await.remove(0);
        assert_eq!(late.map_err(|error| error.kind()), Err(ErrorKind::Stale));
    }
    // Not even when the partition is the first's again: bug 57, `stale_offset_never_committed`.
    second.close().await.expect("it closes");
    let back = receive(&first, gone.len()).await;
    assert_eq!(ids(&back), ids(&gone));
    for delivery in &gone {
        let late = first.settle(&[(delivery.receipt, Settlement::Ack)]).await.remove(0);
        assert_eq!(late.map_err(|error| error.kind()), Err(ErrorKind::Stale));
    }
    first.close().await.expect("it closes");
    assert_eq!(topic.committed(&topic.topic).await.into_iter().flatten().sum::<i64>(), 0);
}

/// Who finished what: an ack that was taken.
type Finished = Arc<Mutex<BTreeMap<usize, u32>>>;

/// A worker that takes 5 ms for each event and acks it; on a session that is not live it starts nothing.
async fn work(broker: Arc<KafkaBroker>, finished: Finished, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        let Ok(Ok(deliveries)) = timeout(Duration::from_millis(50), broker.receive(WANT)).await else { continue };
        for delivery in deliveries {
            if !delivery.session.is_live() || stop.load(Ordering::Relaxed) {
                // Refused only where the session is over, and then it comes again as well.
                let _ = broker.settle(&[(delivery.receipt, Settlement::Release { counted: false })]).await;
                continue;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
            if broker.settle(&[(delivery.receipt, Settlement::Ack)]).await.remove(0).is_ok() {
                *finished.lock().expect("no panic").entry(id(&delivery)).or_default() += 1;
            }
        }
    }
}

async fn nothing_finished_runs_again_while_members_come_and_go(topic: Topic) {
    const EVENTS: usize = 600;
    let finished = Finished::default();
    let start = |broker: Arc<KafkaBroker>| {
        let stop = Arc::new(AtomicBool::new(false));
        let working = tokio::spawn(work(Arc::clone(&broker), Arc::clone(&finished), Arc::clone(&stop)));
        (broker, stop, working)
    };
    let first = start(topic.opened().await);
    topic.publish(0..EVENTS).await;
    for _ in 0..2 {
        let (broker, stop, working) = start(topic.opened().await);
        tokio::time::sleep(Duration::from_millis(700)).await;
        broker.stop().await.expect("it stops");
        stop.store(true, Ordering::Relaxed);
        working.await.expect("no panic");
        broker.close().await.expect("it closes");
    }
    until("everything is finished", || finished.lock().expect("no panic").len() == EVENTS).await;
    first.1.store(true, Ordering::Relaxed);
    first.2.await.expect("no panic");
    first.0.close().await.expect("it closes");
    topic.until_committed(i64::try_from(EVENTS).expect("few")).await;
    let twice: Vec<_> =
        finished.lock().expect("no panic").iter().filter(|(_, times)| **times > 1).map(|(id, _)| *id).collect();
    assert_eq!(twice, Vec::<usize>::new(), "finished more than once");
}

async fn after_a_graceful_stop_nothing_that_finished_runs_again(topic: Topic) {
    // Nothing but the last commit is left to tell what is done.
    let first = topic.builder().commit_interval(SELDOM).build().expect("good settings");
    first.open(limits()).await.expect("the broker opens");
    topic.publish(0..30).await;
    let held = receive(&first, 30).await;
    first.stop().await.expect("it stops");
    let (finished, rest): (Vec<_>, Vec<_>) = held.into_iter().partition(|delivery| !id(delivery).is_multiple_of(3));
    ack(&first, &finished).await;
    for delivery in &rest {
        settle(&first, delivery, Settlement::Release { counted: false }).await;
    }
    first.close().await.expect("it closes");
    // An offset behind a gap is not committed and is delivered again; the store knows it. What is before is not.
    let second = topic.opened().await;
    let mut again = BTreeMap::new();
    // Everything that is there: what was given back, and then to the end of its partitions.
    let came_back = async {
        while !(rest.iter().all(|one| again.contains_key(&id(one))) && second.is_caught_up()) {
            let Ok(more) = timeout(Duration::from_millis(200), second.receive(WANT)).await else { continue };
            let more = more.expect("the broker delivers");
            again.extend(more.iter().map(|delivery| (id(delivery), delivery.receipt.partition)));
            ack(&second, &more).await;
        }
    };
    assert!(timeout(SOON, came_back).await.is_ok(), "what was given back comes again: {again:?}");
    silence(&second, Duration::from_millis(500)).await;
    for partition in 0..2 {
        let first_open =
            rest.iter().filter(|one| one.receipt.partition == partition).map(id).min().unwrap_or(usize::MAX);
        let early =
            finished.iter().filter(|one| one.receipt.partition == partition).map(id).filter(|id| *id < first_open);
        for id in early {
            assert!(!again.contains_key(&id), "{id} was finished before everything open in its partition");
        }
    }
    second.close().await.expect("it closes");
}

/// Bug 61 (twmb/franz-go#57): a commit covered what was polled and not processed.
async fn commit_only_terminal(topic: Topic) {
    let broker = topic.opened().await;
    topic.publish(0..40).await;
    let held = receive(&broker, 40).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(topic.committed(&topic.topic).await.into_iter().flatten().sum::<i64>(), 0, "nothing is done");
    // All but the first of each partition, in no order: the prefix is empty.
    let (heads, others): (Vec<_>, Vec<_>) =
        held.into_iter().partition(|delivery| delivery.origin.as_ref().is_some_and(|origin| &*origin.position == "0"));
    let backwards: Vec<_> = others.into_iter().rev().collect();
    ack(&broker, &backwards).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(topic.committed(&topic.topic).await.into_iter().flatten().sum::<i64>(), 0, "done behind a gap");
    ack(&broker, &heads).await;
    topic.until_committed(40).await;
    broker.close().await.expect("it closes");
}

/// clients.md 3.2: a consumer that is not polled loses its partitions. Ours is polled whatever the handlers do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn back_pressure_and_long_handlers_keep_the_membership() {
    let topic = Topic::new(2).with("max.poll.interval.ms", "6000");
    let broker = topic.builder().session_timeout(Duration::from_secs(6)).build().expect("good settings");
    broker.open(Limits { events: 4, ..limits() }).await.expect("the broker opens");
    topic.publish(0..5_000).await;
    let mut held = Vec::new();
    while held.len() < 4 {
        held.extend(broker.receive(WANT).await.expect("the broker delivers"));
    }
    silence(&broker, Duration::from_secs(8)).await;
    assert!(held.iter().all(|delivery| delivery.session.is_live()), "still a member after 8 s in a handler");
    ack(&broker, &held).await;
    let mut seen = 4;
    while seen < 5_000 {
        let more = timeout(SOON, broker.receive(WANT)).await.expect("it goes on").expect("the broker delivers");
        ack(&broker, &more).await;
        seen += more.len();
    }
    assert_eq!(seen, 5_000, "paused and resumed partitions lose and repeat nothing");
    topic.until_committed(5_000).await;
    broker.close().await.expect("it closes");
}

/// A static member that another one replaced is fenced for good: `MessageConsumptionFatal`. It is not dead for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fatal_error_ends_the_sessions_and_the_member_is_replaced() {
    let topic = Topic::new(1).with("group.instance.id", "worker-1");
    let broker = topic.opened().await;
    topic.publish(0..3).await;
    let held = receive(&broker, 3).await;
    let mut config = topic.config();
    config
        .set("group.id", &topic.group)
        .set("group.instance.id", "worker-1")
        .set("partition.assignment.strategy", "cooperative-sticky");
    let (subscribed, stop) = (topic.topic.clone(), Arc::new(AtomicBool::new(false)));
    let other = tokio::task::spawn_blocking({
        let stop = Arc::clone(&stop);
        move || {
            let other: BaseConsumer = config.create().expect("a consumer");
            other.subscribe(&[&subscribed]).expect("it subscribes");
            while !stop.load(Ordering::Relaxed) {
                let _ = other.poll(Duration::from_millis(20));
            }
        }
    });
    let told = timeout(SOON, broker.receive(WANT)).await.expect("it is told");
    assert!(told.is_err_and(|error| error.is_retryable()));
    until("the sessions end", || held.iter().all(|delivery| delivery.session.state() == SessionState::Ended)).await;
    let late = broker.settle(&[(held[0].receipt, Settlement::Ack)]).await.remove(0);
    assert_eq!(late.map_err(|error| error.kind()), Err(ErrorKind::Stale));
    let back = receive(&broker, 3).await;
    assert_eq!(ids(&back), [0, 1, 2], "the one in its place takes up where the group stands");
    ack(&broker, &back).await;
    topic.until_committed(3).await;
    stop.store(true, Ordering::Relaxed);
    other.await.expect("no panic");
    broker.close().await.expect("it closes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_never_blocks_the_runtime() {
    let topic = Topic::new(2);
    let broker = topic.opened().await;
    topic.publish(0..5).await;
    let held = receive(&broker, 5).await;
    let beats = Arc::new(Mutex::new(0_u32));
    let beating = tokio::spawn({
        let beats = Arc::clone(&beats);
        async move {
            loop {
                *beats.lock().expect("no panic") += 1;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    });
    drop(broker);
    until("the sessions end", || held.iter().all(|delivery| delivery.session.state() == SessionState::Ended)).await;
    let again = topic.opened().await;
    assert_eq!(receive(&again, 5).await.len(), 5);
    again.close().await.expect("it closes");
    beating.abort();
    assert!(*beats.lock().expect("no panic") > 20);
}

async fn close(brokers: [Arc<KafkaBroker>; 2]) {
    for broker in brokers {
        broker.close().await.expect("it closes");
    }
}
