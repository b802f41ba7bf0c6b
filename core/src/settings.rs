//! Settings: every number a consumer goes by, its default as a documented constant, and its bounds.
//!
//! A plain structure, so that it reads from any configuration format. What several settings mean together, and with a
//! broker and a store, is checked in `consumer/builder/checks.rs`.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::message::MessageLimits;
use crate::retry::{Backoff, RetryPolicy};

mod env;
#[cfg(test)]
mod tests;
mod text;

/// Which deliveries run at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Deliveries of one ordering key run one after the other.
    PerKey,
    /// Deliveries run as they come.
    Unordered,
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PerKey => "per-key",
            Self::Unordered => "unordered",
        })
    }
}

/// Every setting of a consumer; each has a method of the same name on the builder.
///
/// Durations read as `"30s"`, `"200ms"`, `"8d"` or a number of seconds, sizes as `"64MiB"` or a number of bytes. An
/// unknown name is refused; the error lists the known ones, and [`from_env`](Self::from_env) names the nearest. Bounds
/// are checked when the consumer is built.
///
/// ```
/// use std::time::Duration;
/// use hapax::Settings;
///
/// let settings: Settings = serde_json::from_str(r#"{"lease": "45s", "body_max": "2MiB"}"#)?;
/// assert_eq!(settings, Settings { lease: Duration::from_secs(45), body_max: 2 << 20, ..Settings::default() });
/// # Ok::<(), serde_json::Error>(())
/// ```
// One field a setting: a flat list is what configuration files and environments hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Which deliveries run at once. Default: per key where the broker keeps an order, else unordered.
    pub order: Option<Order>,
    /// Most handlers that run at once, and most claims held. Default [`CONCURRENCY`](Self::CONCURRENCY), `in_flight_max`
    /// where that is less.
    pub concurrency: usize,
    /// Most unsettled deliveries; less where the broker hands out less. Default [`IN_FLIGHT_MAX`](Self::IN_FLIGHT_MAX).
    pub in_flight_max: usize,
    /// Most bytes of unsettled deliveries. Default [`IN_FLIGHT_BYTES_MAX`](Self::IN_FLIGHT_BYTES_MAX).
    #[serde(with = "text::bytes")]
    pub in_flight_bytes_max: usize,
    /// Most items of one call to store or broker. Default [`BATCH_MAX`](Self::BATCH_MAX).
    pub batch_max: usize,
    /// How long a claim lasts unless it is renewed, which happens at a third, and at an eighth where a transaction holds up
    /// every other write. After a crash another waits this long.
    /// Default [`LEASE`](Self::LEASE).
    #[serde(with = "text::duration")]
    pub lease: Duration,
    /// How long one attempt may take. Longer than the lease is sound: it is renewed. Default
    /// [`TIMEOUT`](Self::TIMEOUT); two thirds of the lease for transactional handlers on a store whose transactions
    /// block every other write, since renewals wait behind them.
    #[serde(with = "text::duration_or_none")]
    pub timeout: Option<Duration>,
    /// Most attempts. Default [`ATTEMPTS_MAX`](Self::ATTEMPTS_MAX).
    pub attempts_max: u32,
    /// The delay after the first failure. Default [`DELAY`](Self::DELAY).
    #[serde(with = "text::duration")]
    pub delay: Duration,
    /// By how much each delay grows. Default [`DELAY_FACTOR`](Self::DELAY_FACTOR).
    pub delay_factor: f32,
    /// The longest delay, without jitter. Default [`DELAY_MAX`](Self::DELAY_MAX), less where the broker takes less; with
    /// [`Order::PerKey`] what makes `hold` with jitter, unless the broker keeps order over a retry.
    #[serde(with = "text::duration_or_none")]
    pub delay_max: Option<Duration>,
    /// The share that chance adds to a delay, from 0 to 1. Default [`JITTER`](Self::JITTER).
    pub jitter: f32,
    /// The longest time from the first claim to the start of the last attempt. Default: no limit but `attempts_max`.
    #[serde(with = "text::duration_or_none")]
    pub retry_total_max: Option<Duration>,
    /// Up to this delay a delivery waits here; a longer one goes back to the broker. Default [`HOLD`](Self::HOLD).
    #[serde(with = "text::duration")]
    pub hold: Duration,
    /// Most claims that may end without an outcome (the process died) before the event is set aside. Default
    /// [`CRASHES_MAX`](Self::CRASHES_MAX).
    pub crashes_max: u32,
    /// How long an event may wait for a prerequisite. Default [`NOT_YET_MAX`](Self::NOT_YET_MAX).
    #[serde(with = "text::duration")]
    pub not_yet_max: Duration,
    /// How long the store remembers what was processed or dead-lettered. Default [`RETENTION`](Self::RETENTION).
    #[serde(with = "text::duration")]
    pub retention: Duration,
    /// The share of failures that opens the kill switch, above 0 and up to 1. Default
    /// [`SWITCH_SHARE`](Self::SWITCH_SHARE).
    pub switch_share: f64,
    /// The kill switch stays closed before so many handlers ended within the window; `u32::MAX` keeps it closed for
    /// good. Default [`SWITCH_EVENTS_MIN`](Self::SWITCH_EVENTS_MIN).
    pub switch_events_min: u32,
    /// How long results count for the kill switch. Default [`SWITCH_WINDOW`](Self::SWITCH_WINDOW).
    #[serde(with = "text::duration")]
    pub switch_window: Duration,
    /// How long between probes while the kill switch is open. Default [`SWITCH_PROBE`](Self::SWITCH_PROBE).
    #[serde(with = "text::duration")]
    pub switch_probe: Duration,
    /// How long work in flight may go on after shutdown was asked for. Default [`DRAIN`](Self::DRAIN).
    #[serde(with = "text::duration")]
    pub drain: Duration,
    /// The deadline of one call to store or broker. Default [`CALL_TIMEOUT`](Self::CALL_TIMEOUT), a third of the lease
    /// where that is less.
    #[serde(with = "text::duration")]
    pub call_timeout: Duration,
    /// Most bytes of a message's body. Default [`BODY_MAX`](Self::BODY_MAX).
    #[serde(with = "text::bytes")]
    pub body_max: usize,
    /// Most headers of a message. Default [`HEADERS_MAX`](Self::HEADERS_MAX).
    pub headers_max: usize,
    /// Most bytes of all header names and values. Default [`HEADER_BYTES_MAX`](Self::HEADER_BYTES_MAX).
    #[serde(with = "text::bytes")]
    pub header_bytes_max: usize,
    /// Most bytes of an id or a source. Default [`ID_MAX`](Self::ID_MAX).
    #[serde(with = "text::bytes")]
    pub id_max: usize,
    /// Deepest nesting of JSON. Default [`JSON_DEPTH_MAX`](Self::JSON_DEPTH_MAX).
    pub json_depth_max: usize,
    /// Most bytes of an error's text in records, dead letters and logs. Default
    /// [`ERROR_TEXT_MAX`](Self::ERROR_TEXT_MAX).
    #[serde(with = "text::bytes")]
    pub error_text_max: usize,
}

