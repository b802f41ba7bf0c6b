//! Batch handlers: where their events gather, and how one run of many ends for each.
//!
//! An event joins under the lease of its own life, which waits for its own end. What a batch does to its events is decided
//! here: an outcome for each, or nothing for any, and then they run apart.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::Event;
use super::start::{Apart, Ended, Ready, Running, Start, unwritten};
use super::versions::Decode;
use crate::batch::{BatchHandler, Item, Outcomes, TxBatchHandler};
use crate::context::Context;
use crate::error::{Error, ErrorKind};
use crate::handler::{Failure, IntoFailure};
use crate::message::{Defect, Message};
use crate::run::{Run, Stop};
use crate::store::{Lease, Outcome, Recorded, TransactionalStore};

/// A batch handler's run: an end for each of its events, in order.
pub(crate) type RunningBatch = Pin<Box<dyn Future<Output = Vec<Ended>> + Send>>;

/// Where the events of one batch handler gather, types forgotten.
pub(crate) trait Gather: Send + Sync {
    /// How many wait for company, and since when the first does.
    fn waiting(&self) -> (usize, Option<Instant>);

    /// Starts the handler with up to `most` events that wait for company; `None` when none does.
    fn launch(&self, most: usize, transactions: &Arc<Semaphore>) -> Option<Launched>;

    /// Starts the handler with one event that is to run alone; `None` when there is none.
    fn launch_alone(&self, transactions: &Arc<Semaphore>) -> Option<Launched>;
}

/// A batch that was started, and its events' runs in order. A transactional one takes one transaction for all.
pub(crate) type Launched = (RunningBatch, Vec<Arc<Run>>);

/// Events of one type that wait for their batch.
struct Gathering<E, R> {
    waiting: Mutex<Waiting<E>>,
    run: R,
}

struct Waiting<E> {
    together: VecDeque<(E, Arc<Run>)>,
    alone: VecDeque<(E, Arc<Run>)>,
    /// Since when the first of `together` waits.
    since: Option<Instant>,
}

impl<E, R> Gathering<E, R>
where
    R: Fn(Vec<(E, Arc<Run>)>, Arc<Semaphore>) -> RunningBatch,
{
    fn lock(&self) -> MutexGuard<'_, Waiting<E>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, batch: Vec<(E, Arc<Run>)>, transactions: &Arc<Semaphore>) -> Option<Launched> {
        if batch.is_empty() {
            return None;
        }
        let runs: Vec<_> = batch.iter().map(|(_, run)| Arc::clone(run)).collect();
        runs.iter().enumerate().for_each(|(index, run)| run.joined(runs.len(), index == 0));
        Some(((self.run)(batch, Arc::clone(transactions)), runs))
    }
}

/// The next that still waits: a life that was stopped meanwhile does not.
fn next<E>(queue: &mut VecDeque<(E, Arc<Run>)>) -> Option<(E, Arc<Run>)> {
    std::iter::from_fn(|| queue.pop_front()).find(|(_, run)| !run.is_given_up())
}

impl<E, R> Gather for Gathering<E, R>
where
    E: Event,
    R: Fn(Vec<(E, Arc<Run>)>, Arc<Semaphore>) -> RunningBatch + Send + Sync,
{
    fn waiting(&self) -> (usize, Option<Instant>) {
        let waiting = self.lock();
        (waiting.together.len(), waiting.since)
    }

    fn launch(&self, most: usize, transactions: &Arc<Semaphore>) -> Option<Launched> {
        let mut waiting = self.lock();
        let batch: Vec<_> = std::iter::from_fn(|| next(&mut waiting.together)).take(most).collect();
        waiting.since = (!waiting.together.is_empty()).then(Instant::now);
        drop(waiting);
        self.start(batch, transactions)
    }

    fn launch_alone(&self, transactions: &Arc<Semaphore>) -> Option<Launched> {
        let one = next(&mut self.lock().alone);
        self.start(one.into_iter().collect(), transactions)
    }
}

/// A handler of many events at once.
pub(super) struct Batched<E, R> {
    decode: Decode<E>,
    gathering: Arc<Gathering<E, R>>,
}

