//! Claims that travel with a commit: what becomes of the next event when the commit fails, hangs, or loses its answer, and
//! when nothing is started any more.
//!
//! Real time against a real file, and short.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hapax::{Context, ErrorKind, Failure, Message, Status};
use hapax_sqlite::SqliteTx;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};

use crate::script::Fault;
use crate::transactions::{Ground, WAIT_MAX, effect};

async fn ground() -> Ground {
    let ground = Ground::new().await;
    ground.script.claims_at_commit();
    ground
}

/// Each of these events took effect once, at its first attempt.
async fn are_done(ground: &Ground, events: u64) {
    ground.settled().await;
    let mut effects = ground.effects().await;
    effects.sort();
    let mut wanted: Vec<_> = (0..events).map(|id| (id.to_string(), 1)).collect();
    wanted.sort();
    assert_eq!(effects, wanted);
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < WAIT_MAX, "{what}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn who_waits_for_a_permit_is_claimed_by_the_commit_that_frees_it() {
    let ground = ground().await;
    ground.rig.send_all(0..20).await;
    let billing = ground.start(|c| c.on_any_tx(effect).concurrency(1)).await;
    are_done(&ground, 20).await;
    assert_eq!(billing.statistics().processed, 20);
    // The first, and whoever came when none was committing.
    assert!(ground.script.claims() <= 3, "{} calls", ground.script.claims());
}

#[tokio::test]
async fn copies_are_found_processed_although_their_claim_was_to_travel() {
    let ground = ground().await;
    for _ in 0..3 {
        ground.rig.send_all(0..10).await;
    }
    let billing = ground.start(|c| c.on_any_tx(effect).concurrency(2)).await;
    are_done(&ground, 10).await;
    assert_eq!((billing.statistics().processed, billing.statistics().duplicates), (10, 20));
}

/// The commit took place and claimed the next one: both ask again by their tokens, and neither loses an attempt.
#[tokio::test]
async fn a_lost_answer_leaves_both_events_as_they_are() {
    let ground = ground().await;
    ground.script.next("commit-and-claim", Fault::LoseReply);
    ground.rig.send_all(0..3).await;
    let billing = ground.start(|c| c.on_any_tx(effect).concurrency(1)).await;
    are_done(&ground, 3).await;
    assert!(ground.script.is_over());
    assert_eq!(billing.statistics().processed, 3);
}

#[tokio::test]
async fn a_commit_that_is_refused_claims_nothing_and_keeps_nobody() {
    let ground = ground().await;
    ground.script.next("commit-and-claim", Fault::Refuse(ErrorKind::Unavailable));
    ground.rig.send_all(0..3).await;
    let _billing = ground.start(|c| c.on_any_tx(effect).concurrency(1).delay(Duration::from_millis(10))).await;
    are_done(&ground, 3).await;
    assert!(ground.script.is_over());
}

/// It is given up when its handler's time and a lease are over; the one that waited for its claim asks by itself.
#[tokio::test]
async fn a_commit_that_hangs_keeps_the_next_one_no_longer_than_itself() {
    let ground = ground().await;
    ground.script.next("commit-and-claim", Fault::HangAfter);
    ground.rig.send_all(0..3).await;
    let lease = Duration::from_secs(1);
    let wire = |c: hapax::ConsumerBuilder<(), _>| {
        c.on_any_tx(effect).concurrency(1).lease(lease).call_timeout(lease / 3).timeout(lease / 2)
    };
    let _billing = ground.start(wire).await;
    are_done(&ground, 3).await;
    assert!(ground.script.is_over());
}

/// What was claimed while the consumer drains is given back with its attempt, and is not held until its lease is over; so is
/// what may have been claimed, where the answer was lost.
#[tokio::test]
async fn what_a_commit_claimed_for_a_consumer_that_stops_is_given_back() {
    for fault in [Fault::Gate, Fault::GateAndLose] {
        let ground = ground().await;
        let gate = Arc::new(Semaphore::new(0));
        ground.script.next("commit-and-claim", fault(Arc::clone(&gate)));
        ground.rig.send_all(0..2).await;
        let first = ground.start(|c| c.on_any_tx(effect).concurrency(1)).await;
        until("the first is about to commit", async || ground.script.is_over()).await;
        first.handle.stop();
        sleep(Duration::from_millis(50)).await;
        gate.add_permits(1);
        timeout(WAIT_MAX, first.stop()).await.expect("it stops");
        assert_eq!(ground.status("0").await, Some(Status::Processed));
        assert_eq!(ground.status("1").await, Some(Status::Waiting));
        let _second = ground.start(|c| c.on_any_tx(effect).concurrency(1)).await;
        are_done(&ground, 2).await;
    }
}

/// An outage of what handlers depend on: the permit of the one that failed takes those that wait to the switch, one after the
/// other, whatever commits meanwhile.
#[tokio::test]
async fn an_open_switch_lets_nobody_be_claimed_by_a_commit() {
    static STARTS: AtomicUsize = AtomicUsize::new(0);
    async fn handler(message: Arc<Message>, tx: SqliteTx, cx: Context<()>) -> Result<(), Failure> {
        STARTS.fetch_add(1, Ordering::SeqCst);
        if message.attributes.id.as_deref() == Some("0") {
            return Err(Failure::unavailable("the dependency is down"));
        }
        sleep(Duration::from_millis(20)).await;
        effect(message, tx, cx).await
    }
    let ground = ground().await;
    ground.rig.send_all(0..40).await;
    let wire =
        |c: hapax::ConsumerBuilder<(), _>| c.on_any_tx(handler).concurrency(2).switch_probe(Duration::from_secs(60));
    let _billing = ground.start(wire).await;
    until("one is done", async || ground.effects().await.len() == 1).await;
    sleep(Duration::from_millis(500)).await;
    assert!(STARTS.load(Ordering::SeqCst) <= 4, "{} starts", STARTS.load(Ordering::SeqCst));
}
