//! docs/performance.md and its plots, made of the figures that were kept: nothing in it is written by hand but the words.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::feed::Error;
use crate::figures::{Row, line, markdown, ms, rate};
use crate::growth::{NAMES, Point};
use crate::latency::Latency;
use crate::svg::Plot;

/// Figures, and on what they were measured.
#[derive(Debug, Deserialize, Serialize)]
pub struct Kept<T> {
    pub machine: String,
    pub load_before: String,
    pub load_after: String,
    /// Events a round, where it is the same for all, and rounds.
    pub events: Option<u64>,
    pub rounds: usize,
    pub figures: Vec<T>,
}

/// The machine as Linux tells.
pub fn machine() -> String {
    let read = |file| fs::read_to_string(file).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model =
        cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':')).map(|(_, model)| model.trim());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok());
    let gib = memory.unwrap_or(0.0_f64) / 1_048_576.0;
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{cores} cores, {}, {gib:.0} GiB, Linux {}", model.unwrap_or("unknown"), kernel.trim())
}

/// The load average of the last minute.
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("unknown").to_owned()
}

/// The folder `docs`, as scripts/bench names it.
pub struct Docs(PathBuf);

impl Docs {
    pub fn here() -> Result<Self, Error> {
        let docs = std::env::var_os("HAPAX_DOCS").ok_or("HAPAX_DOCS is not set: scripts/bench sets it")?;
        Ok(Self(docs.into()))
    }

    fn folder(&self) -> PathBuf {
        self.0.join("performance")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder().join(format!("{name}.json"))
    }

    pub fn keep<T: Serialize>(&self, name: &str, kept: &Kept<T>) -> Result<(), Error> {
        fs::create_dir_all(self.folder())?;
        Ok(fs::write(self.file(name), serde_json::to_string_pretty(kept)? + "\n")?)
    }

    pub fn kept<T: DeserializeOwned>(&self, name: &str) -> Option<Kept<T>> {
        serde_json::from_slice(&fs::read(self.file(name)).ok()?).ok()
    }

    /// Writes the page anew.
    pub fn write(&self) -> Result<(), Error> {
        let mut text = String::from(INTRODUCTION);
        if let Some(kept) = self.kept::<Row>("compare") {
            text.push_str("\n## Beside what you would pick instead\n\n");
            told(&mut text, &kept);
            line(&mut text, format_args!("{COMPARED}"));
            text.push_str(&markdown(&kept.figures));
        }
        if let Some(kept) = self.kept::<Latency>("latency") {
            text.push_str("\n## Latency\n\n");
            told(&mut text, &kept);
            latency(&mut text, &kept.figures);
        }
        if let Some(kept) = self.kept::<Point>("growth") {
            text.push_str("\n## Growth\n\n");
            told(&mut text, &kept);
            growth(&mut text, &kept.figures, &self.folder())?;
        }
        text.push_str(METHOD);
        Ok(fs::write(self.0.join("performance.md"), text)?)
    }
}

const INTRODUCTION: &str = "# Performance

What hapax costs beside the raw client, and what it saves beside what people write by hand or pick instead. Everything here is
measured by `scripts/bench` on one machine that clients, brokers and stores share: read the figures as ratios within one run.
This page is written by that command; no number in it is copied by hand.
";

const COMPARED: &str = "\
`batched` is the limit with a store: claims and records in batches of 256, written by hand for this benchmark without leases, \
lanes, retries or failures. `raw` is the limit without one. `by-hand` is the idempotent consumer that people write, one message \
after the other; `by-hand-tx` the transaction for each message. What each contender does is in the first lines of its file in \
`benches/compare`.
";

const METHOD: &str = "
## Method

