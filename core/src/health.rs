//! Health and statistics of a consumer: plain data for probes and reports, and the cells that the runtime keeps them in.
//!
//! Live asks "must this process be restarted?", ready asks "does it take work now?". An outage of store or broker is
//! never a reason to restart: it makes a consumer unready, not dead.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use crate::dead_letter::cut;
use crate::error::Error;
use crate::secret::redact;

/// Without a sign of life from its driver for this long, a consumer counts as stuck.
pub const BEAT_MAX: Duration = Duration::from_secs(10);

/// Longest error text in a report.
const ERROR_BYTES_MAX: usize = 512;

/// How a consumer is at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Health {
    /// Its driver turns. False when it gave no sign of life for [`BEAT_MAX`] (a handler that blocks the thread, a
    /// deadlock), and once it has stopped: then only a restart helps.
    pub live: bool,
    /// It takes work: running, store and broker reachable, kill switch closed.
    pub ready: bool,
    /// What it is doing.
    pub phase: Phase,
    /// The processed-events store.
    pub store: Reach,
    /// The broker.
    pub broker: Reach,
    /// The kill switch is open: intake pauses and probes.
    pub switch_open: bool,
    /// What is unsettled.
    pub in_flight: InFlight,
}

/// What a consumer is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Built, not yet receiving.
    #[default]
    Starting,
    /// Receiving and handling.
    Running,
    /// Told to receive nothing; what is in flight goes on.
    Paused,
    /// Stopping: finishes what is in flight.
    Draining,
    /// Over.
    Stopped,
}

impl Phase {
    const ALL: [Self; 5] = [Self::Starting, Self::Running, Self::Paused, Self::Draining, Self::Stopped];

    /// The phase as a lower-case word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
        }
    }
}

/// Whether store or broker answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Reach {
    /// The last call was answered. False before the first answer.
    pub up: bool,
    /// For how long it has been so.
    pub since_seconds: f64,
    /// Why it is not: the error, redacted and cut.
    pub error: Option<String>,
}

/// What a consumer has received and not settled yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct InFlight {
    /// Deliveries.
    pub events: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Age of the oldest, if there is any.
    pub oldest_seconds: Option<f64>,
}

/// What a consumer has done since it was built. Each number only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Statistics {
    /// Deliveries received, duplicates and redeliveries included.
    pub delivered: u64,
    /// Events recorded as processed by this consumer.
    pub processed: u64,
    /// Deliveries that were acked because their event had ended before.
    pub duplicates: u64,
    /// Failures that led to another attempt, now or later.
    pub retried: u64,
    /// Messages set aside, for any reason.
    pub dead_lettered: u64,
    /// Deliveries acked by rule, without a handler.
    pub ignored: u64,
    /// Ids that came with other data.
    pub conflicts: u64,
    /// Leases that ended while their event was handled here.
    pub leases_lost: u64,
    /// Writes that were refused because another holds the event.
    pub fenced: u64,
    /// Deliveries given back to the broker unfinished.
    pub released: u64,
}

/// One number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, events: usize) {
        self.0.fetch_add(events as u64, Ordering::Relaxed);
    }

    pub(crate) fn one(&self) {
        self.add(1);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The cells behind [`Statistics`]; the fields mean the same.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) delivered: Count,
    pub(crate) processed: Count,
    pub(crate) duplicates: Count,
    pub(crate) retried: Count,
    pub(crate) dead_lettered: Count,
    pub(crate) ignored: Count,
    pub(crate) conflicts: Count,
    pub(crate) leases_lost: Count,
    pub(crate) fenced: Count,
    pub(crate) released: Count,
}

impl Counters {
    /// The numbers now. Those of one event may differ by that event while it is being counted.
    pub(crate) fn snapshot(&self) -> Statistics {
        Statistics {
            delivered: self.delivered.get(),
            processed: self.processed.get(),
            duplicates: self.duplicates.get(),
            retried: self.retried.get(),
            dead_lettered: self.dead_lettered.get(),
            ignored: self.ignored.get(),
            conflicts: self.conflicts.get(),
            leases_lost: self.leases_lost.get(),
            fenced: self.fenced.get(),
            released: self.released.get(),
        }
    }
}

/// The cells behind [`Health`]: set by the runtime, read by anybody at any time.
#[derive(Debug)]
pub(crate) struct Vitals {
    built: Instant,
    phase: AtomicU8,
    /// Milliseconds from `built` to the last sign of life.
    beat_ms: AtomicU64,
    switch_open: AtomicBool,
    events: AtomicUsize,
    bytes: AtomicUsize,
    /// Milliseconds from `built` to when the oldest delivery in flight arrived; [`NONE`] if there is none.
    oldest_ms: AtomicU64,
    store: Side,
    broker: Side,
}

