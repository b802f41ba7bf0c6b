//! Zombies: a process that stood still beyond its lease and wakes changes nothing, settles nothing before it asked
//! again, and lets nobody in. S6 FencedWriteRejected, S8 NoSettleWhenFenced.
//!
//! Stalled holders are where mq-bridge 1.3.0 lets a third in: its claims have no owner.

use std::sync::Arc;
use std::time::Duration;

use hapax::{Failure, Status};
use tokio::sync::Semaphore;
use tokio::time::sleep;

use crate::rig::{Process, Rig, Run, Runs, event};
use crate::script::{self, Script};

const LEASE: Duration = Duration::from_secs(30);

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A process whose handler waits at a gate on its first attempt, then answers so; frozen while it waits, so that others
/// take the event over. The others' handlers take `second`.
struct Stalled {
    rig: Rig,
    runs: Runs,
    script: Script,
    gate: Arc<Semaphore>,
    zombie: Process,
    other: Process,
}

impl Stalled {
    async fn new(answer: fn() -> Result<(), Failure>, second: Duration) -> Self {
        let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
        let gate = Arc::new(Semaphore::new(0));
        let act = |gate: &Arc<Semaphore>| {
            let gate = Arc::clone(gate);
            move |run: Run, _| {
                let gate = Arc::clone(&gate);
                async move {
                    if run.attempt == 1 {
                        gate.acquire().await.unwrap().forget();
                        return answer();
                    }
                    sleep(second).await;
                    Ok(())
                }
            }
        };
        let zombie = script::start(&rig, "billing", &script, |c| {
            c.on_any(runs.then(act(&gate))).in_flight_max(1).concurrency(1).timeout(seconds(3600))
        });
        let zombie = zombie.await;
        rig.send(event("1")).await;
        rig.until("running", || runs.len() == 1).await;
        script.freeze();
        let other = rig.start("billing", |c| c.on_any(runs.then(act(&gate))).timeout(seconds(3600))).await;
        assert!(rig.broker.redeliver(1));
        Self { rig, runs, script, gate, zombie, other }
    }

    /// The zombie's handler returns, and the process wakes behind it.
    async fn wake(&self) {
        self.gate.add_permits(1);
        self.rig.quiet().await;
        self.rig.journal.note("wakes");
        self.script.thaw();
    }

