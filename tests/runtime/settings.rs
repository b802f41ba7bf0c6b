//! Invariant: what is set on the builder is what the running consumer keeps to: how much at once, how much claimed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hapax::Settings;

use crate::rig::{Rig, Runs, event};

const SECOND: Duration = Duration::from_secs(1);

/// The most handlers that ran at once.
#[derive(Clone, Default)]
struct AtOnce(Arc<(AtomicUsize, AtomicUsize)>);

impl AtOnce {
    async fn run(self, time: Duration) {
        let now = self.0.0.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.1.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(time).await;
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }

    fn most(&self) -> usize {
        self.0.1.load(Ordering::SeqCst)
    }
}

#[tokio::test(start_paused = true)]
async fn concurrency_bounds_handlers_and_is_used_up() {
    for (concurrency, expected) in [(1, 1), (7, 7), (64, 64)] {
        let (rig, runs, at_once) = (Rig::new(), Runs::default(), AtOnce::default());
        let counted = at_once.clone();
        let handler = runs.then(move |_, _| {
            let run = counted.clone().run(SECOND);
            async move {
                run.await;
                Ok(())
            }
        });
        rig.send_all(0..200).await;
        let billing = rig.start("billing", |c| c.on_any(handler).concurrency(concurrency)).await;
        rig.settled().await;
        assert_eq!((at_once.most(), runs.len()), (expected, 200));
        billing.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn only_what_runs_is_claimed() {
    let (rig, runs) = (Rig::new(), Runs::default());
    rig.send_all(0..100).await;
    let billing = rig.start("billing", |c| c.on_any(runs.take(20 * SECOND)).concurrency(3).in_flight_max(50)).await;
    rig.until("three run", || runs.len() == 3).await;
    assert_eq!(rig.broker.standing().unsettled, 50);
    assert_eq!(rig.journal.lines(), ["store claim 3"], "a process that dies now leaves three leases behind");
    billing.crash().await;
}

#[tokio::test(start_paused = true)]
async fn the_settings_struct_is_the_builders_methods() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let settings = Settings { concurrency: 2, attempts_max: 2, ..Settings::default() };
    let handler = runs.answer(|_| Err(hapax::Failure::retryable("busy")));
    let billing = rig.start("billing", |c| c.on_any(handler).settings(settings)).await;
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!((runs.len(), rig.dead().len()), (2, 1));
    billing.stop().await;
}
