//! The effect of an event: a row of the table `effects` that commits with the record, or a line at the end of a file.
//!
//! A row is there once. A line can be there again after a crash between the write and the record; it bears the
//! idempotency key, by which whoever reads the file tells that it is one effect.

use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hapax::{Context, Failure, Message};
use hapax_postgres::PgTx;
use hapax_sqlite::SqliteTx;
use serde::Serialize;
use sqlx::{Executor, PgPool, SqlitePool};

/// Where JSON that is no CloudEvent has its id (RFC 6901).
pub(crate) const ID_POINTER: &str = "/id";
/// Held while the table is created: two `CREATE TABLE IF NOT EXISTS` at once can fail in PostgreSQL.
const CREATING: i64 = 0x6861_7061_7865_6666;
const CREATE: &str = "CREATE TABLE IF NOT EXISTS effects \
    (consumer TEXT NOT NULL, source TEXT NOT NULL, id TEXT NOT NULL, type TEXT NOT NULL)";
/// Fails where a table of this name has another shape.
const LOOK: &str = "SELECT consumer, source, id, type FROM effects LIMIT 0";

/// What the handlers see beside the event.
#[derive(Debug)]
pub(crate) struct App {
    /// How long a handler takes.
    pub(crate) pause: Duration,
    /// The share of attempts that fail.
    pub(crate) fail_rate: f64,
    /// Where lines go.
    pub(crate) lines: Option<Arc<File>>,
}

impl App {
    async fn work(&self, effect: &Effect<'_>) -> Result<(), Failure> {
        tracing::debug!(id = &*effect.id, attempt = effect.attempt, "begins");
        tokio::time::sleep(self.pause).await;
        if self.fail_rate > 0.0 && fastrand::f64() < self.fail_rate {
            return Err(Failure::retryable("--fail-rate"));
        }
        Ok(())
    }
}

/// One row. It commits together with the mark that the event was processed, or neither does.
pub(crate) async fn sqlite_row(event: Arc<Message>, mut tx: SqliteTx, cx: Context<App>) -> Result<(), Failure> {
    let effect = Effect::of(&event, &cx);
    let Effect { consumer, source, id, ty, .. } = &effect;
    let insert = sqlx::query("INSERT INTO effects (consumer, source, id, type) VALUES (?, ?, ?, ?)");
    insert.bind(*consumer).bind(&**source).bind(&**id).bind(*ty).execute(&mut *tx).await?;
    cx.state().work(&effect).await
}

/// One row, as in SQLite.
pub(crate) async fn postgres_row(event: Arc<Message>, mut tx: PgTx, cx: Context<App>) -> Result<(), Failure> {
    let effect = Effect::of(&event, &cx);
    let Effect { consumer, source, id, ty, .. } = &effect;
    let insert = sqlx::query("INSERT INTO effects (consumer, source, id, type) VALUES ($1, $2, $3, $4)");
    // Unnamed, so that it goes through a pooler that hands out its connections by transaction.
    insert.bind(*consumer).bind(&**source).bind(&**id).bind(*ty).persistent(false).execute(&mut *tx).await?;
    cx.state().work(&effect).await
}

/// One line. What can fail comes before it.
pub(crate) async fn line(event: Arc<Message>, cx: Context<App>) -> Result<(), Failure> {
    let effect = Effect::of(&event, &cx);
    cx.state().work(&effect).await?;
    let file = cx.state().lines.clone().ok_or_else(|| Failure::permanent("there is no file for effects"))?;
    let mut line = serde_json::to_vec(&effect)?;
    line.push(b'\n');
    append(&file, &line)?;
    // The record must not say processed before the line is on disk.
    tokio::task::spawn_blocking(move || file.sync_data()).await??;
    Ok(())
}

/// Opens the file for appending, and creates it if it is missing.
pub(crate) fn open(path: &Path) -> Result<Arc<File>, String> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.map(Arc::new).map_err(|error| format!("--effects {}: {error}", path.display()))
}

/// In one call, which the system does not mix with those of other processes.
fn append(mut file: &File, line: &[u8]) -> io::Result<()> {
    match file.write(line)? {
        written if written == line.len() => Ok(()),
        written => Err(io::Error::other(format!("{written} of {} bytes were written", line.len()))),
    }
}

/// Creates the table if it is missing, however many processes do it at once.
pub(crate) async fn create_in_sqlite(pool: &SqlitePool) -> Result<(), sqlx::Error> {
    sqlx::query(CREATE).execute(pool).await?;
    sqlx::query(LOOK).execute(pool).await.map(drop)
}

/// Creates the table if it is missing, however many processes do it at once.
pub(crate) async fn create_in_postgres(pool: &PgPool) -> Result<(), sqlx::Error> {
    // Whoever may not create it finds it made by somebody who may.
    if pool.execute(LOOK).await.is_ok() {
        return Ok(());
    }
    let mut tx = pool.begin().await?;
    sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(CREATING).persistent(false).execute(&mut *tx).await?;
    tx.execute(CREATE).await?;
    tx.commit().await?;
    pool.execute(LOOK).await.map(drop)
}

/// The effect as it is written down.
#[derive(Debug, Serialize)]
struct Effect<'a> {
    consumer: &'a str,
    source: Cow<'a, str>,
    id: Cow<'a, str>,
    #[serde(rename = "type")]
    ty: &'a str,
    key: String,
    /// For the log alone.
    #[serde(skip)]
    attempt: u32,
}

impl<'a> Effect<'a> {
    fn of(event: &'a Message, cx: &'a Context<App>) -> Self {
        let (source, id) = identity(event);
        let ty = event.attributes.ty.as_deref().unwrap_or_default();
        Self { consumer: cx.consumer(), source, id, ty, key: cx.idempotency_key(), attempt: cx.attempt() }
    }
}

/// What identified the event: source and id of a CloudEvent, else the id in its JSON.
fn identity(event: &Message) -> (Cow<'_, str>, Cow<'_, str>) {
    let attributes = &event.attributes;
    let given = |value: &'_ Option<Box<str>>| value.as_deref().is_some_and(|text| !text.is_empty());
    if let (Some(source), Some(id)) = (&attributes.source, &attributes.id)
        && given(&attributes.source)
        && given(&attributes.id)
    {
        return (Cow::Borrowed(source), Cow::Borrowed(id));
    }
    #[derive(serde::Deserialize)]
    struct Named<'a> {
        #[serde(borrow)]
        id: &'a serde_json::value::RawValue,
    }
    let id = serde_json::from_slice::<Named<'_>>(&event.data).map(|named| named.id.get()).unwrap_or_default();
    (Cow::Borrowed(""), serde_json::from_str::<String>(id).map_or(Cow::Borrowed(id), Cow::Owned))
}
