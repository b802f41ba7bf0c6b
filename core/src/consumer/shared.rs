//! What all lives of a consumer share, and the small steps of a life that decide nothing.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::FutureExt;
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::builder::{MissingId, Parts};
use super::calls::{ClaimCalls, GivenUp, PublishCalls, RecordCalls, SettleCalls};
use super::coalesce::Coalescer;
use super::copies::{Copies, Turn};
use super::keepalive::Keepalive;
use super::pipeline::End;
use super::runners::Started;
use super::switch::{Pass, Switch, SwitchSettings};
use super::verdict::{self, Bounds, Delay};
use crate::broker::{Broker, Delivery, Settlement};
use crate::dead_letter::{DeadLetter, Reason, cut};
use crate::error::{Error, ErrorKind};
use crate::event::{Ended, Otherwise, Ready, Resolved, RouteInfo, Routes, Start};
use crate::guarantee::Guarantee;
use crate::handler::Failure;
use crate::health::{Counters, Phase, Vitals};
use crate::identity::{IdFrom, identify};
use crate::message::{Defect, DefectKind, Message, MessageLimits};
use crate::observer::{Observed, Observer, Side};
use crate::publisher::Publisher;
use crate::retry::RetryPolicy;
use crate::run::{Finish, Run, Stop};
use crate::settings::{Order, Settings};
use crate::stepping::{Stepped, Stepper};
use crate::store::{
    ClaimRequest, ConsumerId, EventKey, Fingerprint, Lease, Outcome, ProcessedStore, Recorded, Trouble,
};
use crate::trace;

/// A step that few lives take: boxed, so that the common life stays small enough to move and keep.
pub(super) type Rare<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What handles of a consumer see and set. Apart, so that a handle that is kept keeps neither broker nor store.
pub(super) struct View {
    pub(super) name: Arc<str>,
    pub(super) guarantee: Guarantee,
    pub(super) counters: Counters,
    pub(super) vitals: Vitals,
    pub(super) stop: CancellationToken,
    drain_deadline: Mutex<Duration>,
    is_paused: AtomicBool,
}

impl View {
    pub(super) fn pause_intake(&self, pause: bool) {
        self.is_paused.store(pause, Ordering::SeqCst);
        if matches!(self.vitals.phase(), Phase::Running | Phase::Paused) {
            self.vitals.enter(if pause { Phase::Paused } else { Phase::Running });
        }
    }

