//! Leases: held for as long as a handler runs, given up when they are lost, and taken over on time when a process dies.
//! S4 OneLiveLease, S15 AttemptsBounded, S16 AttemptsSurvive.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hapax::{Context, Failure, Reason, Route, Status, Stop};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::rig::{Builder, Rig, Runs, event, key};
use crate::script::{self, Script};

const LEASE: Duration = Duration::from_secs(30);

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Why a handler was stopped, and after how long: noted when it is dropped.
#[derive(Clone, Default)]
struct Stopped(Arc<Mutex<Option<End>>>);

type End = (Option<Stop>, Duration);

impl Stopped {
    fn watch(&self, cx: Context<()>) -> impl Drop + use<> {
        struct Watched(Stopped, Context<()>, Instant);
        impl Drop for Watched {
            fn drop(&mut self) {
                *self.0.0.lock().unwrap() = Some((self.1.stopped(), self.2.elapsed()));
            }
        }
        Watched(self.clone(), cx, Instant::now())
    }

    #[track_caller]
    fn seen(&self) -> End {
        self.0.lock().unwrap().expect("the handler was dropped")
    }
}

/// Never ends by itself.
async fn for_ever() -> Result<(), Failure> {
    std::future::pending().await
}

#[tokio::test(start_paused = true)]
async fn a_handler_longer_than_its_lease_keeps_its_event() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let long = |runs: &Runs| Route::on_any(runs.take(seconds(300))).timeout(seconds(600));
    // Without room for a second delivery, so that the copy goes to the other process.
    let first = rig.start("billing", |c| c.add(long(&runs)).in_flight_max(1).concurrency(1)).await;
    rig.send(event("1")).await;
    rig.until("running", || runs.len() == 1).await;
    let second = rig.start("billing", |c| c.add(long(&runs))).await;
    assert!(rig.broker.redeliver(1));
    rig.settled().await;
    assert_eq!(runs.len(), 1, "{:?}", runs.all());
    let renewals = rig.journal.lines_of("store renew").len();
    assert!((25..=35).contains(&renewals), "renewed at every third of the lease: {renewals} times");
    assert_eq!((first.statistics().leases_lost, second.statistics().processed), (0, 0));
    assert_eq!(second.statistics().duplicates, 1);
}

/// riverqueue/river#350, #1288, #1331: jobs with a long or no timeout were rescued while they ran.
#[tokio::test(start_paused = true)]
async fn lease_respects_per_handler_max_run() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let long = Route::on_any(runs.take(seconds(90 * 60))).timeout(seconds(2 * 60 * 60));
    let billing = rig.start("billing", |c| c.add(long)).await;
    rig.send(event("long")).await;
    rig.settled().await;
    assert_eq!(runs.attempts("long"), [1]);
    billing.stop().await;

    let (rig, runs) = (Rig::new(), Runs::default());
    let first_hangs = runs.then(|run, _| async move { if run.attempt == 1 { for_ever().await } else { Ok(()) } });
    let billing = rig.start("billing", |c| c.add(Route::on_any(first_hangs).timeout(seconds(10)))).await;
    rig.send(event("short")).await;
    rig.settled().await;
    assert_eq!(runs.attempts("short"), [1, 2]);
    let second = runs.of("short")[1].at;
    assert!((seconds(10)..seconds(11)).contains(&second), "ended at its own timeout, then retried: {second:?}");
    assert_eq!(billing.statistics().leases_lost, 0);
}

#[tokio::test(start_paused = true)]
async fn a_handler_is_stopped_before_its_lost_lease_can_be_anothers() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let stopped = Stopped::default();
    let watch = stopped.clone();
    let handler = runs.then(move |run, cx| {
        let watched = (run.attempt == 1).then(|| watch.watch(cx));
        async move {
            let _watched = watched;
            if run.attempt == 1 { for_ever().await } else { Ok(()) }
        }
    });
    let billing = rig.start("billing", |c| c.on_any(handler).timeout(seconds(600))).await;
    rig.send(event("1")).await;
    rig.until("running", || runs.len() == 1).await;
    rig.store_faults.begin_outage();
    sleep(seconds(60)).await;
    let (why, after) = stopped.seen();
    assert_eq!(why, Some(Stop::LeaseLost));
    assert!((seconds(20)..LEASE).contains(&after), "told while the lease still held at the store: {after:?}");
    assert_eq!(rig.journal.lines_of("settle"), [""; 0], "nothing is settled without a verdict");
    assert_eq!(billing.statistics().leases_lost, 1);
    rig.store_faults.end_outage();
    rig.settled().await;
    assert_eq!(runs.attempts("1"), [1, 2]);
    assert_eq!(runs.of("1")[1].crashes, 1, "an attempt without an outcome counts as a crash");
}

