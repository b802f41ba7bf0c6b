//! Ids in Redis and PostgreSQL, as few commands as it takes.

use std::collections::HashSet;

use compare_kit::Arguments;
use redis::aio::MultiplexedConnection;
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, PgPool};

use crate::source::Error;

/// Seconds until an id is forgotten: 8 days, as hapax does.
const RETENTION_S: u64 = 8 * 24 * 3_600;
/// Seconds until a claim is.
const CLAIM_S: u64 = 30;

pub enum Store {
    Redis { connection: MultiplexedConnection, prefix: String },
    Postgres { pool: PgPool, table: String },
}

impl Store {
    /// A store of the group's own: a prefix, or a table `{group}_id` beside a table `{group}_effect`.
    pub async fn open(arguments: &Arguments) -> Result<Self, Error> {
        let group = arguments.group.replace('-', "_");
        match arguments.store.as_str() {
            "redis" => {
                let client = redis::Client::open(arguments.store_url.as_str())?;
                let connection = client.get_multiplexed_async_connection().await?;
                Ok(Self::Redis { connection, prefix: group })
            }
            "postgres" => {
                let connections = if arguments.contender == "by-hand-tx" { arguments.concurrency as u32 } else { 2 };
                let pool = PgPoolOptions::new().max_connections(connections).connect(&arguments.store_url).await?;
                let sql = format!(
                    "CREATE TABLE {group}_id (id bytea PRIMARY KEY, done boolean NOT NULL, at timestamptz NOT NULL DEFAULT now()); \
                     CREATE TABLE {group}_effect (id bytea NOT NULL)"
                );
                sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool).await?;
                Ok(Self::Postgres { pool, table: group })
            }
            other => Err(format!("no consumer is written by hand for the store {other}").into()),
        }
    }

    /// Drops the tables.
    pub async fn drop_all(arguments: &Arguments) -> Result<(), Error> {
        if arguments.store == "postgres" {
            let group = arguments.group.replace('-', "_");
            let pool = PgPoolOptions::new().max_connections(1).connect(&arguments.store_url).await?;
            let sql = format!("DROP TABLE IF EXISTS {group}_id, {group}_effect");
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool).await?;
        }
        Ok(())
    }

    fn key(prefix: &str, id: &[u8]) -> Vec<u8> {
        [prefix.as_bytes(), b":", id].concat()
    }

    /// Which of these are new and ours now.
    pub async fn claim(&mut self, ids: &[&[u8]]) -> Result<Vec<bool>, Error> {
        match self {
            Self::Redis { connection, prefix } => {
                let mut pipe = redis::pipe();
                for id in ids {
                    pipe.cmd("SET").arg(Self::key(prefix, id)).arg("c").arg("NX").arg("EX").arg(CLAIM_S);
                }
                let answers: Vec<Option<String>> = pipe.query_async(connection).await?;
                Ok(answers.iter().map(Option::is_some).collect())
            }
            Self::Postgres { pool, table } => {
                let sql = format!(
                    "INSERT INTO {table}_id (id, done) SELECT unnest($1::bytea[]), false ON CONFLICT DO NOTHING RETURNING id"
                );
                let new: Vec<Vec<u8>> = sqlx::query_scalar(AssertSqlSafe(sql)).bind(ids).fetch_all(&*pool).await?;
                if new.len() == ids.len() {
                    return Ok(vec![true; ids.len()]);
                }
                let new: HashSet<_> = new.into_iter().collect();
                Ok(ids.iter().map(|id| new.contains(*id)).collect())
            }
        }
    }

    /// These are done.
    pub async fn record(&mut self, ids: &[&[u8]]) -> Result<(), Error> {
        if ids.is_empty() {
            return Ok(());
        }
        match self {
            Self::Redis { connection, prefix } => {
                let mut pipe = redis::pipe();
                for id in ids {
                    pipe.cmd("SET").arg(Self::key(prefix, id)).arg("d").arg("EX").arg(RETENTION_S).ignore();
                }
                pipe.query_async::<()>(connection).await?;
            }
            Self::Postgres { pool, table } => {
                let sql = format!("UPDATE {table}_id SET done = true WHERE id = ANY($1::bytea[])");
                sqlx::query(AssertSqlSafe(sql)).bind(ids).execute(&*pool).await?;
            }
        }
        Ok(())
    }

    /// One id alone: whether it is new. It stays, whatever becomes of the handler.
    pub async fn is_new(&mut self, id: &[u8]) -> Result<bool, Error> {
        match self {
            Self::Redis { connection, prefix } => {
                let mut set = redis::cmd("SET");
                set.arg(Self::key(prefix, id)).arg("d").arg("NX").arg("EX").arg(RETENTION_S);
                Ok(set.query_async::<Option<String>>(connection).await?.is_some())
            }
            Self::Postgres { pool, table } => {
                let sql = format!("INSERT INTO {table}_id (id, done) VALUES ($1, true) ON CONFLICT DO NOTHING");
                Ok(sqlx::query(AssertSqlSafe(sql)).bind(id).execute(&*pool).await?.rows_affected() == 1)
            }
        }
    }
}

/// The transaction of one message: its id, and one row as its effect. Answers whether it was new.
pub async fn in_transaction(pool: &PgPool, table: &str, id: &[u8]) -> Result<bool, Error> {
    let mut tx = pool.begin().await?;
    let insert = format!("INSERT INTO {table}_id (id, done) VALUES ($1, true) ON CONFLICT DO NOTHING");
    let is_new = sqlx::query(AssertSqlSafe(insert)).bind(id).execute(&mut *tx).await?.rows_affected() == 1;
    if is_new {
        let effect = format!("INSERT INTO {table}_effect (id) VALUES ($1)");
        sqlx::query(AssertSqlSafe(effect)).bind(id).execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(is_new)
}
