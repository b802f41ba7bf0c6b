//! Events and routes: which handler takes a message, decided by its type alone, before anything is claimed.
//!
//! Routes forget the types here: behind [`Routes`] there is only "prepare this message" and "start this run".

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};

use crate::cloudevents;
use crate::context::Context;
use crate::error::{Error, ErrorKind};
use crate::handler::{Failure, Handler, IntoFailure, TxHandler};
use crate::message::{Defect, Message};
use crate::retry::RetryPolicy;
use crate::run::{Run, Stop};
use crate::store::{Outcome, Recorded, TransactionalStore};

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
    ty.rsplit_once(".v")
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

    /// What the handler does outside the store's transaction. Default: nothing is declared.
    pub fn effects(mut self, effects: Effects) -> Self {
        self.info.effects = effects;
        self
    }

    /// How long one attempt may take. Default: the consumer's.
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
        let info = RouteInfo { event, transactional, effects: Effects::Undeclared, timeout: None, retry: None };
        Self { info, bind: Box::new(bind), marker: PhantomData }
    }
}

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
    /// The store could not begin or write the transaction: not the handler's failure.
    StoreFailed(Error),
}

fn ended<E: IntoFailure>(result: Result<(), E>) -> Ended {
    match result {
        Ok(()) => Ended::Effect,
        Err(error) => Ended::Failed(error.into_failure()),
    }
}

