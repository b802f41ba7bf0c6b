//! What the server, as configured, can promise.

use hapax::{Durability, StoreHealth};
use sqlx::Row;

use crate::error::Fault;
use crate::schema::{self, read_only};
use crate::store::PostgresStore;

pub(crate) async fn probe(store: &PostgresStore) -> Result<StoreHealth, Fault> {
    let place = store.schema().quoted();
    let limits = store.statements().limits();
    let about = format!(
        "{limits} SELECT current_setting('server_version'), \
         current_setting('fsync')::boolean AND current_setting('full_page_writes')::boolean, \
         current_setting('synchronous_commit'), current_setting('synchronous_standby_names') = '', \
         pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean, \
         EXISTS (SELECT FROM pg_stat_replication), \
         (SELECT value FROM {place}.hapax_meta WHERE name = 'schema'), \
         (SELECT value FROM {place}.hapax_meta WHERE name = 'fence_floor') \
             - (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, \
         (SELECT reltuples::bigint FROM pg_catalog.pg_class WHERE oid = '{place}.hapax_record'::regclass)"
    );
    let replies = store.lines().ask(about).await?;
    let row = replies.last().and_then(|rows| rows.first());
    let row = row.ok_or_else(|| Fault::unavailable("the server's answer is cut short"))?;
    if row.try_get(4)? {
        return Err(read_only());
    }
    schema::check_version(row.try_get(6)?)?;
    let (flushes, commit, no_standby): (bool, &str, bool) = (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
    let durability = if flushes && commit != "off" { Durability::Durable } else { Durability::Lossy };
    let mut health = StoreHealth::new("postgres", row.try_get::<&str, _>(0)?, durability);
    // Replicas are there, and a commit does not wait for them.
    health.loses_on_failover = row.try_get(5)? && (no_standby || matches!(commit, "off" | "local"));
    health.claims_at_commit = true;
    health.transactions_max = Some(store.pool().options().get_max_connections() as usize);
    health.records = row.try_get::<Option<i64>, _>(8)?.and_then(|records| u64::try_from(records).ok());
    let behind: Option<i64> = row.try_get(7)?;
    health.trouble = match (store.sweep_fault(), behind) {
        (Some(fault), _) => Some(format!("the sweep failed: {}", fault.during("sweep")).into()),
        (None, Some(micros)) if micros > 0 => Some(
            format!(
                "the server's clock is {} s behind what it was: leases and retries last longer",
                micros / 1_000_000
            )
            .into(),
        ),
        _ => None,
    };
    Ok(health)
}
