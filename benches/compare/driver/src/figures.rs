//! What was measured, as it is stored and printed.

use std::fmt::Write as _;

use compare_kit::Outcome;
use serde::{Deserialize, Serialize};

use crate::contender::Contender;

/// Middle, smallest and largest of the rounds.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(measured: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = measured.into_iter().map(rounded).collect();
        sorted.sort_by(f64::total_cmp);
        match sorted.as_slice() {
            [] => Self::default(),
            [min, .., max] => {
                let upper = sorted.len() / 2;
                let lower = (sorted.len() - 1) / 2;
                Self { median: rounded(f64::midpoint(sorted[lower], sorted[upper])), min: *min, max: *max }
            }
            [only] => Self { median: *only, min: *only, max: *only },
        }
    }
}

/// Four digits say enough.
fn rounded(value: f64) -> f64 {
    if value >= 1_000.0 { value.round() } else { (value * 1_000.0).round() / 1_000.0 }
}

/// One contender.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    pub broker: String,
    pub store: String,
    pub contender: String,
    pub level: Option<String>,
    pub size: usize,
    pub concurrency: usize,
    pub events_per_s: Spread,
    pub cpu_us_per_event: Spread,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub peak_mib: f64,
    /// At what offered rate the latencies were measured, where it was not the usual one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offered_per_s: Option<u64>,
    /// How many events a round had.
    #[serde(default)]
    pub events: u64,
}

impl Row {
    pub fn new(contender: &Contender, size: usize, events: u64, outcomes: &[Outcome]) -> Self {
        Self {
            broker: contender.broker.clone(),
            store: contender.store.to_owned(),
            contender: contender.name.to_owned(),
            level: contender.level.map(str::to_owned),
            size,
            concurrency: contender.concurrency,
            events_per_s: Spread::of(outcomes.iter().map(|outcome| outcome.events as f64 / outcome.seconds)),
            cpu_us_per_event: Spread::of(outcomes.iter().map(|outcome| outcome.cpu_us_per_event)),
            p50_ms: None,
            p99_ms: None,
            peak_mib: Spread::of(outcomes.iter().map(|outcome| outcome.peak_mib)).median.round(),
            offered_per_s: None,
            events,
        }
    }

    pub fn title(&self) -> String {
        title(&self.contender, self.level.as_deref(), &self.store, self.concurrency)
    }
}

/// A contender's name for people: `hapax L2, redis`.
pub fn title(name: &str, level: Option<&str>, store: &str, concurrency: usize) -> String {
    let with_level = level.map(|level| format!(" {level}")).unwrap_or_default();
    let store = if store == "none" { String::new() } else { format!(", {store}") };
    let is_transactional = name == "by-hand-tx" || level == Some("L4");
    let at = if is_transactional { format!(", {concurrency} at once") } else { String::new() };
    format!("{name}{with_level}{store}{at}")
}

/// `12.3k`.
pub fn rate(value: f64) -> String {
    match value {
        _ if value >= 100_000.0 => format!("{:.0}k", value / 1_000.0),
        _ if value >= 1_000.0 => format!("{:.1}k", value / 1_000.0),
        _ => format!("{value:.0}"),
    }
}

/// Milliseconds, or a dash.
pub fn ms(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |ms| if ms >= 100.0 { format!("{ms:.0}") } else { format!("{ms:.2}") })
}

/// A ratio between two lines of one run, and what was asked of it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Ratio {
    pub broker: String,
    pub what: String,
    pub ratio: f64,
    pub target: Option<f64>,
}

