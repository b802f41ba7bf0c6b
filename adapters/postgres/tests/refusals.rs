//! What is refused, by name and with the remedy, before anything is written: a server that cannot carry the store, tables
//! that are not ours or not there, rights that are missing. And migrations that meet.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use fixture::{Cluster, LEASE, Place, RETENTION, number, pool_of, request, run, server, unused_schema};
use hapax::{Durability, ErrorKind, Outcome, ProcessedStore};
use hapax_postgres::sqlx::PgPool;
use hapax_postgres::{PostgresStore, SCHEMA_VERSION};

async fn refused(pool: &PgPool, schema: &str, kind: ErrorKind, says: &[&str]) {
    for migrate in [false, true] {
        let error = PostgresStore::builder(pool.clone()).schema(schema).migrate(migrate).connect().await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        for words in says {
            assert!(error.to_string().contains(words), "{error}: should say {words:?}");
        }
    }
}

#[tokio::test]
async fn a_database_without_our_tables_is_told_how_to_get_them() {
    let pool = pool_of(server(), 2);
    let schema = unused_schema();
    let error = PostgresStore::builder(pool.clone()).schema(&*schema).connect().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    assert!(error.to_string().contains(".migrate(true)") && error.to_string().contains(&schema), "{error}");
    let created = number(&pool, format!("SELECT count(*) FROM pg_namespace WHERE nspname = '{schema}'")).await;
    assert_eq!(created, 0, "checking writes nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migrations_that_meet_are_one() {
    let pool = pool_of(server(), 10);
    let schema = unused_schema();
    let mut starts = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (pool, schema) = (pool.clone(), schema.clone());
        starts.spawn(async move {
            let store = PostgresStore::builder(pool).schema(&*schema).migrate(true).connect().await.unwrap();
            store.open("billing", RETENTION).await.unwrap()
        });
    }
    let numbers = starts.join_all().await;
    assert!(numbers.iter().all(|number| *number == numbers[0]), "{numbers:?}");
    PostgresStore::migrate_schema(&pool, &schema).await.expect("nothing to do");
    run(&pool, format!("DROP SCHEMA {schema} CASCADE")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_that_open_at_once_get_numbers_of_their_own() {
    let place = Place::fresh().await;
    let mut opens = tokio::task::JoinSet::new();
    for n in 0..12 {
        let store = place.store().await;
        opens.spawn(async move { store.open(&format!("consumer {}", n % 6), RETENTION).await.unwrap().0 });
    }
    let mut numbers = opens.join_all().await;
    numbers.sort_unstable();
    assert_eq!(numbers, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]);
}

#[tokio::test]
async fn a_table_of_our_name_with_another_shape_is_refused() {
    let changes = [
        ("ALTER TABLE {s}.hapax_record DROP COLUMN fence", "has no column fence"),
        ("ALTER TABLE {s}.hapax_record ALTER COLUMN attempt TYPE bigint", "column attempt of another shape"),
        ("ALTER TABLE {s}.hapax_record ALTER COLUMN time DROP NOT NULL", "column time of another shape"),
        ("ALTER TABLE {s}.hapax_record ADD COLUMN note text", "column note that hapax does not know"),
        ("ALTER TABLE {s}.hapax_record DROP CONSTRAINT hapax_record_pkey", "no unique index on (key,consumer)"),
        ("ALTER TABLE {s}.hapax_record SET UNLOGGED", "UNLOGGED"),
        ("ALTER TABLE {s}.hapax_record ENABLE ROW LEVEL SECURITY", "row security"),
        ("DROP TABLE {s}.hapax_record", "hapax_record is missing"),
        ("DROP TABLE {s}.hapax_record; CREATE VIEW {s}.hapax_record AS SELECT 1", "is not an ordinary table"),
        ("DROP TABLE {s}.hapax_meta; CREATE TABLE {s}.hapax_meta (id int)", "hapax_meta has no column name"),
        ("UPDATE {s}.hapax_meta SET value = 7 WHERE name = 'hapax'", "does not bear hapax's mark"),
        ("DELETE FROM {s}.hapax_meta WHERE name = 'schema'", "holds no schema version"),
    ];
    for (change, says) in changes {
        let place = Place::fresh().await;
        run(&place.owner, change.replace("{s}", &place.schema)).await;
        refused(&place.owner, &place.schema, ErrorKind::Incompatible, &[says]).await;
    }
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let place = Place::fresh().await;
    let newer = format!("UPDATE {}.hapax_meta SET value = {} WHERE name = 'schema'", place.schema, SCHEMA_VERSION + 1);
    run(&place.owner, newer).await;
    refused(&place.owner, &place.schema, ErrorKind::Incompatible, &["newer hapax", "upgrade hapax-postgres"]).await;
}

/// Two versions of hapax on one store: the older one stops as soon as the newer has migrated, and writes nothing.
#[tokio::test]
async fn a_schema_that_becomes_newer_stops_the_store() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let held = fixture::lease(&store, consumer, 1).await;
    let newer = format!("UPDATE {}.hapax_meta SET value = {} WHERE name = 'schema'", place.schema, SCHEMA_VERSION + 1);
    run(&place.owner, newer).await;
    let errors = [
        store.claim(&[request(consumer, 2, 2)], LEASE).await.map(drop).unwrap_err(),
        store.record(&[(held, Outcome::Processed)]).await.map(drop).unwrap_err(),
        store.renew(&[held], LEASE).await.map(drop).unwrap_err(),
        store.probe().await.map(drop).unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    }
    let unchanged = format!("SELECT count(*) FROM {}.hapax_record WHERE state = 0", place.schema);
    assert_eq!(number(&place.owner, unchanged).await, 1);
    let all = format!("SELECT count(*) FROM {}.hapax_record", place.schema);
    assert_eq!(number(&place.owner, all).await, 1);
}

