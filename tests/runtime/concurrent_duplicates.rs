//! Invariant: the store believes one holder at a time. Copies of an event that runs wait for its record, cost the rest
//! nothing, and are acked as duplicates when it has ended.

use std::time::Duration;

use hapax::Failure;

use crate::rig::{Process, Rig, Runs, event};

const SECOND: Duration = Duration::from_secs(1);

/// MassTransit/MassTransit#3791, Particular/NServiceBus#4086: the row was not truly locked, or looked at before the handler
/// and written behind it, so concurrent copies both ran.
#[tokio::test(start_paused = true)]
async fn two_copies_same_id_concurrent_one_effect() {
    for processes in [1, 2, 5] {
        let (rig, runs) = (Rig::new(), Runs::default());
        let mut started = Vec::new();
        for _ in 0..processes {
            started.push(rig.start("billing", |c| c.on_any(runs.take(SECOND)).in_flight_max(8)).await);
        }
        rig.send_all(["1"; 40]).await;
        rig.settled().await;
        assert_eq!(runs.len(), 1, "{processes} processes");
        let duplicates: u64 = started.iter().map(|process| process.statistics().duplicates).sum();
        assert_eq!(duplicates, 39);
        for process in started {
            process.stop().await;
        }
    }
}

/// MassTransit/MassTransit#4753, #5915: a local table of pending messages refused redeliveries until the broker gave up on
/// them and moved them to its dead letters.
#[tokio::test(start_paused = true)]
async fn redelivery_while_pending_attaches_not_rejects() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.take(20 * SECOND))).await;
    rig.send(event("1")).await;
    rig.until("it runs", || runs.len() == 1).await;
    for _ in 0..5 {
        assert!(rig.broker.redeliver(1), "it is held");
        tokio::time::sleep(SECOND).await;
    }
    rig.settled().await;
    assert_eq!((runs.len(), rig.dead().len()), (1, 0));
    assert_eq!(rig.journal.lines_of("settle "), ["settle ack"; 6], "none was given back to the broker");
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_copy_in_the_same_process_is_woken_by_the_record_and_asks_once() {
    let (rig, runs) = (Rig::new(), Runs::default());
    rig.send_all(["1", "1"]).await;
    let begun = tokio::time::Instant::now();
    let billing = rig.start("billing", |c| c.on_any(runs.take(20 * SECOND))).await;
    rig.settled().await;
    assert!(begun.elapsed() < 20 * SECOND + Duration::from_millis(50), "no poll in between: {:?}", begun.elapsed());
    assert_eq!(rig.journal.lines_of("store claim"), ["store claim 1", "store claim 1"]);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn one_that_waited_with_other_data_under_the_id_is_a_conflict_nevertheless() {
    let (rig, runs) = (Rig::new(), Runs::default());
    rig.send(event("1")).await;
    rig.send(event("1").with_data("application/json", "{\"other\":1}")).await;
    rig.send(event("1")).await;
    let billing = rig.start("billing", |c| c.on_any(runs.take(SECOND))).await;
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates, rig.dead().len()), (1, 1, 1));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_copy_in_another_process_asks_seldom_and_ends_soon_after_the_record() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let first = rig.start("billing", |c| c.on_any(runs.take(20 * SECOND)).in_flight_max(1)).await;
    rig.send_all(["1", "1"]).await;
    let begun = tokio::time::Instant::now();
    rig.until("it runs", || runs.len() == 1).await;
    let second = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    assert_eq!(runs.len(), 1);
    assert!(begun.elapsed() < 21 * SECOND + Duration::from_millis(50), "{:?}", begun.elapsed());
    let claims = rig.journal.lines_of("store claim").len();
    assert!((10..=30).contains(&claims), "from 50 ms doubling to a second: {claims}");
    assert_eq!(rig.journal.observed("Duplicate { of: Held"), 1, "told once, however often it asks");
    assert_eq!(rig.journal.lines_of("settle "), ["settle ack"; 2], "no way round by the broker");
    first.stop().await;
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn waiting_copies_hold_no_permit() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.take(10 * SECOND)).concurrency(2)).await;
    rig.send_all(["1", "1", "1", "1", "2"]).await;
    rig.settled().await;
    assert_eq!(runs.ids(), ["1", "2"]);
    assert!(runs.of("2")[0].at < SECOND, "the other event ran beside the first: {:?}", runs.of("2"));
    billing.stop().await;
}

/// Hole of mq-bridge: one key in flight stalls its whole batch.
#[tokio::test(start_paused = true)]
async fn an_event_held_elsewhere_does_not_stall_its_batch() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let slow = rig.start("billing", |c| c.on_any(runs.take(15 * SECOND)).in_flight_max(1)).await;
    rig.send(event("held")).await;
    rig.until("it runs", || runs.len() == 1).await;
    rig.broker.redeliver(1);
    rig.send_all(0..50).await;
    let others = Runs::default();
    let second = rig.start("billing", |c| c.on_any(others.ok())).await;
    rig.until("the others are done", || second.statistics().processed == 50).await;
    assert!(others.all().iter().all(|run| run.at < SECOND));
    assert_eq!(slow.statistics().processed, 0, "the held one still runs");
    rig.settled().await;
    assert_eq!((runs.len(), others.of("held").len()), (1, 0));
    slow.stop().await;
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn copies_beyond_half_of_what_may_be_in_flight_go_back_and_starve_nobody() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let wire = |runs: &Runs| {
        runs.then(|run, _| async move {
            tokio::time::sleep(if run.id == "1" { 50 * SECOND } else { Duration::ZERO }).await;
            Ok(())
        })
    };
    let billing = rig.start("billing", |c| c.on_any(wire(&runs)).in_flight_max(8)).await;
    rig.send_all(["1"; 30]).await;
    rig.send(event("2")).await;
    rig.until("the other ran", || !runs.of("2").is_empty()).await;
    assert!(runs.of("2")[0].at < 10 * SECOND, "{:?}", runs.of("2"));
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates), (2, 29));
    assert!(!rig.journal.lines_of("settle retry").is_empty());
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_copy_of_a_crashed_holder_runs_when_the_lease_is_over() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let first =
        rig.start("billing", |c| c.on_any(runs.take(1_000 * SECOND)).timeout(2_000 * SECOND).in_flight_max(1)).await;
    rig.send(event("1")).await;
    rig.until("it runs", || runs.len() == 1).await;
    rig.send(event("1")).await;
    let second: Process = rig.start("billing", |c| c.on_any(runs.ok())).await;
    tokio::time::sleep(100 * SECOND).await;
    assert_eq!(runs.len(), 1, "leases are renewed");
    first.crash().await;
    let crashed = runs.all()[0].at + 100 * SECOND;
    rig.settled().await;
    let again = &runs.all()[1];
    assert_eq!((again.attempt, again.crashes, runs.len()), (2, 1, 2));
    assert!(again.at > crashed && again.at < crashed + 32 * SECOND, "{:?} after {crashed:?}", again.at);
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_copy_runs_in_its_turn_where_the_first_fails_and_the_attempt_counts_once() {
    let (rig, runs) = (Rig::new(), Runs::default());
    rig.send_all(["1", "1"]).await;
    let handler = runs.answer(|run| if run.attempt < 3 { Err(Failure::retryable("busy")) } else { Ok(()) });
    let billing = rig.start("billing", |c| c.on_any(handler).jitter(0.0)).await;
    rig.settled().await;
    assert_eq!(runs.attempts("1"), [1, 2, 3], "two deliveries are not two counts");
    assert_eq!(billing.statistics().duplicates, 1);
    billing.stop().await;
}
