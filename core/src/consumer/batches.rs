//! Batches of events for one handler: when one leaves, and how its end becomes the end of each.
//!
//! A batch leaves when the one before has returned, when it is full, or when its first event has waited for
//! [`BATCH_WAIT`]: no timer of its own, and no latency when idle.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use tracing::Instrument;

use super::runners::Handler;
use super::shared::Shared;
use super::steps::panic_text;
use crate::event::{Apart, Ended, Gather, Launched, RouteInfo, Routes, RunningBatch};
use crate::handler::Failure;
use crate::run::{Finish, Run};
use crate::stepping::Stepped;
use crate::trace;

/// The longest that an event waits for the batch before its own to return, to within a tick.
const BATCH_WAIT: Duration = Duration::from_millis(500);

/// The batch handlers of a consumer.
pub(super) struct Batches {
    routes: Vec<BatchRoute>,
    batch_max: usize,
}

struct BatchRoute {
    name: &'static str,
    gather: Arc<dyn Gather>,
    under_way: Arc<AtomicUsize>,
}

impl Batches {
    pub(super) fn new(routes: &Routes, infos: &[RouteInfo], batch_max: usize) -> Self {
        let route =
            |(number, gather): (usize, _)| BatchRoute { name: infos[number].name(), gather, under_way: Arc::default() };
        // In the order in which they were added, so that a run with a seed repeats.
        let mut gathers: Vec<_> = routes.gathers().collect();
        gathers.sort_unstable_by_key(|(number, _)| *number);
        Self { routes: gathers.into_iter().map(route).collect(), batch_max }
    }
}

impl BatchRoute {
    /// Whether what has gathered is to leave.
    fn is_due(&self, batch_max: usize) -> bool {
        match self.gather.waiting() {
            (0, _) => false,
            (events, _) if events >= batch_max => true,
            (_, since) => {
                let waited = since.map_or(Duration::ZERO, |since| since.elapsed());
                waited >= BATCH_WAIT || self.under_way.load(Ordering::SeqCst) == 0
            }
        }
    }
}

impl Shared {
    /// Launches each gathered batch that is due.
    pub(super) fn launch_batches(&self) {
        for route in &self.batches.routes {
            while let Some(launched) = route.gather.launch_alone(&self.transactions) {
                self.start_batch(route, launched);
            }
            while route.is_due(self.batches.batch_max) {
                // None when all that waited were stopped.
                let Some(launched) = route.gather.launch(self.batches.batch_max, &self.transactions) else { break };
                self.start_batch(route, launched);
            }
        }
    }

    fn start_batch(&self, route: &BatchRoute, (mut running, runs): Launched) {
        if let (Some(stepper), Some(first)) = (&self.stepper, runs.first()) {
            running = Box::pin(Stepped::new(running, Arc::clone(stepper), first.lease));
        }
        let span = trace::batch_span(&self.name, route.name, runs.len());
        if !span.is_disabled() {
            running = Box::pin(running.instrument(span));
        }
        let under_way = UnderWay::new(&route.under_way);
        self.started.push(Handler::Many(Many {
            running: Some(running),
            ended: vec![false; runs.len()],
            runs: runs.into(),
            _under_way: under_way,
        }));
    }
}

/// Counts a batch for as long as it runs.
struct UnderWay(Arc<AtomicUsize>);

impl UnderWay {
    fn new(under_way: &Arc<AtomicUsize>) -> Self {
        under_way.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(under_way))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A batch handler's future, and the runs of its events.
pub(super) struct Many {
    /// `None` once it was dropped.
    running: Option<RunningBatch>,
    runs: Arc<[Arc<Run>]>,
    /// Which have ended: a life that is stopped does not wait for the others.
    ended: Vec<bool>,
    _under_way: UnderWay,
}

impl Many {
    pub(super) fn runs(&self) -> Arc<[Arc<Run>]> {
        Arc::clone(&self.runs)
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        for (run, ended) in self.runs.iter().zip(&mut self.ended) {
            if !*ended && run.is_cancelled(cx) {
                *ended = true;
                run.finish(Finish::Dropped);
                run.tell();
            }
        }
        // Who still waits decides: dropped when nobody does.
        let all_stopped = self.ended.iter().all(|ended| *ended);
        let end = match &mut self.running {
            None => return Poll::Ready(()),
            Some(_) if all_stopped => Ok(Vec::new()),
            Some(running) => match AssertUnwindSafe(running).catch_unwind().poll_unpin(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(end) => end,
            },
        };
        // What a handler holds may panic when it is dropped; the others of this runner are not to end with it.
        let running = self.running.take();
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(running)));
        match (end, dropped) {
            (Ok(ends), Ok(())) => self.finish(ends),
            (Err(panic), _) | (Ok(_), Err(panic)) => self.panicked(panic),
        }
        Poll::Ready(())
    }

    fn finish(&mut self, ends: Vec<Ended>) {
        for ((run, ended), end) in self.runs.iter().zip(&self.ended).zip(ends) {
            if !ended {
                run.finish(Finish::Returned(end));
            }
        }
    }

    /// A panic is that of the only event, or nobody's, and each runs alone to find whose.
    fn panicked(&mut self, panic: Box<dyn std::any::Any + Send>) {
        if let [run] = &*self.runs {
            return run.finish(Finish::Panicked(panic));
        }
        let failure = Failure::retryable("panicked").with_source(panic_text(&*panic));
        self.finish(Apart::each_alone(self.runs.len(), failure));
    }
}
