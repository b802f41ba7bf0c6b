//! The SQLite store of hapax: embedded, durable, transactional handlers.

mod admin;
mod batch;
mod error;
mod precheck;
mod rows;
mod schema;
mod statements;
mod store;
mod sweep;
mod tx;
mod writer;

pub use schema::SCHEMA_VERSION;
pub use sqlx;
pub use store::{BUSY_TIMEOUT, POOL_CONNECTIONS_MAX, SqliteStore, SqliteStoreBuilder, Synchronous};
pub use tx::{HAND_BACK_MAX, SqliteLent, SqliteTx};
