//! Health: live asks for a restart only when that helps, ready says whether work is taken, and the numbers agree with
//! what happened. H3 NoSecrets, H7 CountersAgree.

use std::time::Duration;

use hapax::{ErrorKind, Failure, Phase, Service};
use tokio::time::sleep;

use crate::rig::{Rig, Runs, event};
use crate::script::{self, Fault, Script};

#[tokio::test(start_paused = true)]
async fn a_consumer_is_ready_from_its_start_to_its_stop_and_live_until_it_has_stopped() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let (builder, _connection) = rig.process("billing");
    let consumer = builder.on_any(runs.take(Duration::from_secs(5))).build().await.unwrap();
    let handle = consumer.handle();
    let starting = handle.health();
    assert_eq!((starting.phase, starting.live, starting.ready), (Phase::Starting, true, false));
    let running = tokio::spawn(consumer.run(std::future::pending()));
    rig.send(event("1")).await;
    rig.until("running", || runs.len() == 1).await;
    sleep(Duration::from_secs(1)).await;
    let health = handle.health();
    assert_eq!((health.phase, health.live, health.ready), (Phase::Running, true, true));
    assert_eq!(health.in_flight.events, 1);
    assert!(health.in_flight.oldest_seconds.is_some_and(|age| (0.5..1.5).contains(&age)), "{health:?}");
    handle.stop();
    sleep(Duration::from_secs(1)).await;
    let draining = handle.health();
    assert_eq!((draining.phase, draining.live, draining.ready), (Phase::Draining, true, false));
    running.await.unwrap().unwrap();
    let stopped = handle.health();
    assert_eq!((stopped.phase, stopped.live, stopped.ready), (Phase::Stopped, false, false));
    assert_eq!((stopped.in_flight.events, stopped.in_flight.bytes), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_process_that_stands_still_is_not_live() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    let billing = script::start(&rig, "billing", &script, |c| c.on_any(runs.ok())).await;
    sleep(Duration::from_secs(60)).await;
    assert!(billing.handle.health().live, "idle is not stuck");
    script.freeze();
    sleep(Duration::from_secs(5)).await;
    assert!(billing.handle.health().live, "not after a moment");
    sleep(Duration::from_secs(6)).await;
    assert!(!billing.handle.health().live);
    script.thaw();
    sleep(Duration::from_secs(1)).await;
    assert!(billing.handle.health().live);
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_never_a_reason_to_restart() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.store_faults.begin_outage();
    rig.broker_faults.begin_outage();
    rig.send(event("1")).await;
    for _ in 0..60 {
        sleep(Duration::from_secs(60)).await;
        assert!(billing.handle.health().live);
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_in_a_report_bears_no_credentials() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    let consumer = {
        let (builder, _connection) = rig.process("billing");
        builder.on_any(runs.answer(|_| Err(Failure::retryable("no").with_source("postgres://app:hunter2@db/x"))))
    };
    let service = Service::new().add(consumer.attempts_max(1).build().await.unwrap());
    let handle = service.handle();
    script.next("claim", Fault::Refuse(ErrorKind::Unavailable));
    let running = tokio::spawn(service.run(std::future::pending()));
    rig.send(event("1")).await;
    rig.settled().await;
    let (_, letter) = rig.dead_letter();
    assert!(letter.error.contains("db/x") && !letter.error.contains("hunter2"), "{}", letter.error);
    let report = serde_json::to_string(&handle.report()).unwrap();
    assert!(!report.contains("hunter2") && report.contains("\"dead_lettered\":1"), "{report}");
    handle.stop();
    running.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_numbers_agree_with_what_happened() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|run| match run.id.as_str() {
        "bad" => Err(Failure::permanent("no")),
        "twice" if run.attempt == 1 => Err(Failure::retryable("once more")),
        _ => Ok(()),
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send_all(["1", "2", "bad", "twice", "1", "bad"]).await;
    rig.settled().await;
    let other_data = event("2").with_data("application/json", "{}");
    rig.send(other_data).await;
    rig.settled().await;
    let s = billing.statistics();
    assert_eq!((s.delivered, s.processed, s.duplicates, s.retried), (7, 3, 2, 1));
    assert_eq!((s.dead_lettered, s.conflicts, s.ignored, s.released), (2, 1, 0, 0));
    assert_eq!(rig.journal.observed("DeadLettered"), 2);
    assert_eq!(
        rig.journal.observed("Duplicate { of: Processed") + rig.journal.observed("Duplicate { of: DeadLettered"),
        2
    );
}
