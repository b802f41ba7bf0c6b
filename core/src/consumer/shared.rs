//! What all lives of a consumer share, and how it stands: draining, failed, out of reach.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use super::batches::Batches;
use super::builder::{MissingId, Parts};
use super::calls::{ClaimCalls, PublishCalls, RecordCalls, SettleCalls};
use super::coalesce::Coalescer;
use super::copies::Copies;
use super::keepalive::Keepalive;
use super::runners::Started;
use super::switch::{Switch, SwitchSettings};
use super::verdict::Bounds;
use super::waiting::TRANSACTION_BUDGET;
use crate::broker::{Broker, Durability};
use crate::error::Error;
use crate::event::{RouteInfo, Routes};
use crate::guarantee::Guarantee;
use crate::health::{Counters, Phase, Vitals};
use crate::identity::IdFrom;
use crate::message::MessageLimits;
use crate::observer::{Observed, Observer, Side};
use crate::publisher::Publisher;
use crate::retry::RetryPolicy;
use crate::settings::{Order, Settings};
use crate::standby::Standby;
use crate::stepping::Stepper;
use crate::store::{ConsumerId, ProcessedStore};

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
    pub(super) observer: Arc<dyn Observer>,
    pub(super) consumer: ConsumerId,
    pub(super) routes: Routes,
    pub(super) infos: Vec<RouteInfo>,
    pub(super) extractors: Vec<IdFrom>,
    pub(super) missing_id: MissingId,
    pub(super) settings: Settings,
    pub(super) redact: Option<fn(&str) -> String>,
    pub(super) stepper: Option<Arc<dyn Stepper>>,
    // Decided once from the settings.
    pub(super) order: Order,
    pub(super) bounds: Bounds,
    pub(super) limits: MessageLimits,
    pub(super) timeout: Duration,
    pub(super) retry: RetryPolicy,
    pub(super) in_flight_max: usize,
    /// A simulation, which must repeat exactly.
    pub(super) is_seeded: bool,
    pub(super) transactions_block: bool,
    /// Store and broker are nowhere but in this process.
    pub(super) is_in_process: bool,
    // What lives wait for.
    pub(super) claims: ClaimCalls,
    pub(super) records: RecordCalls,
    pub(super) settles: SettleCalls,
    pub(super) publishes: PublishCalls,
    pub(super) started: Started,
    pub(super) keepalive: Keepalive,
    pub(super) switch: Switch,
    pub(super) copies: Copies,
    pub(super) permits: Arc<Semaphore>,
    /// Who waits for a permit, where a commit can claim for them.
    pub(super) standby: Option<Arc<Standby>>,
    pub(super) batches: Batches,
    pub(super) transactions: Arc<Semaphore>,
    pub(super) transaction_budget: Semaphore,
    /// What a transactional handler took lately, in microseconds; 0 before the first.
    pub(super) transaction_us: AtomicU64,
    pub(super) alone: Semaphore,
    pub(super) suspects: AtomicUsize,
    pub(super) suspects_fewer: Notify,
    pub(super) waiting: AtomicUsize,
    // How it stands.
    pub(super) view: Arc<View>,
    pub(super) draining: CancellationToken,
    pub(super) given_up: CancellationToken,
    pub(super) fatal: Mutex<Option<Error>>,
    pub(super) fatal_seen: Notify,
    pub(super) ended_by_broker: Notify,
    pub(super) is_probing: AtomicBool,
    pub(super) is_renewing: AtomicBool,
    /// A batch of calls lets the next of its kind leave before it returns.
    pub(super) another_may_leave: AtomicBool,
    pub(super) is_publisher_up: AtomicBool,
    pub(super) chance: Mutex<fastrand::Rng>,
    pub(super) token: (u64, AtomicU64),
}

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
        let permits = Arc::new(Semaphore::new(s.concurrency));
        // Batches claim for themselves.
        let may_claim = parts.infos.iter().any(|info| info.transactional && !info.batched);
        let standby = || Arc::new(Standby::new(s.lease, Arc::clone(&permits)));
        Self {
            standby: (parts.health.claims_at_commit && may_claim).then(standby),
            claims: Coalescer::new(s.batch_max),
            records: Coalescer::new(s.batch_max),
            settles: Coalescer::new(s.batch_max),
            publishes: Coalescer::new(s.batch_max),
            started: Started::default(),
            keepalive: Keepalive::new(s.lease, parts.health.transactions_block_writes),
            switch: Switch::new(switch),
            copies: Copies::default(),
            permits,
            batches: Batches::new(&parts.routes, &parts.infos, s.batch_max),
            transactions: Arc::new(Semaphore::new(transactions)),
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
            another_may_leave: AtomicBool::new(false),
            is_publisher_up: AtomicBool::new(true),
            token: (rng.u64(..), AtomicU64::new(0)),
            chance: Mutex::new(rng),
            order: parts.order,
            bounds,
            limits: s.message_limits(),
            timeout: parts.timeout,
            retry: parts.retry,
            in_flight_max: s.in_flight_max,
            is_seeded: parts.seed.is_some(),
            transactions_block: parts.health.transactions_block_writes,
            is_in_process: parts.health.durability == Durability::Process
                && parts.broker.capabilities().durability == Durability::Process,
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
        self.standby.iter().for_each(|standby| standby.close());
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

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("name", &self.name).field("routes", &self.routes).finish_non_exhaustive()
    }
}
