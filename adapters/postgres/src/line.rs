//! Lines: connections of the user's pool, each asked one message at a time.
//!
//! A batch is one message of PostgreSQL's simple protocol that holds several statements. The server runs them in one
//! transaction that begins and ends with the message, so a batch costs one round trip, leaves no transaction open
//! whatever happens to its caller, and needs no prepared statement: PgBouncer in transaction mode forwards it as a whole.
//! The extended protocol as sqlx speaks it would take four round trips (begin, parse, execute, commit).
//!
//! The pool tests a connection when it hands it out and when it gets it back. So while there is work, two are kept. On
//! those hot statements are prepared (`hot.rs`), where the connection leads to PostgreSQL itself.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::TryStreamExt;
use hapax::ErrorKind;
use sqlx::pool::PoolConnection;
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Either, PgConnection, PgPool, Postgres, Row};
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout};

use crate::error::Fault;
use crate::hot::Form;
use crate::statements::Statements;

/// Connections kept between batches at most.
const KEPT_MAX: u32 = 2;
/// One that was not used for so long goes back to the pool.
const IDLE_MAX: Duration = Duration::from_secs(1);
/// One that was kept for so long goes back, so that the pool can renew it.
const KEPT_FOR_MAX: Duration = Duration::from_secs(60);
/// How long a connection of the pool is waited for.
pub(crate) const ACQUIRE_MAX: Duration = Duration::from_secs(5);

/// The rows of each statement of a message.
pub(crate) type Replies = Vec<Vec<PgRow>>;

/// The connections of one store.
pub(crate) struct Lines {
    pool: PgPool,
    kept: Mutex<Vec<Kept>>,
    kept_max: usize,
    /// How long an answer is waited for.
    deadline: Duration,
    /// Where connections are given back, wherever the store is dropped.
    runtime: Handle,
    /// Whether hot statements are prepared on what is kept.
    prepares: AtomicBool,
}

struct Kept {
    connection: PoolConnection<Postgres>,
    taken: Instant,
    used: Instant,
    uses: u32,
    is_prepared: bool,
}

impl Lines {
    pub(crate) fn new(pool: PgPool, deadline: Duration, runtime: Handle) -> Self {
        // The user's own statements on this pool find a connection too.
        let spare = pool.options().get_max_connections().saturating_sub(1);
        let kept_max = KEPT_MAX.min(spare) as usize;
        Self { pool, kept: Mutex::default(), kept_max, deadline, runtime, prepares: AtomicBool::new(false) }
    }

    /// From now on hot statements are prepared on what is kept.
    pub(crate) fn prepare(self) -> Self {
        self.prepares.store(true, Ordering::Relaxed);
        self
    }

    pub(crate) fn prepares(&self) -> bool {
        self.prepares.load(Ordering::Relaxed)
    }

    /// The server is not the one that a statement was prepared on, or its tables were changed.
    pub(crate) fn prepare_no_more(&self) {
        if self.prepares.swap(false, Ordering::Relaxed) {
            tracing::warn!("prepared statements are lost behind this pool: hapax sends them as text from now on");
        }
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    pub(crate) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Sends a message and reads all its replies. Dropping it closes the connection; the server finishes the message or
    /// rolls it back.
    pub(crate) async fn ask(&self, message: String) -> Result<Replies, Fault> {
        let mut busy = self.take().await?;
        self.ask_busy(&mut busy, message).await
    }

    /// The same with a hot statement, which `message` writes in the form that it is told.
    pub(crate) async fn ask_hot(
        &self,
        statements: &Statements,
        message: impl Fn(Form) -> String,
    ) -> Result<Replies, Fault> {
        let mut busy = self.take().await?;
        if !self.is_prepared(&mut busy, statements).await? {
            return self.ask_busy(&mut busy, message(Form::Text)).await;
        }
        let asked = self.ask_busy(&mut busy, message(Form::Prepared)).await;
        match &asked {
            // Nothing took place.
            Err(fault) if fault.is_of_preparing() => {
                self.prepare_no_more();
                self.ask_busy(&mut busy, message(Form::Text)).await
            }
            _ => asked,
        }
    }

    /// Prepares the hot statements on a connection that is used for the second time: one that is used once does without.
    async fn is_prepared(&self, busy: &mut Busy<'_>, statements: &Statements) -> Result<bool, Fault> {
        let uses = busy.kept.as_ref().map_or(0, |kept| kept.uses);
        if uses == 0 || !self.prepares() {
            return Ok(false);
        }
        if busy.kept.as_ref().is_some_and(|kept| kept.is_prepared) {
            return Ok(true);
        }
        let limits = statements.limits();
        let names = format!("{limits} SELECT name FROM pg_catalog.pg_prepared_statements WHERE name LIKE 'hapax\\_%'");
        let replies = self.ask_busy(busy, names).await?;
        let mut known = Vec::new();
        for row in replies.last().map(Vec::as_slice).unwrap_or_default() {
            known.push(row.try_get::<String, _>(0)?);
        }
        let mut message = limits;
        for (name, prepare) in statements.prepared() {
            if known.iter().all(|known| known != name) {
                message.push_str(prepare);
                message.push_str("; ");
            }
        }
        match self.ask_busy(busy, message).await {
            Ok(_) => {}
            Err(fault) if fault.is_of_preparing() => {
                self.prepare_no_more();
                return Ok(false);
            }
            Err(fault) => return Err(fault),
        }
        if let Some(kept) = busy.kept.as_mut() {
            kept.is_prepared = true;
        }
        Ok(true)
    }

    async fn ask_busy(&self, busy: &mut Busy<'_>, message: String) -> Result<Replies, Fault> {
        let Some(kept) = busy.kept.as_mut() else {
            return Err(Fault::new(ErrorKind::Internal, "a line without a connection"));
        };
        busy.is_sound = false;
        let asked = timeout(self.deadline, ask_on(&mut kept.connection, message)).await;
        match asked {
            Ok(Ok(replies)) => {
                check_own(&replies)?;
                busy.is_sound = true;
                Ok(replies)
            }
            Ok(Err(fault)) => {
                busy.is_sound = fault.leaves_connection();
                Err(fault)
            }
            Err(_) => Err(Fault::new(ErrorKind::Unknown, format!("no answer within {:?}", self.deadline))),
        }
    }

    async fn take(&self) -> Result<Busy<'_>, Fault> {
        let kept = self.kept().pop();
        let kept = match kept {
            Some(kept) => kept,
            None => {
                let acquired = timeout(ACQUIRE_MAX, self.pool.acquire()).await;
                let why = || Fault::unavailable(format!("no connection of the pool was free within {ACQUIRE_MAX:?}"));
                let now = Instant::now();
                Kept { connection: acquired.map_err(|_| why())??, taken: now, used: now, uses: 0, is_prepared: false }
            }
        };
        Ok(Busy { lines: self, kept: Some(kept), is_sound: false })
    }

