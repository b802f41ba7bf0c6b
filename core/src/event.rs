//! Events and routes: which handler takes a message, decided by its type alone, before anything is claimed.
//!
//! Routes forget the types here: behind [`Routes`] there is only "prepare this message" and "start this run".

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;

use crate::batch::{BatchHandler, TxBatchHandler};
use crate::context::Context;
use crate::handler::{Handler, TxHandler};
use crate::message::Message;
use crate::retry::RetryPolicy;
use crate::run::Run;
use crate::store::TransactionalStore;
use gather::{Batched, together, together_in_transaction};
use start::{Typed, Undecoded, ended, in_transaction};
use versions::Decode;

mod gather;
mod start;
mod versions;

pub(crate) use gather::{Gather, Launched, RunningBatch};
pub(crate) use start::{Apart, Ended, Ready, Running, Start};
pub(crate) use versions::Upcast;

/// A message with a type, a version and a JSON form.
///
/// On the wire the version is a suffix of the type, `.vN`; a bare type is version 1 (CloudEvents primer, "Versioning of
/// CloudEvents").
///
/// ```
/// use hapax::Event;
/// # use serde::{Deserialize, Serialize};
/// #[derive(Serialize, Deserialize)]
/// struct OrderPlaced { order: u64, cents: i64 }
/// impl Event for OrderPlaced {
///     const TYPE: &'static str = "com.shop.order.placed";
///     const VERSION: u32 = 2;   // arrives as com.shop.order.placed.v2
/// }
/// ```
pub trait Event: Serialize + DeserializeOwned + Send + 'static {
    /// The type without a version.
    const TYPE: &'static str;
    /// The version of this shape.
    const VERSION: u32 = 1;
}

/// The type of `E` as it travels.
pub(crate) fn type_name<E: Event>() -> String {
    if E::VERSION == 1 { E::TYPE.to_owned() } else { format!("{}.v{}", E::TYPE, E::VERSION) }
}

/// Type and version of a type as it travels.
pub(crate) fn split_version(ty: &str) -> (&str, u32) {
    // Behind the last dot, since a version has none.
    ty.rsplit_once('.')
        .and_then(|(base, version)| Some((base, version.strip_prefix('v')?)))
        .filter(|(_, digits)| !digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|(base, digits)| Some((base, digits.parse().ok()?)))
        .unwrap_or((ty, 1))
}

/// What a handler does outside the store's transaction, as its author declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effects {
    /// Nothing is declared: an effect can repeat in the declared windows.
    Undeclared,
    /// Every call downstream carries [`Context::key`] or [`Context::fence`], and callees keep keys this long.
    Keyed(Duration),
}

impl Effects {
    /// Every call downstream carries the key or the fence; callees keep keys for `kept`.
    pub const fn keyed(kept: Duration) -> Self {
        Self::Keyed(kept)
    }
}

/// What happens to types without a handler: decided before the claim, without asking the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Otherwise {
    /// They are acked.
    Ignore,
    /// They go to the dead letters as [`Reason::UnknownType`](crate::Reason::UnknownType).
    DeadLetter,
}

/// One handler and its own settings.
///
/// `S` is the consumer's state, `T` its store; both are inferred.
#[must_use = "a route does nothing until it is added to a consumer"]
pub struct Route<S, T> {
    pub(crate) info: RouteInfo,
    #[allow(clippy::type_complexity, reason = "made once and taken apart once, here and in the builder")]
    pub(crate) bind: Box<dyn FnOnce(Arc<S>, &T, Vec<Upcast>) -> Arc<dyn Start> + Send>,
    marker: PhantomData<fn(S, T)>,
}

/// What is known of a route without its types.
#[derive(Clone, Debug)]
pub(crate) struct RouteInfo {
    /// Type and version; none for `on_any`.
    pub(crate) event: Option<(&'static str, u32)>,
    pub(crate) transactional: bool,
    /// Takes many events at once.
    pub(crate) batched: bool,
    pub(crate) effects: Effects,
    pub(crate) timeout: Option<Duration>,
    pub(crate) retry: Option<RetryPolicy>,
}

impl RouteInfo {
    /// The route's name in reports: the type, or `*`.
    pub(crate) fn name(&self) -> &'static str {
        self.event.map_or("*", |(ty, _)| ty)
    }
}

impl<S, T> fmt::Debug for Route<S, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Route").field("info", &self.info).finish_non_exhaustive()
    }
}

impl<S: Send + Sync + 'static, T: 'static> Route<S, T> {
    /// Events of type `E`.
    pub fn on<E: Event, H: Handler<E, S>>(handler: H) -> Self {
        let handler = Arc::new(handler);
        Self::new(Some((E::TYPE, E::VERSION)), false, |state, _, upcasts| {
            let run = move |event: E, run: Arc<Run>| {
                let (handler, cx) = (Arc::clone(&handler), Context::new(run, Arc::clone(&state)));
                async move { ended(handler.handle(event, cx).await) }
            };
            Arc::new(Typed { decode: Decode::new(upcasts), run: Arc::new(run) })
        })
    }

    /// Every message without a handler of its own, undecoded.
    pub fn on_any<H: Handler<Arc<Message>, S>>(handler: H) -> Self {
        let handler = Arc::new(handler);
        Self::new(None, false, |state, _, _| {
            let run = move |message: Arc<Message>, run: Arc<Run>| {
                let (handler, cx) = (Arc::clone(&handler), Context::new(run, Arc::clone(&state)));
                async move { ended(handler.handle(message, cx).await) }
            };
            Arc::new(Undecoded { run: Arc::new(run) })
        })
    }

