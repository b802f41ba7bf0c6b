//! Batch handlers: many events at once, an outcome for each.

use std::fmt;
use std::future::Future;

use crate::context::Context;
use crate::handler::{Failure, IntoFailure};

/// One event of a batch, with a context of its own: its attempt, its key, its fence.
pub struct Item<E, S> {
    /// The event.
    pub event: E,
    /// What is known of it.
    pub cx: Context<S>,
}

impl<E: fmt::Debug, S> fmt::Debug for Item<E, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Item").field("event", &self.event).field("cx", &self.cx).finish()
    }
}

/// How each event of a batch ended, in the order of the batch: [`all_done`](Self::all_done), or collected from one
/// `Result` for each.
///
/// ```
/// use hapax::{Context, Failure, Item, Outcomes};
///
/// async fn index(batch: Vec<Item<u32, ()>>) -> Result<Outcomes, Failure> {
///     let document = |item: &Item<u32, ()>| {
///         if item.event == 0 { Err(Failure::permanent("no document has this number")) } else { Ok(item.event) }
///     };
///     let documents: Vec<_> = batch.iter().map(document).collect();
///     // .. send those that are Ok in one request; `?` on its error fails the batch as a whole ..
///     Ok(documents.into_iter().map(|document| document.map(drop)).collect())
/// }
/// ```
#[derive(Debug)]
pub struct Outcomes(Each);

#[derive(Debug)]
enum Each {
    AllDone,
    Collected(Vec<Result<(), Failure>>),
}

impl Outcomes {
    /// Every event of the batch took effect.
    pub fn all_done() -> Self {
        Self(Each::AllDone)
    }

    pub(crate) fn into_each(self, events: usize) -> Vec<Result<(), Failure>> {
        match self.0 {
            Each::AllDone => (0..events).map(|_| Ok(())).collect(),
            Each::Collected(outcomes) => outcomes,
        }
    }
}

impl<F: IntoFailure> FromIterator<Result<(), F>> for Outcomes {
    fn from_iter<I: IntoIterator<Item = Result<(), F>>>(outcomes: I) -> Self {
        let outcomes = outcomes.into_iter().map(|outcome| outcome.map_err(IntoFailure::into_failure));
        Self(Each::Collected(outcomes.collect()))
    }
}

/// Takes many events at once. Plain async functions are batch handlers.
///
/// Each event is claimed, counted and recorded by itself. An item that fails fails alone. `Err` fails the batch as a whole,
/// as a panic and the timeout do: then each of its events is run again by itself, as a batch of one, under the same claim.
/// What the handler had done by then it does again.
///
/// An item that loses its lease does not stop the batch: before an effect that must not overlap with another's, look at
/// [`cx.stopped()`](Context::stopped) of that item. Its outcome is not recorded then, and it is claimed again.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no batch handler for `{E}` with state `{S}`",
    label = "not a batch handler",
    note = "a batch handler is `async fn(Vec<Item<E, S>>) -> Result<Outcomes, F>` where F is `hapax::Failure` or implements `hapax::IntoFailure`",
    note = "`S` is what `.state(..)` was given before this handler was added"
)]
pub trait BatchHandler<E, S>: Send + Sync + 'static {
    /// How the batch fails as a whole.
    type Error: IntoFailure;

    /// Makes the events take effect.
    fn handle(&self, batch: Vec<Item<E, S>>) -> impl Future<Output = Result<Outcomes, Self::Error>> + Send;
}

impl<E, S, F, Fut, Er> BatchHandler<E, S> for F
where
    F: Fn(Vec<Item<E, S>>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Outcomes, Er>> + Send,
    Er: IntoFailure,
{
    type Error = Er;

    fn handle(&self, batch: Vec<Item<E, S>>) -> impl Future<Output = Result<Outcomes, Er>> + Send {
        self(batch)
    }
}

/// Takes many events at once and one transaction of the store's: their effects through it and their marks commit
/// together.
///
/// Nothing commits where an item fails: its effects cannot be told from those of the others. It fails alone all the same;
/// the others are run again without it, at once and under the same claims, and nothing of the first run is left.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no transactional batch handler for `{E}` with transaction `{T}` and state `{S}`",
    label = "not a transactional batch handler",
    note = "a transactional batch handler is `async fn(Vec<Item<E, S>>, Tx) -> Result<Outcomes, F>` where Tx is the store's own (`SqliteTx`, `PgTx`)"
)]
pub trait TxBatchHandler<E, T, S>: Send + Sync + 'static {
    /// How the batch fails as a whole.
    type Error: IntoFailure;

    /// Makes the events take effect through `tx`.
    fn handle(&self, batch: Vec<Item<E, S>>, tx: T) -> impl Future<Output = Result<Outcomes, Self::Error>> + Send;
}

impl<E, T, S, F, Fut, Er> TxBatchHandler<E, T, S> for F
where
    F: Fn(Vec<Item<E, S>>, T) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Outcomes, Er>> + Send,
    Er: IntoFailure,
{
    type Error = Er;

    fn handle(&self, batch: Vec<Item<E, S>>, tx: T) -> impl Future<Output = Result<Outcomes, Er>> + Send {
        self(batch, tx)
    }
}
