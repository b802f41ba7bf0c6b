//! Handlers that panic or block: a panic is a failure like another, and a blocked thread is nobody else's.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
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

const LEASE: Duration = Duration::from_secs(2);
/// Longer than the lease.
const LONG: Duration = Duration::from_secs(3);
/// How long anything may take before a test fails.
const SOON: Duration = Duration::from_secs(20);

/// What a handler blocks its thread with.
#[derive(Clone)]
struct Block(Arc<Mutex<Receiver<()>>>);

impl Block {
    /// A thread that gets hold of it stands still until the sender is dropped.
    fn new() -> (SyncSender<()>, Self) {
        let (let_go, blocked) = sync_channel(1);
        (let_go, Self(Arc::new(Mutex::new(blocked))))
    }

    fn stand_still(&self) {
        assert_eq!(self.0.lock().unwrap().recv_timeout(SOON * 2), Err(RecvTimeoutError::Disconnected));
    }
}

/// Waits on the machine's clock, whose hours are long.
async fn soon(rig: &Rig, what: &str, is: impl FnMut() -> bool) {
    timeout(SOON, rig.until(what, is)).await.unwrap_or_else(|_| panic!("never {what}"));
}

/// Real time: a thread is blocked.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_handler_that_blocks_its_thread_stops_neither_claims_nor_renewals_of_others() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let (let_go, block) = Block::new();
    let handler = runs.then(move |run, _| {
        let block = block.clone();
        async move {
            match run.id.as_str() {
                "blocks" => block.stand_still(),
                "long" => sleep(LONG).await,
                _ => {}
            }
            Ok(())
        }
    });
    let wire =
        |c: crate::rig::Builder| c.lease(LEASE).call_timeout(LEASE / 3).add(Route::on_any(handler).timeout(SOON));
    let billing = rig.start("billing", wire).await;
    rig.send_all(["blocks", "long"]).await;
    // The other may have been handed over together with it, and then waits behind it.
    soon(&rig, "it blocks", || runs.of("blocks").len() == 1).await;
    let begun = Instant::now();
    rig.send_all((0..50).map(|n| format!("short {n}"))).await;
    soon(&rig, "the others are processed", || billing.statistics().processed >= 50).await;
    sleep(LONG.saturating_sub(begun.elapsed())).await;
    drop(let_go);
    timeout(SOON, rig.broker.settled()).await.expect("all end");
    assert_eq!(runs.len(), 52, "each once");
    assert_eq!(billing.statistics().leases_lost, 0, "renewed beside the blocked thread, its own lease too");
    billing.stop().await;
}

/// The same, one after the other: whatever is started beside the blocked handler ends in its own time.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn events_that_come_beside_a_blocked_handler_do_not_wait_for_it() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let (let_go, block) = Block::new();
    let handler = runs.then(move |run, _| {
        let block = block.clone();
        async move {
            if run.id == "blocks" {
                block.stand_still();
            }
            Ok(())
        }
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send(event("blocks")).await;
    soon(&rig, "it blocks", || runs.len() == 1).await;
    for n in 1..=20 {
        rig.send(event(&n.to_string())).await;
        soon(&rig, "an event beside it is processed", || billing.statistics().processed == n).await;
    }
    drop(let_go);
    billing.stop().await;
}
