//! What an event costs with the PostgreSQL store, through the real pipeline: throughput by batch, beside many records,
//! transactional handlers, bytes on disk. The server is that of `scripts/brokers`, on this machine, durable.
//!
//! ```text
//! cargo bench -p hapax-benches --bench postgres -- [NAME ..] [--events N] [--rounds R] [--remembered N] [--json FILE]
//! ```

#![allow(clippy::disallowed_methods, reason = "benchmarks measure the real clock")]

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use hapax::{Context, Failure, Message, Observed, Verb};
use hapax_benches::machine::{Machine, load};
use hapax_benches::report::{Figures, Spread};
use hapax_benches::{Plan, consume, noop};
use hapax_postgres::sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use hapax_postgres::sqlx::{self, AssertSqlSafe, PgPool};
use hapax_postgres::{PgTx, PostgresStore};
use hapax_testkit::servers::Server;

/// Measures the PostgreSQL store in the pipeline.
#[derive(Parser)]
struct Arguments {
    /// Only cases whose name holds one of these.
    names: Vec<String>,
    /// Events a round.
    #[arg(long, default_value_t = 100_000)]
    events: usize,
    /// Rounds a case; the median is printed, with the smallest and the largest.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Records that are there already in the case of a large table.
    #[arg(long, default_value_t = 1_000_000)]
    remembered: usize,
    /// Writes the figures here too.
    #[arg(long)]
    json: Option<std::path::PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Arguments {
    fn wants(&self, case: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|name| case.contains(name.as_str()))
    }
}

/// A schema of its own for one case.
struct Place {
    schema: String,
    pool: PgPool,
}

impl Place {
    /// The pipeline has at most one claim and one record under way: of three connections it uses two.
    async fn fresh(case: &str, connections_max: u32) -> Self {
        let schema = format!("hapax_bench_{}_{}", std::process::id(), case.replace('-', "_"));
        let options = PgConnectOptions::from_str(&Server::Postgres.url()).expect("a URL of PostgreSQL");
        let pool = PgPoolOptions::new().max_connections(connections_max).connect_lazy_with(options);
        PostgresStore::migrate_schema(&pool, &schema).await.expect("a migration");
        Self { schema, pool }
    }

    async fn store(&self) -> PostgresStore {
        let builder = PostgresStore::builder(self.pool.clone()).schema(&*self.schema).sweep_every(Duration::ZERO);
        builder.reuse_connections(true).connect().await.expect("the store connects")
    }

    async fn run(&self, sql: &str) {
        let sql = sql.replace("{schema}", &self.schema);
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&self.pool).await.expect("the statement runs");
    }

    async fn number(&self, sql: &str) -> i64 {
        let sql = sql.replace("{schema}", &self.schema);
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&self.pool).await.expect("a number")
    }

    /// Records that ended within the last days, as the store would have left them.
    async fn remember(&self, records: usize) {
        const AT_ONCE: usize = 500_000;
        for first in (0..records).step_by(AT_ONCE) {
            let most = records.min(first + AT_ONCE);
            self.run(&format!(
                "INSERT INTO {{schema}}.hapax_record \
                 (time, fence, consumer, attempt, crashes, state, key, fingerprint) \
                 SELECT t, t, 1, 1, 0, 3, gen_random_uuid(), gen_random_uuid() \
                 FROM (SELECT (extract(epoch FROM now()) * 1000000)::bigint - ({records} - n) * bigint '1000' AS t \
                 FROM generate_series({first}, {most} - 1) AS n) AS past"
            ))
            .await;
        }
        self.run("VACUUM ANALYZE {schema}.hapax_record").await;
        self.run("CHECKPOINT").await;
    }

    async fn end(self) {
        self.run("DROP SCHEMA {schema} CASCADE").await;
        self.pool.close().await;
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
    println!("server and client on this machine, fsync and synchronous_commit on; medians of {}", arguments.rounds);
    println!("load average at the start: {}", load());
    let mut figures = Figures::default();
    for (name, batch, remembered) in [
        ("batch-64", 64, 0),
        ("batch-256", 256, 0),
        ("batch-1024", 1_024, 0),
        ("batch-256-remembering", 256, arguments.remembered),
    ] {
        if arguments.wants(name) {
            batches(name, batch, remembered, arguments, &mut figures).await;
        }
    }
    for (name, concurrency) in [("transactional", 32), ("transactional-one-in-flight", 1)] {
        if arguments.wants(name) {
            transactional(name, concurrency, arguments, &mut figures).await;
        }
    }
    if arguments.wants("disk") {
        disk(&mut figures).await;
    }
    println!("load average at the end: {}", load());
    figures.write(arguments.json.as_deref()).expect("the figures' file");
}

