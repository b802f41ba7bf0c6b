//! Only terminal records older than their consumer's retention are removed, in bounded steps, by one replica at a time,
//! and fences grow over them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::time::Duration;

use fixture::{Place, RETENTION, claim, doomed, failed, key, lease, number, process, run};
use hapax::{Claim, Outcome, ProcessedStore, Status, StoreAdmin};
use hapax_postgres::sqlx::{AssertSqlSafe, Executor};

const HOUR: Duration = Duration::from_secs(3_600);

async fn records(place: &Place) -> i64 {
    number(&place.owner, format!("SELECT count(*) FROM {}.hapax_record", place.schema)).await
}

#[tokio::test]
async fn a_sweep_removes_only_terminal_records_that_are_old_enough() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let longer = store.open("audit", RETENTION * 100).await.unwrap();
    process(&store, consumer, 0..3).await;
    process(&store, longer, 10..12).await;
    for (n, outcomes) in
        [(3, vec![failed()]), (4, vec![doomed()]), (5, vec![doomed(), Outcome::DeadLettered]), (6, vec![])]
    {
        let lease = lease(&store, consumer, n).await;
        for outcome in outcomes {
            store.record(&[(lease, outcome)]).await.unwrap();
        }
    }
    let forgotten = lease(&store, consumer, 7).await;
    assert!(store.forget("billing", forgotten.key).await.unwrap());
    // Not yet: nothing goes.
    place.pass(RETENTION - Duration::from_secs(60)).await;
    process(&store, consumer, 8..9).await;
    let swept = store.sweep(1_000).await.unwrap();
    assert_eq!((swept.removed, swept.more), (0, false));
    place.pass(Duration::from_secs(120)).await;
    let swept = store.sweep(1_000).await.unwrap();
    // Three processed, one doomed, one dead-lettered, one forgotten.
    assert_eq!((swept.removed, swept.more), (6, false));
    for (n, status) in [
        (0, None),
        (3, Some(Status::Waiting)),
        (4, None),
        (5, None),
        (6, Some(Status::Claimed)),
        (7, None),
        (8, Some(Status::Processed)),
    ] {
        let found = store.look_up("billing", key(n)).await.unwrap().map(|view| view.status);
        assert_eq!(found, status, "event {n}");
    }
    assert!(store.look_up("audit", key(10)).await.unwrap().is_some(), "another consumer keeps its own longer");
    assert!(matches!(claim(&store, consumer, 0, 99).await, Claim::Granted(lease, None) if lease.attempt == 1));
}

#[tokio::test]
async fn fences_grow_over_swept_records_and_a_clock_set_back() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    process(&store, consumer, 1..2).await;
    // As if the server's clock had been an hour ahead when it was granted, or a replica with a slower one took over.
    let ahead = HOUR.as_micros();
    run(&place.owner, format!("UPDATE {}.hapax_record SET fence = fence + {ahead}", place.schema)).await;
    let fence = number(&place.owner, format!("SELECT fence FROM {}.hapax_record", place.schema)).await;
    place.pass(RETENTION * 2).await;
    assert_eq!(store.sweep(10).await.unwrap().removed, 1);
    for n in [1, 2] {
        let lease = lease(&store, consumer, n).await;
        assert!(lease.fence.get() > fence as u64, "{lease:?} after {fence}");
    }
    let trouble = store.probe().await.unwrap().trouble.expect("the clock is behind");
    assert!(trouble.contains("clock"), "{trouble}");
}

#[tokio::test]
async fn a_sweep_is_bounded_and_goes_on_where_it_stopped() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    process(&store, consumer, 0..500).await;
    place.pass(RETENTION * 2).await;
    process(&store, consumer, 1_000..1_010).await;
    let swept = store.sweep(200).await.unwrap();
    assert_eq!((swept.removed, swept.more, records(&place).await), (200, true, 310));
    let swept = place.store().await.sweep(1_000).await.unwrap();
    assert_eq!((swept.removed, swept.more, records(&place).await), (300, false, 10));
}

/// One replica at a time: while another session holds the turn, nothing is removed and nobody waits for it but who asked.
#[tokio::test]
async fn one_replica_sweeps_at_a_time() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    process(&store, consumer, 0..20).await;
    place.pass(RETENTION * 2).await;
    let mut other = place.owner.begin().await.unwrap();
    let turn = format!("SELECT pg_advisory_xact_lock(hashtextextended('hapax sweep \"{}\"', 0))", place.schema);
    other.execute(AssertSqlSafe(turn)).await.unwrap();
    let waits = tokio::time::timeout(Duration::from_millis(500), store.sweep(100)).await;
    assert!(waits.is_err(), "it is another's turn");
    assert_eq!(records(&place).await, 20);
    process(&store, consumer, 100..110).await;
    other.rollback().await.unwrap();
    assert_eq!(store.sweep(100).await.unwrap().removed, 20);
}

