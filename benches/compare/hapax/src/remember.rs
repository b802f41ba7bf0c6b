//! Fills a store with processed events that no topic has. One is processed through the store's own contract. Where a server
//! or a file keeps them, the others are copies of it under keys of their own, which takes seconds where the contract takes
//! minutes; and what grew by that has come to rest when this returns.

use std::time::{Duration, Instant};

use compare_kit::Arguments;
use hapax::{BoxError, Claim, ClaimRequest, ConsumerId, EventKey, Fingerprint, Outcome, ProcessedStore, Settings};
use redis::aio::MultiplexedConnection;
use sqlx::AssertSqlSafe;
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions, SqliteSynchronous};

use crate::effects;

/// Events of one call.
const BATCH: u64 = 1_024;

pub async fn fill(arguments: &Arguments, store: &dyn ProcessedStore) -> Result<(), BoxError> {
    let Arguments { remember: events, remember_from: from, .. } = *arguments;
    let consumer = store.open("compared", Settings::RETENTION).await?;
    let copies = if arguments.store == "memory" { 0 } else { events - 1 };
    for first in (from..from + events - copies).step_by(BATCH as usize) {
        process(store, consumer, first..(first + BATCH).min(from + events - copies)).await?;
    }
    if copies == 0 {
        return Ok(());
    }
    let (first, from) = (key(from), from + 1);
    match arguments.store.as_str() {
        "redis" => copy_in_redis(arguments, consumer, first, from..from + copies).await,
        "postgres" => copy_in_postgres(arguments, first, copies).await,
        "sqlite" => copy_in_sqlite(arguments, first, copies).await,
        other => Err(format!("nobody knows how to copy records in {other}").into()),
    }
}

fn key(number: u64) -> EventKey {
    EventKey::of("compared", "/remembered", &number.to_string())
}

async fn process(
    store: &dyn ProcessedStore,
    consumer: ConsumerId,
    numbers: std::ops::Range<u64>,
) -> Result<(), BoxError> {
    let request = |number: u64| ClaimRequest {
        consumer,
        key: key(number),
        fingerprint: Fingerprint::ANY,
        token: u128::from(number),
        reopen: None,
    };
    let claims = store.claim(&numbers.map(request).collect::<Vec<_>>(), Settings::LEASE).await?;
    let granted = claims.into_iter().filter_map(|claim| match claim {
        Claim::Granted(lease, _) => Some((lease, Outcome::Processed)),
        _ => None,
    });
    store.record(&granted.collect::<Vec<_>>()).await?;
    Ok(())
}

/// Copies the record KEYS\[1\] under the numbers from ARGV\[1\] to ARGV\[2\].
const COPY: &str = "local value, ttl = redis.call('GET', KEYS[1]), redis.call('PTTL', KEYS[1])
local names = string.sub(KEYS[1], 1, -17)
for number = ARGV[1], ARGV[2] do
  redis.call('SET', names .. struct.pack('>I8I8', 0, number), value, 'PX', ttl)
end";
/// Looks at each of them once.
const LOOK: &str = "local names = string.sub(KEYS[1], 1, -17)
for number = ARGV[1], ARGV[2] do
  redis.call('EXISTS', names .. struct.pack('>I8I8', 0, number))
end";
/// Makes tables grow that should have grown while the log was written anew.
const TOUCH: &str = "redis.call('SET', KEYS[1] .. 'touched', '', 'PX', 60000) redis.call('DEL', KEYS[1] .. 'touched')";

async fn copy_in_redis(
    arguments: &Arguments,
    consumer: ConsumerId,
    first: EventKey,
    numbers: std::ops::Range<u64>,
) -> Result<(), BoxError> {
    // As the adapter names records: prefix and partition, consumer, event.
    let record = [format!("{{{}:0}}", arguments.group).as_bytes(), &consumer.0.to_be_bytes(), &first.0].concat();
    let unhurried = redis::AsyncConnectionConfig::new().set_response_timeout(None);
    let client = redis::Client::open(arguments.store_url.as_str())?;
    let mut connection = client.get_multiplexed_async_connection_with_config(&unhurried).await?;
    each(&mut connection, COPY, &record, numbers.clone()).await?;
    log_is_written(&mut connection).await?;
    each(&mut connection, TOUCH, &record, 0..1).await?;
    // A growing table moves a bucket with every look into it, and no table has more buckets than it has records.
    each(&mut connection, LOOK, &record, 1..numbers.end).await
}

