//! Shutdown: what finished is settled and never run again, what did not is given back uncounted, and it all ends in
//! time, whatever stands still. L3 ShutdownBounded, S9 SettleOnce.

use std::sync::Arc;
use std::time::Duration;

use hapax::{ErrorKind, Failure, Phase, Service, Status, Stop};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

use crate::journal::Journal;
use crate::rig::{Process, Rig, Runs, event};
use crate::script::{self, Fault, Script};

const DRAIN: Duration = Duration::from_secs(25);
/// After the deadline what is left is given back, which takes at most so long.
const GIVE_BACK: Duration = Duration::from_millis(3_500);

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Stops the process, and answers how long that took.
async fn stop(process: Process) -> Duration {
    let begun = Instant::now();
    process.stop().await;
    begun.elapsed()
}

#[tokio::test(start_paused = true)]
async fn what_finishes_is_settled_and_never_run_again() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.take(seconds(10))).concurrency(8)).await;
    rig.send_all(0..20).await;
    rig.until("running", || runs.len() == 8).await;
    let took = stop(billing).await;
    assert!(took <= seconds(10) + Duration::from_millis(500), "as long as the handlers need, no longer: {took:?}");
    assert_eq!(rig.journal.lines_of("settle ack").len(), 8);
    assert_eq!(rig.broker.standing().ready, 12, "the rest is given back");
    let _next = rig.start("billing", |c| c.on_any(runs.take(seconds(10)))).await;
    rig.settled().await;
    assert!((0..20).all(|id| runs.attempts(&id.to_string()) == [1]), "{:?}", runs.ids());
}

#[tokio::test(start_paused = true)]
async fn what_does_not_finish_is_given_back_uncounted_with_the_same_attempt() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.take(seconds(600))).timeout(seconds(3600))).await;
    rig.send(event("1")).await;
    rig.until("running", || runs.len() == 1).await;
    let took = stop(billing).await;
    assert!((DRAIN..DRAIN + GIVE_BACK).contains(&took), "{took:?}");
    assert_eq!(rig.status("billing", "1").await, Some(Status::Waiting));
    assert_eq!(rig.journal.lines_of("settle"), ["settle release-uncounted"]);
    let _next = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    let all = runs.all();
    assert_eq!((all[0].attempt, all[1].attempt, all[1].crashes), (1, 1, 0));
    assert!(all[1].fence > all[0].fence, "a new claim with a higher fence");
    assert!(all[1].at - all[0].at < DRAIN + seconds(5), "at once: nobody waits for a lease");
}

/// ag2ai/faststream#3010: a handler that shutdown cancelled was acked.
#[tokio::test(start_paused = true)]
async fn cancelled_handler_never_settles() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.then(|_, _| std::future::pending()))).await;
    rig.send_all(0..5).await;
    rig.until("running", || runs.len() == 5).await;
    billing.handle.stop_within(seconds(1));
    stop(billing).await;
    assert_eq!(rig.journal.lines_of("settle ack"), [""; 0]);
    assert_eq!(rig.journal.lines_of("settle release-uncounted").len(), 5);
    assert!(rig.journal.lines_of("store record").iter().all(|line| !line.contains(" processed")), "nor marked");
    assert_eq!(rig.broker.standing().ready, 5);
}

/// Notes its end in the journal.
struct Ends(Journal);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.note("handler ended");
    }
}

