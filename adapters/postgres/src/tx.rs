//! Transactions of handlers: lent out by value, handed back on drop, never left open.
//!
//! Each has a connection of the pool to itself, so they run beside one another and beside claims and renewals. Whether
//! the handler ended the transaction by itself is told by a setting that lives as long as the transaction does.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hapax::{ErrorKind, Lease, Outcome, Recorded};
use sqlx::pool::PoolConnection;
use sqlx::postgres::PgTransactionManager;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, Postgres, SqlSafeStr, Transaction};
use sqlx_core::transaction::TransactionManager;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;

use crate::error::Fault;
use crate::line::{ACQUIRE_MAX, Lines};
use crate::outcomes::{self, Desk};
use crate::statements::Statements;

/// How long a handler that has returned may still keep its transaction (in a task that it started).
pub const HAND_BACK_MAX: Duration = Duration::from_secs(5);

/// How long a connection and the answer to `BEGIN` are waited for.
pub const BEGIN_MAX: Duration = Duration::from_secs(10);

/// How long another handler's transaction is waited for where as many are open as may be.
const TURN_MAX: Duration = Duration::from_secs(30);

/// Connections of the pool that handlers leave for claims, renewals and records.
const LEFT: u32 = 2;

/// How many transactions of handlers may be open at once on `pool`.
pub(crate) fn turns(pool: &PgPool) -> usize {
    let most = pool.options().get_max_connections().saturating_sub(LEFT).max(1);
    usize::try_from(most).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS)
}

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
        &self.held.as_ref().expect("held until it is dropped").connection
    }
}

impl DerefMut for PgTx {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.held.as_mut().expect("held until it is dropped").connection
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

/// An open transaction. Dropping it rolls back.
#[derive(Debug)]
struct Held {
    connection: PoolConnection<Postgres>,
    mark: u64,
    is_committed: bool,
    // Let go after the connection.
    _turn: OwnedSemaphorePermit,
}

impl Held {
    /// What sqlx believes of the connection: inside the transaction, and in no savepoint of it. Where it believes
    /// otherwise, its commit would release the savepoint or do nothing, and report success.
    fn check_depth(&self) -> Result<(), Fault> {
        match depth(&self.connection) {
            1 => Ok(()),
            0 => Err(Fault::rejected(
                "the handler ended hapax' transaction, or dropped a savepoint() before it was there: what it wrote is \
                 rolled back",
            )),
            _ => Err(Fault::rejected("the handler left a savepoint open: commit it, roll it back, or drop it")),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.is_committed {
            return;
        }
        if depth(&self.connection) == 0 {
            // What is open there, if anything is, sqlx would not end.
            self.connection.close_on_drop();
        }
        // From the innermost savepoint on, which alone would leave the transaction open.
        while depth(&self.connection) > 0 {
            PgTransactionManager::start_rollback(&mut self.connection);
        }
    }
}

fn depth(connection: &PgConnection) -> usize {
    PgTransactionManager::get_transaction_depth(connection)
}

pub(crate) async fn begin(
    lines: &Lines,
    statements: &Statements,
    turns: &Arc<Semaphore>,
) -> Result<(PgTx, PgLent), Fault> {
    static MARKS: AtomicU64 = AtomicU64::new(1);
    let mark = MARKS.fetch_add(1, Ordering::Relaxed);
    let (pool, begin) = (lines.pool().clone(), AssertSqlSafe(statements.begin(mark)));
    let turn = timeout(TURN_MAX, Arc::clone(turns).acquire_owned()).await;
    let turn = turn.map_err(|_| Fault::unavailable(format!("no other transaction ended within {TURN_MAX:?}")))?;
    let turn = turn.map_err(|_| Fault::new(ErrorKind::Internal, "the turns are closed"))?;
    // In a task, since sqlx 0.9 leaves the server inside a transaction where `begin` is dropped before its answer has
    // come. Should nobody want it any more, it is rolled back as soon as it is there.
    let begun = tokio::spawn(async move {
        let mut connection = timeout(ACQUIRE_MAX, pool.acquire()).await.map_err(|_| sqlx::Error::PoolTimedOut)??;
        let begun = PgTransactionManager::begin(&mut connection, Some(begin.into_sql_str()));
        // Bounded here too: a server that does not answer must not keep the turn.
        let begun = timeout(BEGIN_MAX, begun).await.unwrap_or(Err(sqlx::Error::PoolTimedOut));
        match begun {
            Ok(()) => Ok(Held { connection, mark, is_committed: false, _turn: turn }),
            Err(error) => {
                // It may be inside a transaction: one that somebody left open, or ours.
                connection.close_on_drop();
                Err(error)
            }
        }
    });
    let begun = timeout(BEGIN_MAX, begun).await;
    let late = || Fault::unavailable(format!("no transaction within {BEGIN_MAX:?}"));
    let begun = begun.map_err(|_| late())?;
    let held = begun.map_err(|_| Fault::new(ErrorKind::Internal, "the task that begins panicked"))??;
    let (home, back) = oneshot::channel();
    let tx = PgTx { held: Some(held), home: Some(home) };
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
        let held = self.held.as_mut().ok_or_else(lost)?;
        held.check_depth()?;
        Ok(held)
    }

    pub(crate) async fn record(
        &mut self,
        statements: &Statements,
        batch: &[(Lease, Outcome)],
    ) -> Result<Vec<Recorded>, Fault> {
        let deadline = self.deadline;
        let Held { connection, mark, .. } = self.held().await?;
        let mut desk = Desk::Transaction { connection: &mut *connection, mark: *mark, deadline };
        outcomes::record(statements, batch, &mut desk).await
    }

    pub(crate) async fn commit(mut self) -> Result<(), Fault> {
        let deadline = self.deadline;
        let held = self.held().await?;
        match timeout(deadline, PgTransactionManager::commit(&mut held.connection)).await {
            Ok(Ok(())) => {
                held.is_committed = true;
                Ok(())
            }
            Ok(Err(error)) => Err(Fault::from(error).at_commit()),
            Err(_) => {
                held.connection.close_on_drop();
                Err(Fault::new(ErrorKind::Unknown, format!("no answer within {deadline:?}")))
            }
        }
    }
}

fn lost() -> Fault {
    Fault::rejected("the handler did not hand the transaction back")
}