/// A record that somebody works on is passed over, so that the sweep waits for nobody and nobody deadlocks with it.
#[tokio::test]
async fn a_locked_record_is_passed_over() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    process(&store, consumer, 0..10).await;
    place.pass(RETENTION * 2).await;
    let mut other = place.owner.begin().await.unwrap();
    let lock = format!("SELECT 1 FROM {}.hapax_record WHERE key = '{}' FOR UPDATE", place.schema, key(3).to_hex());
    other.execute(AssertSqlSafe(lock)).await.unwrap();
    let swept =
        tokio::time::timeout(Duration::from_secs(5), store.sweep(100)).await.expect("it does not wait").unwrap();
    assert_eq!(swept.removed, 9);
    other.rollback().await.unwrap();
    assert_eq!(store.sweep(100).await.unwrap().removed, 1);
}

/// The task of the store does it by itself, in several replicas at once, while claims go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_sweep_by_themselves() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    process(&store, consumer, 0..2_000).await;
    place.pass(RETENTION * 2).await;
    let mut replicas = Vec::new();
    for _ in 0..3 {
        replicas.push(place.builder().sweep_every(Duration::from_millis(100)).connect().await.unwrap());
    }
    let swept = async {
        let mut from = 10_000;
        while records(&place).await > (from - 10_000) as i64 {
            process(&store, consumer, from..from + 5).await;
            from += 5;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), swept).await.expect("what is expired goes, what is new stays");
    assert!(store.probe().await.unwrap().trouble.is_none());
}

#[tokio::test]
async fn sweep_failure_is_a_health_failure() {
    let place = Place::fresh().await;
    let store = place.builder().sweep_every(Duration::from_millis(50)).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    process(&store, consumer, 0..3).await;
    place.pass(RETENTION * 2).await;
    let schema = &place.schema;
    run(
        &place.owner,
        format!(
            "CREATE FUNCTION {schema}.refuse() RETURNS trigger LANGUAGE plpgsql AS \
             'BEGIN RAISE EXCEPTION ''no deletes here''; END'; \
             CREATE TRIGGER refuse BEFORE DELETE ON {schema}.hapax_record EXECUTE FUNCTION {schema}.refuse()"
        ),
    )
    .await;
    let told = async {
        loop {
            if let Some(trouble) = store.probe().await.unwrap().trouble {
                return trouble;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let trouble = tokio::time::timeout(Duration::from_secs(10), told).await.expect("the probe tells");
    assert!(trouble.contains("no deletes here"), "{trouble}");
    run(&place.owner, format!("DROP TRIGGER refuse ON {schema}.hapax_record")).await;
    let healed = async {
        while store.probe().await.unwrap().trouble.is_some() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), healed).await.expect("and that it is over");
}

#[tokio::test]
async fn an_operator_sees_reason_trouble_and_waiting_time() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let waiting = lease(&store, consumer, 1).await;
    let later = Outcome::Failed { after: HOUR, counted: true, trouble: fixture::trouble() };
    store.record(&[(waiting, later)]).await.unwrap();
    let dead = lease(&store, consumer, 2).await;
    store.record(&[(dead, doomed())]).await.unwrap();
    store.record(&[(dead, Outcome::DeadLettered)]).await.unwrap();
    place.pass(Duration::from_secs(600)).await;
    let view = store.look_up("billing", key(1)).await.unwrap().unwrap();
    assert!(view.since > HOUR / 2 && view.since <= HOUR * 5 / 6, "{view:?}");
    assert_eq!(view.trouble, Some(fixture::trouble()));
    let listed = store.list("billing", Status::DeadLettered, 10).await.unwrap();
    assert_eq!((listed.len(), listed[0].reason), (1, Some(hapax::Reason::Permanent)));
    assert!(listed[0].since >= Duration::from_secs(600) && listed[0].fence == dead.fence.get());
    assert!(store.list("nobody", Status::Waiting, 10).await.unwrap().is_empty());
    assert!(!store.forget("nobody", key(1)).await.unwrap());
    assert_eq!(store.list("billing", Status::Waiting, 0).await.unwrap().len(), 0);
}
