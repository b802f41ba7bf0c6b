//! Every setting, its default, its check.
//!
//! `build()` asks broker and store what they can do, checks everything against everything (`checks.rs`), decides what
//! the settings left open (`plan.rs`), and either tells all faults at once or hands the parts to the runtime.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::Consumer;
use crate::batch::{BatchHandler, TxBatchHandler};
use crate::broker::{Broker, Capabilities};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Otherwise, Route, RouteInfo, Routes, Upcast};
use crate::fault::{BuildError, Fault, Probed};
use crate::guarantee::windows::{Facts, compute};
use crate::guarantee::{Guarantee, Level, Window};
use crate::handler::{Handler, TxHandler};
use crate::identity::IdFrom;
use crate::message::Message;
use crate::observer::{Observer, Telemetry};
use crate::publisher::Publisher;
use crate::retry::RetryPolicy;
use crate::settings::{Order, Settings};
use crate::stepping::Stepper;
use crate::store::{ConsumerId, ProcessedStore, StoreHealth, TransactionalStore};
use plan::Plan;

mod checks;
mod plan;
mod setters;
#[cfg(test)]
mod tests;

/// What happens to a message in which no extractor finds an id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MissingId {
    /// It goes to the dead letters as [`Reason::MissingId`](crate::Reason::MissingId).
    #[default]
    DeadLetter,
    /// It is acked.
    Ignore,
}

/// Puts a consumer together; made by [`Consumer::builder`].
///
/// `S` is the state that handlers see, `T` the store. Everything has a default but name, broker, store, one handler, and
/// what happens to types without a handler.
#[must_use = "nothing happens before .build().await"]
pub struct ConsumerBuilder<S, T> {
    state: Arc<S>,
    store: T,
    routes: Vec<Route<S, T>>,
    choices: Choices,
}

/// What was chosen, without the types of state and store.
struct Choices {
    name: String,
    broker: Arc<dyn Broker>,
    upcasts: Vec<Upcast>,
    otherwise: Option<Otherwise>,
    publisher: Option<Arc<dyn Publisher>>,
    observer: Option<Arc<dyn Observer>>,
    settings: Settings,
    retry: Option<RetryPolicy>,
    extractors: Vec<IdFrom>,
    missing_id: MissingId,
    allowed: Vec<Window>,
    required: Level,
    seed: Option<u64>,
    redact: Option<fn(&str) -> String>,
    stepper: Option<Arc<dyn Stepper>>,
    /// Found while methods were called.
    faults: Vec<Fault>,
}

/// What the runtime is made of: checked, every choice made.
pub(crate) struct Parts {
    pub(crate) name: Arc<str>,
    pub(crate) broker: Arc<dyn Broker>,
    pub(crate) store: Arc<dyn ProcessedStore>,
    pub(crate) consumer: ConsumerId,
    pub(crate) publisher: Option<Arc<dyn Publisher>>,
    pub(crate) observer: Arc<dyn Observer>,
    /// With `in_flight_max`, `concurrency` and `call_timeout` as they hold.
    pub(crate) settings: Settings,
    pub(crate) order: Order,
    /// Of handlers without one of their own.
    pub(crate) timeout: Duration,
    /// Of handlers without one of their own.
    pub(crate) retry: RetryPolicy,
    /// Most transactional handlers at once.
    pub(crate) transactions_max: usize,
    pub(crate) routes: Routes,
    /// By route number, with the timeout and the retry policy that hold for each.
    pub(crate) infos: Vec<RouteInfo>,
    pub(crate) extractors: Vec<IdFrom>,
    pub(crate) missing_id: MissingId,
    pub(crate) guarantee: Guarantee,
    pub(crate) capabilities: Capabilities,
    pub(crate) health: StoreHealth,
    pub(crate) seed: Option<u64>,
    pub(crate) redact: Option<fn(&str) -> String>,
    pub(crate) stepper: Option<Arc<dyn Stepper>>,
}

impl Consumer {
    /// A consumer called `name`, which is part of every record's key: change it, and every event is new.
    ///
    /// `broker` and `store` may be `Arc<dyn Broker>` and `Arc<dyn ProcessedStore>` too, chosen at run time.
    pub fn builder<T: ProcessedStore>(
        name: impl Into<String>,
        broker: impl Broker,
        store: T,
    ) -> ConsumerBuilder<(), T> {
        let choices = Choices {
            name: name.into(),
            broker: Arc::new(broker),
            upcasts: Vec::new(),
            otherwise: None,
            publisher: None,
            observer: None,
            settings: Settings::default(),
            retry: None,
            extractors: Vec::new(),
            missing_id: MissingId::default(),
            allowed: Vec::new(),
            required: Level::Deduplicated,
            seed: None,
            redact: None,
            stepper: None,
            faults: Vec::new(),
        };
        ConsumerBuilder { state: Arc::new(()), store, routes: Vec::new(), choices }
    }
}

