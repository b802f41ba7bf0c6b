//! What an event costs with the SQLite store, durable (`synchronous = FULL`), through the real pipeline: throughput by
//! batch, transactional handlers, added latency, bytes on disk.
//!
//! ```text
//! cargo bench -p hapax-benches --bench sqlite -- [NAME ..] [--events N] [--rounds R] [--remembered N] [--dir DIR] [--json FILE]
//! ```

#![allow(clippy::disallowed_methods, reason = "benchmarks measure the real clock")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use hapax::{Consumer, Context, Failure, Level, Message, Observed, Verb};
use hapax_benches::machine::{Machine, load};
use hapax_benches::report::{Figures, Spread, percentile};
use hapax_benches::settled::Timed;
use hapax_benches::{Plan, consume, noop, remember};
use hapax_memory::MemoryBroker;
use hapax_sqlite::sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use hapax_sqlite::sqlx::{self, ConnectOptions, Connection, SqliteConnection};
use hapax_sqlite::{SqliteStore, SqliteTx};

/// Measures the SQLite store in the pipeline.
#[derive(Parser)]
struct Arguments {
    /// Only cases whose name holds one of these.
    names: Vec<String>,
    /// Events a round.
    #[arg(long, default_value_t = 50_000)]
    events: usize,
    /// Rounds a case; the median is printed, with the smallest and the largest.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Ids that are remembered in the case of a large file.
    #[arg(long, default_value_t = 1_000_000)]
    remembered: usize,
    /// Where the files are made: on the disk that is to be measured.
    #[arg(long, default_value = env!("CARGO_TARGET_TMPDIR"))]
    dir: PathBuf,
    /// Writes the figures here too.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Arguments {
    fn wants(&self, case: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|name| case.contains(name.as_str()))
    }
}

/// A folder of its own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn within(dir: &Path) -> Self {
        let folder = dir.join(format!("hapax-bench-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for the files");
        Self(folder)
    }

    async fn store(&self, name: &str) -> SqliteStore {
        SqliteStore::open(self.file(name)).await.expect("a new store")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.db"))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{} is left behind: {error}", self.0.display());
        }
    }
}

fn main() {
    let arguments = Arguments::parse();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(measure(&arguments));
}

async fn measure(arguments: &Arguments) {
    println!("{}", Machine::this());
    println!("durable: WAL, synchronous FULL, in {}; medians of {} rounds", arguments.dir.display(), arguments.rounds);
    let folder = Folder::within(&arguments.dir);
    let mut figures = Figures::default();
    for (name, batch, remembered) in [
        ("batch-64", 64, 0),
        ("batch-256", 256, 0),
        ("batch-1024", 1_024, 0),
        ("batch-256-remembering", 256, arguments.remembered),
    ] {
        if arguments.wants(name) {
            batches(name, batch, remembered, arguments, &folder, &mut figures).await;
        }
    }
    for (name, concurrency) in [("transactional", 64), ("transactional-one-in-flight", 1)] {
        if arguments.wants(name) {
            transactional(name, concurrency, arguments, &folder, &mut figures).await;
        }
    }
    if arguments.wants("latency") {
        latency(&folder, arguments, &mut figures).await;
    }
    if arguments.wants("disk") {
        disk(&folder, &mut figures).await;
    }
    println!("load average at the end: {}", load());
    figures.write(arguments.json.as_deref()).expect("the figures' file");
}

/// Events a second where the load forms batches: twice as many handlers as items of a batch, so that one batch gathers
/// while another is under way.
async fn batches(
    name: &str,
    batch: usize,
    remembered: usize,
    arguments: &Arguments,
    folder: &Folder,
    figures: &mut Figures,
) {
    let store = folder.store(name).await;
    remember(&store, remembered).await;
    let events = if batch < 256 { arguments.events / 2 } else { arguments.events };
    let plan = Plan { batch, ..Plan::of(events, 2 * batch) };
    let (calls, items) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut costs = Vec::new();
    for round in 0..arguments.rounds {
        let (calls, items) = (Arc::clone(&calls), Arc::clone(&items));
        let observer = move |what: &Observed<'_>| {
            if let Observed::Called { verb: Verb::Claim, batch, .. } = what {
                calls.fetch_add(1, Ordering::Relaxed);
                items.fetch_add(*batch, Ordering::Relaxed);
            }
        };
        let with = |builder: hapax::ConsumerBuilder<(), SqliteStore>| builder.on_any(noop).observer(Arc::new(observer));
        costs.push(consume(&plan, store.clone(), round * events, with).await);
    }
    store.close().await;
    let rate = Spread::of(costs.iter().map(|cost| cost.events_per_second));
    let cpu = Spread::of(costs.iter().map(|cost| cost.cpu_us));
    let mean = items.load(Ordering::Relaxed) as f64 / calls.load(Ordering::Relaxed).max(1) as f64;
    println!(
        "{name:<28} {:>8.0} events/s ({:.0}..{:.0})  {:.1} us CPU an event  mean claim {mean:.0}",
        rate.median, rate.least, rate.most, cpu.median
    );
    figures.note(name, "events_per_second", rate.median);
    figures.note(name, "cpu_us", cpu.median);
}

