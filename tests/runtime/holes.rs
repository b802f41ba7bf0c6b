//! Holes that were found by reading mq-bridge 1.3.0, a crate with the same promise, each as the test that it would fail.
//! Those about identity are in `missing_id.rs`, those about batches in `concurrent_duplicates.rs` and `retries.rs`, that about
//! replays in `reopen.rs`, stalled holders that really stand still in `zombies.rs`.

use std::time::Duration;

use hapax::{Failure, Reason, Status};

use crate::rig::{Builder, Rig, Runs, event};

const SECOND: Duration = Duration::from_secs(1);
/// In the microseconds of a store's clock.
const MINUTE: i64 = 60_000_000;

/// Its claims have no owner: a stalled holder is overtaken, finishes, and its failure deletes the second holder's claim.
#[tokio::test(start_paused = true)]
async fn a_holder_that_was_overtaken_and_fails_lets_no_third_one_in() {
    for fails in [true, false] {
        let (rig, runs) = (Rig::new(), Runs::default());
        let slow = |runs: &Runs| {
            runs.then(move |run, _| async move {
                // The first ends while the second runs.
                let time = if run.crashes == 0 { 8 } else { 20 };
                tokio::time::sleep(time * SECOND).await;
                if fails && run.crashes == 0 { Err(Failure::retryable("late")) } else { Ok(()) }
            })
        };
        // Renewals come at a third of the lease; the clock steps before the first one.
        let wire = |c: Builder, runs: &Runs| c.on_any(slow(runs)).in_flight_max(2);
        let first = rig.start("billing", |c| wire(c, &runs)).await;
        rig.send(event("1")).await;
        rig.until("the first runs", || runs.len() == 1).await;
        rig.store.step_clock(MINUTE);
        rig.send(event("1")).await;
        let others = [rig.start("billing", |c| wire(c, &runs)).await, rig.start("billing", |c| wire(c, &runs)).await];
        first.connection.drain_session();
        rig.until("the second runs", || runs.len() == 2).await;
        rig.send(event("1")).await;
        rig.settled().await;
        assert_eq!((runs.len(), runs.all()[1].crashes), (2, 1), "no third one");
        assert_eq!(rig.status("billing", "1").await, Some(Status::Processed));
        assert!(first.statistics().fenced >= 1, "{:?}", first.statistics());
        assert_eq!((first.statistics().processed, rig.dead().len()), (0, 0));
        first.stop().await;
        for other in others {
            other.stop().await;
        }
    }
}

/// Where the store cannot be reached at the mark, it warns and acks all the same, and the event may run again.
#[tokio::test(start_paused = true)]
async fn a_store_out_of_reach_at_the_mark_is_waited_for_and_nothing_is_acked_before() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let store = rig.store_faults.clone();
    let handler = runs.then(move |_, _| {
        store.begin_outage();
        async { Ok(()) }
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send(event("1")).await;
    tokio::time::sleep(7_200 * SECOND).await;
    assert_eq!(rig.journal.lines_of("settle "), [""; 0], "neither acked nor given back");
    rig.store_faults.end_outage();
    rig.settled().await;
    assert_eq!((runs.len(), rig.status("billing", "1").await), (1, Some(Status::Processed)));
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!(runs.len(), 1);
    billing.stop().await;
}

/// Where the store cannot be reached at the claim, a copy runs unclaimed after 300 s.
#[tokio::test(start_paused = true)]
async fn a_store_out_of_reach_at_the_claim_lets_nothing_run_however_long() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.store_faults.begin_outage();
    rig.send_all(["1", "1", "2"]).await;
    tokio::time::sleep(7_200 * SECOND).await;
    assert_eq!((runs.len(), rig.journal.lines_of("settle ").len()), (0, 0));
    rig.store_faults.end_outage();
    rig.settled().await;
    assert_eq!(runs.len(), 2);
    billing.stop().await;
}

/// An event that was dropped as not retryable is marked as processed.
#[tokio::test(start_paused = true)]
async fn what_was_set_aside_is_not_recorded_as_processed() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.answer(|_| Err(Failure::permanent("no"))))).await;
    rig.send(event("1")).await;
    rig.settled().await;
    let record = rig.record("billing", "1").await.unwrap();
    assert_eq!((record.status, record.reason), (Status::DeadLettered, Some(Reason::Permanent)));
    assert_eq!(billing.statistics().processed, 0);
    billing.stop().await;
}

/// The client's clock judges expiry, so that a replica that is ahead steals claims. Here leases are judged by the store's
/// clock alone, and messages cannot move it.
#[tokio::test(start_paused = true)]
async fn a_claim_is_not_stolen_by_what_a_message_says_of_the_time() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let wire = |c: Builder| c.on_any(runs.take(20 * SECOND)).in_flight_max(1);
    let first = rig.start("billing", wire).await;
    let mut early = event("1");
    early.attributes.time = Some("1970-01-01T00:00:00Z".into());
    let mut late = event("1");
    late.attributes.time = Some("2970-01-01T00:00:00Z".into());
    rig.send(early).await;
    rig.until("it runs", || runs.len() == 1).await;
    let second = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.send(late).await;
    rig.settled().await;
    assert_eq!((runs.len(), first.statistics().processed), (1, 1));
    first.stop().await;
    second.stop().await;
}