    fn after_waking(&self) -> Vec<String> {
        let lines = self.rig.journal.lines();
        let woke = lines.iter().position(|line| line == "wakes").expect("it woke");
        lines[woke + 1..].to_vec()
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_record_is_fenced_and_the_zombie_claims_again_before_it_settles() {
    let stalled = Stalled::new(|| Ok(()), seconds(1)).await;
    sleep(LEASE + seconds(5)).await;
    assert_eq!(stalled.other.statistics().processed, 1, "taken over and done");
    stalled.wake().await;
    stalled.rig.settled().await;
    assert_eq!(stalled.after_waking(), ["store record processed", "store claim 1", "settle ack"]);
    let zombie = stalled.zombie.statistics();
    assert_eq!((zombie.processed, zombie.fenced, zombie.duplicates), (0, 1, 1));
    assert_eq!(stalled.runs.attempts("1"), [1, 2], "one repeat, in the declared window");
    assert_eq!(stalled.rig.record("billing", "1").await.unwrap().crashes, 1, "and the record counts it");
}

#[tokio::test(start_paused = true)]
async fn a_zombie_settles_nothing_while_the_other_runs() {
    let stalled = Stalled::new(|| Ok(()), seconds(100)).await;
    sleep(LEASE + seconds(5)).await;
    stalled.wake().await;
    sleep(seconds(30)).await;
    let lines = stalled.after_waking();
    assert_eq!(lines[..2], ["store record processed", "store claim 1"], "it asks before it lets go of its delivery");
    assert_eq!(stalled.rig.journal.lines_of("settle ack"), [""; 0], "and nothing is acked");
    assert_eq!(stalled.rig.status("billing", "1").await, Some(Status::Claimed), "the other's claim stands");
    stalled.rig.settled().await;
    assert_eq!(stalled.runs.attempts("1"), [1, 2]);
    assert_eq!((stalled.zombie.statistics().processed, stalled.other.statistics().processed), (0, 1));
    assert_eq!(stalled.other.statistics().leases_lost, 0);
}

/// mq-bridge: a stalled holder's nack deleted the second holder's claim and let a third in.
#[tokio::test(start_paused = true)]
async fn a_late_failure_does_not_let_a_third_in() {
    let stalled = Stalled::new(|| Err(Failure::retryable("late")), seconds(100)).await;
    sleep(LEASE + seconds(5)).await;
    stalled.wake().await;
    let third = stalled.rig.start("billing", |c| c.on_any(stalled.runs.ok())).await;
    stalled.rig.broker.redeliver(1);
    stalled.rig.settled().await;
    assert_eq!(stalled.runs.attempts("1"), [1, 2], "the second holder's claim stood");
    assert_eq!((third.statistics().processed, stalled.zombie.statistics().retried), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_late_permanent_failure_places_no_dead_letter() {
    let stalled = Stalled::new(|| Err(Failure::permanent("late")), seconds(1)).await;
    sleep(LEASE + seconds(5)).await;
    stalled.wake().await;
    stalled.rig.settled().await;
    assert_eq!(stalled.rig.dead(), []);
    assert_eq!(stalled.rig.status("billing", "1").await, Some(Status::Processed));
}

/// mq-bridge: a stalled holder's renewal extended a foreign claim.
#[tokio::test(start_paused = true)]
async fn a_late_renewal_does_not_extend_anothers_lease() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    let hangs_twice = |runs: &Runs| {
        runs.then(|run, _| async move { if run.attempt <= 2 { std::future::pending().await } else { Ok(()) } })
    };
    // The renewal is on its way when the process stops, and arrives when it wakes.
    let renewal = script.gate("renew");
    let _zombie = script::start(&rig, "billing", &script, |c| {
        c.on_any(hangs_twice(&runs)).in_flight_max(1).concurrency(1).timeout(seconds(3600))
    })
    .await;
    rig.send(event("1")).await;
    rig.until("running", || runs.len() == 1).await;
    sleep(seconds(11)).await;
    assert!(script.is_over(), "the renewal was sent");
    script.freeze();
    let second = rig.start("billing", |c| c.on_any(hangs_twice(&runs)).timeout(seconds(3600))).await;
    rig.broker.redeliver(1);
    rig.until("taken over", || runs.len() == 2).await;
    second.crash().await;
    let _third = rig.start("billing", |c| c.on_any(hangs_twice(&runs))).await;
    sleep(seconds(15)).await;
    renewal.add_permits(1);
    script.thaw();
    rig.settled().await;
    assert_eq!(runs.attempts("1"), [1, 2, 3]);
    let (second, again) = (runs.all()[1].at, runs.all()[2].at);
    assert!(again <= second + LEASE + seconds(1), "the dead one's lease ended on time: {:?}", again - second);
}

#[tokio::test(start_paused = true)]
async fn an_ack_that_comes_late_is_harmless() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    let ack = script.gate("settle");
    let _zombie =
        script::start(&rig, "billing", &script, |c| c.on_any(runs.ok()).in_flight_max(1).concurrency(1)).await;
    rig.send(event("1")).await;
    rig.until("recorded", || !rig.journal.lines_of("store record").is_empty()).await;
    rig.quiet().await;
    script.freeze();
    let other = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.broker.redeliver(1);
    rig.until("found processed", || other.statistics().duplicates == 1).await;
    ack.add_permits(1);
    script.thaw();
    rig.settled().await;
    assert_eq!(runs.len(), 1);
    assert_eq!(rig.journal.lines_of("settle"), ["settle ack", "settle ack"]);
}

/// A process that was suspended finds its leases over by its own clock: it stops its handlers before it asks anybody.
#[tokio::test(start_paused = true)]
async fn a_process_that_wakes_behind_its_lease_stops_its_handler() {
    let stalled = Stalled::new(|| Ok(()), seconds(100)).await;
    sleep(LEASE + seconds(5)).await;
    stalled.rig.journal.note("wakes");
    stalled.script.thaw();
    sleep(seconds(1)).await;
    stalled.gate.add_permits(1);
    assert_eq!(stalled.zombie.statistics().leases_lost, 1);
    let lines = stalled.after_waking();
    assert!(lines.iter().all(|line| !line.starts_with("store record")), "it recorded nothing: {lines:?}");
    stalled.rig.settled().await;
    assert_eq!(stalled.runs.attempts("1"), [1, 2]);
}
