//! What an event costs with the Redis store: claimed and recorded by bare calls and through the real pipeline, by batch, with
//! many records, and how much memory a record takes.
//!
//! ```text
//! cargo bench -p hapax-benches --bench redis -- [NAME ..] [--events N] [--rounds R] [--remembered N] [--url URL] [--json FILE]
//! ```

#![allow(clippy::disallowed_methods, reason = "benchmarks measure the real clock")]

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use hapax::{Claim, ClaimRequest, EventKey, Fingerprint, Outcome, ProcessedStore, Settings};
use hapax_benches::machine::{Machine, load};
use hapax_benches::report::{Figures, Spread};
use hapax_benches::{Plan, consume, noop, remember};
use hapax_redis::redis::{self, InfoDict};
use hapax_redis::{RedisServer, RedisStore};

/// Measures the Redis store.
#[derive(Parser)]
struct Arguments {
    /// Only cases whose name holds one of these.
    names: Vec<String>,
    /// Events a round.
    #[arg(long, default_value_t = 200_000)]
    events: usize,
    /// Rounds a case; the median is printed, with the smallest and the largest.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Records in the cases with many.
    #[arg(long, default_value_t = 1_000_000)]
    remembered: usize,
    /// A server that is there, instead of a redis-server of the benchmark's own with AOF everysec. Keys are left behind.
    #[arg(long)]
    url: Option<String>,
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

/// A redis-server of the benchmark's own, ended with its data.
struct Own {
    child: Child,
    folder: PathBuf,
    port: u16,
}

impl Own {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        drop(listener);
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("redis-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for its data");
        let child = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", "", "--dir"])
            .arg(&folder)
            .args(["--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory-policy", "noeviction"])
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        Self { child, folder, port }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ended_before = self.child.kill().is_err();
        let _reaped = self.child.wait().is_err();
        if let Err(error) = std::fs::remove_dir_all(&self.folder) {
            eprintln!("{} is left behind: {error}", self.folder.display());
        }
    }
}

const CASES: [&str; 8] = [
    "store-256",
    "store-256-four",
    "store-256-remembering",
    "pipeline-64",
    "pipeline-256",
    "pipeline-1024",
    "pipeline-256-remembering",
    "memory",
];

/// The server under measurement, and stores on it.
struct Bench {
    url: String,
    own: Option<Own>,
}

