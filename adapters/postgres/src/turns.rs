//! Turns: how many handlers' transactions are open at once, and the connections that they take.
//!
//! The pool tests a connection when it hands it out and when it gets it back, which together is as much as a handler
//! asks of the server. So where the user wants it one serves several handlers in a row; but not for long, and only while
//! others need not wait for the pool.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hapax::ErrorKind;
use sqlx::pool::PoolConnection;
use sqlx::postgres::PgTransactionManager;
use sqlx::{PgConnection, Postgres};
use sqlx_core::transaction::TransactionManager;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use crate::error::Fault;
use crate::line::{ACQUIRE_MAX, Lines};
use crate::statements::Readiness;

/// How long another handler's transaction is waited for where as many are open as may be.
const TURN_MAX: Duration = Duration::from_secs(30);
/// Connections of the pool that handlers leave for claims, renewals and records.
const LEFT: u32 = 2;
/// The pool has a connection back after so long,
const KEPT_FOR_MAX: Duration = Duration::from_secs(10);
/// and where no handler wants it.
const IDLE_MAX: Duration = Duration::from_millis(100);

/// The turns of one store, for all its clones.
pub(crate) struct Turns {
    pub(crate) lines: Arc<Lines>,
    open: Arc<Semaphore>,
    kept: Mutex<Vec<Line>>,
    /// Whether a task gives back what no handler wants.
    is_tidied: AtomicBool,
    reuses: bool,
}

/// A connection between transactions.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) connection: PoolConnection<Postgres>,
    /// Of `finish.sql`.
    pub(crate) readiness: Readiness,
    taken: Instant,
    used: Instant,
    is_kept: bool,
}

impl Line {
    /// Whether it comes from another handler, and the pool has not looked at it since.
    pub(crate) fn is_kept(&self) -> bool {
        self.is_kept
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // From the innermost savepoint on, which alone would leave the transaction open. Sent with whatever comes next.
        while depth(&self.connection) > 0 {
            PgTransactionManager::start_rollback(&mut self.connection);
        }
    }
}

/// How deep sqlx believes the connection to be in transactions and savepoints.
pub(crate) fn depth(connection: &PgConnection) -> usize {
    PgTransactionManager::get_transaction_depth(connection)
}

impl Turns {
    pub(crate) fn new(lines: Arc<Lines>, reuses: bool) -> Self {
        let most = lines.pool().options().get_max_connections().saturating_sub(LEFT).max(1);
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self {
            lines,
            open: Arc::new(Semaphore::new(most)),
            kept: Mutex::default(),
            is_tidied: AtomicBool::new(false),
            reuses,
        }
    }

    /// Waits for a turn and a connection.
    pub(crate) async fn take(&self) -> Result<(Line, OwnedSemaphorePermit), Fault> {
        let turn = timeout(TURN_MAX, Arc::clone(&self.open).acquire_owned()).await;
        let turn = turn.map_err(|_| Fault::unavailable(format!("no other transaction ended within {TURN_MAX:?}")))?;
        let turn = turn.map_err(|_| Fault::new(ErrorKind::Internal, "the turns are closed"))?;
        let kept = self.kept().pop();
        if let Some(line) = kept {
            return Ok((line, turn));
        }
        let acquired = timeout(ACQUIRE_MAX, self.lines.pool().acquire()).await;
        let connection = acquired.map_err(|_| sqlx::Error::PoolTimedOut)??;
        let now = Instant::now();
        // What is asked for once is not worth preparing.
        let readiness = if self.keeps() { Readiness::Unknown } else { Readiness::NotAsked };
        Ok((Line { connection, readiness, taken: now, used: now, is_kept: false }, turn))
    }

    /// Gives back what is kept: one of them was dead, and the pool looks at the others.
    pub(crate) fn forget_kept(&self) {
        self.kept().clear();
    }

    /// Takes a connection back on which nothing is open or under way.
    pub(crate) fn give_back(self: &Arc<Self>, mut line: Line) {
        line.used = Instant::now();
        line.is_kept = true;
        let pool = self.lines.pool();
        let has_room = pool.num_idle() > 0 || pool.size() < pool.options().get_max_connections();
        let is_fresh = line.taken.elapsed() < KEPT_FOR_MAX;
        if !self.keeps() || !has_room || !is_fresh || pool.is_closed() {
            return;
        }
        self.kept().push(line);
        if !self.is_tidied.swap(true, Ordering::SeqCst) {
            self.lines.runtime().spawn(Arc::clone(self).tidy());
        }
    }

    /// Whether one connection serves several handlers. Behind a pooler, one that waits would keep a server from others.
    fn keeps(&self) -> bool {
        self.reuses && self.lines.prepares()
    }

    /// Gives back what no handler wants, until nothing is kept.
    async fn tidy(self: Arc<Self>) {
        loop {
            tokio::time::sleep(IDLE_MAX / 2).await;
            let mut kept = self.kept();
            kept.retain(|line| line.used.elapsed() < IDLE_MAX);
            if kept.is_empty() {
                self.is_tidied.store(false, Ordering::SeqCst);
                return;
            }
        }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Line>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turns {
    fn drop(&mut self) {
        // The pool takes them back in a task of its own.
        let _runtime = self.lines.runtime().enter();
        self.kept().clear();
    }
}

impl fmt::Debug for Turns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turns").field("open", &self.open).finish_non_exhaustive()
    }
}
