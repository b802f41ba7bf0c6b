//! The SQLite store of hapax: embedded, durable, one file, with transactional handlers.
//!
//! ```no_run
//! # async fn start() -> hapax::Result<()> {
//! use hapax_sqlite::{SqliteStore, sqlx};
//!
//! let store = SqliteStore::open("events.db").await?;
//! sqlx::query("CREATE TABLE IF NOT EXISTS invoices (order_id INTEGER NOT NULL)")
//!     .execute(store.pool())
//!     .await
//!     .expect("the user's own table in the same file");
//! # Ok(())
//! # }
//! ```
//!
//! # What each verb is in SQL
//!
//! | contract | SQL | commits |
//! |---|---|---|
//! | `open` | read `hapax_consumer`; only where it is new: insert, or update its retention | 0 or 1 |
//! | `claim` of new events | insert into `hapax_open` what neither table has | 1, shared by all calls that wait |
//! | `record` of processed ones | move them from `hapax_open` to `hapax_record`; a step of the sweep | shared |
//! | `renew`, any other `claim` or `record` | read the batch, core's state machine, write what changed | shared |
//! | `probe` | versions, read through the pool; tells a sweep that failed | 0 |
//! | `begin`, `record_in`, `commit` | `BEGIN IMMEDIATE`, the handler's statements, the record as above, `COMMIT` | 1 |
//! | `look_up`, `list` | reads through the pool, which block nobody | 0 |
//! | `sweep`, `forget` | find through the pool, delete in steps of at most 2,048 records | 1 a step |
//!
//! # What is on disk
//!
//! Four tables, `hapax_meta`, `hapax_consumer`, `hapax_open` and `hapax_record`, in `migrations/`: public API with the
//! version [`SCHEMA_VERSION`]. Events under way are in `hapax_open`, those that ended in `hapax_record`: an event writes
//! into the large table once, about 75 bytes. There is no index by time: every record pays for a walk of four rows along
//! the primary key, which removes what is expired (`sweep.rs` tells why). A record outlives its retention by up to a
//! quarter of it at a steady rate, and longer where nothing is recorded; `StoreAdmin::sweep` removes at once.
//!
//! The file may hold tables of the user's. It is switched to WAL mode, for good. `user_version`, `application_id` and
//! sqlx's own migrations table are left to the user. Foreign keys are enforced on hapax' connections.
//!
//! # Before anything is written
//!
//! Refused by a named error, with no byte written and no `-wal` or `-shm` created: what is no SQLite database or is
//! damaged, a table of our name with another shape, a newer schema, a file or folder that cannot be written
//! (`precheck.rs`). Files up to 64 MiB are checked whole, of larger ones the header, the schema and the small tables.
//! Where a WAL with content lies beside the file (in use, or left by a killed process), it is read too, for which
//! SQLite may create the `-shm` index beside it. A database is never created over another, nor over a WAL without one.
//! Damage met later ends the call as [`Incompatible`](hapax::ErrorKind::Incompatible).
//!
//! # Limits
//!
//! - One writer at a time, in all processes. A transactional handler keeps out claims, renewals and records of others
//!   while it runs: keep it short, and its timeout below the lease. In one process the two take turns; other processes
//!   wait up to [`BUSY_TIMEOUT`], then fail as [`Unavailable`](hapax::ErrorKind::Unavailable).
//! - A handler must not end its transaction with SQL texts: a `COMMIT` is turned into a rollback and the record refused.
//!   One that returns but keeps its transaction is refused after [`HAND_BACK_MAX`].
//! - A local file system: WAL does not work over a network. No database in memory.
//! - The clock is the machine's. One set back makes leases and retries last longer; fences grow all the same.
//! - The store belongs to the tokio runtime in which it was opened. Under tokio's paused clock, timeouts may pass while
//!   SQLite's thread is at work.
//! - With [`Synchronous::Normal`] a crash of the machine may lose the last commits, which `probe` says.

mod admin;
mod batch;
mod error;
mod hot;
mod precheck;
mod rows;
mod schema;
mod statements;
mod store;
mod sweep;
mod tx;
mod writer;
mod writes;

pub use schema::SCHEMA_VERSION;
pub use sqlx;
pub use store::{BUSY_TIMEOUT, POOL_CONNECTIONS_MAX, SqliteStore, SqliteStoreBuilder, Synchronous};
pub use tx::{HAND_BACK_MAX, SqliteLent, SqliteTx};
