//! What runs for every event is cheap for the server, and right whatever stands between: prepared where the pool leads to
//! PostgreSQL itself, text behind PgBouncer in transaction mode, and duplicates are told without a write or a lock.

mod fixture;

use std::time::Duration;

use fixture::{LEASE, Place, Through, claim, key, lease, number, process, request};
use hapax::{Claim, Outcome, ProcessedStore, Recorded, TransactionalStore};
use hapax_postgres::PostgresStore;
use hapax_postgres::sqlx::{self, AssertSqlSafe, Row};
use tokio::time::Instant;

/// Statements of hapax that are prepared on the connections of a pool, each asked once.
async fn prepared(place: &Place) -> i64 {
    let mut connections = Vec::new();
    for _ in 0..place.pool.size() {
        connections.push(place.pool.acquire().await.expect("a connection"));
    }
    let mut sum = 0;
    for connection in &mut connections {
        let count = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'hapax\\_%'";
        // As text, which needs no statement of its own on these servers.
        let row = sqlx::raw_sql(count).fetch_one(&mut **connection).await.expect("a row");
        let count: i64 = row.get(0);
        sum += count;
    }
    sum
}

/// Claims and records one by one, then handlers' transactions in a row: what is prepared, on connections that are kept.
async fn work(store: &PostgresStore, consumer: hapax::ConsumerId, events: std::ops::Range<u64>) {
    let (recorded, committed): (Vec<u64>, Vec<u64>) = events.clone().partition(|n| n % 2 == 0);
    for n in recorded {
        process(store, consumer, n..n + 1).await;
    }
    let mut held = Vec::new();
    for n in committed {
        held.push(lease(store, consumer, n).await);
    }
    for held in held {
        let (tx, lent) = store.begin().await.expect("a transaction begins");
        drop(tx);
        let answers = store.record_and_commit(lent, &[(held, Outcome::Processed)]).await.expect("it is recorded");
        assert_eq!(answers, [Recorded::Done]);
    }
    for n in events {
        assert!(matches!(claim(store, consumer, n, 7).await, Claim::Processed { .. }), "event {n} was processed");
    }
}

#[tokio::test]
async fn what_runs_for_every_event_is_prepared_where_the_pool_leads_to_the_server_itself() {
    let place = Place::fresh().await;
    let store = place.builder().reuse_connections(true).connect().await.expect("the store connects");
    let consumer = ProcessedStore::open(&store, "billing", fixture::RETENTION).await.expect("the store opens");
    work(&store, consumer, 0..10).await;
    drop(store);
    // The connections are given back to the pool by tasks.
    let given_back = async {
        while prepared(&place).await != 3 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), given_back).await.expect("three statements are prepared");
}

#[tokio::test]
async fn a_handler_that_lets_go_of_what_is_prepared_is_recorded_all_the_same() {
    let place = Place::fresh().await;
    let store = place.builder().reuse_connections(true).connect().await.expect("the store connects");
    let consumer = ProcessedStore::open(&store, "billing", fixture::RETENTION).await.expect("the store opens");
    work(&store, consumer, 0..10).await;
    let held = lease(&store, consumer, 11).await;
    let (mut tx, lent) = store.begin().await.expect("a transaction begins");
    place.write(&mut tx, "kept").await;
    sqlx::raw_sql("DEALLOCATE ALL").execute(&mut *tx).await.expect("it is let go");
    drop(tx);
    let answers = store.record_and_commit(lent, &[(held, Outcome::Processed)]).await.expect("it is recorded");
    assert_eq!(answers, [Recorded::Done]);
    assert_eq!(place.rows().await, ["kept"]);
    work(&store, consumer, 20..30).await;
}

#[tokio::test]
async fn nothing_is_prepared_behind_a_bouncer_nor_where_it_is_not_wanted() {
    for through in [Through::Bouncer, Through::Owner] {
        let place = Place::reached(through).await;
        let builder = if through == Through::Owner { place.builder().prepare(false) } else { place.builder() };
        let store = builder.reuse_connections(true).connect().await.expect("the store connects");
        let consumer = ProcessedStore::open(&store, "billing", fixture::RETENTION).await.expect("the store opens");
        work(&store, consumer, 0..10).await;
        drop(store);
        tokio::time::sleep(Duration::from_millis(200)).await;
        // Behind the bouncer these are its servers, in turn.
        assert_eq!(prepared(&place).await, 0, "{through:?}");
    }
}