impl<S: Send + Sync + 'static, T: ProcessedStore> ConsumerBuilder<S, T> {
    /// What handlers see as [`Context::state`](crate::Context::state). Goes before the handlers. Default: `()`.
    pub fn state<N: Send + Sync + 'static>(self, state: N) -> ConsumerBuilder<N, T> {
        self.shared_state(Arc::new(state))
    }

    /// As [`state`](Self::state), where others keep hold of it too.
    pub fn shared_state<N: Send + Sync + 'static>(mut self, state: Arc<N>) -> ConsumerBuilder<N, T> {
        if !self.routes.is_empty() {
            self.choices.faults.push(Fault::new(
                "state-after-handler",
                format!(".state(..) comes after {} handlers", self.routes.len()),
                "they were added for another state and could not see this one",
                ".state(..) before the first .on(..)",
            ));
        }
        ConsumerBuilder { state, store: self.store, routes: Vec::new(), choices: self.choices }
    }

    /// Handles events of type `E`.
    pub fn on<E: Event, H: Handler<E, S>>(self, handler: H) -> Self {
        self.add(Route::on(handler))
    }

    /// Handles every message without a handler of its own, undecoded.
    pub fn on_any<H: Handler<Arc<Message>, S>>(self, handler: H) -> Self {
        self.add(Route::on_any(handler))
    }

    /// Handles events of type `E` in the store's transaction: effects and mark commit together.
    pub fn on_tx<E: Event, H: TxHandler<E, T::Tx, S>>(self, handler: H) -> Self
    where
        T: TransactionalStore,
    {
        self.add(Route::on_tx(handler))
    }

    /// Handles every message without a handler of its own, undecoded, in the store's transaction.
    pub fn on_any_tx<H: TxHandler<Arc<Message>, T::Tx, S>>(self, handler: H) -> Self
    where
        T: TransactionalStore,
    {
        self.add(Route::on_any_tx(handler))
    }

    /// Handles events of type `E`, many at once: up to `batch_max` of what was claimed while the batch before ran, or for
    /// half a second. A batch can be as large as `concurrency` lets claims be.
    pub fn on_batch<E: Event, H: BatchHandler<E, S>>(self, handler: H) -> Self {
        self.add(Route::on_batch(handler))
    }

    /// Handles events of type `E`, many at once, in one transaction of the store's: the effects and marks of all commit
    /// together.
    pub fn on_batch_tx<E: Event, H: TxBatchHandler<E, T::Tx, S>>(self, handler: H) -> Self
    where
        T: TransactionalStore,
    {
        self.add(Route::on_batch_tx(handler))
    }

    /// A handler with settings of its own.
    #[allow(clippy::should_implement_trait, reason = "adds a route; nobody adds builders")]
    pub fn add(mut self, route: Route<S, T>) -> Self {
        self.routes.push(route);
        self
    }

    /// Asks broker and store, checks everything, and builds the consumer. The broker is open afterwards, and nothing is
    /// received before [`run`](Consumer::run).
    ///
    /// # Errors
    /// Every fault at once, each with its remedy. The broker is closed again, and the store is not changed.
    pub async fn build(self) -> Result<Consumer, BuildError> {
        let Self { state, store, routes, mut choices } = self;
        let infos: Vec<_> = routes.iter().map(|route| route.info.clone()).collect();
        let mut bound = Routes { typed: HashMap::new(), any: None, otherwise: choices.otherwise };
        for (number, route) in (0..).zip(routes) {
            let start = (route.bind)(Arc::clone(&state), &store, choices.upcasts.clone());
            match route.info.event {
                Some((ty, _)) => drop(bound.typed.insert(ty, (number, start))),
                None => bound.any = Some((number, start)),
            }
        }
        let mut faults = std::mem::take(&mut choices.faults);
        faults.extend(checks::choices(&choices));
        faults.extend(checks::routes(&infos, choices.otherwise, &choices.upcasts));
        let store: Arc<dyn ProcessedStore> = Arc::new(store);
        choices.finish(store, bound, infos, faults).await.map(Consumer::assemble)
    }
}

