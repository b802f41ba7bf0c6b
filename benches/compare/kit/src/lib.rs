//! What every contender has in common: its arguments, what it counts, and the line it ends with.
//!
//! A contender consumes a topic until it has handled so many events, settles them, prints one line of JSON and ends. Its
//! handler does nothing but [`Meter::handled`], and what `--work` says.

#![allow(clippy::disallowed_methods, reason = "benchmarks measure the real clock")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use cpu_time::ProcessTime;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// What the driver tells a contender.
#[derive(Clone, Debug, Parser)]
pub struct Arguments {
    /// Which of the package's contenders.
    #[arg(long)]
    pub contender: String,
    #[arg(long)]
    pub broker: String,
    #[arg(long)]
    pub url: String,
    /// Topic, queue or stream.
    #[arg(long)]
    pub topic: String,
    #[arg(long)]
    pub group: String,
    #[arg(long, default_value = "none")]
    pub store: String,
    #[arg(long, default_value = "")]
    pub store_url: String,
    /// The level to run at, for contenders that have several.
    #[arg(long)]
    pub level: Option<String>,
    /// How many distinct events to handle.
    #[arg(long)]
    pub events: u64,
    /// How many messages to settle, where some repeat an event. The rate is that of messages then.
    #[arg(long)]
    pub messages: Option<u64>,
    /// Fills the store with so many events that are not those of the topic.
    #[arg(long, default_value_t = 0)]
    pub remember: u64,
    /// The number of the first of them.
    #[arg(long, default_value_t = 0)]
    pub remember_from: u64,
    /// How many handlers at once, where the contender has such a setting.
    #[arg(long, default_value_t = 256)]
    pub concurrency: usize,
    /// Most unsettled messages, where the contender has such a setting.
    #[arg(long, default_value_t = 1_024)]
    pub in_flight: usize,
    /// Most items of one call, where the contender has such a setting.
    #[arg(long, default_value_t = 512)]
    pub batch: usize,
    /// Order: `none` or `key`.
    #[arg(long, default_value = "none")]
    pub order: String,
    /// Measures from the time of sending, which stands in the payload. What bears none is only to warm up: the first such
    /// event is told by a line `ready`, and it is not counted.
    #[arg(long)]
    pub latency: bool,
    /// A second line tells the stages of a delivery: [`Stages`].
    #[arg(long)]
    pub stages: bool,
    /// Handlers never return: what the process holds then is told after some seconds.
    #[arg(long)]
    pub stopped: bool,
    /// Ends when nothing more comes, instead of after so many events.
    #[arg(long)]
    pub until_idle: bool,
    /// The store's place stays as it is, for others to use.
    #[arg(long)]
    pub keep: bool,
}

/// The line that a contender ends with.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Outcome {
    pub events: u64,
    pub seconds: f64,
    pub cpu_us_per_event: f64,
    pub peak_mib: f64,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    /// What the store takes where it keeps things, if that is known.
    #[serde(default)]
    pub store_mib: Option<f64>,
    /// When the first event was handled and when this was told, in microseconds since 1970.
    #[serde(default)]
    pub first_us: u64,
    #[serde(default)]
    pub last_us: u64,
}

/// The median and the time within which 99 of 100 were done.
pub type Percentiles = Option<(f64, f64)>;

/// Milliseconds from the receipt of a delivery.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Stages {
    /// To the start of its handler.
    pub start: Percentiles,
    /// Until it is settled at the broker.
    pub settlement: Percentiles,
}

/// Of waits in microseconds.
pub fn percentiles_ms(mut waits_us: Vec<u32>) -> Percentiles {
    waits_us.sort_unstable();
    let last = waits_us.len().checked_sub(1)?;
    let at = |share: f64| f64::from(waits_us[(last as f64 * share).round() as usize]) / 1_000.0;
    Some((at(0.50), at(0.99)))
}

/// Counts what is handled, from the first event to the last.
#[derive(Debug)]
pub struct Meter {
    wanted: u64,
    messages: Option<u64>,
    latency: bool,
    ready: AtomicBool,
    handled: AtomicU64,
    /// What the process had used when its work began.
    cpu_before: Mutex<Duration>,
    first: Mutex<Option<Instant>>,
    /// Microseconds from sending to handling.
    waited: Mutex<Vec<u32>>,
    all: Notify,
}

