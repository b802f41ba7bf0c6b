//! The one row that an event writes at level L4, alone or with a batch, and the stores that hold it.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use compare_kit::{Arguments, Meter};
use hapax::{BoxError, Context, Event, Failure, Item, Message, Outcomes};
use hapax_postgres::{PgTx, PostgresStore};
use hapax_sqlite::{SqliteStore, SqliteTx};
use serde::{Deserialize, Serialize};
use sqlx::AssertSqlSafe;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::clocked::Clocks;

/// What handlers see.
pub struct App {
    pub meter: Meter,
    pub insert: &'static str,
    pub clocks: Option<Arc<Clocks>>,
    /// Handlers never return.
    pub stopped: bool,
}

impl App {
    pub fn started(&self, event: &Message) {
        if let Some(clocks) = &self.clocks {
            clocks.started(event);
        }
    }
}

/// The event of batch handlers: decoded, and nothing of it kept.
#[derive(Serialize, Deserialize)]
pub struct Measured {}

impl Event for Measured {
    const TYPE: &'static str = "measured";
}

/// A schema's name, of the group.
pub fn schema(arguments: &Arguments) -> String {
    arguments.group.replace('-', "_")
}

pub fn sqlite_file(arguments: &Arguments) -> PathBuf {
    PathBuf::from(&arguments.store_url).join(format!("{}.db", arguments.group))
}

/// The statement that writes the effect. Made once, needed as long as the process lives.
pub fn insert(arguments: &Arguments) -> &'static str {
    let is_batch = arguments.level.as_deref() == Some("L4-batch");
    match (arguments.store.as_str(), is_batch) {
        ("postgres", false) => format!("INSERT INTO {}.effect (id) VALUES ($1)", schema(arguments)).leak(),
        ("postgres", true) => {
            format!("INSERT INTO {}.effect (id) SELECT unnest($1::bytea[])", schema(arguments)).leak()
        }
        (_, false) => "INSERT INTO effect (id) VALUES (?)",
        (_, true) => "INSERT INTO effect (id) SELECT value FROM json_each(?)",
    }
}

/// A schema of its own; as many connections as handlers may hold a transaction, two for claims and records, and two more, so
/// that connections may go from one handler to the next.
pub async fn postgres(arguments: &Arguments) -> Result<PostgresStore, BoxError> {
    let connections = match arguments.level.as_deref() {
        Some("L4") => arguments.concurrency as u32 + 4,
        _ => 4,
    };
    let options = PgConnectOptions::from_str(&arguments.store_url)?;
    let pool = PgPoolOptions::new().max_connections(connections).connect_with(options).await?;
    let schema = schema(arguments);
    PostgresStore::migrate_schema(&pool, &schema).await?;
    let create = format!("CREATE TABLE IF NOT EXISTS {schema}.effect (id bytea NOT NULL)");
    sqlx::raw_sql(AssertSqlSafe(create)).execute(&pool).await?;
    Ok(PostgresStore::builder(pool).schema(schema).reuse_connections(true).connect().await?)
}

/// A file of its own.
pub async fn sqlite(arguments: &Arguments) -> Result<SqliteStore, BoxError> {
    let store = SqliteStore::open(sqlite_file(arguments)).await?;
    sqlx::query("CREATE TABLE IF NOT EXISTS effect (id BLOB NOT NULL)").execute(store.pool()).await?;
    Ok(store)
}

/// Leaves nothing behind in PostgreSQL and in files, unless the store was handed over filled.
pub async fn drop_all(arguments: &Arguments) -> Result<(), BoxError> {
    if arguments.keep {
        return Ok(());
    }
    match arguments.store.as_str() {
        "postgres" => {
            let pool = PgPoolOptions::new().max_connections(1).connect(&arguments.store_url).await?;
            let drop = format!("DROP SCHEMA IF EXISTS {} CASCADE", schema(arguments));
            sqlx::raw_sql(AssertSqlSafe(drop)).execute(&pool).await?;
        }
        "sqlite" => {
            for ending in ["", "-wal", "-shm"] {
                let mut file = sqlite_file(arguments).into_os_string();
                file.push(ending);
                // Those beside the database are there only sometimes.
                let _ = std::fs::remove_file(file);
            }
        }
        _ => {}
    }
    Ok(())
}

/// What the store takes on disk, where that can be asked for. Redis tells for the whole server.
pub async fn store_mib(arguments: &Arguments) -> Option<f64> {
    let bytes = match arguments.store.as_str() {
        "postgres" => {
            let pool = PgPoolOptions::new().max_connections(1).connect(&arguments.store_url).await.ok()?;
            let sql = "SELECT sum(pg_total_relation_size(c.oid))::bigint FROM pg_class c \
                       JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relkind = 'r'";
            let bytes: i64 = sqlx::query_scalar(sql).bind(schema(arguments)).fetch_one(&pool).await.ok()?;
            bytes as f64
        }
        "sqlite" => std::fs::metadata(sqlite_file(arguments)).ok()?.len() as f64,
        _ => return None,
    };
    Some((bytes / 1_048_576.0 * 10.0).round() / 10.0)
}

fn id(event: &Message) -> &[u8] {
    event.attributes.id.as_deref().unwrap_or_default().as_bytes()
}

pub async fn postgres_row(event: Arc<Message>, mut tx: PgTx, cx: Context<App>) -> Result<(), Failure> {
    let app = cx.state();
    app.started(&event);
    sqlx::query(app.insert).bind(id(&event)).execute(&mut *tx).await?;
    app.meter.handled(&event.data);
    Ok(())
}

pub async fn postgres_rows(batch: Vec<Item<Measured, App>>, mut tx: PgTx) -> Result<Outcomes, Failure> {
    let Some(first) = batch.first() else { return Ok(Outcomes::all_done()) };
    let ids: Vec<_> = batch.iter().map(|item| id(item.cx.message())).collect();
    sqlx::query(first.cx.state().insert).bind(ids).execute(&mut *tx).await?;
    told(&batch);
    Ok(Outcomes::all_done())
}

pub async fn sqlite_row(event: Arc<Message>, mut tx: SqliteTx, cx: Context<App>) -> Result<(), Failure> {
    let app = cx.state();
    app.started(&event);
    sqlx::query(app.insert).bind(id(&event)).execute(&mut *tx).await?;
    app.meter.handled(&event.data);
    Ok(())
}

pub async fn sqlite_rows(batch: Vec<Item<Measured, App>>, mut tx: SqliteTx) -> Result<Outcomes, Failure> {
    let Some(first) = batch.first() else { return Ok(Outcomes::all_done()) };
    let ids: Vec<_> = batch.iter().map(|item| item.cx.message().attributes.id.as_deref()).collect();
    let ids = serde_json::to_string(&ids)?;
    sqlx::query(first.cx.state().insert).bind(ids).execute(&mut *tx).await?;
    told(&batch);
    Ok(Outcomes::all_done())
}

fn told(batch: &[Item<Measured, App>]) {
    for item in batch {
        let app = item.cx.state();
        app.started(item.cx.message());
        app.meter.handled(&item.cx.message().data);
    }
}