impl Settings {
    /// 64 handlers at once.
    pub const CONCURRENCY: usize = 64;
    /// 1,024 unsettled deliveries.
    pub const IN_FLIGHT_MAX: usize = 1_024;
    /// 64 MiB of unsettled deliveries.
    pub const IN_FLIGHT_BYTES_MAX: usize = 64 << 20;
    /// 256 items a call.
    pub const BATCH_MAX: usize = 256;
    /// 30 s.
    pub const LEASE: Duration = Duration::from_secs(30);
    /// 60 s.
    pub const TIMEOUT: Duration = Duration::from_secs(60);
    /// 10 attempts.
    pub const ATTEMPTS_MAX: u32 = RetryPolicy::ATTEMPTS_MAX;
    /// 200 ms.
    pub const DELAY: Duration = RetryPolicy::DELAY;
    /// Each delay is 4 times the one before.
    pub const DELAY_FACTOR: f32 = RetryPolicy::FACTOR;
    /// 5 min.
    pub const DELAY_MAX: Duration = RetryPolicy::DELAY_MAX;
    /// Up to 25 %.
    pub const JITTER: f32 = RetryPolicy::JITTER;
    /// 5 s.
    pub const HOLD: Duration = Duration::from_secs(5);
    /// 3 crashes; at the fourth it is set aside.
    pub const CRASHES_MAX: u32 = 3;
    /// 1 h.
    pub const NOT_YET_MAX: Duration = Duration::from_hours(1);
    /// 8 days: longer than the 7 for which Kafka keeps messages by default.
    pub const RETENTION: Duration = Duration::from_hours(8 * 24);
    /// Half of the handlers.
    pub const SWITCH_SHARE: f64 = 0.5;
    /// 20 handlers.
    pub const SWITCH_EVENTS_MIN: u32 = 20;
    /// 30 s.
    pub const SWITCH_WINDOW: Duration = Duration::from_secs(30);
    /// 30 s.
    pub const SWITCH_PROBE: Duration = Duration::from_secs(30);
    /// 25 s: Kubernetes kills 30 s after it asked to stop.
    pub const DRAIN: Duration = Duration::from_secs(25);
    /// 10 s.
    pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);
    /// 1 MiB.
    pub const BODY_MAX: usize = MessageLimits::DEFAULT.body_max;
    /// 64 headers.
    pub const HEADERS_MAX: usize = MessageLimits::DEFAULT.headers_max;
    /// 8 KiB.
    pub const HEADER_BYTES_MAX: usize = MessageLimits::DEFAULT.header_bytes_max;
    /// 512 B.
    pub const ID_MAX: usize = MessageLimits::DEFAULT.id_max;
    /// 64 levels.
    pub const JSON_DEPTH_MAX: usize = MessageLimits::DEFAULT.json_depth_max;
    /// 512 B.
    pub const ERROR_TEXT_MAX: usize = 512;

    /// Every setting by its name.
    pub const NAMES: &[&str] = &[
        "order",
        "concurrency",
        "in_flight_max",
        "in_flight_bytes_max",
        "batch_max",
        "lease",
        "timeout",
        "attempts_max",
        "delay",
        "delay_factor",
        "delay_max",
        "jitter",
        "retry_total_max",
        "hold",
        "crashes_max",
        "not_yet_max",
        "retention",
        "switch_share",
        "switch_events_min",
        "switch_window",
        "switch_probe",
        "drain",
        "call_timeout",
        "body_max",
        "headers_max",
        "header_bytes_max",
        "id_max",
        "json_depth_max",
        "error_text_max",
    ];

    /// What a message may measure.
    pub fn message_limits(&self) -> MessageLimits {
        MessageLimits {
            body_max: self.body_max,
            headers_max: self.headers_max,
            header_bytes_max: self.header_bytes_max,
            id_max: self.id_max,
            json_depth_max: self.json_depth_max,
        }
    }

    /// The retry policy of these settings, with `delay_max` where none is set.
    pub(crate) fn retry_policy(&self, delay_max: Duration) -> RetryPolicy {
        let max = self.delay_max.unwrap_or(delay_max.max(self.delay));
        let backoff = Backoff::Exponential { first: self.delay, factor: self.delay_factor, max };
        let policy = RetryPolicy::with(backoff).attempts_max(self.attempts_max).jitter(self.jitter);
        match self.retry_total_max {
            Some(total_max) => policy.total_max(total_max),
            None => policy,
        }
    }

    /// Whether every setting of the retry policy is as it was.
    pub(crate) fn retry_is_default(&self) -> bool {
        let default = Self::default();
        (self.attempts_max, self.delay, self.delay_max, self.retry_total_max)
            == (default.attempts_max, default.delay, default.delay_max, default.retry_total_max)
            && self.delay_factor == default.delay_factor
            && self.jitter == default.jitter
    }

    /// Settings that are out of their bounds, each alone.
    pub(crate) fn faults(&self) -> Vec<Fault> {
        const MS: Duration = Duration::from_millis(1);
        const S: Duration = Duration::from_secs(1);
        const H: Duration = Duration::from_hours(1);
        const D: Duration = Duration::from_hours(24);
        let mut bounds = Bounds(Vec::new());
        bounds.number("concurrency", self.concurrency, 1, 1 << 16);
        bounds.number("in_flight_max", self.in_flight_max, 1, 1_000_000);
        bounds.number("in_flight_bytes_max", self.in_flight_bytes_max, 4 << 10, 64 << 30);
        bounds.number("batch_max", self.batch_max, 1, 10_000);
        bounds.time("lease", Some(self.lease), S, H);
        bounds.time("timeout", self.timeout, 10 * MS, D);
        bounds.number("attempts_max", self.attempts_max as usize, 1, 1_000);
        bounds.time("delay", Some(self.delay), Duration::ZERO, D);
        bounds.share("delay_factor", self.delay_factor.into(), 1.0, 1_000.0);
        bounds.time("delay_max", self.delay_max, self.delay, 7 * D);
        bounds.share("jitter", self.jitter.into(), 0.0, 1.0);
        bounds.time("retry_total_max", self.retry_total_max, S, 365 * D);
        bounds.time("hold", Some(self.hold), Duration::ZERO, H);
        bounds.number("crashes_max", self.crashes_max as usize, 0, 1_000);
        bounds.time("not_yet_max", Some(self.not_yet_max), Duration::ZERO, 30 * D);
        bounds.time("retention", Some(self.retention), S, 3_650 * D);
        bounds.share("switch_share", self.switch_share, 0.01, 1.0);
        bounds.number("switch_events_min", self.switch_events_min as usize, 1, u32::MAX as usize);
        bounds.time("switch_window", Some(self.switch_window), S, H);
        bounds.time("switch_probe", Some(self.switch_probe), 100 * MS, H);
        bounds.time("drain", Some(self.drain), Duration::ZERO, H);
        bounds.time("call_timeout", Some(self.call_timeout), 10 * MS, 600 * S);
        bounds.number("body_max", self.body_max, 1, 1 << 30);
        bounds.number("headers_max", self.headers_max, 0, 10_000);
        bounds.number("header_bytes_max", self.header_bytes_max, 0, 16 << 20);
        bounds.number("id_max", self.id_max, 1, 64 << 10);
        // serde_json itself stops at 128.
        bounds.number("json_depth_max", self.json_depth_max, 1, 127);
        bounds.number("error_text_max", self.error_text_max, 0, 64 << 10);
        bounds.0
    }
}