const NONE: u64 = u64::MAX;

impl Vitals {
    /// Starting, nothing reached yet. Made in `build()`, inside the runtime.
    pub(crate) fn new() -> Self {
        let built = Instant::now();
        Self {
            built,
            phase: AtomicU8::new(Phase::Starting as u8),
            beat_ms: AtomicU64::new(0),
            switch_open: AtomicBool::new(false),
            events: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            oldest_ms: AtomicU64::new(NONE),
            store: Side::new(built),
            broker: Side::new(built),
        }
    }

    /// A sign of life: called by the driver at every tick, far more often than [`BEAT_MAX`].
    pub(crate) fn beat(&self) {
        self.beat_ms.store(self.at(Instant::now()), Ordering::Relaxed);
    }

    /// Enters a phase, which is a sign of life too. [`Phase::Stopped`] is final.
    pub(crate) fn enter(&self, phase: Phase) {
        self.beat();
        let stopped = Phase::Stopped as u8;
        let _ =
            self.phase.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |now| (now != stopped).then_some(phase as u8));
    }

    pub(crate) fn phase(&self) -> Phase {
        Phase::ALL[usize::from(self.phase.load(Ordering::SeqCst))]
    }

    /// The store answered. Whether that is news.
    pub(crate) fn store_up(&self) -> bool {
        self.store.answered()
    }

    /// Whether the last call to the store was answered.
    pub(crate) fn is_store_up(&self) -> bool {
        self.store.up.load(Ordering::Relaxed)
    }

    /// The store did not answer. Whether that is news.
    pub(crate) fn store_down(&self, error: &Error) -> bool {
        self.store.failed(error)
    }

    /// The broker answered. Whether that is news.
    pub(crate) fn broker_up(&self) -> bool {
        self.broker.answered()
    }

    /// The broker did not answer. Whether that is news.
    pub(crate) fn broker_down(&self, error: &Error) -> bool {
        self.broker.failed(error)
    }

    /// The kill switch opened or closed. Whether that is news.
    pub(crate) fn switch(&self, open: bool) -> bool {
        self.switch_open.swap(open, Ordering::SeqCst) != open
    }

    /// What is unsettled now.
    pub(crate) fn in_flight(&self, events: usize, bytes: usize, oldest: Option<Instant>) {
        self.events.store(events, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        self.oldest_ms.store(oldest.map_or(NONE, |since| self.at(since)), Ordering::Relaxed);
    }

    pub(crate) fn health(&self) -> Health {
        let now = Instant::now();
        let phase = self.phase();
        let silent_ms = self.at(now).saturating_sub(self.beat_ms.load(Ordering::Relaxed));
        let live = match phase {
            Phase::Starting => true,
            Phase::Stopped => false,
            Phase::Running | Phase::Paused | Phase::Draining => u128::from(silent_ms) <= BEAT_MAX.as_millis(),
        };
        let (store, broker) = (self.store.reach(now), self.broker.reach(now));
        let switch_open = self.switch_open.load(Ordering::SeqCst);
        let ready = live && phase == Phase::Running && store.up && broker.up && !switch_open;
        let in_flight = InFlight {
            events: self.events.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            oldest_seconds: Some(self.oldest_ms.load(Ordering::Relaxed))
                .filter(|oldest_ms| *oldest_ms != NONE)
                .map(|oldest_ms| Duration::from_millis(self.at(now).saturating_sub(oldest_ms)).as_secs_f64()),
        };
        Health { live, ready, phase, store, broker, switch_open, in_flight }
    }

    fn at(&self, when: Instant) -> u64 {
        let ms = when.saturating_duration_since(self.built).as_millis();
        u64::try_from(ms).unwrap_or(NONE - 1)
    }
}

/// Whether one of the two answers, since when, and why not.
#[derive(Debug)]
struct Side {
    /// The answer to the question asked after every call, without the lock.
    up: AtomicBool,
    last: Mutex<(Instant, Option<String>)>,
}

impl Side {
    fn new(built: Instant) -> Self {
        Self { up: AtomicBool::new(false), last: Mutex::new((built, None)) }
    }

    fn answered(&self) -> bool {
        if self.up.load(Ordering::Relaxed) {
            return false;
        }
        let mut last = self.last();
        let news = !self.up.swap(true, Ordering::SeqCst);
        if news {
            *last = (Instant::now(), None);
        }
        news
    }