/// Events a second where the load forms batches: twice as many handlers as items of a batch, so that one batch gathers
/// while another is under way.
async fn batches(name: &str, batch: usize, remembered: usize, arguments: &Arguments, figures: &mut Figures) {
    let place = Place::fresh(name, 3).await;
    let store = place.store().await;
    place.remember(remembered).await;
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
        let with =
            |builder: hapax::ConsumerBuilder<(), PostgresStore>| builder.on_any(noop).observer(Arc::new(observer));
        costs.push(consume(&plan, store.clone(), round * events, with).await);
    }
    let records = place.number("SELECT count(*) FROM {schema}.hapax_record").await;
    place.end().await;
    let rate = Spread::of(costs.iter().map(|cost| cost.events_per_second));
    let cpu = Spread::of(costs.iter().map(|cost| cost.cpu_us));
    let mean = items.load(Ordering::Relaxed) as f64 / calls.load(Ordering::Relaxed).max(1) as f64;
    println!(
        "{name:<28} {:>8.0} events/s ({:.0}..{:.0})  {:.1} us CPU of the client an event  mean claim {mean:.0}  {records} records",
        rate.median, rate.least, rate.most, cpu.median
    );
    figures.note(name, "events_per_second", rate.median);
    figures.note(name, "cpu_us", cpu.median);
}

async fn write_row(message: Arc<Message>, mut tx: PgTx, _: Context<()>) -> Result<(), Failure> {
    // The schema comes with the connection: see `transactional`.
    let insert = sqlx::query("INSERT INTO effects (id) VALUES ($1)").bind(message.attributes.id.as_deref());
    insert.execute(&mut *tx).await?;
    Ok(())
}

/// Handlers that take the transaction, each with its own commit: what that gives, and how many bare transactions of two
/// rows the same number of connections takes, which is the limit.
async fn transactional(name: &str, concurrency: usize, arguments: &Arguments, figures: &mut Figures) {
    let connections = concurrency as u32 + 4;
    let mut place = Place::fresh(name, connections).await;
    let options = PgConnectOptions::from_str(&Server::Postgres.url()).expect("a URL of PostgreSQL");
    let options = options.options([("search_path", place.schema.as_str())]);
    place.pool = PgPoolOptions::new().max_connections(connections).connect_lazy_with(options);
    place.run("CREATE TABLE {schema}.effects (id text NOT NULL PRIMARY KEY); CREATE TABLE {schema}.bare (x int)").await;
    let store = place.store().await;
    let events = arguments.events.min(4_000);
    let plan = Plan::of(events, concurrency);
    let (mut rates, mut limits) = (Vec::new(), Vec::new());
    for round in 0..arguments.rounds {
        let cost = consume(&plan, store.clone(), round * events, |builder| builder.on_any_tx(write_row)).await;
        rates.push(cost.events_per_second);
        limits.push(bare(&place.pool, events, concurrency).await);
    }
    place.end().await;
    let (rate, limit) = (Spread::of(rates), Spread::of(limits));
    println!(
        "{name:<28} {:>8.0} events/s ({:.0}..{:.0})  bare transactions of two rows: {:.0}/s",
        rate.median, rate.least, rate.most, limit.median
    );
    figures.note(name, "events_per_second", rate.median);
    figures.note(name, "bare_transactions_per_second", limit.median);
}

async fn bare(pool: &PgPool, transactions: usize, concurrency: usize) -> f64 {
    let left = Arc::new(AtomicUsize::new(transactions));
    let begun = Instant::now();
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..concurrency {
        let (pool, left) = (pool.clone(), Arc::clone(&left));
        clients.spawn(async move {
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                let mut tx = pool.begin().await.expect("a transaction");
                for _ in 0..2 {
                    sqlx::query("INSERT INTO bare (x) VALUES (1)").execute(&mut *tx).await.expect("a row");
                }
                tx.commit().await.expect("a commit");
            }
        });
    }
    clients.join_all().await;
    transactions as f64 / begun.elapsed().as_secs_f64()
}

/// Bytes of a record in the table and its index.
async fn disk(figures: &mut Figures) {
    const EVENTS: usize = 200_000;
    let place = Place::fresh("disk", 3).await;
    let plan = Plan { batch: 256, ..Plan::of(EVENTS, 512) };
    consume(&plan, place.store().await, 0, |builder| builder.on_any(noop)).await;
    place.run("VACUUM {schema}.hapax_record").await;
    let table = place.number("SELECT pg_relation_size('{schema}.hapax_record')").await as f64 / EVENTS as f64;
    let index = place.number("SELECT pg_indexes_size('{schema}.hapax_record')").await as f64 / EVENTS as f64;
    place.end().await;
    println!("{:<28} {table:>8.0} bytes a record in the table, {index:.0} in its index, of {EVENTS}", "disk");
    figures.note("disk", "bytes_per_record", table + index);
}
