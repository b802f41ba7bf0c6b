//! Quickstart: deliveries become effects, each event's effect once, whatever is delivered twice, killed or started again.
//!
//! Reads CloudEvents, one JSON document a line, hands them as deliveries to two workers, and writes one row for each
//! event into the table `effects` of an SQLite file. Run it, kill it half-way (`kill -9`), run it again, run three at
//! once: each event has one row. A line that is no event is set aside and told with its number.
//!
//! Exit codes: 0 when every line was dealt with, 1 when it was told to stop before that, 2 when it cannot go on.

mod feed;
mod lines;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use hapax::{Consumer, ConsumerHandle, Context, Failure, Message, MessageLimits};
use hapax_memory::MemoryBroker;
use hapax_sqlite::{SqliteStore, SqliteTx, sqlx};
use report::{Report, tell};
use tokio::task::JoinSet;

/// The consumer's name, part of every record's key: both workers, and every run, are the same consumer.
const CONSUMER: &str = "quickstart";
/// How long others wait for an event whose process died.
const LEASE: Duration = Duration::from_secs(5);
/// The handler holds SQLite's one write lock, so it may take no longer than two thirds of the lease.
const HANDLER_MS_MAX: u64 = 3_000;

/// Deliveries become effects: each event's effect once, whatever is repeated or killed.
#[derive(Parser)]
struct Args {
    /// CloudEvents, one JSON document a line; `-` reads standard input [default: a small sample]
    #[arg(long, value_name = "FILE|-")]
    events: Option<PathBuf>,
    /// The SQLite file with the table `effects`; created if it is missing
    #[arg(long, value_name = "FILE", default_value = "quickstart.db")]
    db: PathBuf,
    /// Milliseconds that the handler waits after its row is written and before the commit
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=HANDLER_MS_MAX))]
    handler_ms: u64,
    /// Print the counts as JSON, as the last line
    #[arg(long)]
    json: bool,
}

/// What the handler sees beside the event.
struct App {
    pause: Duration,
}

/// The effect: one row. It commits together with the mark that the event was processed, or neither does.
async fn write_row(event: Arc<Message>, mut tx: SqliteTx, cx: Context<App>) -> Result<(), Failure> {
    let attributes = &event.attributes;
    sqlx::query("INSERT INTO effects (source, id, type) VALUES (?, ?, ?)")
        .bind(attributes.source.as_deref())
        .bind(attributes.id.as_deref())
        .bind(attributes.ty.as_deref())
        .execute(&mut *tx)
        .await?;
    tokio::time::sleep(cx.state().pause).await;
    Ok(())
}

/// One of the workers. What is set here is set because people are invited to kill this one; the defaults suit services.
async fn worker(
    args: &Args,
    broker: MemoryBroker,
    store: SqliteStore,
    report: &Arc<Report>,
) -> Result<Consumer, String> {
    Consumer::builder(CONSUMER, broker, store)
        .state(App { pause: Duration::from_millis(args.handler_ms) })
        .on_any_tx(write_row)
        .lease(LEASE)
        // Each kill counts against the events it interrupts; by default the fourth sets them aside.
        .crashes_max(1_000)
        .attempts_max(1_000)
        .drain(LEASE)
        .observer(Arc::clone(report) as Arc<_>)
        .build()
        .await
        .map_err(|error| error.faults.iter().map(|fault| &*fault.what).collect::<Vec<_>>().join("; "))
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(code) => code,
        Err(why) => {
            tell(format_args!("quickstart: {}", why.replace('\n', " ")));
            ExitCode::from(2)
        }
    }
}

async fn run(args: Args) -> Result<ExitCode, String> {
    let events = lines::open(args.events.as_deref())?;
    let store = open_store(&args).await?;
    let broker = MemoryBroker::builder("lines").capacity(128).dead_letters_max(128).build();
    let report = Arc::new(Report::default());

    let (mut workers, mut handles) = (JoinSet::new(), Vec::new());
    for broker in [broker.another(), broker.another()] {
        let worker = worker(&args, broker, store.clone(), &report).await?;
        handles.push(worker.handle());
        workers.spawn(worker.run(std::future::pending()));
    }

    let ended = {
        let feed = feed::feed(lines::read(events, MessageLimits::DEFAULT.body_max), &broker, &report);
        let show = report.show(&broker, &handles);
        tokio::select! {
            fed = feed => fed.map(|()| true),
            () = hapax::shutdown_signal() => Ok(false),
            Some(ended) = workers.join_next() => Err(why_it_ended(ended)),
            never = show => match never {},
        }
    };

    handles.iter().for_each(ConsumerHandle::stop);
    let drained: Vec<_> = workers.join_all().await;
    let table = count_effects(&store).await;
    store.close().await;
    report.sum_up(&broker, &handles, table, args.json);
    drained.into_iter().collect::<Result<(), _>>().map_err(|error| error.to_string())?;
    if ended? {
        return Ok(ExitCode::SUCCESS);
    }
    tell(format_args!("quickstart: stopped before every line was dealt with; run it again to go on"));
    Ok(ExitCode::FAILURE)
}

/// A worker is not to end by itself, so there is an error to tell.
fn why_it_ended(ended: Result<hapax::Result<()>, tokio::task::JoinError>) -> String {
    match ended {
        Ok(Err(error)) => error.to_string(),
        Ok(Ok(())) => "a worker ended before its work was done".to_owned(),
        Err(error) => format!("a worker ended: {error}"),
    }
}

/// The store, and the table `effects` beside its records. Nothing in the table keeps a second row of an event out.
async fn open_store(args: &Args) -> Result<SqliteStore, String> {
    let store = SqliteStore::open(&args.db).await.map_err(|error| error.to_string())?;
    let prepared = async {
        let create = "CREATE TABLE IF NOT EXISTS effects (source TEXT NOT NULL, id TEXT NOT NULL, type TEXT NOT NULL)";
        sqlx::query(create).execute(store.pool()).await?;
        sqlx::query("SELECT source, id, type FROM effects LIMIT 0").execute(store.pool()).await
    };
    if let Err(error) = prepared.await {
        store.close().await;
        return Err(format!("{}: the table effects cannot be used: {error}", args.db.display()));
    }
    Ok(store)
}

/// Rows of the table, and how many events they are of.
async fn count_effects(store: &SqliteStore) -> Option<(i64, i64)> {
    let count = "SELECT count(*), count(DISTINCT source || char(0) || id) FROM effects";
    sqlx::query_as(count).fetch_one(store.pool()).await.ok()
}
