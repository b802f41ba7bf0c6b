//! Transactions of handlers: lent out by value, handed back on drop, never left open.
//!
//! Each has a connection of the pool to itself, so they run beside one another and beside claims and renewals. Whether
//! the handler ended the transaction by itself is told by a setting that lives as long as the transaction does.

use std::num::NonZeroU64;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hapax::{ClaimRequest, ErrorKind, Lease, Outcome, Recorded};
use sqlx::postgres::{PgRow, PgTransactionManager};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Postgres, Row, SqlSafeStr, Transaction};
use sqlx_core::transaction::TransactionManager;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::timeout;

use crate::error::{Fault, code};
use crate::line::{Replies, ask_into, ask_on};
use crate::outcomes::{self, Desk, ended_by_handler};
use crate::statements::{Next, Readiness, Statements};
use crate::turns::{Line, Turns, depth};

/// How long a handler that has returned may still keep its transaction (in a task that it started).
pub const HAND_BACK_MAX: Duration = Duration::from_secs(5);

/// How long the answer to `BEGIN` is waited for.
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
        self.held.as_ref().expect("held until it is dropped").connection()
    }
}

impl DerefMut for PgTx {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.held.as_mut().expect("held until it is dropped").connection_mut()
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

/// A transaction. Dropping it rolls back, unless it has ended.
#[derive(Debug)]
struct Held {
    line: Option<Line>,
    stands: Stands,
    mark: u64,
    turns: Arc<Turns>,
    // Let go after the connection.
    _turn: OwnedSemaphorePermit,
}

/// How a transaction stands on its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stands {
    /// An answer has not come: it may have begun or ended.
    Unknown,
    /// It has begun.
    Open,
    /// It was committed; another may be open that nothing was done in.
    Committed,
}

impl Held {
    fn connection(&self) -> &PgConnection {
        &self.line.as_ref().expect("there until it is dropped").connection
    }

    fn connection_mut(&mut self) -> &mut PgConnection {
        &mut self.line.as_mut().expect("there until it is dropped").connection
    }

    /// Begins on the server. What sqlx believes of the connection is so afterwards.
    async fn begin(&mut self, statements: &Statements) -> Result<(), Fault> {
        let mark = self.mark;
        let connection = self.connection_mut();
        if depth(connection) == 1 {
            return ask_on(connection, statements.begin_next(mark)).await.map(drop);
        }
        let begin = AssertSqlSafe(statements.begin(mark)).into_sql_str();
        Ok(PgTransactionManager::begin(connection, Some(begin)).await?)
    }

    /// What sqlx believes of the connection: inside the transaction, and in no savepoint of it. Where it believes
    /// otherwise, its commit would release the savepoint or do nothing, and report success.
    fn check_depth(&self) -> Result<(), Fault> {
        match depth(self.connection()) {
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
        let Some(mut line) = self.line.take() else { return };
        match self.stands {
            Stands::Committed => self.turns.give_back(line),
            Stands::Open if depth(&line.connection) > 0 => {}
            // What is open there, if anything is, sqlx would not end.
            Stands::Open | Stands::Unknown => line.connection.close_on_drop(),
        }
    }
}

pub(crate) async fn begin(statements: &Statements, turns: &Arc<Turns>) -> Result<(PgTx, PgLent), Fault> {
    static MARKS: AtomicU64 = AtomicU64::new(1);
    let mark = MARKS.fetch_add(1, Ordering::Relaxed);
    loop {
        let (line, turn) = turns.take().await?;
        let is_kept = line.is_kept();
        // sqlx 0.9 leaves the server inside a transaction where `begin` is dropped before its answer has come: such a
        // connection is closed.
        let mut held = Held { line: Some(line), stands: Stands::Unknown, mark, turns: Arc::clone(turns), _turn: turn };
        let begun = timeout(BEGIN_MAX, held.begin(statements)).await;
        match begun.map_err(|_| Fault::unavailable(format!("no transaction within {BEGIN_MAX:?}")))? {
            Ok(()) => {
                held.stands = Stands::Open;
                let (home, back) = oneshot::channel();
                let tx = PgTx { held: Some(held), home: Some(home) };
                return Ok((tx, PgLent { back: Some(back), held: None, deadline: turns.lines.deadline() }));
            }
            // The server was restarted, or has ended it: the pool would have found out.
            Err(fault) if is_kept && !fault.leaves_connection() => turns.forget_kept(),
            Err(refused) => return Err(refused),
        }
    }
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
        let held = self.held().await?;
        let mark = held.mark;
        held.stands = Stands::Unknown;
        let mut desk = Desk::Transaction { connection: held.connection_mut(), mark, deadline };
        let recorded = outcomes::record(statements, batch, &mut desk).await;
        if recorded.as_ref().map_or_else(Fault::leaves_transaction, |_| true) {
            held.stands = Stands::Open;
        }
        recorded
    }

    pub(crate) async fn commit(mut self) -> Result<(), Fault> {
        let deadline = self.deadline;
        let held = self.held().await?;
        held.stands = Stands::Unknown;
        match timeout(deadline, PgTransactionManager::commit(held.connection_mut())).await {
            Ok(Ok(())) => {
                held.stands = Stands::Committed;
                Ok(())
            }
            Ok(Err(error)) => {
                let fault = Fault::from(error);
                if fault.leaves_transaction() {
                    held.stands = Stands::Open;
                }
                Err(fault.at_commit())
            }
            Err(_) => Err(Fault::new(ErrorKind::Unknown, format!("no answer within {deadline:?}"))),
        }
    }