impl<E: Event, R> Batched<E, R>
where
    R: Fn(Vec<(E, Arc<Run>)>, Arc<Semaphore>) -> RunningBatch + Send + Sync + 'static,
{
    pub(super) fn new(decode: Decode<E>, run: R) -> Self {
        let waiting = Waiting { together: VecDeque::new(), alone: VecDeque::new(), since: None };
        Self { decode, gathering: Arc::new(Gathering { waiting: Mutex::new(waiting), run }) }
    }
}

impl<E: Event, R> Start for Batched<E, R>
where
    R: Fn(Vec<(E, Arc<Run>)>, Arc<Semaphore>) -> RunningBatch + Send + Sync + 'static,
{
    fn prepare(
        &self,
        message: &Arc<Message>,
        version: u32,
        json_depth_max: usize,
    ) -> std::result::Result<Box<dyn Ready>, Defect> {
        let event = self.decode.read(message, version, json_depth_max)?;
        Ok(Box::new(Joining { event, gathering: Arc::clone(&self.gathering) }))
    }

    fn knows(&self, version: u32) -> bool {
        version == E::VERSION || self.decode.chain(version).is_some()
    }

    fn gathers(&self) -> Option<Arc<dyn Gather>> {
        Some(Arc::clone(&self.gathering) as Arc<dyn Gather>)
    }
}

/// An event that was read and will wait for its batch.
struct Joining<E, R> {
    event: E,
    gathering: Arc<Gathering<E, R>>,
}

impl<E, R> Ready for Joining<E, R>
where
    E: Event,
    R: Fn(Vec<(E, Arc<Run>)>, Arc<Semaphore>) -> RunningBatch + Send + Sync,
{
    fn start(self: Box<Self>, run: Arc<Run>) -> Option<Running> {
        let mut waiting = self.gathering.lock();
        if run.is_alone() {
            waiting.alone.push_back((self.event, run));
        } else {
            waiting.since.get_or_insert_with(Instant::now);
            waiting.together.push_back((self.event, run));
        }
        None
    }
}

fn items<E, S>(batch: Vec<(E, Arc<Run>)>, state: &Arc<S>) -> Vec<Item<E, S>> {
    let item = |(event, run)| Item { event, cx: Context::new(run, Arc::clone(state)) };
    batch.into_iter().map(item).collect()
}

/// The batch came to nothing: its failure is that of the only event, or nobody's, and each runs alone to find whose.
fn failed(events: usize, failure: Failure) -> Vec<Ended> {
    if events == 1 {
        return vec![Ended::Failed(failure)];
    }
    Apart::each_alone(events, failure)
}

/// The outcome of each, or the failure of all: a handler that answers for too few or too many answers for none.
fn outcomes<F: IntoFailure>(
    events: usize,
    answered: std::result::Result<Outcomes, F>,
) -> std::result::Result<Vec<std::result::Result<(), Failure>>, Failure> {
    let outcomes = answered.map_err(IntoFailure::into_failure)?.into_each(events);
    if outcomes.len() == events {
        return Ok(outcomes);
    }
    let why = format!("it answered for {} events of {events}: answer for each, in order", outcomes.len());
    Err(Failure::retryable("wrong number of outcomes").with_source(why))
}

/// Runs a batch handler: what fails takes nothing else with it.
pub(super) fn together<E, S, H>(handler: &Arc<H>, state: &Arc<S>, batch: Vec<(E, Arc<Run>)>) -> RunningBatch
where
    E: Event,
    S: Send + Sync + 'static,
    H: BatchHandler<E, S>,
{
    let (handler, state, events) = (Arc::clone(handler), Arc::clone(state), batch.len());
    Box::pin(async move {
        let now = Instant::now();
        batch.iter().for_each(|(_, run)| run.begin(now));
        match outcomes(events, handler.handle(items(batch, &state)).await) {
            Ok(outcomes) => {
                outcomes.into_iter().map(|outcome| outcome.map_or_else(Ended::Failed, |()| Ended::Effect)).collect()
            }
            Err(failure) => failed(events, failure),
        }
    })
}

