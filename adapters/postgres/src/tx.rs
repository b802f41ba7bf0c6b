//! Transactions of handlers: lent out by value, handed back on drop, never left open.
//!
//! Each has a connection of the pool to itself, so they run beside one another and beside claims and renewals. Whether
//! the handler ended the transaction by itself is told by a setting that lives as long as the transaction does.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hapax::{ErrorKind, Lease, Outcome, Recorded};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Postgres, Transaction};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::error::Fault;
use crate::line::{ACQUIRE_MAX, Lines};
use crate::outcomes::{self, Desk};
use crate::statements::Statements;

/// How long a handler that has returned may still keep its transaction (in a task that it started).
pub const HAND_BACK_MAX: Duration = Duration::from_secs(5);

/// How long a connection and the answer to `BEGIN` are waited for.
pub const BEGIN_MAX: Duration = Duration::from_secs(10);

/// What a handler gets: derefs to sqlx's connection, inside the transaction in which the event is recorded.
///
/// It goes back to hapax when it is dropped, at the latest at the handler's end. Do not commit or roll back with SQL
/// texts; for a part that may fail take a [`savepoint`](Self::savepoint). The isolation level is `READ COMMITTED`.
///
/// ```
/// use hapax_postgres::{PgTx, sqlx};
///
/// async fn invoice(mut tx: PgTx, order: i64) -> Result<(), sqlx::Error> {
///     sqlx::query("INSERT INTO invoices (order_id) VALUES ($1)").bind(order).execute(&mut *tx).await?;
///     let mut part = tx.savepoint().await?;
///     sqlx::query("INSERT INTO hints (order_id) VALUES ($1)").bind(order).execute(&mut *part).await?;
///     part.rollback().await
/// }
/// ```
///
/// Behind PgBouncer in transaction mode add `.persistent(false)` to each query: sqlx names the others, also with a
/// statement cache of 0, and PgBouncer before 1.21 lends the next transaction a server that does not know the name.
#[derive(Debug)]
pub struct PgTx {
    held: Option<Held>,
    home: Option<oneshot::Sender<Held>>,
}

impl PgTx {
    /// A savepoint: rolled back on drop unless it is committed, which keeps it as part of this transaction.
    ///
    /// # Errors
    /// Those of PostgreSQL.
    pub async fn savepoint(&mut self) -> Result<Transaction<'_, Postgres>, sqlx::Error> {
        (**self).begin().await
    }

    /// The same as [`savepoint`](Self::savepoint), by the name that sqlx uses for nested transactions.
    ///
    /// # Errors
    /// Those of PostgreSQL.
    pub async fn transaction(&mut self) -> Result<Transaction<'_, Postgres>, sqlx::Error> {
        self.savepoint().await
    }
}

impl Deref for PgTx {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.held.as_ref().expect("held until it is dropped").transaction
    }
}

impl DerefMut for PgTx {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.held.as_mut().expect("held until it is dropped").transaction
    }
}

impl Drop for PgTx {
    fn drop(&mut self) {
        if let (Some(held), Some(home)) = (self.held.take(), self.home.take()) {
            // Where nobody waits for it any more it is dropped here, which rolls back.
            drop(home.send(held));
        }
    }
}

/// Where a transaction comes back. Dropping it rolls back: at once, or as soon as the handler lets go.
#[derive(Debug)]
pub struct PgLent {
    back: Option<oneshot::Receiver<Held>>,
    held: Option<Held>,
    deadline: Duration,
}

#[derive(Debug)]
struct Held {
    transaction: Transaction<'static, Postgres>,
    mark: u64,
}

pub(crate) async fn begin(lines: &Lines, statements: &Statements) -> Result<(PgTx, PgLent), Fault> {
    static MARKS: AtomicU64 = AtomicU64::new(1);
    let mark = MARKS.fetch_add(1, Ordering::Relaxed);
    let (pool, begin) = (lines.pool().clone(), AssertSqlSafe(statements.begin(mark)));
    // In a task, since sqlx 0.9 leaves the server inside a transaction where `begin` is dropped before its answer has
    // come. Should nobody want it any more, it is rolled back as soon as it is there.
    let begun = tokio::spawn(async move {
        let connection = timeout(ACQUIRE_MAX, pool.acquire()).await.map_err(|_| sqlx::Error::PoolTimedOut)??;
        Transaction::begin(connection, Some(sqlx::SqlSafeStr::into_sql_str(begin))).await
    });
    let begun = timeout(BEGIN_MAX, begun).await;
    let late = || Fault::unavailable(format!("no transaction within {BEGIN_MAX:?}"));
    let begun = begun.map_err(|_| late())?;
    let transaction = begun.map_err(|_| Fault::new(ErrorKind::Internal, "the task that begins panicked"))??;
    let (home, back) = oneshot::channel();
    let tx = PgTx { held: Some(Held { transaction, mark }), home: Some(home) };
    Ok((tx, PgLent { back: Some(back), held: None, deadline: lines.deadline() }))
}

impl PgLent {
    async fn held(&mut self) -> Result<&mut Held, Fault> {
        if let Some(back) = &mut self.back {
            let back = timeout(HAND_BACK_MAX, back).await;
            let held = back.map_err(|_| {
                Fault::rejected(
                    "the handler has returned but keeps its transaction, perhaps in a task that it started: it must \
                     drop the transaction before it returns",
                )
            })?;
            self.back = None;
            self.held = held.ok();
        }
        self.held.as_mut().ok_or_else(lost)
    }

    pub(crate) async fn record(
        &mut self,
        statements: &Statements,
        batch: &[(Lease, Outcome)],
    ) -> Result<Vec<Recorded>, Fault> {
        let deadline = self.deadline;
        let Held { transaction, mark } = self.held().await?;
        let mut desk = Desk::Transaction { connection: &mut *transaction, mark: *mark, deadline };
        outcomes::record(statements, batch, &mut desk).await
    }

    pub(crate) async fn commit(mut self) -> Result<(), Fault> {
        let deadline = self.deadline;
        self.held().await?;
        let Held { transaction, .. } = self.held.take().ok_or_else(lost)?;
        match timeout(deadline, transaction.commit()).await {
            Ok(done) => done.map_err(|error| Fault::from(error).at_commit()),
            Err(_) => Err(Fault::new(ErrorKind::Unknown, format!("no answer within {deadline:?}"))),
        }
    }
}

fn lost() -> Fault {
    Fault::rejected("the handler did not hand the transaction back")
}