    pub(super) fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::SeqCst)
    }

    pub(super) fn drain_deadline(&self) -> Duration {
        *self.drain_deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_drain_deadline(&self, deadline: Duration) {
        *self.drain_deadline.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Everything that lives share. Nothing in it is locked across an await.
pub(super) struct Shared {
    pub(super) name: Arc<str>,
    pub(super) broker: Arc<dyn Broker>,
    pub(super) store: Arc<dyn ProcessedStore>,
    pub(super) publisher: Option<Arc<dyn Publisher>>,
    observer: Arc<dyn Observer>,
    consumer: ConsumerId,
    routes: Routes,
    pub(super) infos: Vec<RouteInfo>,
    extractors: Vec<IdFrom>,
    missing_id: MissingId,
    pub(super) settings: Settings,
    redact: Option<fn(&str) -> String>,
    stepper: Option<Arc<dyn Stepper>>,
    // Decided once from the settings.
    pub(super) order: Order,
    pub(super) bounds: Bounds,
    limits: MessageLimits,
    timeout: Duration,
    retry: RetryPolicy,
    pub(super) in_flight_max: usize,
    transactions_block: bool,
    // What lives wait for.
    pub(super) claims: ClaimCalls,
    pub(super) records: RecordCalls,
    pub(super) settles: SettleCalls,
    pub(super) publishes: PublishCalls,
    pub(super) started: Started,
    pub(super) keepalive: Keepalive,
    pub(super) switch: Switch,
    copies: Copies,
    permits: Semaphore,
    transactions: Semaphore,
    transaction_budget: Semaphore,
    /// What a transactional handler took lately, in microseconds; 0 before the first.
    transaction_us: AtomicU64,
    pub(super) alone: Semaphore,
    suspects: AtomicUsize,
    suspects_fewer: Notify,
    pub(super) waiting: AtomicUsize,
    // How it stands.
    pub(super) view: Arc<View>,
    pub(super) draining: CancellationToken,
    pub(super) given_up: CancellationToken,
    pub(super) fatal: Mutex<Option<Error>>,
    pub(super) fatal_seen: Notify,
    pub(super) ended_by_broker: Notify,
    is_probing: AtomicBool,
    is_renewing: AtomicBool,
    pub(super) is_publisher_up: AtomicBool,
    chance: Mutex<fastrand::Rng>,
    token: (u64, AtomicU64),
}

/// An event that was read: which handler, which key, ready to start once.
pub(super) struct Event {
    pub(super) route: usize,
    version: u32,
    pub(super) key: EventKey,
    fingerprint: Fingerprint,
    /// In a lock that is never taken, only opened by its owner: events need not be `Sync`, and a life must be `Send`.
    ready: Mutex<Option<Box<dyn Ready>>>,
    /// Crashes in its history that were told to the observer.
    pub(super) crashes_seen: u32,
    /// The lease of a commit whose answer was lost.
    pub(super) unknown: Option<(Lease, Trouble)>,
}

/// What a message turned out to be.
pub(super) enum Read {
    /// An event with a handler.
    Event(Event),
    /// Acked by rule.
    Ignored,
    /// To the dead letters without a record.
    Unfit(Reason, Box<str>),
}

/// The right to claim: a permit for the handler, and the kill switch's pass.
pub(super) struct Place<'a> {
    pub(super) pass: Pass<'a>,
    _permit: SemaphorePermit<'a>,
    _budget: Option<SemaphorePermit<'a>>,
}

/// The answer to waiting for a key's turn.
pub(super) enum Turned<'a> {
    /// Until it is dropped, no copy is claimed in this process.
    Yours(Turn<'a>),
    /// Too many wait already: the broker is to keep it for so long.
    Crowded(Duration),
    /// The consumer drains, or the session is taken away.
    Over,
}

/// A claimed event with a crash in its history.
pub(super) struct Suspect<'a>(&'a Shared);

impl<'a> Suspect<'a> {
    pub(super) fn claimed(shared: &'a Shared) -> Self {
        shared.suspects.fetch_add(1, Ordering::SeqCst);
        Self(shared)
    }

    /// Waits until every other suspect gave its claim back.
    pub(super) async fn is_the_only_one(&self) {
        loop {
            let fewer = self.0.suspects_fewer.notified();
            if self.0.suspects.load(Ordering::SeqCst) <= 1 {
                return;
            }
            fewer.await;
        }
    }
}

impl Drop for Suspect<'_> {
    fn drop(&mut self) {
        self.0.suspects.fetch_sub(1, Ordering::SeqCst);
        self.0.suspects_fewer.notify_waiters();
    }
}

/// Counts a delivery that waits, for as long as it does.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How long a copy stays at the broker when too many wait here.
pub(super) const CROWDED: Duration = Duration::from_secs(1);

/// The share of a lease that claims may wait for the one transaction of a store that blocks.
const TRANSACTION_BUDGET: u32 = 64;