    fn failed(&self, error: &Error) -> bool {
        let mut last = self.last();
        let was_up = self.up.swap(false, Ordering::SeqCst);
        let news = was_up || last.1.is_none();
        if was_up {
            last.0 = Instant::now();
        }
        last.1 = Some(cut(&redact(&error.to_string()), ERROR_BYTES_MAX).into());
        news
    }

    fn reach(&self, now: Instant) -> Reach {
        let last = self.last();
        Reach {
            up: self.up.load(Ordering::SeqCst),
            since_seconds: now.saturating_duration_since(last.0).as_secs_f64(),
            error: last.1.clone(),
        }
    }

    fn last(&self) -> MutexGuard<'_, (Instant, Option<String>)> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn down() -> Error {
        Error::new(ErrorKind::Unavailable, "claim").because("the server is restarting")
    }

    fn running() -> Vitals {
        let vitals = Vitals::new();
        vitals.store_up();
        vitals.broker_up();
        vitals.enter(Phase::Running);
        vitals
    }

    #[tokio::test(start_paused = true)]
    async fn a_driver_that_gives_no_sign_of_life_is_not_live_until_it_turns_again() {
        let vitals = running();
        tokio::time::advance(BEAT_MAX).await;
        assert!(vitals.health().live);
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(!vitals.health().live && !vitals.health().ready);
        vitals.beat();
        assert!(vitals.health().live && vitals.health().ready);
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_makes_a_consumer_unready_and_not_dead() {
        let vitals = running();
        assert!(vitals.store_down(&down()), "the first failure is news");
        tokio::time::advance(Duration::from_secs(3)).await;
        assert!(!vitals.store_down(&down()), "the second is not");
        let health = vitals.health();
        assert!(health.live && !health.ready && health.broker.up);
        assert_eq!(health.store.error.as_deref(), Some("claim: the server is restarting"));
        assert!((health.store.since_seconds - 3.0).abs() < 1e-9, "down since the first failure");
        assert!(vitals.store_up() && !vitals.store_up());
        assert_eq!(vitals.health().store.error, None);
        assert!(vitals.health().ready);
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_in_a_report_holds_no_credentials_and_is_short() {
        let vitals = running();
        let long = format!("redis://u:c4nary@h refused {}", "x".repeat(2_000));
        vitals.broker_down(&Error::new(ErrorKind::Unavailable, "receive").because(long));
        let error = vitals.health().broker.error.expect("it is down");
        assert!(error.starts_with("receive: redis://***@h refused x") && error.len() == ERROR_BYTES_MAX, "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_running_consumer_with_its_switch_closed_is_ready() {
        let vitals = Vitals::new();
        vitals.store_up();
        vitals.broker_up();
        for (phase, live, ready) in [
            (Phase::Starting, true, false),
            (Phase::Running, true, true),
            (Phase::Paused, true, false),
            (Phase::Draining, true, false),
        ] {
            vitals.enter(phase);
            let health = vitals.health();
            assert_eq!((health.phase, health.live, health.ready), (phase, live, ready));
        }
        vitals.enter(Phase::Running);
        assert!(vitals.switch(true) && !vitals.switch(true));
        assert!(!vitals.health().ready && vitals.health().live);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stopped_consumer_stays_stopped() {
        let vitals = running();
        vitals.enter(Phase::Stopped);
        vitals.enter(Phase::Running);
        assert_eq!(vitals.health().phase, Phase::Stopped);
        assert!(!vitals.health().live);
    }

    #[tokio::test(start_paused = true)]
    async fn health_reads_as_json_with_units_in_its_names() {
        let vitals = running();
        vitals.in_flight(3, 700, Some(Instant::now()));
        tokio::time::advance(Duration::from_millis(1_500)).await;
        let json = serde_json::to_value(vitals.health()).expect("plain data");
        assert_eq!(json["phase"], "running");
        assert_eq!(json["in_flight"], serde_json::json!({"events": 3, "bytes": 700, "oldest_seconds": 1.5}));
        vitals.in_flight(0, 0, None);
        assert_eq!(vitals.health().in_flight, InFlight::default());
    }

    #[test]
    fn statistics_are_what_was_counted() {
        let counters = Counters::default();
        counters.delivered.add(5);
        counters.processed.one();
        let expected = Statistics { delivered: 5, processed: 1, ..Statistics::default() };
        assert_eq!(counters.snapshot(), expected);
    }
}
