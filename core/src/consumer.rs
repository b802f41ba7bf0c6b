//! Consumer: run until shutdown, then drain.
//!
//! To read on: `consumer/pipeline.rs` is one delivery's life, `consumer/engine.rs` drives many of them.

mod batches;
mod builder;
mod calls;
mod coalesce;
mod copies;
mod engine;
mod helm;
mod intake;
mod keepalive;
mod lanes;
mod lives;
mod pipeline;
mod reading;
mod runners;
mod shared;
mod steps;
mod switch;
mod verdict;
mod waiting;

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};

pub use self::builder::{ConsumerBuilder, MissingId};
use self::engine::Engine;
use self::helm::{Bell, Drive, Helm};
use self::shared::{Shared, View};
use crate::error::{Error, ErrorKind, Result};
use crate::guarantee::Guarantee;
use crate::health::{Health, Phase, Statistics};
use crate::run::Stop;

/// What is given back after the drain deadline has this long to be recorded and released, and half of it more when store or
/// broker do not answer.
const GIVE_BACK: Duration = Duration::from_secs(2);
/// The broker has this long to stop delivering, and then to let go: together, a stop takes no more than 4.5 s beyond the drain deadline.
const CLOSE: Duration = Duration::from_millis(1_500);

/// Consumes one broker with one store: every event once, as far as its [`Guarantee`] says.
///
/// Made by [`Consumer::builder`].
pub struct Consumer {
    shared: Arc<Shared>,
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Consumer").field(&self.shared).finish()
    }
}

impl Consumer {
    pub(crate) fn assemble(parts: builder::Parts) -> Self {
        Self { shared: Arc::new(Shared::new(parts)) }
    }

    /// What this consumer promises, for each handler, and which windows are open.
    pub fn guarantee(&self) -> &Guarantee {
        &self.shared.view.guarantee
    }

    /// A handle for health, statistics, pause and stop; keeping it keeps neither broker nor store.
    pub fn handle(&self) -> ConsumerHandle {
        ConsumerHandle { view: Arc::clone(&self.shared.view) }
    }

    /// Consumes until `shutdown` resolves, [`ConsumerHandle::stop`] is called, or the broker delivers nothing more; then
    /// drains: takes nothing new, lets what runs finish until the deadline, and gives the rest back uncounted. It returns
    /// within `drain` and 4.5 s, whatever store and broker do.
    ///
    /// Dropping the future is a crash: handlers end at their next await point, nothing is settled, leases expire.
    ///
    /// # Errors
    /// When going on could be wrong: a store that is damaged or foreign, an adapter that breaks its contract. An outage
    /// is no error: it waits.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<()> {
        let bell = Arc::<Bell>::default();
        // The engine yields by itself; tokio's budget for one task is made for smaller ones.
        tokio::task::unconstrained(bell.listen(drive(self.shared, shutdown, &bell))).await
    }
}

async fn drive(shared: Arc<Shared>, shutdown: impl Future<Output = ()>, bell: &Arc<Bell>) -> Result<()> {
    let helm = Helm::new(bell, |wheel| Engine::new(Arc::clone(&shared), pipeline::life, wheel));
    tracing::info!(consumer = &*shared.name, "{}", shared.view.guarantee);
    shared.store_is_up();
    shared.broker_is_up();
    shared.view.vitals.enter(if shared.view.is_paused() { Phase::Paused } else { Phase::Running });
    tokio::select! {
        biased;
        () = shutdown => {}
        () = shared.view.stop.cancelled() => {}
        () = shared.fatal_seen.notified() => {}
        () = shared.ended_by_broker.notified() => {}
        () = helm.drive() => {}
    }
    shared.view.vitals.enter(Phase::Draining);
    helm.hold(|| shared.drain());
    let stop = async {
        if let Ok(Err(error)) = timeout(CLOSE, shared.broker.stop()).await {
            tracing::warn!(consumer = &*shared.name, %error, "the broker could not be stopped; closing ends it");
        }
    };
    let drain = drain(&shared, &helm);
    tokio::select! {
        ((), ()) = futures_util::future::join(stop, drain) => {}
        // A broker that does not answer to a stop is closed all the same.
        () = sleep_until(Instant::now() + shared.view.drain_deadline() + GIVE_BACK * 3 / 2) => {}
    }
    // Lives that are left are dropped before the session is closed, so that none of them settles behind it.
    let left = helm.end().map_or(0, |engine| {
        engine.tell_in_flight();
        engine.in_flight()
    });
    if left > 0 {
        tracing::warn!(consumer = &*shared.name, left, "deliveries are left to the broker unsettled");
    }
    let closed = match timeout(CLOSE, shared.broker.close()).await {
        Ok(result) => result,
        Err(_) => Err(Error::new(ErrorKind::Unknown, "close").because("no answer in time")),
    };
    shared.view.vitals.enter(Phase::Stopped);
    match (shared.take_fatal(), closed) {
        (Some(fatal), _) => Err(fatal),
        // An outage is no error at the end either: what the broker could not be told it delivers again, found processed.
        (None, Err(error)) if error.is_retryable() => {
            let error = shared.error_text(&error.to_string());
            tracing::warn!(consumer = &*shared.name, %error, "the broker could not be told everything at the end");
            Ok(())
        }
        (None, closed) => closed,
    }
}

/// Until the deadline what runs may finish; then it is stopped and given back; then the calls are given up.
async fn drain<E: Drive>(shared: &Shared, helm: &Helm<E>) {
    let mut deadline = Instant::now() + shared.view.drain_deadline();
    if shared.has_failed() {
        deadline = Instant::now();
    }
    if drained(helm, deadline).await {
        return;
    }
    helm.hold(|| shared.keepalive.stop_all(Stop::Shutdown));
    if !shared.has_failed() && drained(helm, Instant::now() + GIVE_BACK).await {
        return;
    }
    shared.given_up.cancel();
    drained(helm, Instant::now() + GIVE_BACK / 2).await;
}

/// Drives until nothing is in flight, at most until `deadline`.
async fn drained<E: Drive>(helm: &Helm<E>, deadline: Instant) -> bool {
    tokio::select! {
        biased;
        () = helm.drive() => true,
        () = sleep_until(deadline) => false,
    }
}

/// A view of a running consumer, and the levers on it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ConsumerHandle {
    view: Arc<View>,
}

impl ConsumerHandle {
    /// The consumer's name.
    pub fn name(&self) -> &str {
        &self.view.name
    }

    /// Whether it lives, takes work, and reaches store and broker.
    pub fn health(&self) -> Health {
        self.view.vitals.health()
    }

    /// What it has done since it was built.
    pub fn statistics(&self) -> Statistics {
        self.view.counters.snapshot()
    }

    /// What it promises.
    pub fn guarantee(&self) -> &Guarantee {
        &self.view.guarantee
    }

    /// Takes nothing new; what is in flight goes on. Takes effect within a quarter of a second.
    pub fn pause(&self) {
        self.view.pause_intake(true);
    }

    /// Takes work again.
    pub fn resume(&self) {
        self.view.pause_intake(false);
    }

    /// Stops gracefully, as `shutdown` does.
    pub fn stop(&self) {
        self.view.stop.cancel();
    }

    /// Stops gracefully with another deadline than the consumer's own.
    pub fn stop_within(&self, deadline: Duration) {
        self.view.set_drain_deadline(deadline);
        self.stop();
    }
}