impl Shared {
    pub(super) fn new(parts: Parts) -> Self {
        let s = &parts.settings;
        let mut rng = parts.seed.map_or_else(fastrand::Rng::new, fastrand::Rng::with_seed);
        let transactions = parts.transactions_max.clamp(1, Semaphore::MAX_PERMITS);
        let switch = SwitchSettings {
            share: s.switch_share,
            events_min: s.switch_events_min,
            window: s.switch_window,
            probe: s.switch_probe,
        };
        let bounds = Bounds {
            crashes_max: s.crashes_max,
            not_yet_max: s.not_yet_max,
            hold: s.hold,
            waits_in_place: parts.order == Order::PerKey && !parts.capabilities.retry_keeps_order,
            retry_max: parts.capabilities.retry_max,
        };
        Self {
            claims: Coalescer::new(s.batch_max),
            records: Coalescer::new(s.batch_max),
            settles: Coalescer::new(s.batch_max),
            publishes: Coalescer::new(s.batch_max),
            started: Started::default(),
            keepalive: Keepalive::new(s.lease, parts.health.transactions_block_writes),
            switch: Switch::new(switch),
            copies: Copies::default(),
            permits: Semaphore::new(s.concurrency),
            transactions: Semaphore::new(transactions),
            transaction_budget: Semaphore::new(TRANSACTION_BUDGET as usize),
            transaction_us: AtomicU64::new(0),
            alone: Semaphore::new(1),
            suspects: AtomicUsize::new(0),
            suspects_fewer: Notify::new(),
            waiting: AtomicUsize::new(0),
            view: Arc::new(View {
                name: Arc::clone(&parts.name),
                guarantee: parts.guarantee,
                counters: Counters::default(),
                vitals: Vitals::new(),
                stop: CancellationToken::new(),
                drain_deadline: Mutex::new(s.drain),
                is_paused: AtomicBool::new(false),
            }),
            draining: CancellationToken::new(),
            given_up: CancellationToken::new(),
            fatal: Mutex::new(None),
            fatal_seen: Notify::new(),
            ended_by_broker: Notify::new(),
            is_probing: AtomicBool::new(false),
            is_renewing: AtomicBool::new(false),
            is_publisher_up: AtomicBool::new(true),
            token: (rng.u64(..), AtomicU64::new(0)),
            chance: Mutex::new(rng),
            order: parts.order,
            bounds,
            limits: s.message_limits(),
            timeout: parts.timeout,
            retry: parts.retry,
            in_flight_max: s.in_flight_max,
            transactions_block: parts.health.transactions_block_writes,
            name: parts.name,
            broker: parts.broker,
            store: parts.store,
            publisher: parts.publisher,
            observer: parts.observer,
            consumer: parts.consumer,
            routes: parts.routes,
            infos: parts.infos,
            extractors: parts.extractors,
            missing_id: parts.missing_id,
            settings: parts.settings,
            redact: parts.redact,
            stepper: parts.stepper,
        }
    }

    /// What a message is, by itself: an event with a handler, ignored by rule, or unfit.
    pub(super) fn read(&self, delivery: &Delivery) -> Read {
        let message = &delivery.message;
        if let Some(defect) = message.defect() {
            return unfit(defect);
        }
        let ty = message.attributes.ty.as_deref();
        let (route, start, version) = match self.routes.resolve(ty) {
            Resolved::Route(route, start, version) => (route as usize, start, version),
            Resolved::UnknownVersion => {
                let error = format!("no handler knows this version of {:?}", ty.unwrap_or_default());
                return Read::Unfit(Reason::UnknownVersion, error.into());
            }
            Resolved::Otherwise(Otherwise::Ignore) => return Read::Ignored,
            Resolved::Otherwise(Otherwise::DeadLetter) => {
                let error = format!("no handler for type {:?}", ty.unwrap_or_default());
                return Read::Unfit(Reason::UnknownType, error.into());
            }
        };
        let identity = match identify(message, delivery.origin.as_deref(), &self.extractors, &self.limits) {
            Ok(Some(identity)) => identity,
            Ok(None) => match self.missing_id {
                MissingId::Ignore => return Read::Ignored,
                MissingId::DeadLetter => return Read::Unfit(Reason::MissingId, "no extractor found an id".into()),
            },
            Err(defect) => return unfit(&defect),
        };
        let key = identity.key(&self.name);
        match self.prepare(start, message, version) {
            Ok(ready) => Read::Event(Event {
                route,
                version,
                key,
                fingerprint: Fingerprint::of(message.attributes.content_type.as_deref(), &message.data),
                ready: Mutex::new(Some(ready)),
                crashes_seen: 0,
                unknown: None,
            }),
            Err(defect) => unfit(&defect),
        }
    }