/// apalis-dev/apalis#467: a duration was compared with an instant, so that orphans never came back.
#[tokio::test(start_paused = true)]
async fn expired_lease_is_reclaimed_on_time() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let first_hangs =
        |runs: &Runs| runs.then(|run, _| async move { if run.attempt == 1 { for_ever().await } else { Ok(()) } });
    let first = rig.start("billing", |c| c.on_any(first_hangs(&runs))).await;
    rig.send(event("1")).await;
    rig.until("running", || runs.len() == 1).await;
    first.crash().await;
    let _second = rig.start("billing", |c| c.on_any(first_hangs(&runs))).await;
    rig.settled().await;
    assert_eq!(runs.attempts("1"), [1, 2]);
    let again = runs.of("1")[1].at;
    assert!(again >= LEASE, "not before the lease is over: {again:?}");
    assert!(again <= LEASE + seconds(1), "and not a poll later: {again:?}");
}

/// apalis-dev/apalis#504: a restart under the same name hid, or stole, what was in flight.
#[tokio::test(start_paused = true)]
async fn restart_same_name_reclaims_without_stealing() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let slow = |runs: &Runs| runs.take(seconds(50));
    let old = rig.start("billing", |c| c.on_any(slow(&runs)).in_flight_max(2).concurrency(2)).await;
    rig.send_all(["1", "2"]).await;
    rig.until("running", || runs.len() == 2).await;
    let _new = rig.start("billing", |c| c.on_any(slow(&runs))).await;
    assert!(rig.broker.redeliver(1) && rig.broker.redeliver(2));
    sleep(seconds(40)).await;
    assert_eq!(runs.len(), 2, "what runs elsewhere is not stolen, whatever the name");
    let died = runs.all()[0].at + seconds(40);
    old.crash().await;
    rig.settled().await;
    assert_eq!((runs.attempts("1"), runs.attempts("2")), (vec![1, 2], vec![1, 2]), "and not hidden either");
    for id in ["1", "2"] {
        let again = runs.of(id)[1].at;
        assert!(again <= died + LEASE + seconds(60), "taken over when the lease was over: {again:?}");
    }
}

/// OpenZeppelin/openzeppelin-relayer#891: a replica's heartbeat kept the dead one's jobs alive, since both had one name.
#[tokio::test(start_paused = true)]
async fn two_replicas_same_config_one_dies() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let wire = |runs: &Runs| {
        Route::on_any(runs.then(|run, _| async move {
            sleep(seconds(if run.crashes == 0 { 400 } else { 1 })).await;
            Ok(())
        }))
        .timeout(seconds(600))
    };
    let dies = rig.start("billing", |c| c.add(wire(&runs)).in_flight_max(1).concurrency(1)).await;
    rig.send(event("1")).await;
    rig.until("running", || runs.len() == 1).await;
    let lives = rig.start("billing", |c| c.add(wire(&runs))).await;
    rig.send(event("2")).await;
    rig.until("both run", || runs.len() == 2).await;
    dies.crash().await;
    sleep(LEASE + seconds(2)).await;
    assert_eq!(runs.attempts("1"), [1, 2], "the dead one's event is not kept by the living one's renewals");
    rig.settled().await;
    assert_eq!(runs.attempts("2"), [1], "the living one keeps its own");
    assert_eq!(lives.statistics().leases_lost, 0);
}