impl Bench {
    async fn new(url: Option<&str>) -> Self {
        let own = url.is_none().then(Own::start);
        let url =
            url.map_or_else(|| format!("redis://127.0.0.1:{}", own.as_ref().map_or(0, |own| own.port)), Into::into);
        let bench = Self { url, own };
        let patience = Instant::now() + Duration::from_secs(10);
        while bench.info("server").await.is_none() {
            assert!(Instant::now() < patience, "the server does not answer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bench
    }

    async fn store(&self, name: &str) -> RedisStore {
        let server = RedisServer::at(self.url.parse().expect("a url")).expect("a url of Redis");
        // One for each case, as long as the default: it is in every key.
        let case = CASES.iter().position(|case| *case == name).unwrap_or(CASES.len());
        let prefix = format!("{case:x}{:04x}", std::process::id() & 0xffff);
        RedisStore::builder(server).prefix(prefix).connect().await.expect("the server takes it")
    }

    async fn info(&self, section: &str) -> Option<InfoDict> {
        let client = redis::Client::open(self.url.as_str()).ok()?;
        let mut connection = client.get_multiplexed_async_connection().await.ok()?;
        redis::cmd("INFO").arg(section).query_async(&mut connection).await.ok()
    }

    /// Microseconds of CPU time that the server has used.
    async fn cpu_us(&self) -> f64 {
        let info = self.info("cpu").await.expect("the server tells its time");
        let seconds = |name| info.get::<f64>(name).unwrap_or_default();
        (seconds("used_cpu_user") + seconds("used_cpu_sys")) * 1e6
    }

    /// Waits until the server has moved its tables, which it doubles while they grow, a little with each command: until then
    /// every event pays for the growth before it. A server of the benchmark's own is told to hurry.
    async fn at_rest(&self) {
        self.hurry("500").await;
        let (mut used, mut since) = (self.used_memory().await, Instant::now());
        while since.elapsed() < Duration::from_secs(2) {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = self.used_memory().await;
            // The table that has been emptied is freed at once, and is large.
            if used.abs_diff(now) > 1 << 18 {
                (used, since) = (now, Instant::now());
            }
        }
        self.hurry("10").await;
    }

    /// How often in a second a server of our own goes on with that by itself.
    async fn hurry(&self, hz: &str) {
        if self.own.is_none() {
            return;
        }
        let client = redis::Client::open(self.url.as_str()).expect("a url");
        let mut connection = client.get_multiplexed_async_connection().await.expect("the server is there");
        let () = redis::cmd("CONFIG").arg("SET").arg("hz").arg(hz).query_async(&mut connection).await.expect("set");
    }

    async fn used_memory(&self) -> u64 {
        self.info("memory").await.and_then(|info| info.get("used_memory")).expect("the server tells its memory")
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
    let bench = Bench::new(arguments.url.as_deref()).await;
    let health = bench.store("health").await.probe().await.expect("it answers");
    println!(
        "Redis {} on the same machine, {:?}, one connection; medians of {} rounds",
        health.version, health.durability, arguments.rounds
    );
    let mut figures = Figures::default();
    let many = arguments.remembered;
    for (name, batch, at_once, remembered) in
        [("store-256", 256, 2, 0), ("store-256-four", 256, 4, 0), ("store-256-remembering", 256, 2, many)]
    {
        if arguments.wants(name) {
            calls(name, batch, at_once, remembered, arguments, &bench, &mut figures).await;
        }
    }
    for (name, batch, remembered) in [
        ("pipeline-64", 64, 0),
        ("pipeline-256", 256, 0),
        ("pipeline-1024", 1_024, 0),
        ("pipeline-256-remembering", 256, many),
    ] {
        if arguments.wants(name) {
            pipeline(name, batch, remembered, arguments, &bench, &mut figures).await;
        }
    }
    if arguments.wants("memory") {
        memory(arguments, &bench, &mut figures).await;
    }
    println!("load average at the end: {}", load());
    figures.write(arguments.json.as_deref()).expect("the figures' file");
}

/// Events a second by bare calls: each of `at_once` tasks claims a batch, then records it as processed.
async fn calls(
    name: &str,
    batch: usize,
    at_once: usize,
    remembered: usize,
    arguments: &Arguments,
    bench: &Bench,
    figures: &mut Figures,
) {
    let store = bench.store(name).await;
    remember(&store, remembered).await;
    bench.at_rest().await;
    let (mut rates, mut server_us) = (Vec::new(), Vec::new());
    for round in 0..arguments.rounds {
        let (begun, before) = (Instant::now(), bench.cpu_us().await);
        let share = arguments.events / at_once;
        let tasks: Vec<_> = (0..at_once)
            .map(|task| {
                let first = round * arguments.events + task * share;
                tokio::spawn(claim_and_record(store.clone(), first, share, batch))
            })
            .collect();
        for task in tasks {
            task.await.expect("no panic");
        }
        rates.push((at_once * share) as f64 / begun.elapsed().as_secs_f64());
        server_us.push((bench.cpu_us().await - before) / (at_once * share) as f64);
    }
    report(name, &Spread::of(rates), &Spread::of(server_us), figures);
}

async fn claim_and_record(store: RedisStore, first: usize, events: usize, batch: usize) {
    let consumer = store.open("bench", Settings::RETENTION).await.expect("the store is open");
    for from in (first..first + events).step_by(batch) {
        let requests: Vec<_> = (from..(from + batch).min(first + events))
            .map(|number| ClaimRequest {
                consumer,
                key: EventKey::of("bench", "/bench", &number.to_string()),
                fingerprint: Fingerprint::of(None, &number.to_le_bytes()),
                token: number as u128,
                reopen: None,
            })
            .collect();
        let claims = store.claim(&requests, Settings::LEASE).await.expect("answered");
        let outcomes: Vec<_> = claims
            .into_iter()
            .map(|claim| match claim {
                Claim::Granted(lease, _) => (lease, Outcome::Processed),
                other => panic!("all are new: {other:?}"),
            })
            .collect();
        store.record(&outcomes).await.expect("recorded");
    }
}

/// Events a second through the pipeline with the memory broker and a handler that does nothing: twice as many handlers as
/// items of a batch, so that one batch gathers while another is under way.
async fn pipeline(
    name: &str,
    batch: usize,
    remembered: usize,
    arguments: &Arguments,
    bench: &Bench,
    figures: &mut Figures,
) {
    let store = bench.store(name).await;
    remember(&store, remembered).await;
    bench.at_rest().await;
    let plan = Plan { batch, ..Plan::of(arguments.events, 2 * batch) };
    let (mut costs, mut server_us) = (Vec::new(), Vec::new());
    for round in 0..arguments.rounds {
        let (first, before) = (round * arguments.events, bench.cpu_us().await);
        costs.push(consume(&plan, store.clone(), first, |builder| builder.on_any(noop)).await);
        server_us.push((bench.cpu_us().await - before) / arguments.events as f64);
    }
    let rate = Spread::of(costs.iter().map(|cost| cost.events_per_second));
    report(name, &rate, &Spread::of(server_us), figures);
    let cpu = Spread::of(costs.iter().map(|cost| cost.cpu_us));
    println!("{:<28} {:>8.1} us CPU an event in this process", "", cpu.median);
    figures.note(name, "cpu_us", cpu.median);
}

/// The server's CPU time tells most where others are at work too: it is one thread, so its inverse is the most there can be.
fn report(name: &str, rate: &Spread, server_us: &Spread, figures: &mut Figures) {
    let Spread { median, least, most } = rate;
    let server_us = server_us.median;
    println!(
        "{name:<28} {median:>8.0} events/s ({least:.0}..{most:.0})  {server_us:.1} us CPU an event in the server, load \
         average {}",
        load()
    );
    figures.note(name, "events_per_second", *median);
    figures.note(name, "server_cpu_us", server_us);
}

/// Bytes of a processed record in the server's memory, everything that Redis keeps for it included.
async fn memory(arguments: &Arguments, bench: &Bench, figures: &mut Figures) {
    let store = bench.store("memory").await;
    let before = bench.used_memory().await;
    remember(&store, arguments.remembered).await;
    bench.at_rest().await;
    let grown = bench.used_memory().await.saturating_sub(before);
    let per_record = grown as f64 / arguments.remembered as f64;
    println!("{:<28} {per_record:>8.1} bytes a record in memory, of {}", "memory", arguments.remembered);
    figures.note("memory", "bytes_per_record", per_record);
}
