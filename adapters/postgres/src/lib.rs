//! The PostgreSQL store of hapax, with transactional handlers, on a pool of yours.

mod admin;
mod error;
mod health;
mod line;
mod outcomes;
mod rows;
mod schema;
mod statements;
mod store;
mod sweep;
mod template;
mod tx;

pub use schema::SCHEMA_VERSION;
pub use sqlx;
pub use store::{LOCK_TIMEOUT, PostgresStore, PostgresStoreBuilder, SCHEMA, STATEMENT_TIMEOUT};
pub use sweep::SWEEP_EVERY;
pub use tx::{BEGIN_MAX, HAND_BACK_MAX, PgLent, PgTx};
