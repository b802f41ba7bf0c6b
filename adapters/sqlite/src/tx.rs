//! Transactions of handlers: lent out by value, handed back on drop, never left open.
//!
//! One handler at a time has the write lock of the file. What it does on the connection is watched: a `COMMIT` of its
//! own is turned into a rollback, and a transaction that ended early (by the handler, or by SQLite, as on a full disk)
//! is not recorded in, so that effects and mark can only commit together.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hapax::{ErrorKind, Lease, Outcome, Recorded};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use sqlx::{Connection, Sqlite, SqliteConnection, SqlitePool, Transaction};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::batch::Batch;
use crate::error::Fault;
use crate::rows::Within;
use crate::store::Clock;
use crate::writer::Patience;

/// How long a handler that has returned may still keep its transaction (in a task that it started).
pub const HAND_BACK_MAX: Duration = Duration::from_secs(5);

/// What a handler gets: derefs to sqlx's connection, inside the transaction in which the event is recorded.
///
/// It goes back to hapax when it is dropped, at the latest at the handler's end. Do not commit or roll back with SQL
/// texts; for a part that may fail take a [`savepoint`](Self::savepoint).
///
/// ```
/// use hapax_sqlite::{SqliteTx, sqlx};
///
/// async fn invoice(mut tx: SqliteTx, order: i64) -> Result<(), sqlx::Error> {
///     sqlx::query("INSERT INTO invoices (order_id) VALUES (?)").bind(order).execute(&mut *tx).await?;
///     let mut part = tx.savepoint().await?;
///     sqlx::query("INSERT INTO hints (order_id) VALUES (?)").bind(order).execute(&mut *part).await?;
///     part.rollback().await
/// }
/// ```
#[derive(Debug)]
pub struct SqliteTx {
    held: Option<Held>,
    home: Option<oneshot::Sender<Held>>,
}

impl SqliteTx {
    /// A savepoint: rolled back on drop unless it is committed, which keeps it as part of this transaction.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn savepoint(&mut self) -> Result<Transaction<'_, Sqlite>, sqlx::Error> {
        (**self).begin().await
    }

    /// The same as [`savepoint`](Self::savepoint), by the name that sqlx uses for nested transactions.
    ///
    /// # Errors
    /// Those of SQLite.
    pub async fn transaction(&mut self) -> Result<Transaction<'_, Sqlite>, sqlx::Error> {
        self.savepoint().await
    }
}

impl Deref for SqliteTx {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.held.as_ref().expect("held until it is dropped").transaction
    }
}

impl DerefMut for SqliteTx {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.held.as_mut().expect("held until it is dropped").transaction
    }
}

impl Drop for SqliteTx {
    fn drop(&mut self) {
        if let (Some(held), Some(home)) = (self.held.take(), self.home.take()) {
            // Where nobody waits for it any more it is dropped here, which rolls back.
            drop(home.send(held));
        }
    }
}

/// Where a transaction comes back. Dropping it rolls back: at once, or as soon as the handler lets go.
#[derive(Debug)]
pub struct SqliteLent {
    back: Option<oneshot::Receiver<Held>>,
    held: Option<Held>,
}

/// An open transaction and the store's write lock, in the order in which they are given back.
#[derive(Debug)]
struct Held {
    transaction: Transaction<'static, Sqlite>,
    watch: Arc<Watch>,
    _permit: OwnedSemaphorePermit,
    _turn: OwnedSemaphorePermit,
}

/// What happened on one connection behind hapax' back.
#[derive(Debug, Default)]
struct Watch {
    may_commit: AtomicBool,
    refused_commit: AtomicBool,
    rolled_back: AtomicBool,
}

impl Watch {
    fn reset(&self) {
        for flag in [&self.may_commit, &self.refused_commit, &self.rolled_back] {
            flag.store(false, Ordering::SeqCst);
        }
    }

    fn check(&self) -> Result<(), Fault> {
        if self.refused_commit.load(Ordering::SeqCst) {
            let text = "the handler ran COMMIT in hapax' transaction; it was rolled back: leave out COMMIT, or take a \
                savepoint";
            return Err(Fault::new(ErrorKind::Rejected, text));
        }
        if self.rolled_back.load(Ordering::SeqCst) {
            let text = "the handler's transaction was rolled back before its end: by a ROLLBACK of its own, or by \
                SQLite after an error that the handler ignored";
            return Err(Fault::new(ErrorKind::Rejected, text));
        }
        Ok(())
    }
}

/// Lends transactions, one after the other.
#[derive(Debug)]
pub(crate) struct Lender {
    pool: SqlitePool,
    /// The watch of the pool's only connection.
    watch: Arc<Mutex<Arc<Watch>>>,
    /// Handlers queue here, so that at most one of them stands before the writer.
    turn: Arc<Semaphore>,
    lock: Arc<Semaphore>,
    patience: Patience,
}

