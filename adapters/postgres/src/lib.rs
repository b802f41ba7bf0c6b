//! The PostgreSQL store of hapax, with transactional handlers, on a pool of yours.
//!
//! ```no_run
//! # async fn start() -> Result<(), Box<dyn std::error::Error>> {
//! use hapax_postgres::PostgresStore;
//! use hapax_postgres::sqlx::postgres::PgPoolOptions;
//!
//! let pool = PgPoolOptions::new().max_connections(20).connect("postgres://app@localhost/shop").await?;
//! let store = PostgresStore::builder(pool).migrate(true).connect().await?;
//! # drop(store);
//! # Ok(())
//! # }
//! ```
//!
//! # What each verb is in SQL
//!
//! | contract | SQL | round trips |
//! |---|---|---|
//! | `open` | advisory lock, insert or update `hapax_consumer` only where it is new | 1 |
//! | `claim` | `INSERT .. SELECT unnest(..) ORDER BY key ON CONFLICT DO UPDATE .. WHERE <free>`; what was not granted is read | 1, or 2 |
//! | `renew` | `UPDATE .. FROM unnest(..)`, in the order of the keys | 1 |
//! | `record` | the same; what has vanished is inserted anew | 1, or 2 |
//! | `begin`, `record_in`, `commit` | `BEGIN` and a mark, the handler's statements, the update of `record`, `COMMIT` | 1 each |
//! | `probe`, `look_up`, `list`, `forget` | one statement | 1 |
//! | `sweep` | steps: the next blocks of the table, under an advisory lock that is tried and not waited for | 1 a step |
//!
//! The rules of `hapax::record` are written in SQL here (`sql/claim.sql`, `sql/record.sql`, `sql/anew.sql`), since a batch
//! is one statement; the conformance kit compares them with generated histories. `line.rs` tells why a batch is a message
//! of the simple protocol, `template.rs` why no value can leave its place in it.
//!
//! # What is in the database
//!
//! Three tables, `hapax_meta`, `hapax_consumer` and `hapax_record`, in `migrations/`: public API with the version
//! [`SCHEMA_VERSION`]. They are created on request only ([`PostgresStoreBuilder::migrate`], [`PostgresStore::migrate`]);
//! after that SELECT, INSERT, UPDATE and DELETE on them are all the rights that are needed. Forgetting a record leaves a
//! row behind until it is swept, so that the fence goes on growing. The mark can be written as plain SQL by other clients:
//! `docs/postgres.md`.
//!
//! # Limits
//!
//! - PostgreSQL 14 or later, a database in UTF-8.
//! - A handler that runs `COMMIT` as SQL text commits what it wrote; it is found out, and nothing is recorded.
//! - A record outlives its retention by about an eighth: there is no index by time (`sweep.rs` tells why).
//! - The clock is the server's. One set back makes leases and retries last longer; fences grow all the same.
//! - The store belongs to the tokio runtime in which it was connected. It keeps up to two of the pool's connections
//!   while there is work.
//! - With `synchronous_commit = off` or `fsync = off` a crash may lose the last commits, and with replicas that are not
//!   waited for a failover may, which `probe` says.

mod admin;
mod error;
mod health;
mod hot;
mod line;
mod outcomes;
mod rows;
mod schema;
mod statements;
mod store;
mod sweep;
mod template;
mod turns;
mod tx;

pub use schema::SCHEMA_VERSION;
pub use sqlx;
pub use store::{LOCK_TIMEOUT, PostgresStore, PostgresStoreBuilder, SCHEMA, STATEMENT_TIMEOUT};
pub use sweep::SWEEP_EVERY;
pub use tx::{BEGIN_MAX, HAND_BACK_MAX, PgLent, PgTx};