/// sidekiq/sidekiq#6379: at shutdown a long job was put back while it still ran, and ran twice at once.
#[tokio::test(start_paused = true)]
async fn shutdown_requeue_only_after_stop() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let journal = rig.journal.clone();
    let handler = runs.then(move |_, _| {
        let ends = Ends(journal.clone());
        async move {
            let _ends = ends;
            std::future::pending().await
        }
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send(event("1")).await;
    rig.until("running", || runs.len() == 1).await;
    let next = rig.start("billing", |c| c.on_any(runs.ok())).await;
    billing.handle.stop_within(seconds(5));
    sleep(seconds(4)).await;
    assert_eq!(runs.len(), 1, "not given back while it runs");
    stop(billing).await;
    let lines = rig.journal.lines();
    let at = |line: &str| lines.iter().position(|l| l == line).unwrap_or_else(|| panic!("no {line}: {lines:?}"));
    assert!(at("handler ended") < at("store record failed-uncounted"));
    assert!(at("store record failed-uncounted") < at("settle release-uncounted"), "recorded, then given back");
    rig.settled().await;
    assert_eq!((runs.len(), next.statistics().processed), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn handlers_are_told_at_once_and_may_finish() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.then(|run, cx| async move {
        cx.cancelled().cancelled().await;
        assert_eq!(cx.stopped(), Some(Stop::Shutdown));
        sleep(seconds(2)).await;
        if run.id == "gives up" { Err(Failure::retryable("shutting down")) } else { Ok(()) }
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send_all(["finishes", "gives up"]).await;
    rig.until("running", || runs.len() == 2).await;
    let took = stop(billing).await;
    assert!((seconds(2)..seconds(3)).contains(&took), "told at once: {took:?}");
    assert_eq!(rig.status("billing", "finishes").await, Some(Status::Processed));
    let given_up = rig.record("billing", "gives up").await.unwrap();
    assert_eq!((given_up.status, given_up.attempt), (Status::Waiting, 0), "its attempt is given back");
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_its_retry_is_given_back_at_once() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let failing = runs.answer(|_| Err(Failure::retryable("not now").after(seconds(4))));
    let billing = rig.start("billing", |c| c.on_any(failing)).await;
    rig.send_all(0..3).await;
    rig.until("waiting", || runs.len() == 3).await;
    rig.quiet().await;
    assert!(stop(billing).await < Duration::from_millis(500));
    assert_eq!(rig.broker.standing().ready, 3);
    assert_eq!(rig.record("billing", "0").await.unwrap().attempt, 1, "the attempt that failed is counted");
}

#[tokio::test(start_paused = true)]
async fn a_stop_during_the_claim_runs_nothing_and_is_bounded() {
    for fault in [Fault::Hang, Fault::HangAfter] {
        let applied = matches!(fault, Fault::HangAfter);
        let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
        for _ in 0..10 {
            script.next("claim", fault.clone());
        }
        let billing = script::start(&rig, "billing", &script, |c| c.on_any(runs.ok())).await;
        rig.send(event("1")).await;
        sleep(seconds(1)).await;
        let took = stop(billing).await;
        assert!(took <= DRAIN + GIVE_BACK, "{took:?}");
        assert_eq!((runs.len(), rig.broker.standing().ready), (0, 1), "given back by the end of the session");
        let _next = rig.start("billing", |c| c.on_any(runs.ok())).await;
        rig.settled().await;
        // A claim that took place unseen is a crash: nobody can tell it from one.
        assert_eq!(runs.attempts("1"), [if applied { 2 } else { 1 }]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_during_the_record_waits_for_it_and_settles() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    let record = script.gate("record");
    let billing = script::start(&rig, "billing", &script, |c| c.on_any(runs.ok())).await;
    rig.send(event("1")).await;
    rig.until("recording", || script.is_over()).await;
    billing.handle.stop();
    sleep(seconds(5)).await;
    record.add_permits(1);
    stop(billing).await;
    assert_eq!(rig.journal.lines_of("settle"), ["settle ack"]);
    assert_eq!(rig.status("billing", "1").await, Some(Status::Processed));
    assert_eq!((runs.len(), rig.broker.standing().ready), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_stop_while_the_settlement_hangs_is_bounded_and_the_event_is_found_processed() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    for _ in 0..10 {
        script.next("settle", Fault::Hang);
    }
    let billing = script::start(&rig, "billing", &script, |c| c.on_any(runs.ok())).await;
    rig.send(event("1")).await;
    rig.until("recorded", || !rig.journal.lines_of("store record").is_empty()).await;
    let took = stop(billing).await;
    assert!(took <= DRAIN + GIVE_BACK, "{took:?}");
    let next = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    assert_eq!((runs.len(), next.statistics().duplicates), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_does_not_answer_close_is_bounded_and_no_error() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    script.next("stop", Fault::Hang);
    script.next("close", Fault::Hang);
    let billing = script::start(&rig, "billing", &script, |c| c.on_any(runs.ok()).call_timeout(seconds(2))).await;
    rig.send(event("1")).await;
    rig.settled().await;
    let begun = Instant::now();
    billing.ended().await.expect("an outage is no error");
    assert!(begun.elapsed() <= seconds(3));
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_refuses_to_close_for_good_is_told() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    script.next("close", Fault::Refuse(ErrorKind::Internal));
    let billing = script::start(&rig, "billing", &script, |c| c.on_any(runs.ok())).await;
    let error = billing.ended().await.expect_err("the broker was not closed");
    assert_eq!((error.kind(), error.operation()), (ErrorKind::Internal, "close"));
}

#[tokio::test(start_paused = true)]
async fn a_stop_while_the_store_is_down_is_bounded_and_settles_nothing() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let handler = runs.then(move |run, _| {
        let gate = Arc::clone(&opened);
        async move {
            if run.attempt == 1 {
                gate.acquire().await.unwrap().forget();
            }
            Ok(())
        }
    });
    let billing = rig.start("billing", |c| c.on_any(handler).timeout(seconds(3600))).await;
    rig.send_all(["returned", "running"]).await;
    rig.until("running", || runs.len() == 2).await;
    rig.store_faults.begin_outage();
    gate.add_permits(1);
    sleep(seconds(1)).await;
    let took = stop(billing).await;
    assert!(took <= DRAIN + GIVE_BACK, "{took:?}");
    assert_eq!(rig.journal.lines_of("settle"), [""; 0], "what has no verdict is not settled");
    rig.store_faults.end_outage();
    let _next = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    for id in ["returned", "running"] {
        assert_eq!(rig.status("billing", id).await, Some(Status::Processed), "nothing is lost");
        assert_eq!(runs.attempts(id), [1, 2], "and runs once more, since no outcome was recorded");
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_not_ours_any_more_ends_the_run_with_its_error() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    let billing = script::start(&rig, "billing", &script, |c| c.on_any(runs.then(|_, _| std::future::pending()))).await;
    rig.send(event("1")).await;
    rig.until("running", || runs.len() == 1).await;
    script.next("claim", Fault::Refuse(ErrorKind::Incompatible));
    rig.send(event("2")).await;
    let begun = Instant::now();
    let error = billing.running.await.unwrap().expect_err("a fatal error");
    assert_eq!((error.kind(), error.operation()), (ErrorKind::Incompatible, "claim"));
    assert!(begun.elapsed() < seconds(2), "without a drain: going on could be wrong");
    let health = billing.handle.health();
    assert_eq!((health.phase, health.live), (Phase::Stopped, false));
    assert_eq!(rig.journal.lines_of("settle ack"), [""; 0]);
    assert_eq!(rig.broker.standing().ready, 2, "both come again");
}

#[tokio::test(start_paused = true)]
async fn consumers_of_a_service_drain_together_and_each_sees_every_event() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let (billing, _connection) = rig.process("billing");
    let shipping_broker = rig.broker.group("shipping");
    let shipping = hapax::Consumer::builder("shipping", shipping_broker, rig.journaled_store()).seed(99);
    let billing = billing.on_any(runs.take(seconds(3))).build().await.unwrap();
    let shipping = shipping.on_any(runs.take(seconds(5))).build().await.unwrap();
    let service = Service::new().add(billing).add(shipping);
    let handle = service.handle();
    let stopping = handle.clone();
    rig.send_all(0..3).await;
    let running = tokio::spawn(service.run(std::future::pending()));
    rig.until("running", || runs.len() == 6).await;
    assert!(handle.live() && handle.ready());
    let begun = Instant::now();
    stopping.stop();
    running.await.unwrap().unwrap();
    assert!(begun.elapsed() <= seconds(5) + Duration::from_millis(100), "the longest drain, not the sum");
    let done: Vec<_> = handle.consumers().iter().map(|consumer| consumer.statistics().processed).collect();
    assert_eq!(done, [3, 3]);
    assert!(!handle.live() && !handle.ready());
}

#[tokio::test(start_paused = true)]
async fn a_fatal_error_of_one_consumer_stops_the_others_gracefully() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    let broken = script::Scripted::new(rig.store.clone(), &script);
    let billing = hapax::Consumer::builder("billing", rig.broker.group("billing"), broken).on_any(runs.ok());
    let shipping = hapax::Consumer::builder("shipping", rig.broker.group("shipping"), rig.store.clone());
    let shipping = shipping.on_any(runs.take(seconds(2))).build().await.unwrap();
    let service = Service::new().add(billing.build().await.unwrap()).add(shipping);
    let handle = service.handle();
    rig.send(event("1")).await;
    let running = tokio::spawn(service.run(std::future::pending()));
    rig.until("both have started", || runs.len() == 2).await;
    script.next("claim", Fault::Refuse(ErrorKind::Incompatible));
    rig.send(event("2")).await;
    let error = running.await.unwrap().expect_err("billing failed");
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    assert!(error.to_string().contains("billing"), "{error}");
    assert_eq!(handle.consumers()[1].statistics().processed, 1, "the healthy one drained");
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_is_stopped_before_it_received_anything_ends_at_once() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let (builder, _connection) = rig.process("billing");
    rig.send(event("1")).await;
    let consumer = builder.on_any(runs.ok()).build().await.unwrap();
    consumer.run(std::future::ready(())).await.unwrap();
    assert_eq!((runs.len(), rig.broker.standing().ready), (0, 1));
}