impl Choices {
    async fn finish(
        self,
        store: Arc<dyn ProcessedStore>,
        routes: Routes,
        infos: Vec<RouteInfo>,
        mut faults: Vec<Fault>,
    ) -> Result<Parts, BuildError> {
        let broker = Arc::clone(&self.broker);
        // Broker and store are asked even where there are faults already, so that theirs are told with them.
        let deadline = self.settings.call_timeout.clamp(Duration::from_millis(10), Duration::from_secs(600));
        let limits = plan::limits(&self.settings, self.retry.as_ref(), &infos);
        let (opened, health) =
            tokio::join!(answer("open", deadline, broker.open(limits)), answer("probe", deadline, store.probe()));
        let is_open = opened.is_ok();
        let decided = match (opened, health) {
            (Ok(()), Ok(health)) => Some(self.decide(infos, broker.capabilities(), health, &mut faults)),
            (opened, health) => {
                faults.extend(opened.err().map(|error| Fault::probed(Probed::Broker, &error)));
                faults.extend(health.err().map(|error| Fault::probed(Probed::Store, &error)));
                None
            }
        };
        // The store is told name and retention only when everything else holds: a retention that is refused must not
        // let it sweep what others still need.
        let mut consumer = None;
        if faults.is_empty() {
            match answer("open", deadline, store.open(&self.name, self.settings.retention)).await {
                Ok(number) => consumer = Some(number),
                Err(error) => faults.push(Fault::probed(Probed::Store, &error)),
            }
        }
        let (Some(consumer), Some((plan, guarantee))) = (consumer, decided) else {
            if is_open {
                // What it answers changes nothing: the faults are what is told.
                let _ = answer("close", deadline, broker.close()).await;
            }
            return Err(BuildError { faults });
        };
        Ok(self.parts(store, consumer, routes, plan, guarantee))
    }

    /// Checks what is chosen against what broker and store can do, and makes the choices that were left open.
    fn decide(
        &self,
        infos: Vec<RouteInfo>,
        capabilities: Capabilities,
        health: StoreHealth,
        faults: &mut Vec<Fault>,
    ) -> (Plan, Guarantee) {
        faults.extend(checks::transactions(&infos, &self.settings, &health, self.publisher.is_some()));
        faults.extend(checks::extractors(&self.extractors, &capabilities));
        let plan = Plan::new(&self.settings, self.retry.as_ref(), infos, capabilities, health, &self.extractors);
        faults.extend(checks::limits(&plan));
        let facts = Facts {
            consumer: &self.name,
            capabilities: &plan.capabilities,
            health: &plan.health,
            settings: &plan.settings,
            order: plan.order,
            routes: &plan.infos,
            notes: plan.notes.clone(),
        };
        let (guarantee, refused) = compute(facts, &self.allowed);
        faults.extend(refused);
        faults.extend(checks::levels(&guarantee, self.required));
        (plan, guarantee)
    }

    fn parts(
        self,
        store: Arc<dyn ProcessedStore>,
        consumer: ConsumerId,
        routes: Routes,
        plan: Plan,
        guarantee: Guarantee,
    ) -> Parts {
        let default: fn(&str) -> Arc<dyn Observer> = |name| Arc::new(Telemetry::new(name));
        Parts {
            observer: self.observer.unwrap_or_else(|| default(&self.name)),
            name: self.name.into(),
            broker: self.broker,
            store,
            consumer,
            publisher: self.publisher,
            settings: plan.settings,
            order: plan.order,
            timeout: plan.timeout,
            retry: plan.retry,
            transactions_max: plan.transactions_max,
            routes,
            infos: plan.infos,
            extractors: if self.extractors.is_empty() { vec![IdFrom::CloudEvents] } else { self.extractors },
            missing_id: self.missing_id,
            guarantee,
            capabilities: plan.capabilities,
            health: plan.health,
            seed: self.seed,
            redact: self.redact,
            stepper: self.stepper,
        }
    }
}

/// Waits at most until the deadline.
async fn answer<A>(operation: &'static str, deadline: Duration, call: impl Future<Output = Result<A>>) -> Result<A> {
    let late = |_| {
        let why = format!("no answer within call_timeout = {deadline:?}");
        Err(Error::new(ErrorKind::Unavailable, operation).because(why))
    };
    timeout(deadline, call).await.unwrap_or_else(late)
}

impl<S, T> fmt::Debug for ConsumerBuilder<S, T> {
    /// Without state, store and broker: they may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let routes: Vec<_> = self.routes.iter().map(|route| route.info.name()).collect();
        f.debug_struct("ConsumerBuilder")
            .field("name", &self.choices.name)
            .field("routes", &routes)
            .field("settings", &self.choices.settings)
            .finish_non_exhaustive()
    }
}
