//! `SqliteStore`: settings, opening, and the contracts, which it hands to the writer and the lender.

use std::fmt;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use hapax::record::Moment;
use hapax::{
    Claim, ClaimRequest, ConsumerId, Durability, ErrorKind, Lease, Outcome, ProcessedStore, Recorded, Renewal, Result,
    StoreHealth, TransactionalStore,
};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Row, SqliteConnection, SqlitePool};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::error::{self, Fault};
use crate::sweep::Rolling;
use crate::tx::{Lender, SqliteLent, SqliteTx};
use crate::writer::{BUSY_SLICE, CALLS_MAX, Call, Patience, Reply, Writer};
use crate::{precheck, schema};

/// How long a lock of another process is waited for.
pub const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections of [`SqliteStore::pool`].
pub const POOL_CONNECTIONS_MAX: NonZeroU32 = NonZeroU32::new(4).expect("four is not zero");

/// Pages in the WAL (of 4 KiB by default) after which a commit moves them into the database.
const CHECKPOINT_PAGES: u32 = 10_000;

/// Page cache of the writer: 32 MiB, in SQLite's way of saying it.
const WRITER_CACHE: &str = "-32768";

/// The store's clock.
pub(crate) type Clock = Arc<dyn Fn() -> Moment + Send + Sync>;

/// When SQLite flushes to disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Synchronous {
    /// At every commit: what is acknowledged survives a crash of the machine. [`Durability::Durable`].
    #[default]
    Full,
    /// At checkpoints: the last commits may be lost with the machine, not with the process. [`Durability::Lossy`].
    Normal,
}

/// The settings of a [`SqliteStore`].
#[must_use = "a builder does nothing before connect()"]
pub struct SqliteStoreBuilder {
    path: PathBuf,
    busy_timeout: Duration,
    synchronous: Synchronous,
    pool_connections_max: NonZeroU32,
    clock: Clock,
}

impl SqliteStoreBuilder {
    /// How long a lock of another process is waited for before a call fails as unavailable; [`BUSY_TIMEOUT`].
    pub fn busy_timeout(self, busy_timeout: Duration) -> Self {
        Self { busy_timeout, ..self }
    }

    /// When SQLite flushes to disk; [`Synchronous::Full`].
    pub fn synchronous(self, synchronous: Synchronous) -> Self {
        Self { synchronous, ..self }
    }

    /// Connections of [`SqliteStore::pool`]; [`POOL_CONNECTIONS_MAX`].
    pub fn pool_connections_max(self, pool_connections_max: NonZeroU32) -> Self {
        Self { pool_connections_max, ..self }
    }

    /// Another clock than the machine's: for tests of leases and retention.
    #[doc(hidden)]
    pub fn clock(self, clock: impl Fn() -> Moment + Send + Sync + 'static) -> Self {
        Self { clock: Arc::new(clock), ..self }
    }

    /// Checks what is there, creates or updates hapax' tables, and starts the writer. Needs a tokio runtime, and the
    /// store belongs to it.
    ///
    /// # Errors
    /// [`ErrorKind::Incompatible`] for a file that is no SQLite database, is damaged, has a table of our name with
    /// another shape, or was written by a newer version; [`ErrorKind::Configuration`] for one that cannot be opened or
    /// written: all before anything is written. [`ErrorKind::Unavailable`] where another process keeps it locked.
    pub async fn connect(self) -> Result<SqliteStore> {
        self.connect_checked().await.map_err(|fault| fault.during("connect"))
    }

    async fn connect_checked(self) -> std::result::Result<SqliteStore, Fault> {
        let path = absolute(&self.path)?;
        precheck::examine(&path).await?;
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .busy_timeout(self.busy_timeout)
            .pragma("wal_autocheckpoint", CHECKPOINT_PAGES.to_string())
            .synchronous(match self.synchronous {
                Synchronous::Full => SqliteSynchronous::Full,
                Synchronous::Normal => SqliteSynchronous::Normal,
            });
        let patience = Patience::new(self.busy_timeout);
        // Own connections wait in slices, so that waiting can be given up and shared fairly.
        let own = options.clone().busy_timeout(self.busy_timeout.min(BUSY_SLICE)).row_buffer_size(1024);
        // SQLite keeps what a statement of many rows would undo: in memory, not in a file for each batch.
        let writing = own.clone().pragma("temp_store", "MEMORY").pragma("cache_size", WRITER_CACHE);
        let connection = prepare(&writing, patience).await.map_err(|fault| fault.at_open(&path))?;
        let pool = SqlitePoolOptions::new().max_connections(self.pool_connections_max.get()).connect_lazy_with(options);
        Ok(self.start(writing, own, pool, connection, patience))
    }