/// Starts a process until a handler runs, and kills it, so many times.
async fn kill(rig: &Rig, runs: &Runs, times: usize, wire: impl Fn(Builder) -> Builder) {
    for _ in 0..times {
        let before = runs.len();
        let process = rig.start("billing", &wire).await;
        rig.until("running", || runs.len() > before).await;
        process.crash().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_that_kills_every_process_is_set_aside_after_crashes_max() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let wire = |c: Builder| c.on_any(runs.then(|_, _| for_ever())).crashes_max(3);
    rig.send(event("killer")).await;
    kill(&rig, &runs, 4, wire).await;
    let _last = rig.start("billing", wire).await;
    rig.settled().await;
    assert_eq!(runs.len(), 4, "three crashes are allowed, the fourth is the end");
    assert_eq!(runs.all().iter().map(|run| run.crashes).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let (_, letter) = rig.dead_letter();
    assert_eq!((letter.reason, letter.attempts), (Reason::CrashesExhausted, 4));
    assert_eq!(rig.status("billing", "killer").await, Some(Status::DeadLettered));
}

/// mastra-ai/mastra#23648: a reclaim loop ran what was in flight again, past the cap on attempts. Also a hole of
/// mq-bridge, which caps no attempts.
#[tokio::test(start_paused = true)]
async fn reclaim_counts_attempts_and_skips_in_flight() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let wire =
        |c: Builder| c.on_any(runs.then(|_, _| for_ever())).attempts_max(3).crashes_max(100).timeout(seconds(3600));
    rig.send(event("1")).await;
    kill(&rig, &runs, 2, wire).await;
    let third = rig.start("billing", wire).await;
    rig.until("the third attempt runs", || runs.len() == 3).await;
    let fourth = rig.start("billing", wire).await;
    rig.broker.redeliver(1);
    sleep(seconds(600)).await;
    assert_eq!(runs.len(), 3, "what is in flight is not run beside itself");
    third.crash().await;
    rig.settled().await;
    assert_eq!(runs.attempts("1"), [1, 2, 3], "a claim counts, whoever reclaims");
    assert_eq!(rig.dead(), [("1".to_owned(), Reason::AttemptsExhausted)]);
    fourth.stop().await;
}

#[tokio::test(start_paused = true)]
async fn innocents_beside_a_killer_survive() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let fatal = Arc::new(Notify::new());
    let at_once = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let wire = |c: Builder| {
        let (fatal, at_once, most) = (Arc::clone(&fatal), Arc::clone(&at_once), Arc::clone(&most));
        c.on_any(runs.then(move |run, _| {
            let (fatal, at_once, most) = (Arc::clone(&fatal), Arc::clone(&at_once), Arc::clone(&most));
            async move {
                let _running = Running::new(at_once, (run.crashes > 1).then_some(most));
                sleep(Duration::from_millis(500)).await;
                if run.id == "killer" {
                    fatal.notify_one();
                    for_ever().await?;
                }
                sleep(Duration::from_millis(500)).await;
                Ok(())
            }
        }))
    };
    rig.send_all((0..5).map(|n| format!("before {n}"))).await;
    rig.send(event("killer")).await;
    rig.send_all((0..5).map(|n| format!("after {n}"))).await;
    for _ in 0..4 {
        let process = rig.start("billing", wire).await;
        fatal.notified().await;
        process.crash().await;
    }
    let _last = rig.start("billing", wire).await;
    rig.settled().await;
    assert_eq!(rig.dead(), [("killer".to_owned(), Reason::CrashesExhausted)], "{:#?}", runs.all());
    assert_eq!(most.load(Ordering::SeqCst), 1, "events with two crashes in their history run one after the other");
    let crashes = runs.all().into_iter().filter(|run| run.id != "killer").map(|run| run.crashes).max();
    assert_eq!(crashes, Some(2), "an innocent is hit by the first two crashes and by no other");
}

/// Counts what runs at once, from a run that asks for it on.
struct Running(Arc<AtomicUsize>);