    /// Events of type `E`, with the store's transaction.
    pub fn on_tx<E: Event, H: TxHandler<E, T::Tx, S>>(handler: H) -> Self
    where
        T: TransactionalStore,
    {
        let handler = Arc::new(handler);
        Self::new(Some((E::TYPE, E::VERSION)), true, |state, store: &T, upcasts| {
            let store = store.clone();
            let run = move |event: E, run: Arc<Run>| {
                in_transaction(store.clone(), Arc::clone(&handler), event, run, Arc::clone(&state))
            };
            Arc::new(Typed { decode: Decode::new(upcasts), run: Arc::new(run) })
        })
    }

    /// Every message without a handler of its own, undecoded, with the store's transaction.
    pub fn on_any_tx<H: TxHandler<Arc<Message>, T::Tx, S>>(handler: H) -> Self
    where
        T: TransactionalStore,
    {
        let handler = Arc::new(handler);
        Self::new(None, true, |state, store: &T, _| {
            let store = store.clone();
            let run = move |message: Arc<Message>, run: Arc<Run>| {
                in_transaction(store.clone(), Arc::clone(&handler), message, run, Arc::clone(&state))
            };
            Arc::new(Undecoded { run: Arc::new(run) })
        })
    }

    /// Events of type `E`, many at once.
    pub fn on_batch<E: Event, H: BatchHandler<E, S>>(handler: H) -> Self {
        let handler = Arc::new(handler);
        let event = Some((E::TYPE, E::VERSION));
        Self::new(event, false, |state, _, upcasts| {
            let run = move |batch: Vec<(E, Arc<Run>)>, _: Arc<Semaphore>| together(&handler, &state, batch);
            Arc::new(Batched::new(Decode::new(upcasts), run))
        })
        .batched()
    }

    /// Events of type `E`, many at once, with one transaction of the store's.
    pub fn on_batch_tx<E: Event, H: TxBatchHandler<E, T::Tx, S>>(handler: H) -> Self
    where
        T: TransactionalStore,
    {
        let handler = Arc::new(handler);
        let event = Some((E::TYPE, E::VERSION));
        Self::new(event, true, |state, store: &T, upcasts| {
            let store = store.clone();
            let run = move |batch: Vec<(E, Arc<Run>)>, transactions: Arc<Semaphore>| {
                let (handler, state) = (Arc::clone(&handler), Arc::clone(&state));
                together_in_transaction(store.clone(), handler, state, batch, transactions)
            };
            Arc::new(Batched::new(Decode::new(upcasts), run))
        })
        .batched()
    }

    /// What the handler does outside the store's transaction. Default: nothing is declared.
    pub fn effects(mut self, effects: Effects) -> Self {
        self.info.effects = effects;
        self
    }

    /// How long one attempt may take; of a batch handler, one batch. Default: the consumer's.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.info.timeout = Some(timeout);
        self
    }

    /// How often this handler is tried. Default: the consumer's.
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.info.retry = Some(retry);
        self
    }

    fn new(
        event: Option<(&'static str, u32)>,
        transactional: bool,
        bind: impl FnOnce(Arc<S>, &T, Vec<Upcast>) -> Arc<dyn Start> + Send + 'static,
    ) -> Self {
        let (effects, batched) = (Effects::Undeclared, false);
        let info = RouteInfo { event, transactional, batched, effects, timeout: None, retry: None };
        Self { info, bind: Box::new(bind), marker: PhantomData }
    }

    fn batched(mut self) -> Self {
        self.info.batched = true;
        self
    }
}

/// All routes of a consumer.
pub(crate) struct Routes {
    pub(crate) typed: HashMap<&'static str, (u32, Arc<dyn Start>)>,
    pub(crate) any: Option<(u32, Arc<dyn Start>)>,
    pub(crate) otherwise: Option<Otherwise>,
}

/// Where a message goes.
pub(crate) enum Resolved<'a> {
    /// To this route (its number in the builder's list), as this version.
    Route(u32, &'a Arc<dyn Start>, u32),
    /// Its type has a handler, its version has none.
    UnknownVersion,
    /// Its type has no handler.
    Otherwise(Otherwise),
}

impl Routes {
    /// Where events of batch handlers gather, with the numbers of their routes.
    pub(crate) fn gathers(&self) -> impl Iterator<Item = (usize, Arc<dyn Gather>)> {
        self.typed.values().filter_map(|(number, start)| Some((*number as usize, start.gathers()?)))
    }

    pub(crate) fn resolve(&self, ty: Option<&str>) -> Resolved<'_> {
        let (base, version) = ty.map_or(("", 1), split_version);
        match self.typed.get(base) {
            Some((number, route)) if route.knows(version) => return Resolved::Route(*number, route, version),
            Some(_) if self.any.is_none() => return Resolved::UnknownVersion,
            _ => {}
        }
        match &self.any {
            Some((number, route)) => Resolved::Route(*number, route, version),
            None => Resolved::Otherwise(self.otherwise.unwrap_or(Otherwise::DeadLetter)),
        }
    }
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut types: Vec<_> = self.typed.keys().collect();
        types.sort_unstable();
        f.debug_struct("Routes").field("types", &types).field("any", &self.any.is_some()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_a_suffix_and_a_bare_type_is_version_one() {
        assert_eq!(split_version("order.placed"), ("order.placed", 1));
        assert_eq!(split_version("order.placed.v2"), ("order.placed", 2));
        assert_eq!(split_version("order.v12"), ("order", 12));
        for no_version in ["order.v", "order.v0", "order.v02", "order.vx", "v2", "order.v99999999999"] {
            assert_eq!(split_version(no_version), (no_version, 1));
        }
    }
}