    fn prepare(&self, start: &Arc<dyn Start>, message: &Arc<Message>, version: u32) -> Result<Box<dyn Ready>, Defect> {
        // A user's `Deserialize` runs here, in the engine: its panic must not end all lives.
        let read = || start.prepare(message, version, self.limits.json_depth_max);
        catch_unwind(AssertUnwindSafe(read))
            .unwrap_or_else(|panic| Err(Defect::undecodable(format!("reading it panicked: {}", panic_text(&*panic)))))
    }

    /// A claim for this event with a fresh token.
    pub(super) fn request(&self, event: &Event, delivery: &Delivery) -> ClaimRequest {
        let (process, counter) = &self.token;
        let token = u128::from(*process) << 64 | u128::from(counter.fetch_add(1, Ordering::Relaxed));
        ClaimRequest {
            consumer: self.consumer,
            key: event.key,
            fingerprint: event.fingerprint,
            token,
            reopen: delivery.message.reopen(),
        }
    }

    /// Waits for this key's turn in this process.
    pub(super) async fn turn(&self, key: EventKey, delivery: &Delivery) -> Turned<'_> {
        let mut turn = std::pin::pin!(self.copies.turn(key));
        if let Some(turn) = turn.as_mut().now_or_never() {
            return Turned::Yours(turn);
        }
        if let Delay::AtBroker(after) = verdict::delay(CROWDED, self.is_crowded(), &self.bounds) {
            return Turned::Crowded(after);
        }
        let _waits = Waits::new(&self.waiting);
        self.unless_over(delivery, turn).await.map_or(Turned::Over, Turned::Yours)
    }

    /// Waits until this delivery may be claimed: the kill switch lets it pass and a handler's permit is free. `None`
    /// when nothing may be started any more.
    pub(super) async fn admit(&self, delivery: &Delivery, event: &Event) -> Option<Place<'_>> {
        loop {
            let pass = match self.switch.try_pass() {
                Some(pass) => pass,
                None => self.unless_over(delivery, self.switch.pass()).await?,
            };
            // Closed when the consumer drains.
            let budget = match self.transaction_weight(event) {
                Some(weight) => {
                    let budget = self.transaction_budget.acquire_many(weight);
                    Some(self.unless_over(delivery, budget).await?.ok()?)
                }
                None => None,
            };
            let permit = match self.permits.try_acquire() {
                Ok(permit) => permit,
                Err(_) => Box::pin(self.unless_over(delivery, self.permits.acquire())).await?.ok()?,
            };
            if self.is_draining() || !delivery.session.is_live() {
                return None;
            }
            // It may have opened while this one waited for its permit.
            if pass.is_probe() || !self.switch.is_open() {
                return Some(Place { pass, _permit: permit, _budget: budget });
            }
        }
    }

    /// On a store with one transaction at a time, claims wait for their turn with the lease running: as many are claimed
    /// as handlers will have run in a quarter of the lease, going by what they took lately.
    fn transaction_weight(&self, event: &Event) -> Option<u32> {
        if !self.transactions_block || !self.infos[event.route].transactional {
            return None;
        }
        let took_us = match self.transaction_us.load(Ordering::Relaxed) {
            0 => return Some(TRANSACTION_BUDGET),
            took_us => took_us,
        };
        let quarter_us = (self.settings.lease.as_micros() as u64 / 4).max(1);
        let weight = (took_us * u64::from(TRANSACTION_BUDGET)).div_ceil(quarter_us);
        Some(weight.clamp(1, u64::from(TRANSACTION_BUDGET)) as u32)
    }

    /// The turn to run a transaction, where the handler takes one; the store's connections are shared by all.
    pub(super) async fn transaction_turn(&self, event: &Event) -> Option<SemaphorePermit<'_>> {
        if self.infos[event.route].transactional { self.transactions.acquire().await.ok() } else { None }
    }

    /// Waits for the turn of events with a crash in their history; `None` when the delivery is to be given back instead.
    pub(super) fn turn_alone<'a>(&'a self, delivery: &'a Delivery) -> Rare<'a, Option<SemaphorePermit<'a>>> {
        Box::pin(async move {
            let _waits = Waits::new(&self.waiting);
            self.unless_over(delivery, self.alone.acquire()).await?.ok()
        })
    }

    /// Waits here; false when the delivery is to be given back instead.
    pub(super) fn wait<'a>(&'a self, wait: Duration, delivery: &'a Delivery) -> Rare<'a, bool> {
        Box::pin(async move {
            let _waits = Waits::new(&self.waiting);
            tokio::select! {
                biased;
                () = self.draining.cancelled() => false,
                () = delivery.session.not_live() => false,
                () = tokio::time::sleep(wait) => true,
            }
        })
    }

    /// Waits for it, unless nothing may be started any more: the consumer drains, or the session is taken away.
    fn unless_over<'a, T: 'a>(
        &'a self,
        delivery: &'a Delivery,
        what: impl Future<Output = T> + Send + 'a,
    ) -> Rare<'a, Option<T>> {
        Box::pin(async move {
            tokio::select! {
                biased;
                what = what => Some(what),
                () = self.draining.cancelled() => None,
                () = delivery.session.not_live() => None,
            }
        })
    }

    /// Gives a delivery back that was not claimed.
    pub(super) fn give_back<'a>(&'a self, delivery: &'a Delivery) -> Rare<'a, ()> {
        Box::pin(async move {
            self.view.counters.released.one();
            let _ = self.settle(delivery, Settlement::Release { counted: false }).await;
        })
    }

    /// To the dead letters without a record: there is nothing that could be claimed, so it needs no token to come back.
    pub(super) fn set_aside_unrecorded<'a>(
        &'a self,
        delivery: &'a Delivery,
        reason: Reason,
        error: &'a str,
    ) -> Rare<'a, ()> {
        Box::pin(async move {
            let error = self.error_text(error);
            let dead_letter = self.dead_letter(delivery, reason, &error, 0, Duration::ZERO, None);
            if self.settle(delivery, Settlement::DeadLetter(Box::new(dead_letter))).await.is_ok() {
                self.view.counters.dead_lettered.one();
                let id = delivery.message.attributes.id.as_deref().unwrap_or_default();
                self.observe(&Observed::DeadLettered { reason, id, error: &error });
            }
        })
    }

    /// Settles. An error says that the session ended or the calls were given up: the broker delivers again.
    pub(super) async fn settle(&self, delivery: &Delivery, settlement: Settlement) -> Result<(), GivenUp> {
        self.settles.call((delivery.receipt, settlement)).await
    }

    /// Records, or says that the calls were given up.
    pub(super) async fn record(&self, lease: Lease, outcome: Outcome) -> Result<Recorded, GivenUp> {
        self.records.call((lease, outcome)).await
    }

    /// Sends what the handler published, and waits until the broker has it.
    pub(super) async fn publish(&self, run: &Run) -> Result<(), Failure> {
        let published = std::mem::take(&mut *run.outbox());
        if published.is_empty() {
            return Ok(());
        }
        if self.publisher.is_none() {
            return Err(Failure::permanent("a handler published, and the consumer has no .publisher(..)"));
        }
        let sent: Vec<_> = published.into_iter().map(|outgoing| self.publishes.call(outgoing)).collect();
        for sent in sent {
            match sent.await {
                Ok(()) => {}
                Err(GivenUp::Refused(why)) => {
                    return Err(Failure::permanent("the broker refuses what was published").with_source(&*why));
                }
                Err(GivenUp::Stopped) => return Err(Failure::retryable("shut down while publishing")),
            }
        }
        Ok(())
    }

    /// Hands the handler to a runner and waits for its end, its stop, or its panic.
    pub(super) async fn ended(&self, event: &Event, ready: Box<dyn Ready>, run: &Arc<Run>) -> End {
        let mut running = ready.start(Arc::clone(run));
        if let Some(stepper) = &self.stepper {
            running = Box::pin(Stepped::new(running, Arc::clone(stepper), run.lease));
        }
        let span = trace::handler_span(&self.name, self.infos[event.route].name(), &run.message, &run.lease);
        if !span.is_disabled() {
            running = Box::pin(running.instrument(span));
        }
        self.started.push(running, Arc::clone(run));
        let (finish, stopped) = match std::future::poll_fn(|cx| run.poll_end(cx)).await {
            Ok(finish) => (Some(finish), None),
            Err(stop) => {
                // A commit under way is not cut off: its answer is better than none.
                if !run.is_committing() {
                    run.cancel();
                }
                // It ends at its next await; one that blocks is waited for as long as a lease, then left behind.
                let finish = std::future::poll_fn(|cx| run.poll_finish(cx));
                let finish = tokio::time::timeout(self.settings.lease, finish).await.ok();
                run.cancel();
                (finish, Some(stop))
            }
        };
        match (finish, stopped) {
            (Some(Finish::Returned(ended)), _) => End::Handler(ended),
            (Some(Finish::Panicked(panic)), _) => End::Panicked(panic_text(&*panic)),
            (_, Some(_)) if run.is_committing() => {
                let error = Error::new(ErrorKind::Unknown, "commit").because("stopped while it was under way");
                End::Handler(Ended::Unknown(error))
            }
            (_, Some(stop)) => End::Stopped(stop),
            (_, None) => End::Stopped(Stop::Shutdown),
        }
    }

    /// Learns how long transactions take, for those that hold up every other write.
    pub(super) fn transaction_took(&self, event: &Event, took: Duration) {
        if !self.transactions_block || !self.infos[event.route].transactional {
            return;
        }
        let took_us = (took.as_micros() as u64).max(1);
        let before = self.transaction_us.load(Ordering::Relaxed);
        let next = if before == 0 { took_us } else { before - before / 8 + took_us / 8 };
        self.transaction_us.store(next.max(1), Ordering::Relaxed);
    }

    pub(super) fn dead_letter(
        &self,
        delivery: &Delivery,
        reason: Reason,
        error: &str,
        attempts: u32,
        first: Duration,
        reopen: Option<std::num::NonZeroU64>,
    ) -> DeadLetter {
        let last = SystemTime::now();
        DeadLetter {
            reason,
            error: error.into(),
            consumer: Arc::clone(&self.name),
            attempts,
            first: last.checked_sub(first).unwrap_or(SystemTime::UNIX_EPOCH),
            last,
            origin: delivery.origin.clone(),
            reopen,
        }
    }

    /// For people: the id as text, and the error, redacted and cut.
    pub(super) fn trouble(&self, delivery: &Delivery, error: &str) -> Trouble {
        let identity = identify(&delivery.message, delivery.origin.as_deref(), &self.extractors, &self.limits);
        let id = identity.ok().flatten().map(|identity| identity.id.into()).unwrap_or_default();
        Trouble { id, error: self.error_text(error) }
    }

    pub(super) fn error_text(&self, error: &str) -> Box<str> {
        let redacted = crate::secret::redact(error);
        let redacted = self.redact.map_or_else(
            || redacted.to_string(),
            |redact| {
                catch_unwind(|| redact(&redacted)).unwrap_or_else(|_| "not told: redacting it panicked".to_owned())
            },
        );
        cut(&redacted, self.settings.error_text_max)
    }

    pub(super) fn retry(&self, event: &Event) -> &RetryPolicy {
        self.infos[event.route].retry.as_ref().unwrap_or(&self.retry)
    }

    pub(super) fn timeout(&self, event: &Event) -> Duration {
        self.infos[event.route].timeout.unwrap_or(self.timeout)
    }

    /// A random share from 0 to 1.
    pub(super) fn chance(&self) -> f32 {
        self.chance.lock().unwrap_or_else(PoisonError::into_inner).f32()
    }

    pub(super) fn observe(&self, what: &Observed<'_>) {
        // A panic of the user's observer must not end the engine and all lives with it.
        if catch_unwind(AssertUnwindSafe(|| self.observer.observe(what))).is_err() {
            tracing::error!(consumer = &*self.name, "the observer panicked");
        }
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Leases that were lost, found by the tick or by a renewal.
    pub(super) fn leases_lost(&self, lost: usize) {
        self.view.counters.leases_lost.add(lost);
        (0..lost).for_each(|_| self.observe(&Observed::LeaseLost));
    }

    /// Nothing is started any more.
    pub(super) fn drain(&self) {
        self.draining.cancel();
        self.permits.close();
        self.transaction_budget.close();
        self.keepalive.announce_shutdown();
    }

    /// The consumer cannot go on: what it would do next could be wrong.
    pub(super) fn fail(&self, error: Error) {
        self.fatal.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        // Nothing more is started, not even the next of a lane whose head could not end.
        self.drain();
        self.fatal_seen.notify_one();
    }

    pub(super) fn has_failed(&self) -> bool {
        self.fatal.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    pub(super) fn take_fatal(&self) -> Option<Error> {
        self.fatal.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether the store is not being asked already; the caller asks, then.
    pub(super) fn begin_probe(&self) -> bool {
        !self.is_probing.swap(true, Ordering::SeqCst)
    }

    pub(super) fn end_probe(&self) {
        self.is_probing.store(false, Ordering::SeqCst);
    }

    /// Whether no renewal is under way; the caller's is, then.
    pub(super) fn begin_renewal(&self) -> bool {
        !self.is_renewing.swap(true, Ordering::SeqCst)
    }

    pub(super) fn end_renewal(&self) {
        self.is_renewing.store(false, Ordering::SeqCst);
    }

    pub(super) fn store_is_down(&self, error: &Error) {
        if self.view.vitals.store_down(error) {
            let error = self.error_text(&error.to_string());
            self.observe(&Observed::Reach { side: Side::Store, up: false, error: &error });
        }
    }

    pub(super) fn store_is_up(&self) {
        if self.view.vitals.store_up() {
            self.observe(&Observed::Reach { side: Side::Store, up: true, error: "" });
        }
    }

    pub(super) fn broker_is_down(&self, error: &Error) {
        if self.view.vitals.broker_down(error) {
            let error = self.error_text(&error.to_string());
            self.observe(&Observed::Reach { side: Side::Broker, up: false, error: &error });
        }
    }

    pub(super) fn broker_is_up(&self) {
        if self.view.vitals.broker_up() {
            self.observe(&Observed::Reach { side: Side::Broker, up: true, error: "" });
        }
    }
}

impl Event {
    /// What the handler is started with; read again for another attempt.
    pub(super) fn take_ready(&mut self, shared: &Shared, delivery: &Delivery) -> Result<Box<dyn Ready>, Failure> {
        if let Some(ready) = self.ready.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            return Ok(ready);
        }
        let ty = delivery.message.attributes.ty.as_deref();
        let Resolved::Route(_, start, _) = shared.routes.resolve(ty) else {
            return Err(Failure::permanent("its route is gone"));
        };
        // It was read before, so this fails only if reading it depends on something else than the message.
        shared
            .prepare(start, &delivery.message, self.version)
            .map_err(|defect| Failure::permanent("it was readable before and is not now").with_source(&*defect.detail))
    }

    /// The trouble of a commit under this very lease that turned out not to have taken place.
    pub(super) fn uncommitted(&mut self, lease: Lease) -> Option<Trouble> {
        self.unknown.take().filter(|(unknown, _)| unknown.fence == lease.fence).map(|(_, trouble)| trouble)
    }
}

fn unfit(defect: &Defect) -> Read {
    let reason = match defect.kind {
        DefectKind::Undecodable => Reason::Undecodable,
        DefectKind::BeyondLimit => Reason::BeyondLimit,
    };
    Read::Unfit(reason, defect.detail.clone())
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no text".to_owned())
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("name", &self.name).field("routes", &self.routes).finish_non_exhaustive()
    }
}
