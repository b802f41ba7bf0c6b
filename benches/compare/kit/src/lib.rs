//! What every contender has in common: its arguments, what it counts, and the line it ends with.
//!
//! A contender consumes a topic until it has handled so many events, settles them, prints one line of JSON and ends. Its
//! handler does nothing but [`Meter::handled`], and what `--work` says.

use std::sync::atomic::{AtomicU64, Ordering};
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
    /// How many handlers at once, where the contender has such a setting.
    #[arg(long, default_value_t = 256)]
    pub concurrency: usize,
    /// Order: `none` or `key`.
    #[arg(long, default_value = "none")]
    pub order: String,
    /// Payloads begin with the time at which they were sent, which is what latency is measured from.
    #[arg(long)]
    pub latency: bool,
}

/// The line that a contender ends with.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Outcome {
    pub events: u64,
    pub seconds: f64,
    pub cpu_us_per_event: f64,
    pub peak_mib: f64,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
}

/// Counts what is handled, from the first event to the last.
#[derive(Debug)]
pub struct Meter {
    wanted: u64,
    latency: bool,
    handled: AtomicU64,
    first: Mutex<Option<Instant>>,
    /// Microseconds from sending to handling.
    waited: Mutex<Vec<u32>>,
    all: Notify,
}

impl Meter {
    pub fn new(arguments: &Arguments) -> Self {
        Self {
            wanted: arguments.events,
            latency: arguments.latency,
            handled: AtomicU64::new(0),
            first: Mutex::new(None),
            waited: Mutex::default(),
            all: Notify::new(),
        }
    }

    /// The handler of every contender. Answers whether this was the last event.
    pub fn handled(&self, payload: &[u8]) -> bool {
        let before = self.handled.fetch_add(1, Ordering::Relaxed);
        if before == 0 {
            *self.first.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        if self.latency {
            let waited = now_us().saturating_sub(sent_us(payload));
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
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or_else(Instant::now);
        let mut waited = self.waited.lock().unwrap_or_else(PoisonError::into_inner).clone();
        waited.sort_unstable();
        let at = |share: f64| {
            let index = ((waited.len() as f64 * share) as usize).min(waited.len().checked_sub(1)?);
            Some(f64::from(waited[index]) / 1_000.0)
        };
        let events = self.count();
        let outcome = Outcome {
            events,
            seconds: first.elapsed().as_secs_f64(),
            cpu_us_per_event: ProcessTime::now().as_duration().as_secs_f64() * 1e6 / events.max(1) as f64,
            peak_mib: peak_mib(),
            p50_ms: at(0.50),
            p99_ms: at(0.99),
        };
        println!("{}", serde_json::to_string(&outcome).expect("figures have a JSON form"));
    }
}

/// Microseconds since 1970.
pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_micros() as u64
}

/// The 16 digits with which a payload begins.
fn sent_us(payload: &[u8]) -> u64 {
    let digits = payload.get(..16).and_then(|digits| std::str::from_utf8(digits).ok());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or_else(now_us)
}

/// A payload of this many bytes, at least 16: when it was sent, and filling.
pub fn payload(size: usize) -> Vec<u8> {
    let mut payload = format!("{:016}", now_us()).into_bytes();
    payload.resize(size.max(16), b'.');
    payload
}

/// The most memory that this process had.
fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")).and_then(|kib| kib.trim().parse::<f64>().ok());
    kib.unwrap_or_default() / 1_024.0
}