impl Lender {
    pub(crate) fn new(options: SqliteConnectOptions, lock: Arc<Semaphore>, patience: Patience) -> Self {
        let watch = Arc::new(Mutex::new(Arc::new(Watch::default())));
        let current = Arc::clone(&watch);
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .test_before_acquire(false)
            .max_lifetime(None)
            .idle_timeout(None)
            .after_connect(move |connection, _| {
                let watch = Arc::new(Watch::default());
                *current.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&watch);
                Box::pin(watched(connection, watch))
            })
            // After a commit there is nothing to wait for, else the rollback; a connection that is still inside a
            // transaction then is closed, which ends it.
            .after_release(|connection, _| {
                Box::pin(async move {
                    if connection.is_in_transaction() {
                        connection.ping().await?;
                    }
                    Ok(!connection.is_in_transaction())
                })
            })
            .connect_lazy_with(options);
        Self { pool, watch, turn: Arc::new(Semaphore::new(1)), lock, patience }
    }

    pub(crate) async fn begin(&self) -> Result<(SqliteTx, SqliteLent), Fault> {
        let closed = |_| Fault::new(ErrorKind::Unavailable, "the store is closed");
        let turn = Arc::clone(&self.turn).acquire_owned().await.map_err(closed)?;
        let permit = Arc::clone(&self.lock).acquire_owned().await.map_err(closed)?;
        let mut patience = self.patience;
        let transaction = loop {
            let fault = match self.pool.begin_with("BEGIN IMMEDIATE").await {
                Ok(transaction) => break transaction,
                Err(error) => Fault::from(error),
            };
            if !patience.again(&fault).await {
                return Err(fault);
            }
        };
        let watch = Arc::clone(&self.watch.lock().unwrap_or_else(PoisonError::into_inner));
        watch.reset();
        let (home, back) = oneshot::channel();
        let held = Held { transaction, watch, _permit: permit, _turn: turn };
        Ok((SqliteTx { held: Some(held), home: Some(home) }, SqliteLent { back: Some(back), held: None }))
    }

    pub(crate) async fn close(&self) {
        self.turn.close();
        self.pool.close().await;
    }
}

async fn watched(connection: &mut SqliteConnection, watch: Arc<Watch>) -> Result<(), sqlx::Error> {
    let rolled_back = Arc::clone(&watch);
    let mut handle = connection.lock_handle().await?;
    handle.set_commit_hook(move || {
        let may = watch.may_commit.load(Ordering::SeqCst);
        watch.refused_commit.fetch_or(!may, Ordering::SeqCst);
        may
    });
    handle.set_rollback_hook(move || rolled_back.rolled_back.store(true, Ordering::SeqCst));
    Ok(())
}

impl SqliteLent {
    async fn held(&mut self) -> Result<&mut Held, Fault> {
        if let Some(back) = &mut self.back {
            let back = tokio::time::timeout(HAND_BACK_MAX, back).await;
            let held = back.map_err(|_| {
                let text = "the handler has returned but keeps its transaction, perhaps in a task that it started: \
                    it must drop the transaction before it returns";
                Fault::new(ErrorKind::Rejected, text)
            })?;
            self.back = None;
            self.held = held.ok();
        }
        let lost = || Fault::new(ErrorKind::Rejected, "the handler did not hand the transaction back");
        self.held.as_mut().ok_or_else(lost)
    }

    pub(crate) async fn record(
        &mut self,
        outcomes: &[(Lease, Outcome)],
        clock: &Clock,
    ) -> Result<Vec<Recorded>, Fault> {
        let held = self.held().await?;
        held.watch.check()?;
        let mut batch = Batch::default();
        outcomes.iter().for_each(|(lease, _)| batch.want((lease.consumer, lease.key)));
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let frame = batch.load(&mut held.transaction, Within::Transaction).await?;
        let answers = batch.record(outcomes, clock(), frame)?;
        batch.save(&mut held.transaction, false).await?;
        Ok(answers)
    }

    pub(crate) async fn commit(mut self) -> Result<(), Fault> {
        self.held().await?.watch.check()?;
        let lost = || Fault::new(ErrorKind::Rejected, "the handler did not hand the transaction back");
        let Held { transaction, watch, _permit, _turn } = self.held.take().ok_or_else(lost)?;
        watch.may_commit.store(true, Ordering::SeqCst);
        let done = transaction.commit().await;
        watch.may_commit.store(false, Ordering::SeqCst);
        done.map_err(|error| Fault::from(error).at_commit())
    }
}