#[tokio::test]
async fn statements_that_are_lost_behind_a_bouncer_are_sent_as_text() {
    let place = Place::reached(Through::Bouncer).await;
    let store = place.builder().prepare(true).reuse_connections(true).connect().await.expect("the store connects");
    let consumer = ProcessedStore::open(&store, "billing", fixture::RETENTION).await.expect("the store opens");
    // Three servers in turn: sooner or later one has not heard of them.
    work(&store, consumer, 0..12).await;
    let processed = format!("SELECT count(*) FROM {}.hapax_record WHERE state = 3 AND attempt = 1", place.schema);
    assert_eq!(number(&place.owner, processed).await, 12);
}

#[tokio::test]
async fn duplicates_are_told_in_one_message_that_writes_nothing_and_waits_for_no_lock() {
    let place = Place::fresh().await;
    // Whoever waits for a lock shows it.
    let store = place.builder().lock_timeout(Duration::from_secs(15)).connect().await.expect("the store connects");
    let consumer = ProcessedStore::open(&store, "billing", fixture::RETENTION).await.expect("the store opens");
    process(&store, consumer, 0..3).await;
    let held = lease(&store, consumer, 3).await;
    let marks = format!("SELECT sum(xmax::text::bigint)::bigint FROM {}.hapax_record WHERE state = 3", place.schema);
    let before = number(&place.owner, marks.clone()).await;
    let mut locking = place.owner.begin().await.expect("a transaction");
    let lock =
        format!("SELECT FROM {}.hapax_record WHERE key = CAST('{}' AS uuid) FOR UPDATE", place.schema, key(3).to_hex());
    sqlx::raw_sql(AssertSqlSafe(lock)).execute(&mut *locking).await.expect("locked");
    let begun = Instant::now();
    let requests: Vec<_> = (0..5).map(|n| request(consumer, n, 70 + u128::from(n))).collect();
    let claims = store.claim(&requests, LEASE).await.expect("the store answers");
    assert!(begun.elapsed() < Duration::from_secs(10), "it waited for a lock: {:?}", begun.elapsed());
    for claim in &claims[..3] {
        assert!(matches!(claim, Claim::Processed { .. }), "{claim:?}");
    }
    assert!(matches!(&claims[3], Claim::Held { wait } if *wait > LEASE / 2), "{:?}", claims[3]);
    assert!(matches!(&claims[4], Claim::Granted(lease, None) if lease.attempt == 1), "{:?}", claims[4]);
    locking.rollback().await.expect("rolled back");
    assert_eq!(number(&place.owner, marks).await, before, "a duplicate's row was locked");
    let recorded = store.record(&[(held, Outcome::Processed)]).await.expect("the store answers");
    assert_eq!(recorded, [Recorded::Done]);
}

#[tokio::test]
async fn a_claim_that_meets_anothers_insert_is_held_and_its_neighbours_are_granted() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    // Another process' claim whose commit is on its way: what it inserts is in no snapshot yet.
    let mut other = place.owner.begin().await.expect("a transaction");
    let insert = format!(
        "INSERT INTO {}.hapax_record (key, consumer, state, time, fence, attempt, crashes, fingerprint, token, first) \
         SELECT CAST('{}' AS uuid), {}, 0, t + 30000000, t, 1, 0, CAST('{:032x}' AS uuid), CAST('{:032x}' AS uuid), t \
         FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS t) AS clock",
        place.schema,
        key(1).to_hex(),
        consumer.0,
        u128::from_be_bytes(request(consumer, 1, 1).fingerprint.0),
        1,
    );
    sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut *other).await.expect("inserted");
    let requests: Vec<_> = (0..3).map(|n| request(consumer, n, 90 + u128::from(n))).collect();
    let claiming = tokio::spawn({
        let store = store.clone();
        async move { store.claim(&requests, LEASE).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    other.commit().await.expect("committed");
    let claims = claiming.await.expect("no panic").expect("the store answers");
    assert!(matches!(&claims[0], Claim::Granted(lease, None) if lease.attempt == 1), "{claims:?}");
    assert!(matches!(&claims[1], Claim::Held { wait } if *wait > LEASE / 2), "{claims:?}");
    assert!(matches!(&claims[2], Claim::Granted(lease, None) if lease.attempt == 1), "{claims:?}");
}
