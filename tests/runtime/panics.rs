//! Handlers that panic or block: a panic is a failure like another, and a blocked thread is nobody else's.

use std::time::Duration;

use hapax::{Reason, Route};
use tokio::time::{Instant, sleep, timeout};

use crate::rig::{Rig, Runs, event};

#[tokio::test(start_paused = true)]
async fn a_panic_is_a_failure_and_its_neighbours_go_on() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.then(|run, _| async move {
        sleep(Duration::from_secs(1)).await;
        assert!(run.id != "7" || run.attempt > 2, "boom on attempt {}", run.attempt);
        Ok(())
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send_all(0..20).await;
    rig.settled().await;
    assert_eq!(runs.attempts("7"), [1, 2, 3]);
    assert_eq!(runs.len(), 22, "nobody else ran twice");
    assert_eq!(runs.of("7")[2].crashes, 0, "the process lives, so it is no crash");
    let statistics = billing.statistics();
    assert_eq!((statistics.processed, statistics.retried), (20, 2));
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_always_panics_is_set_aside_with_what_it_said() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.then(|_, _| async { panic!("index out of bounds") });
    let _billing = rig.start("billing", |c| c.on_any(handler).attempts_max(3)).await;
    rig.send(event("1")).await;
    rig.settled().await;
    let (_, letter) = rig.dead_letter();
    assert_eq!((letter.reason, letter.attempts), (Reason::AttemptsExhausted, 3));
    assert!(letter.error.contains("panicked") && letter.error.contains("index out of bounds"), "{}", letter.error);
}

#[tokio::test(start_paused = true)]
async fn a_panic_before_the_first_await_is_no_different() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|run| if run.attempt == 1 { panic!("at once") } else { Ok(()) });
    let _billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send_all(["1", "2"]).await;
    rig.settled().await;
    assert_eq!((runs.attempts("1"), runs.attempts("2")), (vec![1, 2], vec![1, 2]));
}

/// Longer than the lease of a second.
const BLOCKED: Duration = Duration::from_millis(2_200);

/// Real time: a thread is blocked.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_handler_that_blocks_its_thread_stops_neither_claims_nor_renewals_of_others() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.then(|run, _| async move {
        match run.id.as_str() {
            "blocks" => {
                let (sender, receiver) = std::sync::mpsc::sync_channel::<()>(1);
                let blocked = receiver.recv_timeout(BLOCKED);
                assert_eq!(blocked, Err(std::sync::mpsc::RecvTimeoutError::Timeout));
                drop(sender);
            }
            "long" => sleep(BLOCKED).await,
            _ => {}
        }
        Ok(())
    });
    let wire = |c: crate::rig::Builder| {
        let lease = Duration::from_secs(1);
        c.lease(lease).call_timeout(lease / 3).add(Route::on_any(handler).timeout(Duration::from_secs(10)))
    };
    let billing = rig.start("billing", wire).await;
    rig.send_all(["blocks", "long"]).await;
    sleep(Duration::from_millis(100)).await;
    let begun = Instant::now();
    rig.send_all((0..50).map(|n| format!("short {n}"))).await;
    while billing.statistics().processed < 50 {
        assert!(
            begun.elapsed() < Duration::from_secs(1),
            "a blocked handler holds up others: {:?}",
            billing.statistics()
        );
        sleep(Duration::from_millis(5)).await;
    }
    timeout(Duration::from_secs(10), rig.broker.settled()).await.expect("all end");
    assert_eq!(runs.len(), 52, "each once");
    assert_eq!(billing.statistics().leases_lost, 0, "renewed beside the blocked thread, its own lease too");
    billing.stop().await;
}

/// The same, one after the other: whatever is started beside the blocked handler ends in its own time.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn events_that_come_beside_a_blocked_handler_do_not_wait_for_it() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.then(|run, _| async move {
        if run.id == "blocks" {
            let (sender, receiver) = std::sync::mpsc::sync_channel::<()>(1);
            let blocked = receiver.recv_timeout(BLOCKED);
            assert_eq!(blocked, Err(std::sync::mpsc::RecvTimeoutError::Timeout));
            drop(sender);
        }
        Ok(())
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send(event("blocks")).await;
    sleep(Duration::from_millis(50)).await;
    let begun = Instant::now();
    for n in 1..=20 {
        rig.send(event(&n.to_string())).await;
        while billing.statistics().processed < n {
            assert!(begun.elapsed() < Duration::from_secs(2), "event {n} waits for the blocked handler");
            sleep(Duration::from_millis(2)).await;
        }
    }
    billing.stop().await;
}
