//! Invariant: an event that succeeds costs two round trips to the store, shared by its whole batch; and what each other end
//! of an event costs.

use std::time::Duration;

use hapax::Failure;

use crate::rig::{Rig, Runs, event};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn a_batch_that_succeeds_costs_one_claim_and_one_record() {
    for events in [1, 2, 50] {
        let (rig, runs) = (Rig::new(), Runs::default());
        rig.send_all(0..events).await;
        let billing = rig.start("billing", |c| c.on_any(runs.take(SECOND))).await;
        rig.settled().await;
        let record = format!("store record{}", " processed".repeat(events));
        assert_eq!(rig.journal.lines_of("store "), [format!("store claim {events}"), record]);
        billing.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn events_one_after_the_other_cost_two_each_and_none_when_idle() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    for id in 0..10 {
        rig.send(event(&id.to_string())).await;
        rig.settled().await;
    }
    tokio::time::sleep(3_600 * SECOND).await;
    assert_eq!(rig.journal.round_trips(), 20);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn every_end_of_an_event_has_its_price() {
    for (id, price) in [("ok", 2), ("retried", 4), ("dead", 3), ("again", 1), ("reopened", 2)] {
        let (rig, runs) = (Rig::new(), Runs::default());
        let noted = runs.clone();
        let handler = runs.answer(move |run| match (run.id.as_str(), noted.of(&run.id).len()) {
            ("retried", 1) => Err(Failure::retryable("busy")),
            ("dead", _) | ("reopened", 1) => Err(Failure::permanent("no")),
            _ => Ok(()),
        });
        let billing = rig.start("billing", |c| c.on_any(handler)).await;
        rig.send(event(id)).await;
        rig.settled().await;
        let before = rig.journal.round_trips();
        match id {
            "again" => rig.send(event(id)).await,
            "reopened" => assert_eq!(rig.broker.redrive(), 1),
            _ => assert_eq!(before, price, "{id}"),
        }
        rig.settled().await;
        if matches!(id, "again" | "reopened") {
            assert_eq!(rig.journal.round_trips() - before, price, "{id}");
        }
        billing.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_long_handler_costs_a_renewal_each_third_of_its_lease_shared_by_all() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let wire = |c: crate::rig::Builder| c.on_any(runs.take(55 * SECOND)).lease(30 * SECOND);
    rig.send_all(0..40).await;
    let billing = rig.start("billing", wire).await;
    rig.settled().await;
    let renewals = rig.journal.lines_of("store renew");
    assert!(renewals.iter().all(|line| line == "store renew 40"), "{renewals:?}");
    assert!((4..=6).contains(&renewals.len()), "{renewals:?}");
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn batches_are_bounded_and_a_burst_shares_them() {
    let (rig, runs) = (Rig::new(), Runs::default());
    rig.send_all(0..300).await;
    let billing = rig.start("billing", |c| c.on_any(runs.ok()).concurrency(300).batch_max(100)).await;
    rig.settled().await;
    let claims = rig.journal.lines_of("store claim");
    let sizes: Vec<usize> = claims.iter().map(|line| line["store claim ".len()..].parse().unwrap()).collect();
    assert_eq!((sizes.iter().sum::<usize>(), sizes.iter().max()), (300, Some(&100)));
    assert!(rig.journal.round_trips() < 30, "{} round trips for 300 events", rig.journal.round_trips());
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_store_is_asked_for_one_batch_at_a_time_and_the_next_one_gathers() {
    let broker = hapax_memory::MemoryBroker::builder("orders");
    let slow =
        hapax_testkit::faulty::Faults { delay: 1.0, delay_max: SECOND, ..hapax_testkit::faulty::Faults::none(3) };
    let rig = Rig::with_faults(broker, slow, hapax_testkit::faulty::Faults::none(4));
    let runs = Runs::default();
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    for id in 0..200 {
        rig.send(event(&id.to_string())).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    rig.settled().await;
    assert_eq!(runs.len(), 200);
    assert!(rig.journal.round_trips() < 60, "{} round trips for 200 events in two seconds", rig.journal.round_trips());
    billing.stop().await;
}