    fn give_back(&self, mut kept: Kept) {
        kept.used = Instant::now();
        kept.uses = kept.uses.saturating_add(1);
        let mut all = self.kept();
        let stays = all.len() < self.kept_max && kept.taken.elapsed() < KEPT_FOR_MAX && !self.pool.is_closed();
        if stays {
            all.push(kept);
        }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Vec<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back what is not used, until the pool is closed.
    pub(crate) async fn tidy(self: Arc<Self>) {
        let mut closing = self.pool.close_event();
        loop {
            tokio::select! {
                () = &mut closing => break,
                () = tokio::time::sleep(IDLE_MAX / 2) => {}
            }
            self.kept().retain(|kept| kept.used.elapsed() < IDLE_MAX);
        }
        self.kept().clear();
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        // The pool takes them back in a task of its own.
        let _runtime = self.runtime.enter();
        self.kept().clear();
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines")
            .field("kept_max", &self.kept_max)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// A connection with a message on its way. Unless the answer was read to its end, it is closed.
struct Busy<'a> {
    lines: &'a Lines,
    kept: Option<Kept>,
    is_sound: bool,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let Some(mut kept) = self.kept.take() else { return };
        if self.is_sound {
            self.lines.give_back(kept);
        } else {
            kept.connection.close_on_drop();
        }
    }
}

/// Refuses the answers of a message that was not its own transaction: it was swallowed by one that another user of the
/// pool left open on this connection, and nobody would commit it. (sqlx 0.9 leaves it so where a `begin()` is dropped
/// before its answer has come.)
fn check_own(replies: &Replies) -> Result<(), Fault> {
    let told = replies.iter().take(2).chain(replies.last()).filter_map(|rows| rows.first());
    let told = told.filter_map(|row| row.try_get::<bool, _>("is_own").ok());
    match told.reduce(|_, own| own) {
        Some(false) => {
            tracing::warn!(
                "a connection of the pool was handed out inside a transaction that nobody ended; closing it"
            );
            Err(Fault::unavailable("a connection of the pool was inside somebody's transaction, and is closed"))
        }
        Some(true) | None => Ok(()),
    }
}

/// Sends a message on a connection and reads all its replies.
pub(crate) async fn ask_on(connection: &mut PgConnection, message: String) -> Result<Replies, Fault> {
    let mut replies = Replies::new();
    ask_into(connection, message, &mut replies).await?;
    Ok(replies)
}

/// The same, where what came before an error is wanted too.
pub(crate) async fn ask_into(
    connection: &mut PgConnection,
    message: String,
    replies: &mut Replies,
) -> Result<(), Fault> {
    // Sound because of `template.rs`: what is written into a text is digits, hexadecimal digits and our own words.
    let mut answers = sqlx::raw_sql(AssertSqlSafe(message)).fetch_many(connection);
    let mut rows = Vec::new();
    while let Some(answer) = answers.try_next().await? {
        match answer {
            Either::Left(_) => replies.push(std::mem::take(&mut rows)),
            Either::Right(row) => rows.push(row),
        }
    }
    Ok(())
}