    fn start(
        self,
        writing: SqliteConnectOptions,
        lending: SqliteConnectOptions,
        pool: SqlitePool,
        connection: SqliteConnection,
        patience: Patience,
    ) -> SqliteStore {
        let lock = Arc::new(Semaphore::new(1));
        let sweep_fault = Arc::new(Mutex::new(None));
        let writer = Writer {
            options: writing,
            connection: Some(connection),
            lock: Arc::clone(&lock),
            patience,
            clock: Arc::clone(&self.clock),
            rolling: Rolling::new(),
            sweep_fault: Arc::clone(&sweep_fault),
        };
        let (calls, waiting) = mpsc::channel(CALLS_MAX);
        let writer = tokio::spawn(writer.run(waiting));
        SqliteStore(Arc::new(Inner {
            calls,
            writer: Mutex::new(Some(writer)),
            lender: Lender::new(lending, lock, patience),
            pool,
            clock: self.clock,
            durability: match self.synchronous {
                Synchronous::Full => Durability::Durable,
                Synchronous::Normal => Durability::Lossy,
            },
            sweep_fault,
        }))
    }
}

impl fmt::Debug for SqliteStoreBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteStoreBuilder")
            .field("path", &self.path)
            .field("busy_timeout", &self.busy_timeout)
            .field("synchronous", &self.synchronous)
            .field("pool_connections_max", &self.pool_connections_max)
            .finish_non_exhaustive()
    }
}

/// An absolute path, so that SQLite takes no part of it for a URI.
fn absolute(path: &Path) -> std::result::Result<PathBuf, Fault> {
    if path.as_os_str().is_empty() || path.as_os_str() == ":memory:" {
        let text =
            "a database in memory cannot be shared by the store's connections: give a file, or take hapax-memory";
        return Err(Fault::configuration(text));
    }
    if path.to_str().is_none() {
        return Err(Fault::configuration(format!("{} is not UTF-8, which SQLite asks for", path.display())));
    }
    std::path::absolute(path).map_err(|error| Fault::configuration(format!("{}: {error}", path.display())))
}

/// Opens the file for writing, switches it to WAL and brings our tables up to date.
async fn prepare(options: &SqliteConnectOptions, patience: Patience) -> std::result::Result<SqliteConnection, Fault> {
    let mut left = patience;
    loop {
        let fault = match prepare_once(options).await {
            Ok(connection) => return Ok(connection),
            Err(fault) => fault,
        };
        if !left.again(&fault).await {
            return Err(fault);
        }
    }
}

async fn prepare_once(options: &SqliteConnectOptions) -> std::result::Result<SqliteConnection, Fault> {
    let mut connection = options.connect().await?;
    // Again, now that a journal left behind is rolled back and before the first write: what the precheck could not see.
    let found = schema::inspect(&mut connection).await?;
    let mode: String = sqlx::query_scalar("PRAGMA journal_mode = WAL").fetch_one(&mut connection).await?;
    if !mode.eq_ignore_ascii_case("wal") {
        let text = format!("SQLite keeps journal mode {mode} here where hapax needs WAL: use a local file system");
        return Err(Fault::configuration(text));
    }
    if found == Some(schema::SCHEMA_VERSION) {
        return Ok(connection);
    }
    // Nobody else can write from here on, so what is checked now is what is changed.
    sqlx::query("BEGIN IMMEDIATE").execute(&mut connection).await?;
    schema::migrate(&mut connection).await?;
    sqlx::query("COMMIT").execute(&mut connection).await?;
    Ok(connection)
}

/// The processed-events store in one SQLite file. Cheap to clone; the last clone that is dropped ends its writer.
#[derive(Clone, Debug)]
pub struct SqliteStore(Arc<Inner>);