struct Wanted {
    of: (&'static str, &'static str, Option<&'static str>),
    to: (&'static str, &'static str),
    target: Option<f64>,
    only: Option<&'static str>,
}

/// Every ratio that these rows allow, the ones to `batched` first.
pub fn ratios(rows: &[Row]) -> Vec<Ratio> {
    const fn wanted(
        of: (&'static str, &'static str, Option<&'static str>),
        to: (&'static str, &'static str),
        target: Option<f64>,
        only: Option<&'static str>,
    ) -> Wanted {
        Wanted { of, to, target, only }
    }
    const L1: (&str, &str, Option<&str>) = ("hapax", "memory", Some("L1"));
    const L2_REDIS: (&str, &str, Option<&str>) = ("hapax", "redis", Some("L2"));
    const L2_POSTGRES: (&str, &str, Option<&str>) = ("hapax", "postgres", Some("L2"));
    const L4: (&str, &str, Option<&str>) = ("hapax", "postgres", Some("L4"));
    const L4_BATCH: (&str, &str, Option<&str>) = ("hapax", "postgres", Some("L4-batch"));
    const ALL: &[Wanted] = &[
        wanted(L2_REDIS, ("batched", "redis"), Some(0.7), None),
        wanted(L2_POSTGRES, ("batched", "postgres"), Some(0.7), None),
        wanted(L1, ("mq-bridge", "memory"), Some(1.2), Some("kafka")),
        wanted(L1, ("watermill", "memory"), Some(1.2), Some("kafka")),
        wanted(L2_POSTGRES, ("mq-bridge", "postgres"), Some(1.5), Some("kafka")),
        wanted(L2_REDIS, ("by-hand", "redis"), Some(5.0), None),
        wanted(L2_POSTGRES, ("by-hand", "postgres"), Some(10.0), None),
        wanted(L2_REDIS, ("by-hand", "redis"), Some(4.0), Some("redis")),
        wanted(L2_POSTGRES, ("by-hand", "postgres"), Some(7.0), Some("redis")),
        wanted(L4, ("by-hand-tx", "postgres"), Some(1.0), None),
        wanted(L4_BATCH, ("by-hand-tx", "postgres"), Some(5.0), None),
        wanted(L1, ("raw", "none"), None, None),
        wanted(L2_REDIS, ("raw", "none"), None, None),
        wanted(L2_POSTGRES, ("raw", "none"), None, None),
    ];
    let mut brokers: Vec<_> = rows.iter().map(|row| row.broker.as_str()).collect();
    brokers.dedup();
    let mut found = Vec::new();
    for wanted in ALL {
        for broker in &brokers {
            let has_own = |other: &Wanted| other.only == Some(broker) && (other.of, other.to) == (wanted.of, wanted.to);
            let is_for = match wanted.only {
                Some(only) => only == *broker,
                None => !ALL.iter().any(has_own),
            };
            if is_for {
                of_broker(wanted, broker, rows, &mut found);
            }
        }
    }
    found
}

fn of_broker(wanted: &Wanted, broker: &str, rows: &[Row], found: &mut Vec<Ratio>) {
    let here = || rows.iter().filter(|row| row.broker == broker);
    let (name, store, level) = wanted.of;
    let ours = here().filter(|row| row.contender == name && row.store == store && row.level.as_deref() == level);
    for our in ours {
        for their in here().filter(|row| (row.contender.as_str(), row.store.as_str()) == wanted.to) {
            // One by one at the same number of transactions at once; in batches against the better of both.
            let differs =
                their.contender == "by-hand-tx" && level == Some("L4") && our.concurrency != their.concurrency;
            let is_lesser = level == Some("L4-batch") && their.concurrency == 1;
            if !differs && !is_lesser && their.events_per_s.median > 0.0 {
                found.push(Ratio {
                    broker: broker.to_owned(),
                    what: format!("{} to {}", our.title(), their.title()),
                    ratio: our.events_per_s.median / their.events_per_s.median,
                    target: wanted.target,
                });
            }
        }
    }
}

/// The tables of a comparison.
pub fn markdown(rows: &[Row]) -> String {
    let mut text = String::from("| Ratio of events/s | Broker | Measured | At least |\n|---|---|---|---|\n");
    for Ratio { broker, what, ratio, target } in ratios(rows) {
        let target = target.map_or("-".to_owned(), |target| {
            format!("{target:.1} {}", if ratio >= target { "reached" } else { "**missed**" })
        });
        line(&mut text, format_args!("| {what} | {broker} | {ratio:.2} | {target} |"));
    }
    let mut brokers: Vec<_> = rows.iter().map(|row| row.broker.as_str()).collect();
    brokers.dedup();
    for broker in brokers {
        let columns =
            "| Contender | events a round | events/s (min..max) | CPU µs an event | p50 ms | p99 ms | peak MiB |";
        line(&mut text, format_args!("\n### {broker}\n\n{columns}\n|---|---|---|---|---|---|---|"));
        for row in rows.iter().filter(|row| row.broker == broker) {
            let Row { events_per_s: events, cpu_us_per_event: cpu, peak_mib, .. } = row;
            let title = row.title();
            let (p50, mut p99) = (ms(row.p50_ms), ms(row.p99_ms));
            if let Some(offered) = row.offered_per_s {
                p99 += &format!(" at {offered}/s");
            }
            let (median, min, max) = (rate(events.median), rate(events.min), rate(events.max));
            line(
                &mut text,
                format_args!(
                    "| {title} | {} | {median} ({min}..{max}) | {:.1} | {p50} | {p99} | {peak_mib:.0} |",
                    row.events, cpu.median
                ),
            );
        }
    }
    text
}

/// A line is added; text in memory cannot fail.
pub fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    let _infallible = writeln!(text, "{line}");
}