/// Runs a transactional batch handler: begin, handler, marks of all, commit. All commit together or none does: effects of
/// an item that failed cannot be told from those of the others, so the others run again without it. Dropping it at any point
/// rolls back.
pub(super) fn together_in_transaction<E, S, T, H>(
    store: T,
    handler: Arc<H>,
    state: Arc<S>,
    batch: Vec<(E, Arc<Run>)>,
    transactions: Arc<Semaphore>,
) -> RunningBatch
where
    E: Event,
    S: Send + Sync + 'static,
    T: TransactionalStore,
    H: TxBatchHandler<E, T::Tx, S>,
{
    Box::pin(async move {
        let runs: Vec<_> = batch.iter().map(|(_, run)| Arc::clone(run)).collect();
        let events = runs.len();
        // Closed never: the consumer that drains lets what was started end.
        let _transaction = transactions.acquire_owned().await;
        let wait = runs.first().map(|run| run.remaining()).unwrap_or_default();
        let (tx, lent) = match timeout(wait, store.begin()).await {
            Ok(Ok(begun)) => begun,
            Ok(Err(error)) => return each(&runs, |_| Ended::StoreFailed(told_again(&error, "begin"))),
            Err(_) => {
                let why = "no transaction within the time that the handler has";
                let late = Error::new(ErrorKind::Unavailable, "begin").because(why);
                return each(&runs, |_| Ended::StoreFailed(told_again(&late, "begin")));
            }
        };
        // Waiting for a transaction was not the handler's time.
        let now = Instant::now();
        runs.iter().for_each(|run| run.begin(now));
        match outcomes(events, handler.handle(items(batch, &state), tx).await) {
            Err(failure) => return failed(events, failure),
            Ok(outcomes) if outcomes.iter().any(std::result::Result::is_err) => {
                let again = |()| Ended::Apart(Apart::AGAIN);
                return outcomes.into_iter().map(|outcome| outcome.map_or_else(Ended::Failed, again)).collect();
            }
            Ok(_) => {}
        }
        // Whoever lost its lease or was given up meanwhile: its effects must not commit.
        if runs.iter().any(|run| run.stopped() == Some(Stop::LeaseLost) || run.is_given_up()) {
            return each(&runs, |run| match run.stopped() {
                Some(Stop::LeaseLost) => Ended::Recorded(Recorded::Fenced),
                _ => Ended::Apart(Apart::AGAIN),
            });
        }
        let marks: Vec<(Lease, Outcome)> = runs.iter().map(|run| (run.lease, Outcome::Processed)).collect();
        runs.iter().for_each(|run| run.committing());
        let answers = match store.record_and_commit(lent, &marks).await {
            Ok(answers) if answers.len() == events => answers,
            Ok(_) => {
                let silent = Error::new(ErrorKind::Internal, "record").because("the store did not answer for each");
                return each(&runs, |_| Ended::Unknown(told_again(&silent, "record")));
            }
            Err(error) if error.kind() == ErrorKind::Unknown => {
                return each(&runs, |_| Ended::Unknown(told_again(&error, "commit")));
            }
            Err(error) => return unmarked(&runs, error),
        };
        // Another transaction of such a lease committed before, or another holds the event: nothing was committed.
        let is_committed = answers.iter().all(|answer| matches!(answer, Recorded::Done | Recorded::Vanished));
        let end = |answer| match answer {
            Recorded::Done | Recorded::Vanished if !is_committed => Ended::Apart(Apart::AGAIN),
            ended => Ended::Recorded(ended),
        };
        answers.into_iter().map(end).collect()
    })
}

fn each(runs: &[Arc<Run>], end: impl Fn(&Run) -> Ended) -> Vec<Ended> {
    runs.iter().map(|run| end(run)).collect()
}

/// Marks that were not written, and so no effect either.
fn unmarked(runs: &[Arc<Run>], error: Error) -> Vec<Ended> {
    match error.kind() {
        ErrorKind::Rejected if runs.len() > 1 => {
            failed(runs.len(), Failure::retryable("its transaction cannot be used").with_source(error))
        }
        ErrorKind::Rejected => vec![unwritten(error)],
        _ => each(runs, |_| Ended::StoreFailed(told_again(&error, "record"))),
    }
}

/// One error for many events.
fn told_again(error: &Error, operation: &'static str) -> Error {
    Error::new(error.kind(), operation).because(error.to_string())
}