impl Running {
    fn new(at_once: Arc<AtomicUsize>, most: Option<Arc<AtomicUsize>>) -> Self {
        let now = at_once.fetch_add(1, Ordering::SeqCst) + 1;
        if let Some(most) = most {
            most.fetch_max(now, Ordering::SeqCst);
        }
        Self(at_once)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// mq-bridge 1.3.0 judges expiry by the client's clock, so that a replica that is ahead steals claims. Durations leave
/// our stores, instants never do; what a process can get wrong is its own lease, and that steals nothing.
#[tokio::test(start_paused = true)]
async fn a_replica_with_a_shorter_lease_does_not_steal() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let wire = |runs: &Runs| Route::on_any(runs.take(seconds(20)));
    let first = rig.start("billing", |c| c.add(wire(&runs)).in_flight_max(1).concurrency(1)).await;
    rig.send(event("1")).await;
    rig.until("running", || runs.len() == 1).await;
    let short = seconds(3);
    let second = rig.start("billing", |c| c.add(wire(&runs)).lease(short).call_timeout(seconds(1))).await;
    assert!(rig.broker.redeliver(1));
    rig.settled().await;
    assert_eq!(runs.len(), 1);
    assert_eq!((first.statistics().processed, second.statistics().duplicates), (1, 1));
}

/// JasperFx/wolverine#2602: "I hold the lock" was remembered after the server had given it to another.
#[tokio::test(start_paused = true)]
async fn lease_belief_is_checked_against_store() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let stopped = Stopped::default();
    let wire = |c: Builder| {
        let watch = stopped.clone();
        c.timeout(seconds(600)).in_flight_max(1).concurrency(1).on_any(runs.then(move |run, cx| {
            let watched = (run.attempt == 1).then(|| watch.watch(cx));
            async move {
                let _watched = watched;
                sleep(seconds(60)).await;
                Ok(())
            }
        }))
    };
    let first = rig.start("billing", wire).await;
    rig.send(event("1")).await;
    rig.until("running", || runs.len() == 1).await;
    // A time server sets the store's clock an hour ahead: every lease is over, and the next claim takes the event over.
    rig.store.step_clock(3_600_000_000);
    let second = rig.start("billing", wire).await;
    assert!(rig.broker.redeliver(1));
    rig.settled().await;
    let (why, after) = stopped.seen();
    assert_eq!(why, Some(Stop::LeaseLost));
    assert!(after < seconds(11), "at its next renewal: {after:?}");
    assert_eq!(runs.attempts("1"), [1, 2]);
    assert_eq!((first.statistics().processed, second.statistics().processed), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_store_clock_that_steps_back_delays_and_breaks_nothing() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let wire = |c: Builder| {
        c.on_any(runs.then(|run, _| async move { if run.attempt == 1 { for_ever().await } else { Ok(()) } }))
    };
    rig.send(event("1")).await;
    kill(&rig, &runs, 1, wire).await;
    rig.store.step_clock(-60_000_000);
    let _second = rig.start("billing", wire).await;
    rig.settled().await;
    let all = runs.all();
    assert_eq!(runs.attempts("1"), [1, 2]);
    assert!(all[1].at >= LEASE + seconds(60) && all[1].at < LEASE + seconds(65), "{:?}", all[1].at);
    assert!(all[1].fence > all[0].fence, "fences grow, whatever the clock does");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_the_store_refuses_to_renew_costs_nobody_else_theirs() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.take(seconds(100))).timeout(seconds(600))).await;
    rig.send_all(["1", "2", "3"]).await;
    rig.until("running", || runs.len() == 3).await;
    rig.store_faults.reject(key("billing", "2"));
    sleep(seconds(60)).await;
    assert_eq!(billing.statistics().leases_lost, 1, "the refused one is lost and no other");
    assert!(!billing.running.is_finished(), "and nobody stops for it");
    rig.store_faults.heal();
    rig.settled().await;
    assert_eq!((runs.attempts("1"), runs.attempts("3")), (vec![1], vec![1]));
}

/// The others' claims end first: a crash of this process must not count for them.
#[tokio::test(start_paused = true)]
async fn an_event_with_crashes_in_its_history_runs_when_the_others_gave_their_claims_back() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    let hangs = |c: Builder| c.on_any(runs.then(|_, _| for_ever()));
    rig.send_all(0..3).await;
    for crash in 1..=2 {
        let dies = rig.start("billing", hangs).await;
        rig.until("running", || runs.len() == 3 * crash).await;
        dies.crash().await;
        sleep(LEASE).await;
    }
    let give_backs = script.gate("record");
    let _second = script::start(&rig, "billing", &script, |c| c.on_any(runs.ok())).await;
    sleep(seconds(5)).await;
    assert!(script.is_over(), "the others are being given back");
    assert_eq!(runs.len(), 6, "and nothing runs before they are");
    give_backs.add_permits(1);
    rig.settled().await;
    for id in 0..3 {
        assert_eq!(runs.of(&id.to_string()).last().map(|run| (run.attempt, run.crashes)), Some((3, 2)));
    }
}

/// riverqueue/river#1318: a page full of long-running jobs kept the rescuer from the stuck ones behind it.
#[tokio::test(start_paused = true)]
async fn reclaim_paginates_past_live_leases() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let hangs_once = |c: Builder| {
        let handler = runs.then(|run, _| async move { if run.attempt == 1 { for_ever().await } else { Ok(()) } });
        c.on_any(handler).concurrency(1_000).timeout(seconds(3_600))
    };
    let lives = rig.start("billing", |c| hangs_once(c).in_flight_max(1_000)).await;
    rig.send_all(0..1_000).await;
    rig.until("running", || runs.len() == 1_000).await;
    let dies = rig.start("billing", |c| hangs_once(c).in_flight_max(1_000)).await;
    rig.send(event("stuck")).await;
    rig.until("running", || runs.of("stuck").len() == 1).await;
    dies.crash().await;
    let _next = rig.start("billing", hangs_once).await;
    sleep(LEASE + seconds(2)).await;
    assert_eq!(runs.attempts("stuck"), [1, 2], "found behind a thousand that are held");
    assert_eq!((runs.len(), lives.statistics().leases_lost), (1_002, 0));
}
