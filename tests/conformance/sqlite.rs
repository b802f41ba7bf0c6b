//! The SQLite store passes its suites, on a file of its own for each case, with two handles that know nothing of each
//! other. Its clock is the machine's plus what the fixture lets pass, so that no case waits for a lease.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use hapax::record::Moment;
use hapax::{ProcessedStore, StoreAdmin};
use hapax_sqlite::{SqliteStore, SqliteTx, Synchronous, sqlx};
use hapax_testkit::conformance::{Clock, StoreFixture, TransactionalFixture};

static FILES: AtomicU64 = AtomicU64::new(0);

struct SqliteRecords {
    path: PathBuf,
    passed_us: Arc<AtomicU64>,
    store: SqliteStore,
}

impl SqliteRecords {
    async fn fresh() -> Self {
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        let name = format!("hapax-conformance-{}-{number}.db", std::process::id());
        let path = std::env::temp_dir().join(name);
        let passed_us = Arc::default();
        let store = connect(&path, &passed_us).await;
        sqlx::query("CREATE TABLE effects (what TEXT NOT NULL)").execute(store.pool()).await.expect("a table");
        Self { path, passed_us, store }
    }
}

async fn connect(path: &PathBuf, passed_us: &Arc<AtomicU64>) -> SqliteStore {
    let passed_us = Arc::clone(passed_us);
    let clock = move || {
        let machine = SystemTime::now().duration_since(UNIX_EPOCH).expect("the machine's clock is past 1970");
        Moment(0).after(machine).after(Duration::from_micros(passed_us.load(Ordering::Relaxed)))
    };
    // What survives a crash of the machine is not what these cases are about.
    let builder = SqliteStore::builder(path).synchronous(Synchronous::Normal).clock(clock);
    builder.connect().await.expect("the store connects")
}

impl Drop for SqliteRecords {
    fn drop(&mut self) {
        for ending in ["", "-wal", "-shm"] {
            let mut file = self.path.clone().into_os_string();
            file.push(ending);
            // Not there, or still open: the directory is the system's to tidy.
            let _ = std::fs::remove_file(file);
        }
    }
}

#[async_trait]
impl StoreFixture for SqliteRecords {
    const CLOCK: Clock = Clock::Real;
    const UNIT: Duration = Duration::from_secs(60);

    async fn store(&self) -> Arc<dyn ProcessedStore> {
        Arc::new(self.store.clone())
    }

    async fn again(&self) -> Arc<dyn ProcessedStore> {
        Arc::new(connect(&self.path, &self.passed_us).await)
    }

    async fn admin(&self) -> Arc<dyn StoreAdmin> {
        Arc::new(self.store.clone())
    }

    async fn pass(&self, how_long: Duration) {
        let micros = u64::try_from(how_long.as_micros()).expect("no case lets so much time pass");
        self.passed_us.fetch_add(micros, Ordering::Relaxed);
    }
}

#[async_trait]
impl TransactionalFixture for SqliteRecords {
    type Store = SqliteStore;

    async fn transactional(&self) -> SqliteStore {
        self.store.clone()
    }

    async fn write(&self, tx: &mut SqliteTx, row: &str) {
        let insert = sqlx::query("INSERT INTO effects VALUES (?)").bind(row);
        insert.execute(&mut **tx).await.expect("the handler writes");
    }

    async fn rows(&self) -> Vec<String> {
        let rows = sqlx::query_scalar("SELECT what FROM effects ORDER BY what");
        rows.fetch_all(self.store.pool()).await.expect("others read")
    }
}

hapax_testkit::store_conformance!(records, SqliteRecords::fresh().await);
hapax_testkit::transactional_conformance!(transactions, SqliteRecords::fresh().await);
