//! Routes with their types forgotten: read a message, start its handler, say how it ended.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tokio::time::{Instant, timeout};

use super::Event;
use super::gather::Gather;
use super::versions::Decode;
use crate::context::Context;
use crate::error::{Error, ErrorKind};
use crate::handler::{Failure, IntoFailure, TxHandler};
use crate::message::{Defect, Message};
use crate::run::{Run, Stop};
use crate::store::{Outcome, Recorded, TransactionalStore};

/// How a run of a handler ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The effect took place; the runtime records it.
    Effect,
    /// The effect and the mark were written together, or were not, as this says.
    Recorded(Recorded),
    /// Whether they were written is unknown: claim again with the same token and see.
    Unknown(Error),
    /// It failed.
    Failed(Failure),
    /// Nothing is known of this event: its batch came to nothing. It runs again under the same lease.
    Apart(Apart),
    /// The store could not begin or write the transaction: not the handler's failure.
    StoreFailed(Error),
}

/// How an event goes on whose batch came to nothing.
#[derive(Debug)]
pub(crate) struct Apart {
    /// As a batch of its own.
    pub(crate) alone: bool,
    /// Why, and how many events it was: told with one of them.
    pub(crate) why: Option<(usize, Failure)>,
}

impl Apart {
    /// Together with others once more.
    pub(crate) const AGAIN: Self = Self { alone: false, why: None };

    /// Each of `events` alone, to find out whose doing it was.
    pub(crate) fn each_alone(events: usize, failure: Failure) -> Vec<Ended> {
        let mut why = Some((events, failure));
        (0..events).map(|_| Ended::Apart(Self { alone: true, why: why.take() })).collect()
    }
}

pub(super) fn ended<E: IntoFailure>(result: Result<(), E>) -> Ended {
    match result {
        Ok(()) => Ended::Effect,
        Err(error) => Ended::Failed(error.into_failure()),
    }
}

/// Runs a transactional handler: begin, handler, mark, commit. Dropping it at any point rolls back.
pub(super) async fn in_transaction<E, S, T, H>(
    store: T,
    handler: Arc<H>,
    event: E,
    run: Arc<Run>,
    state: Arc<S>,
) -> Ended
where
    T: TransactionalStore,
    H: TxHandler<E, T::Tx, S>,
{
    // Its lease is renewed meanwhile: without a bound, a store that does not answer would hold the event for ever.
    let (tx, lent) = match timeout(run.remaining(), store.begin()).await {
        Ok(Ok(begun)) => begun,
        Ok(Err(error)) => return Ended::StoreFailed(error),
        Err(_) => {
            let why = "no transaction within the time that the handler has";
            return Ended::StoreFailed(Error::new(ErrorKind::Unavailable, "begin").because(why));
        }
    };
    // Waiting for a transaction was not the handler's time.
    run.begin(Instant::now());
    if let Err(error) = handler.handle(event, tx, Context::new(Arc::clone(&run), state)).await {
        return Ended::Failed(error.into_failure());
    }
    if run.stopped() == Some(Stop::LeaseLost) {
        return Ended::Recorded(Recorded::Fenced);
    }
    run.committing();
    let marks = [(run.lease, Outcome::Processed)];
    let committed = match run.next() {
        None => store.record_and_commit(lent, &marks).await,
        Some((standby, next)) => {
            let asked = Instant::now();
            let committed = store.commit_and_claim(lent, &marks, &next.request, standby.lease()).await;
            committed.map(|(answers, granted)| {
                standby.answer(next, granted.map(|lease| (lease, asked)), || run.pass_permit());
                answers
            })
        }
    };
    match committed {
        // Not done, another holds the event or this very lease's effects are committed already: these are rolled back.
        Ok(answers) => match answers.first() {
            Some(answer) => Ended::Recorded(*answer),
            None => Ended::Unknown(Error::new(ErrorKind::Internal, "record").because("the store answered nothing")),
        },
        Err(error) if error.kind() == ErrorKind::Unknown => Ended::Unknown(error),
        Err(error) => unwritten(error),
    }
}

/// A mark that was not written, and so no effect either. What the store rejects is the handler's doing: it ended the
/// transaction itself, kept it, or ignored that it was broken.
pub(super) fn unwritten(error: Error) -> Ended {
    match error.kind() {
        ErrorKind::Rejected => Ended::Failed(Failure::retryable("its transaction cannot be used").with_source(error)),
        _ => Ended::StoreFailed(error),
    }
}

/// A handler run, types forgotten.
pub(crate) type Running = Pin<Box<dyn Future<Output = Ended> + Send>>;

/// A route, types forgotten: reads a message into something that can be started.
pub(crate) trait Start: Send + Sync {
    fn prepare(&self, message: &Arc<Message>, version: u32, json_depth_max: usize) -> Result<Box<dyn Ready>, Defect>;
    fn knows(&self, version: u32) -> bool;
    /// Where its events gather, if its handler takes many.
    fn gathers(&self) -> Option<Arc<dyn Gather>> {
        None
    }
}

/// An event that was read and can be started once.
pub(crate) trait Ready: Send {
    /// Starts the handler; `None` when the event waits where its batch gathers.
    fn start(self: Box<Self>, run: Arc<Run>) -> Option<Running>;
}

struct Prepared<E, R> {
    event: E,
    run: Arc<R>,
}

impl<E, R, Fut> Ready for Prepared<E, R>
where
    E: Send,
    R: Fn(E, Arc<Run>) -> Fut + Send + Sync,
    Fut: Future<Output = Ended> + Send + 'static,
{
    fn start(self: Box<Self>, run: Arc<Run>) -> Option<Running> {
        Some(Box::pin((self.run)(self.event, run)))
    }
}

/// A handler of whole messages.
pub(super) struct Undecoded<R> {
    pub(super) run: Arc<R>,
}

impl<R, Fut> Start for Undecoded<R>
where
    R: Fn(Arc<Message>, Arc<Run>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Ended> + Send + 'static,
{
    fn prepare(&self, message: &Arc<Message>, _: u32, _: usize) -> Result<Box<dyn Ready>, Defect> {
        Ok(Box::new(Prepared { event: Arc::clone(message), run: Arc::clone(&self.run) }))
    }

    fn knows(&self, _: u32) -> bool {
        true
    }
}

/// A handler of events.
pub(super) struct Typed<E, R> {
    pub(super) decode: Decode<E>,
    pub(super) run: Arc<R>,
}

impl<E, R, Fut> Start for Typed<E, R>
where
    E: Event,
    R: Fn(E, Arc<Run>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Ended> + Send + 'static,
{
    fn prepare(&self, message: &Arc<Message>, version: u32, json_depth_max: usize) -> Result<Box<dyn Ready>, Defect> {
        let event = self.decode.read(message, version, json_depth_max)?;
        Ok(Box::new(Prepared { event, run: Arc::clone(&self.run) }))
    }

    fn knows(&self, version: u32) -> bool {
        version == E::VERSION || self.decode.chain(version).is_some()
    }
}