/// Runs a transactional handler: begin, handler, mark, commit. Dropping it at any point rolls back.
async fn in_transaction<E, S, T, H>(store: T, handler: Arc<H>, event: E, run: Arc<Run>, state: Arc<S>) -> Ended
where
    T: TransactionalStore,
    H: TxHandler<E, T::Tx, S>,
{
    let lease = run.lease;
    // Its lease is renewed meanwhile: without a bound, a store that does not answer would hold the event for ever.
    let (tx, mut lent) = match timeout(run.remaining(), store.begin()).await {
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
    let answer = match store.record_in(&mut lent, &[(lease, Outcome::Processed)]).await {
        Ok(answers) => answers.first().copied(),
        Err(error) => return unwritten(error),
    };
    run.committing();
    match answer {
        Some(Recorded::Done | Recorded::Vanished) => match store.commit(lent).await {
            Ok(()) => Ended::Recorded(answer.unwrap_or(Recorded::Done)),
            Err(error) if error.kind() == ErrorKind::Rejected => unwritten(error),
            Err(error) => Ended::Unknown(error),
        },
        // Another transaction of this very lease committed before: this one's effects must not join it.
        Some(answer @ (Recorded::AlreadyDone | Recorded::Fenced)) => Ended::Recorded(answer),
        None => Ended::StoreFailed(Error::new(ErrorKind::Internal, "record").because("the store answered nothing")),
    }
}

/// A mark that was not written, and so no effect either. What the store rejects is the handler's doing: it ended the
/// transaction itself, kept it, or ignored that it was broken.
fn unwritten(error: Error) -> Ended {
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
}

/// An event that was read and can be started once.
pub(crate) trait Ready: Send {
    fn start(self: Box<Self>, run: Arc<Run>) -> Running;
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
    fn start(self: Box<Self>, run: Arc<Run>) -> Running {
        Box::pin((self.run)(self.event, run))
    }
}

struct Undecoded<R> {
    run: Arc<R>,
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

struct Typed<E, R> {
    decode: Decode<E>,
    run: Arc<R>,
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

/// Reads data of any known version into the newest.
struct Decode<E> {
    upcasts: Vec<Upcast>,
    newest: PhantomData<fn() -> E>,
}

impl<E: Event> Decode<E> {
    fn new(upcasts: Vec<Upcast>) -> Self {
        Self { upcasts: upcasts.into_iter().filter(|upcast| upcast.ty == E::TYPE).collect(), newest: PhantomData }
    }

    fn read(&self, message: &Message, version: u32, json_depth_max: usize) -> Result<E, Defect> {
        if let Some(media) = message.attributes.content_type.as_deref().filter(|media| !cloudevents::is_json(media)) {
            return Err(Defect::undecodable(format!("datacontenttype {media:?} is not JSON; take it with on_any")));
        }
        if cloudevents::json_depth_exceeds(&message.data, json_depth_max) {
            return Err(Defect::beyond_limit(format!("data is nested deeper than json_depth_max = {json_depth_max}")));
        }
        // serde_json's texts tell line, column and what was expected; a wrong value's text they may quote is cut later.
        let unreadable = |e: serde_json::Error| {
            Defect::undecodable(format!("data does not read as {}: {}", type_name::<E>(), without_values(&e)))
        };
        if version == E::VERSION {
            return serde_json::from_slice(&message.data).map_err(unreadable);
        }
        let chain = self.chain(version).unwrap_or_default();
        let mut steps = chain.iter();
        let oldest = steps.next().ok_or_else(|| Defect::undecodable(format!("version {version} is not known")))?;
        let mut value = (oldest.lift)((oldest.decode)(&message.data).map_err(unreadable)?);
        for step in steps {
            value = (step.lift)(value);
        }
        match value.downcast::<E>() {
            Ok(event) => Ok(*event),
            Err(_) => {
                Err(Defect::undecodable(format!("no upcast from version {version} ends at {}", type_name::<E>())))
            }
        }
    }

    /// The upcasts from `version` to the newest, in order.
    fn chain(&self, version: u32) -> Option<Vec<&Upcast>> {
        let mut chain = Vec::new();
        let mut at = version;
        while at != E::VERSION {
            let step = self.upcasts.iter().find(|upcast| upcast.from == at && upcast.to > at)?;
            at = step.to;
            chain.push(step);
        }
        (!chain.is_empty()).then_some(chain)
    }
}

/// Where and what kind, but never the offending value: payloads do not go into error texts.
fn without_values(error: &serde_json::Error) -> String {
    let kind = match error.classify() {
        serde_json::error::Category::Syntax => "not JSON",
        serde_json::error::Category::Eof => "JSON ends too early",
        serde_json::error::Category::Data => "another shape",
        serde_json::error::Category::Io => "not readable",
    };
    format!("{kind} at line {} column {}", error.line(), error.column())
}

/// One step from an older version to a newer one.
#[derive(Clone)]
pub(crate) struct Upcast {
    pub(crate) ty: &'static str,
    pub(crate) target: &'static str,
    pub(crate) from: u32,
    pub(crate) to: u32,
    decode: fn(&[u8]) -> serde_json::Result<Box<dyn Any + Send>>,
    lift: fn(Box<dyn Any + Send>) -> Box<dyn Any + Send>,
}

impl Upcast {
    pub(crate) fn new<A: Event, B: Event + From<A>>() -> Self {
        Self {
            ty: A::TYPE,
            target: B::TYPE,
            from: A::VERSION,
            to: B::VERSION,
            decode: |data| Ok(Box::new(serde_json::from_slice::<A>(data)?)),
            // A chain is built of matching versions of one type, so the downcast finds what the step before it made.
            lift: |older| match older.downcast::<A>() {
                Ok(older) => Box::new(B::from(*older)),
                Err(other) => other,
            },
        }
    }
}

impl fmt::Debug for Upcast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} v{} -> v{}", self.ty, self.from, self.to)
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
    use serde::Deserialize;

    #[test]
    fn the_version_is_a_suffix_and_a_bare_type_is_version_one() {
        assert_eq!(split_version("order.placed"), ("order.placed", 1));
        assert_eq!(split_version("order.placed.v2"), ("order.placed", 2));
        assert_eq!(split_version("order.v12"), ("order", 12));
        for no_version in ["order.v", "order.v0", "order.v02", "order.vx", "v2", "order.v99999999999"] {
            assert_eq!(split_version(no_version), (no_version, 1));
        }
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct V1 {
        cents: i64,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct V2 {
        cents: i64,
        currency: String,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct V3 {
        amount: String,
    }
    impl Event for V1 {
        const TYPE: &'static str = "paid";
    }
    impl Event for V2 {
        const TYPE: &'static str = "paid";
        const VERSION: u32 = 2;
    }
    impl Event for V3 {
        const TYPE: &'static str = "paid";
        const VERSION: u32 = 3;
    }
    impl From<V1> for V2 {
        fn from(v: V1) -> Self {
            Self { cents: v.cents, currency: "EUR".into() }
        }
    }
    impl From<V2> for V3 {
        fn from(v: V2) -> Self {
            Self { amount: format!("{} {}", v.cents, v.currency) }
        }
    }

    #[test]
    fn an_old_version_is_lifted_step_by_step_and_a_newer_one_is_not_known() {
        let decode = Decode::<V3>::new(vec![Upcast::new::<V2, V3>(), Upcast::new::<V1, V2>()]);
        let message = Message::event("/s", "1", "paid").with_json(&V1 { cents: 5 }).expect("JSON");
        assert_eq!(decode.read(&message, 1, 64).expect("lifted"), V3 { amount: "5 EUR".into() });
        assert!(decode.chain(4).is_none());
        assert!(decode.read(&message, 4, 64).is_err());
    }

    #[test]
    fn an_error_text_never_quotes_the_payload() {
        let decode = Decode::<V1>::new(Vec::new());
        let message = Message::event("/s", "1", "paid").with_data("application/json", r#"{"cents":"s3cret"}"#);
        let defect = decode.read(&message, 1, 64).expect_err("another shape");
        assert!(!defect.detail.contains("s3cret"), "{defect}");
        assert!(defect.detail.contains("line 1"), "{defect}");
    }
}
