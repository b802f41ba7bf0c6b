//! Pause and resume: nothing new is taken, what is in flight goes on, and nothing is lost by either.

use std::time::Duration;

use hapax::{Failure, Phase};
use tokio::time::sleep;

use crate::rig::{Rig, Runs, event};

#[tokio::test(start_paused = true)]
async fn a_paused_consumer_finishes_what_it_has_and_takes_nothing_new() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.then(|run, _| async move {
        sleep(Duration::from_secs(3)).await;
        if run.id == "retried" && run.attempt == 1 { Err(Failure::retryable("once more")) } else { Ok(()) }
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send_all(["1", "retried"]).await;
    rig.until("running", || runs.len() == 2).await;
    billing.handle.pause();
    sleep(Duration::from_millis(300)).await;
    rig.send_all(["later", "latest"]).await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!(rig.journal.lines_of("settle"), ["settle ack"; 2], "in flight goes on, retries included");
    assert_eq!(rig.broker.standing().ready, 2);
    let health = billing.handle.health();
    assert_eq!((health.phase, health.live, health.ready), (Phase::Paused, true, false));
    billing.handle.resume();
    rig.settled().await;
    assert_eq!(runs.len(), 5);
    assert_eq!((billing.handle.health().phase, billing.handle.health().ready), (Phase::Running, true));
}

#[tokio::test(start_paused = true)]
async fn a_consumer_paused_before_its_run_begins_paused() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let (builder, _connection) = rig.process("billing");
    let consumer = builder.on_any(runs.ok()).build().await.unwrap();
    let handle = consumer.handle();
    handle.pause();
    let running = tokio::spawn(consumer.run(std::future::pending()));
    rig.send(event("1")).await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!((runs.len(), handle.health().phase), (0, Phase::Paused));
    handle.resume();
    rig.settled().await;
    assert_eq!(runs.len(), 1);
    handle.stop();
    running.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_paused_consumer_stops_as_any_other_and_stays_stopped() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    billing.handle.pause();
    let handle = billing.handle.clone();
    billing.stop().await;
    handle.resume();
    assert_eq!(handle.health().phase, Phase::Stopped);
    rig.send(event("1")).await;
    assert_eq!(rig.broker.standing().ready, 1);
}

#[tokio::test(start_paused = true)]
async fn pausing_and_resuming_all_the_time_loses_nothing() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.take(Duration::from_millis(70))).concurrency(4)).await;
    rig.send_all(0..200).await;
    for n in 0..100 {
        if n % 2 == 0 {
            billing.handle.pause()
        } else {
            billing.handle.resume()
        }
        sleep(Duration::from_millis(260)).await;
    }
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().processed), (200, 200));
}