- `benches/compare` has a package for each contender; each runs in a process of its own, takes the same arguments and ends with one \
line of figures. Rounds are interleaved: every contender runs once before any runs again. Medians, with the smallest and the largest.
- Kafka topics (4 partitions) and Redis streams are filled once for a comparison, and each run reads them as a new group; RabbitMQ's \
quorum queues are filled anew for each run. Messages are CloudEvents in binary mode; on Kafka the record key is the event's id.
- The rate counts from the first handled event to the last one settled. CPU time is that of the contender's process, start included; \
what broker and store spend is not in it, and slows everybody who shares the two cores.
- librdkafka reads ahead up to 64 MiB before the first message is taken: where a round's messages fit into that, rates of several hundred \
thousand on Kafka (`raw`, RustStream) tell how fast its queue is emptied, not how fast a topic is fetched. `--events` makes rounds longer.
- The latency columns are measured apart, at 1,000 events/s offered for three seconds after a warm-up, from sending to the start of the \
handler. A contender that manages less than 1,500 is offered half of what it manages, which its line says: beyond that a figure is that \
of a queue.
- A contender that would take over 30 s a round runs fewer events, which its line says.
- A store is filled with remembered ids by one event through the store's contract and copies of its record under other keys; in memory \
all go through the contract. Before it is measured it comes to rest: PostgreSQL has vacuumed and written a checkpoint, Redis has written \
its log anew and moved all keys to the larger hash table, SQLite has emptied its log; then a fiftieth as many events as it remembers, \
at least 1,000, have gone through it, so that what comes once after a checkpoint, the first write to each page, is not taken for the cost \
of an event. Its MiB are those of the table, the server, the file.
- hapax runs with its defaults but for: `concurrency` and `in_flight_max` 1,024 and `batch_max` 512, so that a batch gathers while \
another is under way; at L4 the concurrency that the line tells, at L1 `.require(Level::AtLeastOnce)`. Order is unordered, as for the \
others, but for the growth by keys.
- mq-bridge runs with its default batch of 512 and its id from the record key; Watermill with its router, its default marshaler and the \
event's id as the key of its deduplicator; RustStream with tracked commits and a decoded message.
- Servers are durable: PostgreSQL with `fsync` and `synchronous_commit`, RabbitMQ with quorum queues; Redis as \
`scripts/brokers` starts it. PostgreSQL has 1 GB of shared buffers.

To repeat it:

```text
scripts/bench --docs
scripts/bench latency --docs
scripts/bench growth --docs
```
";

fn told<T>(text: &mut String, kept: &Kept<T>) {
    let Kept { machine, load_before, load_after, rounds, .. } = kept;
    let events = kept.events.map(|events| format!("{events} events a round, ")).unwrap_or_default();
    line(
        text,
        format_args!(
            "{machine}. {events}{rounds} rounds. Load average {load_before} before and {load_after} after the last run: above \
             the number of cores, others were at work too. What that run did not measure is from the one before.\n"
        ),
    );
}

fn latency(text: &mut String, rows: &[Latency]) {
    text.push_str("From sending to the handler, and within hapax from receipt to the handler's start and to settlement; p50 / p99 in ms. What\n");
    text.push_str("hapax adds is the difference to the raw client at the same rate.\n\n");
    text.push_str("| Broker | Offered | Contender | Handler | Added to raw | Receipt to handler | Receipt to settlement |\n|---|---|---|---|---|---|---|\n");
    let pair = |pair: Option<(f64, f64)>| {
        pair.map_or("-".to_owned(), |(p50, p99)| format!("{} / {}", ms(Some(p50)), ms(Some(p99))))
    };
    for row in rows {
        let raw = rows
            .iter()
            .find(|raw| raw.contender == "raw" && raw.broker == row.broker && raw.offered_per_s == row.offered_per_s);
        let added = raw.filter(|_| row.contender != "raw").map(|raw| {
            let (p50, p99) = (row.handler.0 - raw.handler.0, row.handler.1 - raw.handler.1);
            format!("{p50:+.2} / {p99:+.2}")
        });
        line(
            text,
            format_args!(
                "| {} | {}/s | {} | {} | {} | {} | {} |",
                row.broker,
                row.offered_per_s,
                row.contender,
                pair(Some(row.handler)),
                added.unwrap_or("-".to_owned()),
                pair(row.start),
                pair(row.settlement)
            ),
        );
    }
}

