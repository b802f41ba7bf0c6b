//! Terminal records outlive their retention by little, others for ever; and the file stays small.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::time::Duration;

use fixture::{Folder, LEASE, RETENTION, claim, doomed, failed, key, lease, process, store};
use hapax::{Claim, Outcome, ProcessedStore, Status, StoreAdmin};
use hapax_sqlite::sqlx;

async fn count(store: &hapax_sqlite::SqliteStore) -> i64 {
    let count = "SELECT (SELECT count(*) FROM hapax_record) + (SELECT count(*) FROM hapax_open)";
    sqlx::query_scalar(count).fetch_one(store.pool()).await.unwrap()
}

#[tokio::test]
async fn a_sweep_removes_only_terminal_records_that_are_old_enough() {
    let folder = Folder::new();
    let (store, clock, consumer) = store(&folder).await;
    process(&store, consumer, 0..10).await;
    let (claimed, waiting, is_doomed, dead) = (
        lease(&store, consumer, 20).await,
        lease(&store, consumer, 21).await,
        lease(&store, consumer, 22).await,
        lease(&store, consumer, 23).await,
    );
    store.record(&[(waiting, failed()), (is_doomed, doomed()), (dead, doomed())]).await.unwrap();
    store.record(&[(dead, Outcome::DeadLettered)]).await.unwrap();
    clock.advance(RETENTION - Duration::from_micros(1));
    assert_eq!(store.sweep(100).await.unwrap().removed, 0);
    clock.advance(Duration::from_micros(1));
    process(&store, consumer, 30..31).await;
    let first = store.sweep(4).await.unwrap();
    assert_eq!((first.removed, first.more), (4, true));
    let rest = store.sweep(100).await.unwrap();
    assert_eq!((rest.removed, rest.more), (7, false), "the doomed one is held until its lease ends");
    clock.advance(LEASE);
    assert_eq!(store.sweep(100).await.unwrap().removed, 1);
    assert_eq!(store.look_up("billing", claimed.key).await.unwrap().unwrap().status, Status::Claimed);
    assert_eq!(store.look_up("billing", waiting.key).await.unwrap().unwrap().status, Status::Waiting);
    assert_eq!(store.look_up("billing", key(30)).await.unwrap().unwrap().status, Status::Processed);
    assert_eq!(count(&store).await, 3);
}

#[tokio::test]
async fn fences_grow_over_swept_records_and_a_clock_set_back() {
    let folder = Folder::new();
    let (store, clock, consumer) = store(&folder).await;
    let before = lease(&store, consumer, 1).await;
    store.record(&[(before, Outcome::Processed)]).await.unwrap();
    clock.advance(RETENTION);
    assert_eq!(store.sweep(1).await.unwrap().removed, 1);
    clock.set_back(RETENTION * 2);
    assert!(lease(&store, consumer, 1).await.fence > before.fence);
}

/// At a steady rate the table is bounded, with nobody calling sweep.
#[tokio::test]
async fn records_pay_for_the_removal_of_older_ones() {
    let folder = Folder::new();
    let (store, clock, consumer) = store(&folder).await;
    let mut most = 0;
    for round in 0..120_u64 {
        process(&store, consumer, round * 100..(round + 1) * 100).await;
        clock.advance(RETENTION / 20);
        most = most.max(count(&store).await);
    }
    assert!(most <= 2600, "{most} records where 2,000 are within their retention");
}

/// Bug 5 of semantics.md section 4: records that vanish under the sweep and keys that are none of ours.
#[tokio::test(flavor = "multi_thread")]
async fn sweep_survives_concurrent_delete_and_junk_keys() {
    let folder = Folder::new();
    let (store, clock, consumer) = store(&folder).await;
    process(&store, consumer, 0..3000).await;
    for junk in ["x''", "x'00'", "x'ffffffffffffffffffffffffffffffffffffffff'"] {
        let junk =
            format!("INSERT INTO hapax_record VALUES (1, {junk}, 77, 0, 1, 1, 0, x'00', NULL, NULL, NULL, NULL)");
        sqlx::query(sqlx::AssertSqlSafe(junk)).execute(store.pool()).await.unwrap();
    }
    sqlx::query("INSERT INTO hapax_record VALUES (-5, x'01', 3, 0, 1, 1, 0, x'00', NULL, NULL, NULL, NULL)")
        .execute(store.pool())
        .await
        .unwrap();
    clock.advance(RETENTION);
    let deleter = store.clone();
    let deleting = tokio::spawn(async move {
        for n in 0..1000 {
            deleter.forget("billing", key(n)).await.unwrap();
        }
    });
    let (mut removed, mut more) = (0, true);
    while more {
        let swept = store.sweep(100).await.unwrap();
        (removed, more) = (removed + swept.removed, swept.more);
    }
    deleting.await.unwrap();
    assert!((2000..=3003).contains(&removed), "{removed}");
    assert_eq!(count(&store).await, 1, "only the record of an unknown consumer is left");
    store.probe().await.unwrap();
}

/// Bug 14 of semantics.md section 4: a sweep that fails is no silent no-op, and does not keep records from being written.
#[tokio::test]
async fn sweep_failure_is_a_health_failure() {
    let folder = Folder::new();
    let (store, clock, consumer) = store(&folder).await;
    process(&store, consumer, 0..200).await;
    sqlx::query("CREATE TRIGGER keep BEFORE DELETE ON hapax_record BEGIN SELECT RAISE(ABORT, 'kept'); END")
        .execute(store.pool())
        .await
        .unwrap();
    clock.advance(RETENTION);
    process(&store, consumer, 200..400).await;
    process(&store, consumer, 400..600).await;
    let told = store.probe().await.unwrap().trouble.expect("the sweep's failure is told");
    assert!(told.starts_with("sweep: ") && told.contains("kept"), "{told}");
    assert!(matches!(claim(&store, consumer, 599, 1).await, Claim::Processed { .. }));
    assert!(store.sweep(10).await.is_err());
    sqlx::query("DROP TRIGGER keep").execute(store.pool()).await.unwrap();
    assert!(!store.sweep(1000).await.unwrap().more);
    assert_eq!(store.probe().await.unwrap().trouble, None);
}

#[tokio::test]
async fn a_processed_event_takes_at_most_100_bytes_on_disk() {
    let folder = Folder::new();
    let (store, _clock, consumer) = store(&folder).await;
    let events = 20_000;
    for from in (0..events).step_by(250) {
        process(&store, consumer, from..from + 250).await;
    }
    store.close().await;
    let bytes = std::fs::metadata(folder.file()).unwrap().len();
    assert!(bytes <= 100 * events, "{} bytes an event", bytes as f64 / events as f64);
}
