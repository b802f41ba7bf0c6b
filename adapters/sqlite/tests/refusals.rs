//! What is refused, by name, before a byte is written; and that nothing is ever created anew over it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

use fixture::{Folder, process, store};
use hapax::{Claim, ErrorKind, ProcessedStore, StoreAdmin};
use hapax_sqlite::sqlx::sqlite::SqliteConnectOptions;
use hapax_sqlite::sqlx::{self, AssertSqlSafe, ConnectOptions, Connection};
use hapax_sqlite::{SCHEMA_VERSION, SqliteStore};

/// Opens and expects a refusal that changes nothing: no byte, no time, no file beside it.
async fn refused(folder: &Folder, kind: ErrorKind, says: &[&str]) {
    let before = folder.contents();
    let error = SqliteStore::open(folder.file()).await.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    for word in says {
        assert!(error.to_string().contains(word), "{error:?} does not say {word:?}");
    }
    assert!(folder.contents() == before, "a refused file was changed: {error}");
}

async fn sql(path: &Path, sql: &str) {
    let options = SqliteConnectOptions::new().filename(path).create_if_missing(true);
    let mut connection = options.connect().await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

async fn ours(folder: &Folder) {
    let (store, _clock, consumer) = store(folder).await;
    process(&store, consumer, 0..2000).await;
    store.close().await;
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused() {
    for content in ["no database", &"no database ".repeat(1000)] {
        let folder = Folder::new();
        std::fs::write(folder.file(), content).unwrap();
        refused(&folder, ErrorKind::Incompatible, &["not an SQLite database"]).await;
    }
}

#[tokio::test]
async fn a_truncated_database_is_refused() {
    for bytes in [50, 4096, 5000, 40_960] {
        let folder = Folder::new();
        ours(&folder).await;
        let file = std::fs::OpenOptions::new().write(true).open(folder.file()).unwrap();
        file.set_len(bytes).unwrap();
        drop(file);
        refused(&folder, ErrorKind::Incompatible, &["events.db"]).await;
    }
}

#[tokio::test]
async fn a_damaged_page_is_refused() {
    let folder = Folder::new();
    ours(&folder).await;
    let length = folder.file().metadata().unwrap().len();
    for page in [1, length / 4096 / 2] {
        let mut file = std::fs::OpenOptions::new().write(true).open(folder.file()).unwrap();
        file.seek(SeekFrom::Start(page * 4096)).unwrap();
        file.write_all(&[0xa5; 4096]).unwrap();
        drop(file);
        refused(&folder, ErrorKind::Incompatible, &["events.db"]).await;
    }
}

#[tokio::test]
async fn a_table_of_our_name_with_another_shape_is_refused() {
    let meta =
        "CREATE TABLE hapax_meta (name TEXT NOT NULL PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;";
    let cases = [
        ("CREATE TABLE hapax_record (id INTEGER PRIMARY KEY)".to_owned(), ["hapax_meta is missing", "hapax_meta"]),
        ("CREATE TABLE Hapax_Meta (name TEXT, value TEXT)".to_owned(), ["hapax_meta", "column name"]),
        ("CREATE VIEW hapax_meta AS SELECT 1 AS name, 2 AS value".to_owned(), ["hapax_meta", "view"]),
        (meta.to_owned(), ["hapax_meta", "mark"]),
        (meta.replace("STRICT, ", ""), ["hapax_meta", "other constraints"]),
    ];
    for (create, says) in cases {
        let folder = Folder::new();
        sql(&folder.file(), &create).await;
        refused(&folder, ErrorKind::Incompatible, &says).await;
    }
    let changes = [
        ("ALTER TABLE hapax_record ADD COLUMN note TEXT", ["hapax_record", "note"]),
        ("ALTER TABLE hapax_open RENAME COLUMN token TO tokens", ["hapax_open", "no column token"]),
        ("DROP TABLE hapax_consumer", ["hapax_consumer", "missing"]),
        ("DELETE FROM hapax_meta WHERE name = 'schema'", ["hapax_meta", "no schema version"]),
    ];
    for (change, says) in changes {
        let folder = Folder::new();
        ours(&folder).await;
        sql(&folder.file(), change).await;
        refused(&folder, ErrorKind::Incompatible, &says).await;
    }
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let folder = Folder::new();
    ours(&folder).await;
    let newer = SCHEMA_VERSION + 1;
    sql(&folder.file(), &format!("UPDATE hapax_meta SET value = {newer} WHERE name = 'schema'")).await;
    refused(&folder, ErrorKind::Incompatible, &["newer hapax", "upgrade"]).await;
}

/// An upgrade by another process while this one runs: it stops instead of writing what it does not understand.
#[tokio::test]
async fn a_schema_that_becomes_newer_stops_the_store() {
    let folder = Folder::new();
    let (store, _clock, consumer) = store(&folder).await;
    sqlx::query("UPDATE hapax_meta SET value = value + 1 WHERE name = 'schema'").execute(store.pool()).await.unwrap();
    let refused = store.claim(&[fixture::request(consumer, 1, 1)], fixture::LEASE).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Incompatible, "{refused}");
    assert_eq!(store.probe().await.unwrap_err().kind(), ErrorKind::Incompatible);
}

/// What a killed process left in the WAL counts: here a newer schema. Database and WAL stay as they are.
#[tokio::test]
async fn what_stands_in_a_wal_only_is_refused_too() {
    let folder = Folder::new();
    let (store, _clock, _) = store(&folder).await;
    sqlx::query("UPDATE hapax_meta SET value = 99 WHERE name = 'schema'").execute(store.pool()).await.unwrap();
    let left = Folder::new();
    for name in ["events.db", "events.db-wal"] {
        std::fs::copy(folder.path().join(name), left.path().join(name)).unwrap();
    }
    let before = left.contents();
    let error = SqliteStore::open(left.file()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    let after: Vec<_> = left.contents().into_iter().filter(|(path, ..)| !path.ends_with("events.db-shm")).collect();
    assert!(after == before, "the database or its WAL was changed");
}

#[tokio::test]
async fn a_wal_without_its_database_is_refused() {
    for empty in [true, false] {
        let folder = Folder::new();
        let (store, _clock, consumer) = store(&folder).await;
        process(&store, consumer, 0..10).await;
        let left = Folder::new();
        std::fs::copy(folder.path().join("events.db-wal"), left.path().join("events.db-wal")).unwrap();
        if empty {
            std::fs::write(left.file(), "").unwrap();
        }
        refused(&left, ErrorKind::Incompatible, &["events.db-wal"]).await;
    }
}

#[tokio::test]
async fn a_path_where_no_file_can_be_is_refused() {
    let folder = Folder::new();
    for path in [folder.path().join("missing/events.db"), folder.path().to_owned(), ":memory:".into(), "".into()] {
        let error = SqliteStore::open(&path).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    }
    assert!(folder.contents().is_empty());
}

/// An attribute that also root obeys; where it cannot be set, the permissions of an ordinary user.
#[tokio::test]
async fn a_file_that_cannot_be_written_is_refused() {
    for wal in [false, true] {
        let folder = Folder::new();
        if wal {
            ours(&folder).await;
        } else {
            sql(&folder.file(), "CREATE TABLE notes (text TEXT)").await;
        }
        let file = folder.file();
        let locked = Locked::lock(&file);
        refused(&folder, ErrorKind::Configuration, &["cannot be written", "events.db"]).await;
        drop(locked);
        SqliteStore::open(folder.file()).await.unwrap();
    }
}

/// A folder where no -wal can be created: a bind mount would say the same.
#[tokio::test]
async fn a_folder_that_cannot_be_written_is_refused() {
    for existing in [false, true] {
        let folder = Folder::new();
        if existing {
            sql(&folder.file(), "CREATE TABLE notes (text TEXT)").await;
        }
        let _locked = Locked::lock(folder.path());
        refused(&folder, ErrorKind::Configuration, &["folder", "events.db"]).await;
    }
}

/// Makes a file or folder immutable, or read-only where that takes rights that the test lacks.
struct Locked<'a> {
    path: &'a Path,
    immutable: bool,
}

impl<'a> Locked<'a> {
    fn lock(path: &'a Path) -> Self {
        let immutable = Command::new("chattr").arg("+i").arg(path).status().is_ok_and(|status| status.success());
        if !immutable {
            let mut permissions = path.metadata().unwrap().permissions();
            permissions.set_readonly(true);
            std::fs::set_permissions(path, permissions).unwrap();
        }
        let probe = if path.is_dir() { path.join("probe") } else { path.to_owned() };
        let opened = std::fs::OpenOptions::new().append(true).create(path.is_dir()).open(probe);
        assert!(opened.is_err(), "neither chattr +i nor permissions make a file read-only here (root without chattr?)");
        Self { path, immutable }
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if self.immutable {
            let unlocked = Command::new("chattr").arg("-i").arg(self.path).status();
            assert!(unlocked.is_ok_and(|status| status.success()), "chattr -i failed");
            return;
        }
        let mut permissions = self.path.metadata().unwrap().permissions();
        #[allow(clippy::permissions_set_readonly_false, reason = "a folder of the test's own, about to be removed")]
        permissions.set_readonly(false);
        std::fs::set_permissions(self.path, permissions).unwrap();
    }
}

#[tokio::test]
async fn a_database_with_tables_of_the_users_is_welcome() {
    let folder = Folder::new();
    sql(
        &folder.file(),
        "PRAGMA user_version = 7; CREATE TABLE notes (text TEXT); INSERT INTO notes VALUES ('mine'); \
         CREATE TABLE hapax_notes (text TEXT); CREATE TABLE _sqlx_migrations (version BIGINT PRIMARY KEY)",
    )
    .await;
    let (store, _clock, consumer) = store(&folder).await;
    process(&store, consumer, 0..3).await;
    store.close().await;
    let (store, ..) = fixture::store(&folder).await;
    let note: String = sqlx::query_scalar("SELECT text FROM notes").fetch_one(store.pool()).await.unwrap();
    let version: i64 = sqlx::query_scalar("PRAGMA user_version").fetch_one(store.pool()).await.unwrap();
    assert_eq!((note.as_str(), version), ("mine", 7));
}

#[tokio::test]
async fn an_empty_file_becomes_a_store() {
    let folder = Folder::new();
    std::fs::write(folder.file(), "").unwrap();
    let (store, _clock, consumer) = store(&folder).await;
    assert!(matches!(fixture::claim(&store, consumer, 1, 1).await, Claim::Granted(..)));
}

/// Damage that appears while the store runs ends the call and creates nothing anew.
#[tokio::test]
async fn damage_in_mid_life_fails_closed() {
    let folder = Folder::new();
    ours(&folder).await;
    let (store, _clock, consumer) = store(&folder).await;
    let length = folder.file().metadata().unwrap().len();
    let mut file = std::fs::OpenOptions::new().write(true).open(folder.file()).unwrap();
    for page in 1..length / 4096 {
        file.seek(SeekFrom::Start(page * 4096)).unwrap();
        file.write_all(&[0xa5; 4096]).unwrap();
    }
    let batch: Vec<_> = (0..500).map(|n| fixture::request(consumer, n, 1)).collect();
    let error = store.claim(&batch, fixture::LEASE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    assert!(store.sweep(10).await.is_err());
    assert_eq!(folder.file().metadata().unwrap().len(), length);
}

#[tokio::test]
async fn a_table_dropped_in_mid_life_is_told() {
    let folder = Folder::new();
    let (store, _clock, consumer) = store(&folder).await;
    sqlx::query("DROP TABLE hapax_record").execute(store.pool()).await.unwrap();
    let error = store.claim(&[fixture::request(consumer, 1, 1)], fixture::LEASE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
}