impl Meter {
    pub fn new(arguments: &Arguments) -> Self {
        Self {
            wanted: arguments.events,
            messages: arguments.messages,
            latency: arguments.latency,
            ready: AtomicBool::new(false),
            handled: AtomicU64::new(0),
            cpu_before: Mutex::default(),
            first: Mutex::new(None),
            waited: Mutex::default(),
            all: Notify::new(),
        }
    }

    /// CPU time that was used so far is not counted.
    pub fn begin(&self) {
        *self.cpu_before.lock().unwrap_or_else(PoisonError::into_inner) = ProcessTime::now().as_duration();
    }

    /// The handler of every contender. Answers whether this was the last event.
    pub fn handled(&self, payload: &[u8]) -> bool {
        self.handled_at(if self.latency { sent_us(payload) } else { 0 })
    }

    /// The same, for a contender that has decoded the time of sending.
    pub fn handled_at(&self, sent_us: u64) -> bool {
        if self.latency && sent_us == 0 {
            if !self.ready.swap(true, Ordering::Relaxed) {
                println!("ready");
            }
            return false;
        }
        let before = self.handled.fetch_add(1, Ordering::Relaxed);
        if before == 0 {
            *self.first.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        if self.latency {
            let waited = now_us().saturating_sub(sent_us);
            self.waited.lock().unwrap_or_else(PoisonError::into_inner).push(waited.min(u64::from(u32::MAX)) as u32);
        }
        let is_last = before + 1 == self.wanted;
        if is_last {
            self.all.notify_one();
        }
        is_last
    }

    pub fn count(&self) -> u64 {
        self.handled.load(Ordering::Relaxed)
    }

    /// Waits until all were handled.
    pub async fn all_handled(&self) {
        while self.count() < self.wanted {
            self.all.notified().await;
        }
    }

    /// Prints the line: to be called when the last event is settled.
    pub fn report(&self) {
        self.report_with(None);
    }

    /// The same, with what the store takes.
    pub fn report_with(&self, store_mib: Option<f64>) {
        println!("{}", serde_json::to_string(&self.outcome(store_mib)).expect("figures have a JSON form"));
    }

    /// How it stands now.
    pub fn outcome(&self, store_mib: Option<f64>) -> Outcome {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or_else(Instant::now);
        let waited = percentiles_ms(self.waited.lock().unwrap_or_else(PoisonError::into_inner).clone());
        let last_us = now_us();
        let events = self.messages.unwrap_or_else(|| self.count());
        let cpu_before = *self.cpu_before.lock().unwrap_or_else(PoisonError::into_inner);
        let cpu = ProcessTime::now().as_duration().saturating_sub(cpu_before);
        Outcome {
            events,
            seconds: first.elapsed().as_secs_f64(),
            cpu_us_per_event: cpu.as_secs_f64() * 1e6 / events.max(1) as f64,
            peak_mib: peak_mib(),
            p50_ms: waited.map(|(median, _)| median),
            p99_ms: waited.map(|(_, most)| most),
            store_mib,
            first_us: last_us.saturating_sub(first.elapsed().as_micros() as u64),
            last_us,
        }
    }
}

/// Microseconds since 1970.
pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_micros() as u64
}

/// Where the 16 digits of the time of sending begin in a payload.
const SENT_AT: usize = b"{\"sent\":\"".len();

/// When a payload was sent; 0 for one that is only to warm up.
pub fn sent_us(payload: &[u8]) -> u64 {
    let digits = payload.get(SENT_AT..SENT_AT + 16).and_then(|digits| std::str::from_utf8(digits).ok());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or_default()
}

/// A JSON document of this many bytes, at least 37: when it was sent, and filling.
pub fn payload(size: usize, sent_us: u64) -> Vec<u8> {
    let fill = size.saturating_sub(37);
    format!("{{\"sent\":\"{sent_us:016}\",\"fill\":\"{:.<fill$}\"}}", "").into_bytes()
}

/// The most memory that this process had.
fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")).and_then(|kib| kib.trim().parse::<f64>().ok());
    kib.unwrap_or_default() / 1_024.0
}
