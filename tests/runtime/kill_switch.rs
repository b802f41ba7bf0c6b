//! The kill switch: an outage of the handlers' own dependency pauses the consumer instead of emptying the topic into the
//! dead letters. S1 NoLoss, S15 AttemptsBounded.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use hapax::{Failure, Handler, Message, Status};
use tokio::time::{Instant, sleep};

use crate::rig::{Rig, Runs};

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Something that handlers call, and that can be down.
#[derive(Clone, Default)]
struct Dependency {
    down: Arc<AtomicBool>,
    at_once: Arc<AtomicUsize>,
    most_while_down: Arc<AtomicUsize>,
}

impl Dependency {
    fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
        self.most_while_down.store(0, Ordering::SeqCst);
    }

    fn handler(&self, runs: &Runs, failure: fn() -> Failure) -> impl Handler<Arc<Message>, ()> + use<> {
        let dependency = self.clone();
        runs.then(move |_, _| {
            let Self { down, at_once, most_while_down } = dependency.clone();
            async move {
                let now = at_once.fetch_add(1, Ordering::SeqCst) + 1;
                let is_down = down.load(Ordering::SeqCst);
                if is_down {
                    most_while_down.fetch_max(now, Ordering::SeqCst);
                }
                sleep(Duration::from_millis(20)).await;
                at_once.fetch_sub(1, Ordering::SeqCst);
                if is_down { Err(failure()) } else { Ok(()) }
            }
        })
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_the_dependency_opens_it_and_one_probe_at_a_time_closes_it() {
    let (rig, runs, dependency) = (Rig::new(), Runs::default(), Dependency::default());
    let handler = dependency.handler(&runs, || Failure::retryable("no answer"));
    let billing = rig.start("billing", |c| c.on_any(handler).concurrency(30)).await;
    dependency.set_down(true);
    rig.send_all(0..500).await;
    sleep(seconds(2)).await;
    let health = billing.handle.health();
    assert!(health.switch_open && !health.ready && health.live, "{health:?}");
    let first_wave = runs.len();
    assert!((20..=60).contains(&first_wave), "opened by the first failures: {first_wave}");
    dependency.set_down(true);
    sleep(seconds(600)).await;
    let probes = runs.len() - first_wave;
    assert!((18..=22).contains(&probes), "one every thirty seconds: {probes}");
    assert_eq!(dependency.most_while_down.load(Ordering::SeqCst), 1, "one at a time");
    dependency.set_down(false);
    let begun = Instant::now();
    rig.settled().await;
    assert!(begun.elapsed() < seconds(400), "it closes by itself: {:?}", begun.elapsed());
    assert_eq!((rig.dead(), billing.statistics().processed), (vec![], 500), "nothing is set aside because of it");
    assert!(billing.handle.health().ready);
    assert_eq!(rig.journal.observed("Switch { open: true }"), 1);
    assert_eq!(rig.journal.observed("Switch { open: false }"), 1);
}

#[tokio::test(start_paused = true)]
async fn one_unavailable_is_enough_and_uses_up_no_attempt() {
    let (rig, runs, dependency) = (Rig::new(), Runs::default(), Dependency::default());
    let handler = dependency.handler(&runs, || Failure::unavailable("database is down"));
    let billing = rig.start("billing", |c| c.on_any(handler).attempts_max(2).concurrency(1)).await;
    dependency.set_down(true);
    rig.send_all(0..20).await;
    sleep(seconds(1)).await;
    assert!(billing.handle.health().switch_open);
    assert_eq!(runs.len(), 1, "the next is not even claimed");
    sleep(seconds(1_800)).await;
    dependency.set_down(false);
    rig.settled().await;
    assert_eq!((rig.dead(), billing.statistics().processed), (vec![], 20));
    assert!(
        runs.all().iter().all(|run| run.attempt == 1 && run.crashes == 0),
        "no attempt was used up in half an hour"
    );
}

#[tokio::test(start_paused = true)]
async fn attempts_of_what_waits_are_not_burnt_while_it_is_open() {
    let (rig, runs, dependency) = (Rig::new(), Runs::default(), Dependency::default());
    let handler = dependency.handler(&runs, || Failure::retryable("no answer"));
    let billing = rig.start("billing", |c| c.on_any(handler).concurrency(20)).await;
    dependency.set_down(true);
    rig.send_all(0..200).await;
    sleep(seconds(300)).await;
    dependency.set_down(false);
    rig.settled().await;
    assert_eq!((rig.dead(), billing.statistics().processed), (vec![], 200));
    let tried_often = (0..200).filter(|id| runs.of(&id.to_string()).len() > 2).count();
    assert!(tried_often <= 11, "at most the probes of five minutes: {tried_often}");
}

#[tokio::test(start_paused = true)]
async fn a_few_failures_among_many_do_not_open_it() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|run| match run.id.as_bytes().last() {
        Some(b'1'..=b'3') if run.attempt == 1 => Err(Failure::retryable("unlucky")),
        _ => Ok(()),
    });
    let _billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send_all(0..300).await;
    rig.settled().await;
    assert_eq!((runs.len(), rig.journal.observed("Switch")), (390, 0));
}