async fn each(
    connection: &mut MultiplexedConnection,
    script: &str,
    record: &[u8],
    numbers: std::ops::Range<u64>,
) -> Result<(), BoxError> {
    const AT_ONCE: usize = 20_000;
    let script = redis::Script::new(script);
    for first in numbers.clone().step_by(AT_ONCE) {
        let last = (first + AT_ONCE as u64).min(numbers.end) - 1;
        script.key(record).arg(first).arg(last).invoke_async::<()>(connection).await?;
    }
    Ok(())
}

/// Tables do not grow while a child of the server writes its log anew, as it does when that has doubled; and who writes
/// waits while what was written is brought to the disk.
async fn log_is_written(connection: &mut MultiplexedConnection) -> Result<(), BoxError> {
    const PATIENCE: Duration = Duration::from_secs(180);
    const QUIET: Duration = Duration::from_secs(2);
    let begun = Instant::now();
    let mut since = begun;
    while since.elapsed() < QUIET {
        let told: String = redis::cmd("INFO").arg("persistence").query_async(connection).await?;
        let busy = ["aof_rewrite_in_progress:1", "aof_rewrite_scheduled:1", "rdb_bgsave_in_progress:1"];
        if busy.iter().any(|busy| told.contains(busy)) || fsync_is_pending(&told) {
            since = Instant::now();
        }
        if begun.elapsed() > PATIENCE {
            return Err("Redis still writes its log anew".into());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

fn fsync_is_pending(told: &str) -> bool {
    told.lines().any(|line| line.strip_prefix("aof_pending_bio_fsync:").is_some_and(|pending| pending.trim() != "0"))
}

async fn copy_in_postgres(arguments: &Arguments, first: EventKey, copies: u64) -> Result<(), BoxError> {
    let pool = PgPoolOptions::new().max_connections(2).connect(&arguments.store_url).await?;
    let table = format!("{}.hapax_record", effects::schema(arguments));
    let sql = format!(
        "INSERT INTO {table} (time, fence, consumer, attempt, crashes, state, key, fingerprint) \
         SELECT time, fence, consumer, attempt, crashes, state, gen_random_uuid(), fingerprint \
         FROM {table}, generate_series(1, $1) WHERE key = $2::text::uuid"
    );
    let half =
        |copies: u64| sqlx::query(AssertSqlSafe(sql.clone())).bind(copies as i64).bind(first.to_hex()).execute(&pool);
    let (one, other) = tokio::try_join!(half(copies / 2), half(copies - copies / 2))?;
    if one.rows_affected() + other.rows_affected() != copies {
        return Err("the record to copy is not there".into());
    }
    sqlx::raw_sql(AssertSqlSafe(format!("VACUUM (ANALYZE) {table}"))).execute(&pool).await?;
    // Not everybody may ask for it; then it comes by itself, a little later.
    let _ = sqlx::raw_sql("CHECKPOINT").execute(&pool).await;
    Ok(())
}

async fn copy_in_sqlite(arguments: &Arguments, first: EventKey, copies: u64) -> Result<(), BoxError> {
    // The whole table fits into this cache: every page is written once.
    let options = SqliteConnectOptions::new().filename(effects::sqlite_file(arguments));
    let options = options.synchronous(SqliteSynchronous::Normal).pragma("cache_size", "-2000000");
    let pool = SqlitePoolOptions::new().max_connections(1).connect_with(options).await?;
    let sql = "WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < ?1) \
               INSERT INTO hapax_record (consumer, key, state, time, fence, attempt, crashes, fingerprint) \
               SELECT consumer, randomblob(16), state, time, fence, attempt, crashes, fingerprint \
               FROM (SELECT * FROM hapax_record WHERE key = ?2 LIMIT 1) CROSS JOIN number";
    let copied = sqlx::query(sql).bind(copies as i64).bind(first.0.as_slice()).execute(&pool).await?;
    if copied.rows_affected() != copies {
        return Err("the record to copy is not there".into());
    }
    sqlx::raw_sql("PRAGMA wal_checkpoint(TRUNCATE)").execute(&pool).await?;
    pool.close().await;
    Ok(())
}