    /// One event's mark, the next one's claim and the commit in one message; what is more than that in several, without the
    /// claim.
    pub(crate) async fn record_and_commit(
        mut self,
        statements: &Statements,
        batch: &[(Lease, Outcome)],
        next: Option<Next<'_>>,
    ) -> Result<(Vec<Recorded>, Option<Lease>), Fault> {
        if let [(lease, Outcome::Processed)] = batch {
            let next = next.filter(|next| next.request.consumer == lease.consumer && next.request.reopen.is_none());
            if let Some(claimed) = self.finish(statements, lease, next).await? {
                return Ok((vec![Recorded::Done], claimed));
            }
        }
        let answers = self.record(statements, batch).await?;
        if answers.iter().all(|answer| matches!(answer, Recorded::Done | Recorded::Vanished)) {
            self.commit().await.map_err(Fault::at_last_commit)?;
        }
        Ok((answers, None))
    }

    /// Marks one event as processed, claims the next if it can be, and commits; `None` where that could not be done, and
    /// then the transaction stands as the handler left it.
    async fn finish(
        &mut self,
        statements: &Statements,
        lease: &Lease,
        next: Option<Next<'_>>,
    ) -> Result<Option<Option<Lease>>, Fault> {
        let deadline = self.deadline;
        let late = || Fault::new(ErrorKind::Unknown, format!("no answer within {deadline:?}"));
        let held = self.held().await?;
        let Some(line) = &mut held.line else { return Err(lost()) };
        let finish = statements.finish(lease, next, held.mark, line.readiness);
        held.stands = Stands::Unknown;
        let mut replies = Replies::new();
        let asked =
            timeout(deadline, ask_into(&mut line.connection, finish, &mut replies)).await.map_err(|_| late())?;
        let Err(fault) = asked else {
            held.stands = Stands::Committed;
            line.readiness = ready_after(line.readiness, &replies);
            return Ok(Some(next.and_then(|next| granted(next.request, &replies))));
        };
        if fault.leaves_transaction() {
            held.stands = Stands::Open;
        }
        let is_marked = replies.iter().flatten().any(|row| row.try_get::<i64, _>("marked").is_ok());
        // Whoever ends the connection, a pooler say, may not have heard of the commit.
        if is_marked || fault.is_of_connection() {
            return Err(fault.at_last_commit());
        }
        if fault.has_code(code::NO_TRANSACTION) {
            return Err(ended_by_handler());
        }
        // Whatever the claim of the next one ran into is no reason to undo this one: another process claims it now, or did so
        // behind this transaction's snapshot. A handler's own `statement_timeout` does not hold for hapax either.
        let is_tried_again = next.is_some() && fault.leaves_transaction() && !fault.is_of_transaction()
            || [code::DIVISION_BY_ZERO, code::QUERY_CANCELED].iter().any(|code| fault.has_code(code))
            || fault.is_of_preparing();
        if !is_tried_again {
            return Err(fault.in_transaction());
        }
        // What was prepared stays so, whatever became of the transaction, and a handler can let go of it.
        if line.readiness != Readiness::NotAsked {
            line.readiness = Readiness::Unknown;
        }
        held.stands = Stands::Unknown;
        let back = ask_on(&mut line.connection, "ROLLBACK TO SAVEPOINT hapax_mark".to_owned());
        // Whatever it answers, nothing was committed. Without a savepoint the error was one that the handler left behind.
        let back = timeout(deadline, back).await;
        let back = back.map_err(|_| Fault::unavailable(format!("no answer within {deadline:?}")))?;
        if back.as_ref().map_or_else(Fault::leaves_transaction, |_| true) {
            held.stands = Stands::Open;
        }
        match back {
            Ok(_) => Ok(None),
            // The message had not been sent: the error is that of a statement that the handler left behind.
            Err(back) if back.has_code(code::UNKNOWN_SAVEPOINT) => Err(fault.in_transaction()),
            Err(back) => Err(back.in_transaction()),
        }
    }
}

/// The lease of the claim that a commit took along, if it was granted.
fn granted(request: &ClaimRequest, replies: &Replies) -> Option<Lease> {
    let fence = replies.iter().flatten().find_map(|row| row.try_get::<Option<i64>, _>("fence").ok().flatten())?;
    let fence = NonZeroU64::new(u64::try_from(fence).ok()?)?;
    Some(Lease { consumer: request.consumer, key: request.key, fence, attempt: 1 })
}

/// What is known of a connection's prepared statement after it was used.
fn ready_after(before: Readiness, replies: &Replies) -> Readiness {
    let told = |rows: &Vec<PgRow>| rows.first()?.try_get::<bool, _>("is_prepared").ok();
    match before {
        Readiness::Unknown if replies.iter().find_map(told) == Some(true) => Readiness::Prepared,
        Readiness::Unknown => Readiness::Missing,
        Readiness::Missing | Readiness::Prepared => Readiness::Prepared,
        Readiness::NotAsked => Readiness::NotAsked,
    }
}

fn lost() -> Fault {
    Fault::rejected("the handler did not hand the transaction back")
}