async fn write_row(message: Arc<Message>, mut tx: SqliteTx, _: Context<()>) -> Result<(), Failure> {
    let insert = sqlx::query("INSERT INTO effects (id) VALUES (?)").bind(message.attributes.id.as_deref());
    insert.execute(&mut *tx).await?;
    Ok(())
}

/// Handlers that take the transaction run one after the other, each with its own commit: what that gives, and how many
/// bare transactions of two rows the same disk takes, which is the limit.
async fn transactional(name: &str, concurrency: usize, arguments: &Arguments, folder: &Folder, figures: &mut Figures) {
    let store = folder.store(name).await;
    let create = "CREATE TABLE effects (id TEXT NOT NULL PRIMARY KEY) WITHOUT ROWID";
    sqlx::query(create).execute(store.pool()).await.expect("the user's table");
    let mut bare = Bare::open(&folder.file(&format!("{name}-bare"))).await;
    let events = arguments.events.min(2_000);
    let plan = Plan::of(events, concurrency);
    let (mut rates, mut limits) = (Vec::new(), Vec::new());
    for round in 0..arguments.rounds {
        let cost = consume(&plan, store.clone(), round * events, |builder| builder.on_any_tx(write_row)).await;
        rates.push(cost.events_per_second);
        let begun = Instant::now();
        for _ in 0..events {
            bare.commit("BEGIN IMMEDIATE; INSERT INTO bare (x) VALUES (1); INSERT INTO bare (x) VALUES (2); COMMIT")
                .await;
        }
        limits.push(events as f64 / begun.elapsed().as_secs_f64());
    }
    store.close().await;
    let (rate, limit) = (Spread::of(rates), Spread::of(limits));
    println!(
        "{name:<28} {:>8.0} events/s ({:.0}..{:.0})  bare transactions of two rows: {:.0}/s",
        rate.median, rate.least, rate.most, limit.median
    );
    figures.note(name, "events_per_second", rate.median);
    figures.note(name, "bare_transactions_per_second", limit.median);
}

/// From publish to settled at 100 events/s, beside two bare commits of one row each, made between the events.
async fn latency(folder: &Folder, arguments: &Arguments, figures: &mut Figures) {
    let store = folder.store("latency").await;
    let mut bare = Bare::open(&folder.file("latency-bare")).await;
    let events = 200 * arguments.rounds;
    let plan = Plan::of(events, 64);
    let broker = Timed::new(MemoryBroker::builder("bench").capacity(events).ordered().build());
    let builder = Consumer::builder("bench", broker.clone(), store.clone()).on_any(noop);
    let consumer = builder.require(Level::AtLeastOnce).build().await.expect("the benchmark's settings are sound");
    let handle = consumer.handle();
    let running = tokio::spawn(consumer.run(std::future::pending()));
    let (data, mut bare_us) = (plan.data(), Vec::new());
    let mut ticks = tokio::time::interval(Duration::from_millis(5));
    for number in 0..events {
        ticks.tick().await;
        broker.publish(&plan.message(number, &data));
        ticks.tick().await;
        let begun = Instant::now();
        bare.commit("INSERT INTO bare (x) VALUES (1)").await;
        bare.commit("INSERT INTO bare (x) VALUES (2)").await;
        bare_us.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    while broker.settled_us().len() < events {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    handle.stop();
    running.await.expect("no panic").expect("a clean stop");
    store.close().await;
    let mut settled_us = broker.settled_us();
    settled_us.sort_by(f64::total_cmp);
    bare_us.sort_by(f64::total_cmp);
    for (what, share) in [("p50", 0.5), ("p99", 0.99)] {
        let (settled, bare) = (percentile(&settled_us, share), percentile(&bare_us, share));
        println!(
            "{:<28} {settled:>8.0} us from publish to settled, two bare commits {bare:.0} us: {:+.0} us",
            format!("latency-{what}"),
            settled - bare
        );
        figures.note("latency", &format!("{what}_us"), settled);
        figures.note("latency", &format!("bare_{what}_us"), bare);
    }
}

/// Bytes of a record in the file, once the WAL is in it and closed.
async fn disk(folder: &Folder, figures: &mut Figures) {
    const EVENTS: usize = 100_000;
    let store = folder.store("disk").await;
    let plan = Plan { batch: 1_024, ..Plan::of(EVENTS, 2_048) };
    consume(&plan, store.clone(), 0, |builder| builder.on_any(noop)).await;
    store.close().await;
    let bytes = std::fs::metadata(folder.file("disk")).expect("the file").len();
    let per_record = bytes as f64 / EVENTS as f64;
    println!("{:<28} {per_record:>8.1} bytes a record in the file, of {EVENTS}", "disk");
    figures.note("disk", "bytes_per_record", per_record);
}

/// A file of SQLite's alone, with the store's settings: what commits cost by themselves.
struct Bare(SqliteConnection);

impl Bare {
    async fn open(path: &Path) -> Self {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full);
        let mut connection = options.connect().await.expect("a file");
        let create = "CREATE TABLE bare (id INTEGER PRIMARY KEY, x INTEGER)";
        sqlx::query(create).execute(&mut connection).await.expect("a table");
        connection.ping().await.expect("it answers");
        Self(connection)
    }

    async fn commit(&mut self, statements: &'static str) {
        sqlx::query(statements).execute(&mut self.0).await.expect("a commit");
    }
}