/// Collects what is out of bounds.
struct Bounds(Vec<Fault>);

impl Bounds {
    fn number(&mut self, name: &str, value: usize, min: usize, max: usize) {
        self.check(name, (min..=max).contains(&value), &value, &min, &max);
    }

    fn share(&mut self, name: &str, value: f64, min: f64, max: f64) {
        self.check(name, (min..=max).contains(&value), &value, &min, &max);
    }

    fn time(&mut self, name: &str, value: Option<Duration>, min: Duration, max: Duration) {
        let Some(value) = value else { return };
        let text = humantime::format_duration;
        self.check(name, (min..=max).contains(&value), &text(value), &text(min), &text(max));
    }

    fn check(
        &mut self,
        name: &str,
        fits: bool,
        value: &dyn fmt::Display,
        min: &dyn fmt::Display,
        max: &dyn fmt::Display,
    ) {
        if !fits {
            self.0.push(Fault::new(
                "setting-out-of-bounds",
                format!("{name} is {value}: it must be from {min} to {max}"),
                "such a value is a slip rather than a wish: it stops the consumer, or takes a bound away",
                format!(".{name}(..) from {min} to {max}"),
            ));
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            order: None,
            concurrency: Self::CONCURRENCY,
            in_flight_max: Self::IN_FLIGHT_MAX,
            in_flight_bytes_max: Self::IN_FLIGHT_BYTES_MAX,
            batch_max: Self::BATCH_MAX,
            lease: Self::LEASE,
            timeout: None,
            attempts_max: Self::ATTEMPTS_MAX,
            delay: Self::DELAY,
            delay_factor: Self::DELAY_FACTOR,
            delay_max: None,
            jitter: Self::JITTER,
            retry_total_max: None,
            hold: Self::HOLD,
            crashes_max: Self::CRASHES_MAX,
            not_yet_max: Self::NOT_YET_MAX,
            retention: Self::RETENTION,
            switch_share: Self::SWITCH_SHARE,
            switch_events_min: Self::SWITCH_EVENTS_MIN,
            switch_window: Self::SWITCH_WINDOW,
            switch_probe: Self::SWITCH_PROBE,
            drain: Self::DRAIN,
            call_timeout: Self::CALL_TIMEOUT,
            body_max: Self::BODY_MAX,
            headers_max: Self::HEADERS_MAX,
            header_bytes_max: Self::HEADER_BYTES_MAX,
            id_max: Self::ID_MAX,
            json_depth_max: Self::JSON_DEPTH_MAX,
            error_text_max: Self::ERROR_TEXT_MAX,
        }
    }
}