fn growth(text: &mut String, points: &[Point], folder: &Path) -> Result<(), Error> {
    for name in NAMES {
        let here: Vec<_> = points.iter().filter(|point| point.growth == name).collect();
        if here.is_empty() {
            continue;
        }
        let (title, across) = words(name);
        line(text, format_args!("### {title}\n"));
        if name != "stopped" {
            let file = plot(name, title, across, "events/s", &here, folder, |point| Some(point.events_per_s.median))?;
            line(text, format_args!("![{title}](performance/{file})\n"));
        }
        let file = plot(&format!("{name}-memory"), title, across, "MiB of the process", &here, folder, |point| {
            Some(point.peak_mib)
        })?;
        line(text, format_args!("![{title}: memory of the process](performance/{file})\n"));
        if name == "remembered" {
            cost(text, &here);
        }
        text.push_str("| Store | ");
        line(
            text,
            format_args!(
                "{across} | events/s (min..max) | CPU µs an event | peak MiB of the process | MiB in the store |\n|---|---|---|---|---|---|"
            ),
        );
        for point in here {
            let events = &point.events_per_s;
            let rates = if name == "stopped" {
                "-".to_owned()
            } else {
                format!("{} ({}..{})", rate(events.median), rate(events.min), rate(events.max))
            };
            let store = point.store_mib.map_or("-".to_owned(), |mib| format!("{mib:.0}"));
            let cpu = if name == "stopped" { "-".to_owned() } else { format!("{:.1}", point.cpu_us_per_event) };
            line(
                text,
                format_args!("| {} | {} | {rates} | {cpu} | {:.0} | {store} |", point.series, point.x, point.peak_mib),
            );
        }
        text.push('\n');
    }
    Ok(())
}

/// The target: an event costs at most 1.3 times as much beside the most ids as beside the fewest.
fn cost(text: &mut String, points: &[&Point]) {
    let mut lines: BTreeMap<&str, Vec<&Point>> = BTreeMap::new();
    for point in points {
        lines.entry(&point.series).or_default().push(point);
    }
    for (store, points) in lines {
        if let [first, .., last] = points.as_slice() {
            let ratio = first.events_per_s.median / last.events_per_s.median;
            let verdict = if ratio <= 1.3 { "reached" } else { "**missed**" };
            line(
                text,
                format_args!(
                    "- {store}: an event beside {} ids takes {ratio:.2} times what it takes beside {} (at most 1.3: {verdict})",
                    last.x, first.x
                ),
            );
        }
    }
    text.push('\n');
}

fn words(name: &str) -> (&'static str, &'static str) {
    match name {
        "remembered" => ("Remembered ids", "ids remembered"),
        "concurrency" => ("Handlers at once", "concurrency"),
        "payload" => ("Size of a message", "bytes"),
        "duplicates" => ("Share of duplicates", "% duplicates"),
        "keys" => ("Keys in order", "keys"),
        "workers" => ("Worker processes", "processes"),
        _ => ("A handler that never returns: memory is bounded by settings", "in_flight_max, of 4 KiB messages"),
    }
}

fn plot(
    file: &str,
    title: &str,
    across: &str,
    up: &str,
    points: &[&Point],
    folder: &Path,
    y: impl Fn(&Point) -> Option<f64>,
) -> Result<String, Error> {
    let mut series: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for point in points {
        if let Some(y) = y(point) {
            series.entry(point.series.clone()).or_default().push((point.x, y));
        }
    }
    let file = format!("{file}.svg");
    fs::write(folder.join(&file), Plot { title, across, up, series }.svg())?;
    Ok(file)
}