#[tokio::test(start_paused = true)]
async fn a_prerequisite_that_is_missing_does_not_open_it() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs
        .answer(|run| if run.at < seconds(60) { Err(Failure::not_yet("no order yet", seconds(4))) } else { Ok(()) });
    let _billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send_all(0..100).await;
    rig.settled().await;
    assert_eq!((rig.journal.observed("Switch"), rig.dead()), (0, vec![]));
}

/// JasperFx/wolverine GH-3680: a breaker tripped mid-flight, and 9 of 1,200 events were stored where no sweep found them.
#[tokio::test(start_paused = true)]
async fn breaker_trip_conserves_events() {
    let (rig, runs, dependency) = (Rig::new(), Runs::default(), Dependency::default());
    let wire = |c: crate::rig::Builder| {
        c.on_any(dependency.handler(&runs, || Failure::retryable("no answer")))
            .attempts_max(20)
            .switch_probe(seconds(5))
    };
    let first = rig.start("billing", wire).await;
    let second = rig.start("billing", wire).await;
    rig.send_all(0..1_200).await;
    for _ in 0..3 {
        sleep(Duration::from_millis(30)).await;
        dependency.set_down(true);
        sleep(seconds(12)).await;
        dependency.set_down(false);
    }
    rig.settled().await;
    assert!(rig.journal.observed("Switch { open: true }") >= 2, "it tripped");
    assert_eq!(rig.dead(), []);
    for id in 0..1_200 {
        assert_eq!(rig.status("billing", &id.to_string()).await, Some(Status::Processed), "event {id}");
    }
    assert_eq!(first.statistics().processed + second.statistics().processed, 1_200);
}

#[tokio::test(start_paused = true)]
async fn a_stop_while_it_is_open_does_not_wait_for_a_probe() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|_| Err(Failure::unavailable("down")));
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send_all(0..10).await;
    sleep(seconds(5)).await;
    assert!(billing.handle.health().switch_open);
    let begun = Instant::now();
    billing.stop().await;
    assert!(begun.elapsed() < seconds(1));
    assert_eq!(rig.broker.standing().ready + rig.broker.standing().later, 10);
}

#[tokio::test(start_paused = true)]
async fn a_session_that_is_taken_away_gets_back_what_waits_for_a_probe() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|_| Err(Failure::unavailable("down")));
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send_all(0..10).await;
    sleep(seconds(2)).await;
    assert!(billing.handle.health().switch_open);
    assert!(rig.broker.standing().unsettled > 0);
    billing.connection.drain_session();
    sleep(seconds(1)).await;
    let standing = rig.broker.standing();
    assert!(standing.ready >= 9, "others can have them; one comes with the next session, to probe with: {standing:?}");
}