struct Inner {
    calls: mpsc::Sender<Call>,
    writer: Mutex<Option<JoinHandle<()>>>,
    lender: Lender,
    pool: SqlitePool,
    clock: Clock,
    durability: Durability,
    sweep_fault: Arc<Mutex<Option<Fault>>>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("durability", &self.durability).finish_non_exhaustive()
    }
}

impl SqliteStore {
    /// Opens or creates the store at `path` with the default settings.
    ///
    /// # Errors
    /// Those of [`SqliteStoreBuilder::connect`].
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::builder(path).connect().await
    }

    /// Settings for a store at `path`.
    pub fn builder(path: impl AsRef<Path>) -> SqliteStoreBuilder {
        SqliteStoreBuilder {
            path: path.as_ref().to_owned(),
            busy_timeout: BUSY_TIMEOUT,
            synchronous: Synchronous::default(),
            pool_connections_max: POOL_CONNECTIONS_MAX,
            clock: Arc::new(wall_clock),
        }
    }

    /// Connections to the same file for the user's own tables and reads. Writes through it wait for the writer and for
    /// transactional handlers as another process would.
    pub fn pool(&self) -> &SqlitePool {
        &self.0.pool
    }

    /// Finishes what was called, closes every connection, and leaves the file without a WAL if no other process has it
    /// open. Calls after it fail as unavailable. Not needed for durability.
    pub async fn close(&self) {
        // Fails only where the writer has ended already.
        let _ended = self.0.calls.send(Call::Close).await.is_err();
        let writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.0.lender.close().await;
        self.0.pool.close().await;
        if let Some(writer) = writer
            && let Err(error) = writer.await
        {
            tracing::warn!(%error, "the SQLite store's writer did not end cleanly");
        }
    }

    pub(crate) fn now(&self) -> Moment {
        (self.0.clock)()
    }

    /// Asks the writer and waits for its answer.
    pub(crate) async fn call<T>(&self, operation: &'static str, call: impl FnOnce(Reply<T>) -> Call) -> Result<T> {
        let closed = || Fault::new(ErrorKind::Unavailable, "the store is closed").during(operation);
        let (reply, answer) = oneshot::channel();
        self.0.calls.send(call(reply)).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }
}

fn wall_clock() -> Moment {
    Moment::default().after(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

#[async_trait]
impl ProcessedStore for SqliteStore {
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId> {
        let name = consumer.to_owned();
        self.call("open", |reply| Call::Open(name, retention, reply)).await
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        let batch = batch.to_vec();
        self.call("claim", |reply| Call::Claim(batch, lease, reply)).await
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        let leases = leases.to_vec();
        self.call("renew", |reply| Call::Renew(leases, lease, reply)).await
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let batch = batch.to_vec();
        self.call("record", |reply| Call::Record(batch, reply)).await
    }

    async fn probe(&self) -> Result<StoreHealth> {
        let known = "SELECT sqlite_version(), (SELECT value FROM hapax_meta WHERE name = 'schema')";
        let row = sqlx::query(known).fetch_one(&self.0.pool).await.map_err(|error| error::error("probe", error))?;
        let read = || -> std::result::Result<String, Fault> {
            schema::check_version(row.try_get(1)?)?;
            Ok(row.try_get(0)?)
        };
        let version = read().map_err(|fault| fault.during("probe"))?;
        let mut health = StoreHealth::new("sqlite", version, self.0.durability);
        health.transactions_max = Some(1);
        health.transactions_block_writes = true;
        let swept = self.0.sweep_fault.lock().unwrap_or_else(PoisonError::into_inner).clone();
        health.trouble = swept.map(|fault| fault.during("sweep").to_string().into());
        Ok(health)
    }
}

#[async_trait]
impl TransactionalStore for SqliteStore {
    type Tx = SqliteTx;
    type Lent = SqliteLent;

    async fn begin(&self) -> Result<(SqliteTx, SqliteLent)> {
        self.0.lender.begin().await.map_err(|fault| fault.during("begin"))
    }

    async fn record_in(&self, lent: &mut SqliteLent, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        lent.record(batch, &self.0.clock).await.map_err(|fault| fault.during("record"))
    }

    async fn commit(&self, lent: SqliteLent) -> Result<()> {
        lent.commit().await.map_err(|fault| fault.during("commit"))
    }
}