#[tokio::test]
async fn a_table_dropped_in_mid_life_is_told() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    run(&place.owner, format!("DROP TABLE {}.hapax_record", place.schema)).await;
    let error = store.claim(&[request(consumer, 1, 1)], LEASE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
}

#[tokio::test]
async fn rights_that_are_missing_are_named_with_the_grant() {
    let place = Place::fresh().await;
    let (schema, role) = (&place.schema, format!("poor_{}", place.schema));
    run(&place.owner, format!("CREATE ROLE {role} LOGIN PASSWORD 'poor'; GRANT USAGE ON SCHEMA {schema} TO {role}"))
        .await;
    let everything = format!("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}");
    run(&place.owner, format!("{everything}; REVOKE UPDATE ON {schema}.hapax_record FROM {role}")).await;
    let pool = pool_of(server().username(&role).password("poor"), 2);
    let says = ["lacks UPDATE on hapax_record", "GRANT SELECT, INSERT, UPDATE, DELETE ON", &role];
    refused(&pool, schema, ErrorKind::Configuration, &says).await;
    run(&place.owner, format!("REVOKE USAGE ON SCHEMA {schema} FROM {role}")).await;
    let error = PostgresStore::builder(pool.clone()).schema(&**schema).connect().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    // One that may not create tables says so, and is not asked again.
    let error = PostgresStore::migrate_schema(&pool, &unused_schema()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    pool.close().await;
    run(&place.owner, format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

#[tokio::test]
async fn a_schema_name_that_is_none_is_refused() {
    for name in ["", "Shop", "a b", "x\"; DROP TABLE y; --", "pg_hapax"] {
        refused(&pool_of(server(), 1), name, ErrorKind::Configuration, &["schema", "a-z, 0-9 and _"]).await;
    }
}

#[tokio::test]
async fn a_server_that_takes_no_writes_is_refused() {
    let place = Place::fresh().await;
    let pool = pool_of(server().options([("default_transaction_read_only", "on")]), 2);
    refused(&pool, &place.schema, ErrorKind::Configuration, &["replica or read-only", "primary"]).await;
}

/// After a failover the pool may still hold connections to what is a replica now: out of reach, and not used again.
#[tokio::test]
async fn a_session_that_becomes_read_only_is_out_of_reach() {
    use hapax_postgres::sqlx::Executor;
    let place = Place::fresh().await;
    let store =
        PostgresStore::builder(pool_of(server(), 1)).schema(&*place.schema).sweep_every(std::time::Duration::ZERO);
    let store = store.connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    store.pool().execute("SET default_transaction_read_only = on").await.unwrap();
    let error = store.claim(&[request(consumer, 1, 1)], LEASE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    store.claim(&[request(consumer, 1, 1)], LEASE).await.expect("the next connection takes writes");
}

#[tokio::test]
async fn a_database_that_cannot_hold_every_text_is_refused() {
    let owner = pool_of(server(), 1);
    let name = unused_schema();
    run(&owner, format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")).await;
    let pool = pool_of(server().database(&name), 1);
    refused(&pool, "public", ErrorKind::Configuration, &["LATIN1", "UTF8"]).await;
    pool.close().await;
    run(&owner, format!("DROP DATABASE {name}")).await;
}

#[tokio::test]
async fn a_session_that_does_not_wait_for_the_disk_is_lossy() {
    let place = Place::fresh().await;
    let health = place.store().await.probe().await.unwrap();
    assert_eq!((health.name, health.durability, health.loses_on_failover), ("postgres", Durability::Durable, false));
    assert_eq!(health.transactions_max, Some(5));
    assert!(!health.evicts && !health.transactions_block_writes && health.trouble.is_none());
    let pool = pool_of(server().options([("synchronous_commit", "off")]), 2);
    let store = PostgresStore::builder(pool).schema(&*place.schema).connect().await.unwrap();
    assert_eq!(store.probe().await.unwrap().durability, Durability::Lossy);
}

/// The store sees no URL, and what it shows of its pool shows no password.
#[tokio::test]
async fn no_password_is_shown() {
    const CANARY: &str = "canary-hunter2";
    let pool = pool_of(server().password(CANARY), 1);
    let builder = PostgresStore::builder(pool.clone());
    assert!(!format!("{builder:?}").contains(CANARY));
    let error = builder.connect().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    assert!(!format!("{error} {error:?}").contains(CANARY), "{error:?}");
    let place = Place::fresh().await;
    assert!(!format!("{:?}", place.store().await).contains("hapax:"));
}

/// Two-phase commit elsewhere in the database can leave a record locked for hours, and a replica follows: both on a
/// server of the test's own. <https://www.postgresql.org/docs/current/sql-prepare-transaction.html>
#[tokio::test]
async fn a_prepared_transaction_holds_up_its_record_only_and_a_replica_is_refused() {
    let cluster = Cluster::start(&["max_prepared_transactions=5"]).await;
    let pool = pool_of(cluster.options(), 4);
    PostgresStore::migrate(&pool).await.unwrap();
    let builder = PostgresStore::builder(pool.clone()).lock_timeout(std::time::Duration::from_millis(200));
    let store = builder.connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let held = fixture::leases(&store, consumer, 0..2).await;
    let update = format!("UPDATE hapax_record SET attempt = 1 WHERE key = '{}'", held[0].key.to_hex());
    let mut session = pool.acquire().await.unwrap();
    for step in ["BEGIN", &update, "PREPARE TRANSACTION 'stuck'"] {
        let step = hapax_postgres::sqlx::AssertSqlSafe(step.to_owned());
        hapax_postgres::sqlx::raw_sql(step).execute(&mut *session).await.unwrap();
    }
    let batch: Vec<_> = (0..4).map(|n| request(consumer, n, 50 + u128::from(n))).collect();
    let claims = store.claim(&batch, LEASE).await.unwrap();
    assert!(matches!(claims[0], hapax::Claim::Held { .. }), "{claims:?}");
    assert!(claims[2..].iter().all(|claim| matches!(claim, hapax::Claim::Granted(..))), "{claims:?}");
    run(&pool, "ROLLBACK PREPARED 'stuck'").await;
    drop((store, session));
    pool.close().await;
    cluster.crash();
    cluster.follow();
    cluster.up(&["max_prepared_transactions=5"]).await;
    let replica = pool_of(cluster.options(), 2);
    refused(&replica, "public", ErrorKind::Configuration, &["replica or read-only"]).await;
}
