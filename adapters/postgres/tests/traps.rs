//! What PostgreSQL does to a claim protocol that is not careful: deadlocks of batches, rows that others lock, plans that
//! turn bad, sessions that PgBouncer changes, transactions that somebody left open.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fixture::{
    Bouncer, LEASE, Place, RETENTION, Through, claim, failed, key, lease, leases, number, pool_of, process, request,
    run, server,
};
use hapax::{Claim, ErrorKind, Outcome, ProcessedStore, Recorded, Renewal, TransactionalStore};
use hapax_postgres::PostgresStore;
use hapax_postgres::sqlx::postgres::PgPoolOptions;
use hapax_postgres::sqlx::{self, AssertSqlSafe, Connection, Executor};
use tokio::time::Instant;

/// Two multi-id transactions in opposite order deadlock: the store sorts.
/// <https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-DEADLOCKS>
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overlapping_batches_of_many_tasks_do_not_deadlock() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8_u64 {
        let store = store.clone();
        tasks.spawn(async move {
            let mut rng = fastrand::Rng::with_seed(task);
            let mut granted = Vec::new();
            for round in 0..25_u64 {
                let mut events: Vec<u64> = (round * 20..round * 20 + 40).collect();
                rng.shuffle(&mut events);
                let token = |n: u64| (u128::from(task) << 64) | u128::from(round * 1_000 + n);
                let batch: Vec<_> = events.iter().map(|&n| request(consumer, n, token(n))).collect();
                let claims = store.claim(&batch, LEASE).await.expect("no batch fails");
                let mut outcomes = Vec::new();
                for (n, claim) in events.iter().zip(claims) {
                    if let Claim::Granted(lease, _) = claim {
                        granted.push(*n);
                        outcomes.push((lease, if n % 3 == 0 { failed() } else { Outcome::Processed }));
                    }
                }
                let recorded = store.record(&outcomes).await.expect("no batch fails");
                assert!(recorded.iter().all(|recorded| *recorded == Recorded::Done));
            }
            granted
        });
    }
    let mut grants = BTreeMap::<u64, u32>::new();
    for n in tasks.join_all().await.into_iter().flatten() {
        *grants.entry(n).or_default() += 1;
    }
    assert_eq!(grants.len(), 520, "every event was granted to somebody");
    let twice = grants.iter().filter(|(n, times)| *n % 3 != 0 && **times > 1).count();
    assert_eq!(twice, 0, "what was processed is not granted again");
    let deadlocks = number(&place.owner, "SELECT count(*) FROM pg_locks WHERE NOT granted").await;
    assert_eq!(deadlocks, 0);
}

/// One key twice in a statement would raise 21000, or be claimed once: the batch is refused, not the store, so that the
/// runtime halves it.
#[tokio::test]
async fn duplicate_in_batch_is_not_an_outage() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let batch = [request(consumer, 1, 1), request(consumer, 1, 2)];
    assert_eq!(store.claim(&batch, LEASE).await.unwrap_err().kind(), ErrorKind::Rejected);
    assert!(matches!(claim(&store, consumer, 1, 3).await, Claim::Granted(..)), "nothing was written");
}

/// A record that another transaction locks holds nobody up but itself, and for a bounded time.
#[tokio::test]
async fn a_locked_record_waits_and_the_rest_of_its_batch_does_not() {
    let place = Place::fresh().await;
    let store = place.builder().lock_timeout(Duration::from_millis(200)).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let held = leases(&store, consumer, 0..3).await;
    let mut other = place.owner.begin().await.unwrap();
    // Its lease has ended: only the lock keeps it.
    let ended = "UPDATE {}.hapax_record SET time = time - 60000000 WHERE key = '{}'";
    run(&place.owner, ended.replacen("{}", &place.schema, 1).replacen("{}", &key(1).to_hex(), 1)).await;
    let lock = format!("SELECT 1 FROM {}.hapax_record WHERE key = '{}' FOR UPDATE", place.schema, key(1).to_hex());
    other.execute(AssertSqlSafe(lock)).await.unwrap();

    let begun = Instant::now();
    let batch: Vec<_> = (0..6).map(|n| request(consumer, n, 100 + u128::from(n))).collect();
    let claims = store.claim(&batch, LEASE).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(matches!(claims[1], Claim::Held { wait } if wait <= Duration::from_secs(1)), "{:?}", claims[1]);
    assert!(matches!(claims[0], Claim::Held { wait } if wait > Duration::from_secs(1)), "held by its lease");
    assert!(claims[3..].iter().all(|claim| matches!(claim, Claim::Granted(..))), "{claims:?}");

    let late = store.record(&[(held[1], Outcome::Processed)]).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Unavailable, "{late}");
    assert_eq!(store.record(&[(held[0], Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    other.rollback().await.unwrap();
    assert_eq!(store.record(&[(held[1], Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
}

/// <https://www.postgresql.org/docs/current/sql-prepare.html#SQL-PREPARE-NOTES>: a plan made for a small table, or none,
/// is ruinous for a large one. Whatever the statistics say, records are found by their key.
#[tokio::test]
async fn records_are_found_by_their_key_whatever_the_statistics_say() {
    let place = Place::fresh().await;
    // A single line, so that its counts are told when it ends.
    let store = PostgresStore::builder(pool_of(server(), 2)).schema(&*place.schema).sweep_every(Duration::ZERO);
    let store = store.connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let work = async |from: u64| {
        for batch in (from..from + 512).step_by(128) {
            let held = leases(&store, consumer, batch..batch + 128).await;
            let renewed = store.renew(&held, LEASE).await.unwrap();
            assert!(renewed.iter().all(|renewal| *renewal == Renewal::Renewed));
            let outcomes: Vec<_> = held
                .into_iter()
                .zip(0..)
                .map(|(lease, n)| (lease, if n % 8 == 0 { failed() } else { Outcome::Processed }))
                .collect();
            store.record(&outcomes).await.unwrap();
            let again: Vec<_> = (batch..batch + 128).map(|n| request(consumer, n, 7)).collect();
            store.claim(&again, LEASE).await.unwrap();
        }
    };
    work(0).await;
    run(&place.owner, format!("ANALYZE {}.hapax_record", place.schema)).await;
    // Statistics of a small table, and then many rows: as after a burst.
    run(
        &place.owner,
        format!(
            "INSERT INTO {}.hapax_record (time, fence, consumer, attempt, crashes, state, key, fingerprint) \
             SELECT n, n, 1, 1, 0, 3, gen_random_uuid(), gen_random_uuid() FROM generate_series(1, 200000) AS n",
            place.schema
        ),
    )
    .await;
    work(10_000).await;
    run(&place.owner, format!("ANALYZE {}.hapax_record", place.schema)).await;
    let begun = Instant::now();
    work(20_000).await;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    let pool = store.pool().clone();
    drop(store);
    pool.close().await;
    let read = "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'hapax_record' AND schemaname";
    let read = number(&place.owner, format!("{read} = '{}'", place.schema)).await;
    assert_eq!(read, 0, "the table was read from end to end");
}

/// A statement that lives longer than its transaction would meet another server behind PgBouncer in transaction mode
/// (<https://www.pgbouncer.org/features.html>): nothing of ours is named, and no setting stays.
#[tokio::test]
async fn nothing_stays_in_a_session() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    process(&store, consumer, 0..10).await;
    store.probe().await.unwrap();
    let settings = "SELECT string_agg(name || '=' || setting, ' ') FROM pg_settings \
        WHERE name IN ('lock_timeout', 'statement_timeout', 'plan_cache_mode', 'enable_seqscan', 'jit') AND source = 'session'";
    for _ in 0..5 {
        let mut connection = place.pool.acquire().await.unwrap();
        let prepared: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_prepared_statements")
            .persistent(false)
            .fetch_one(&mut *connection)
            .await
            .unwrap();
        assert_eq!(prepared, 0);
        let left: Option<String> =
            sqlx::query_scalar(settings).persistent(false).fetch_one(&mut *connection).await.unwrap();
        assert_eq!(left, None);
    }
}

/// Two stores on three servers of PgBouncer, many batches at once: every one is answered by one server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_share_the_servers_of_a_bouncer() {
    let place = Place::reached(Through::Bouncer).await;
    let (one, consumer) = place.opened().await;
    let other = place.store().await;
    let mut tasks = tokio::task::JoinSet::new();
    for (n, store) in [one, other].into_iter().cycle().take(8).enumerate() {
        let from = n as u64 * 1_000;
        tasks.spawn(async move {
            for batch in 0..10 {
                process(&store, consumer, from + batch * 20..from + batch * 20 + 20).await;
            }
        });
    }
    tasks.join_all().await;
    let processed = format!("SELECT count(*) FROM {}.hapax_record WHERE state = 3", place.schema);
    assert_eq!(number(&place.owner, processed).await, 1_600);
}

/// PgBouncer refuses a start-up parameter that sqlx sends unless it is told to ignore it: told as it says it.
#[tokio::test]
async fn a_bouncer_that_has_no_server_is_out_of_reach_and_not_a_fault() {
    let nowhere = server().host("127.0.0.1").port(1);
    let bouncer = Bouncer::start(&nowhere).await;
    let error = PostgresStore::new(pool_of(bouncer.options(), 2)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
}

/// sqlx 0.9 leaves the server inside a transaction where `begin()` is dropped before its answer has come, and hands the
/// connection out again. A batch that ran in it would be lost although it was answered.
#[tokio::test]
async fn a_batch_swallowed_by_somebodys_open_transaction_is_not_believed() {
    let place = Place::fresh().await;
    let store = PostgresStore::builder(pool_of(server(), 1)).schema(&*place.schema).sweep_every(Duration::ZERO);
    let store = store.connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let mut connection = store.pool().acquire().await.unwrap();
    connection.execute("BEGIN").await.unwrap();
    drop(connection);
    let swallowed = store.claim(&[request(consumer, 1, 1)], LEASE).await.unwrap_err();
    assert_eq!(swallowed.kind(), ErrorKind::Unavailable, "{swallowed}");
    assert!(
        matches!(claim(&store, consumer, 1, 2).await, Claim::Granted(..)),
        "the next one is, on another connection"
    );
    let other = place.store().await;
    assert!(matches!(claim(&other, consumer, 1, 3).await, Claim::Held { .. }), "and it was committed");
}

/// Nor does one that a failed statement has aborted (25P02), or that asked for another isolation level (25001), stop
/// anybody: it is closed, and the next call has another.
#[tokio::test]
async fn a_transaction_left_broken_on_a_connection_is_closed_and_asked_again() {
    let place = Place::fresh().await;
    let store = PostgresStore::builder(pool_of(server(), 1)).schema(&*place.schema).sweep_every(Duration::ZERO);
    let store = store.connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    for (n, left) in ["BEGIN; SELECT 1 / 0", "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT 1"].into_iter().enumerate() {
        let leave = async || {
            let mut connection = store.pool().acquire().await.unwrap();
            for statement in left.split("; ") {
                let _aborted = sqlx::raw_sql(statement).execute(&mut *connection).await;
            }
        };
        leave().await;
        let error = store.claim(&[request(consumer, n as u64, 1)], LEASE).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{left}: {error}");
        assert!(matches!(claim(&store, consumer, n as u64, 1).await, Claim::Granted(..)), "{left}");
        leave().await;
        let error = store.begin().await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{left}: {error}");
        drop(store.begin().await.expect("the next connection is in order"));
    }
}

/// What somebody left uncommitted on a connection is not committed with what a handler writes.
#[tokio::test]
async fn a_handler_does_not_run_inside_somebodys_open_transaction() {
    let place = Place::fresh().await;
    let store = PostgresStore::builder(pool_of(server(), 1)).schema(&*place.schema).sweep_every(Duration::ZERO);
    let store = store.connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let held = lease(&store, consumer, 1).await;
    let mut connection = store.pool().acquire().await.unwrap();
    let leftover = format!("INSERT INTO {}.effects VALUES ('leftover')", place.schema);
    for statement in ["BEGIN".to_owned(), leftover] {
        connection.execute(AssertSqlSafe(statement)).await.unwrap();
    }
    drop(connection);
    let error = store.begin().await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    let (mut tx, mut lent) = store.begin().await.expect("on another connection");
    place.write(&mut tx, "effect").await;
    drop(tx);
    assert_eq!(store.record_in(&mut lent, &[(held, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    store.commit(lent).await.unwrap();
    assert_eq!(place.rows().await, ["effect"]);
}

/// A claim of an event that looks free is a second message, and a holder may dead-letter the event between them. A
/// redriven letter that comes then is not a duplicate of itself: acked as one, it would be lost.
#[tokio::test]
async fn a_redriven_letter_that_comes_while_its_event_ends_is_not_a_duplicate() {
    let place = Place::fresh().await;
    let (other, consumer) = place.opened().await;
    let held = lease(&other, consumer, 1).await;
    assert_eq!(other.record(&[(held, fixture::doomed())]).await.unwrap(), [Recorded::Done]);
    // A pool of one: every message takes its connection anew, so that something can happen between two of them.
    let messages = Arc::new(AtomicUsize::new(usize::MAX / 2));
    let (counted, holder) = (Arc::clone(&messages), other.clone());
    let pool = PgPoolOptions::new().max_connections(1).before_acquire(move |_, _| {
        let (before, holder) = (counted.fetch_add(1, Ordering::SeqCst), holder.clone());
        Box::pin(async move {
            if before == 1 {
                holder.record(&[(held, Outcome::DeadLettered)]).await.expect("the holder ends it");
            }
            Ok(true)
        })
    });
    let store = PostgresStore::builder(pool.connect_lazy_with(server())).schema(&*place.schema);
    let store = store.sweep_every(Duration::ZERO).connect().await.unwrap();
    // Its lease has ended, so it looks free, but its holder lives.
    place.pass(LEASE * 2).await;
    messages.store(0, Ordering::SeqCst);
    let redriven = hapax::ClaimRequest { reopen: Some(held.fence), ..request(consumer, 1, 7) };
    let answer = store.claim(&[redriven], LEASE).await.unwrap().remove(0);
    assert_eq!(messages.load(Ordering::SeqCst), 2, "the holder came between");
    assert!(matches!(&answer, Claim::Granted(lease, None) if lease.attempt == 1), "{answer:?}");
}

/// One record that a foreign transaction locks: the leases of its neighbours are renewed and their outcomes recorded. The
/// runtime halves a batch that is rejected, as here.
#[tokio::test]
async fn a_locked_record_leaves_its_neighbours_renewed_and_recorded() {
    async fn renewed(store: &PostgresStore, held: &[hapax::Lease]) -> Vec<Option<Renewal>> {
        match store.renew(held, LEASE * 2).await {
            Ok(answers) => answers.into_iter().map(Some).collect(),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
                if held.len() == 1 {
                    return vec![None];
                }
                let (left, right) = held.split_at(held.len() / 2);
                [Box::pin(renewed(store, left)).await, Box::pin(renewed(store, right)).await].concat()
            }
        }
    }
    async fn recorded(store: &PostgresStore, held: &[hapax::Lease]) -> Vec<Option<Recorded>> {
        let batch: Vec<_> = held.iter().map(|held| (*held, Outcome::Processed)).collect();
        match store.record(&batch).await {
            Ok(answers) => answers.into_iter().map(Some).collect(),
            Err(error) if held.len() == 1 => {
                // Never given up: what took place must be recorded.
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
                vec![None]
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
                let (left, right) = held.split_at(held.len() / 2);
                [Box::pin(recorded(store, left)).await, Box::pin(recorded(store, right)).await].concat()
            }
        }
    }
    let place = Place::fresh().await;
    let store = place.builder().lock_timeout(Duration::from_millis(200)).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let held = leases(&store, consumer, 0..32).await;
    let mut other = place.owner.begin().await.unwrap();
    let lock = format!("SELECT 1 FROM {}.hapax_record WHERE key = '{}' FOR UPDATE", place.schema, key(9).to_hex());
    other.execute(AssertSqlSafe(lock)).await.unwrap();

    let begun = Instant::now();
    let answers = renewed(&store, &held).await;
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    for (n, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer, (n != 9).then_some(Renewal::Renewed), "{n}");
    }
    let begun = Instant::now();
    let answers = recorded(&store, &held).await;
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    for (n, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer, (n != 9).then_some(Recorded::Done), "{n}");
    }
    other.rollback().await.unwrap();
    assert_eq!(store.record(&[(held[9], Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
}

/// A pool whose sessions ask for other isolation levels: batches run in the one they need.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_serializable_default_does_not_fail_batches() {
    let place = Place::fresh().await;
    let options = server().options([("default_transaction_isolation", "serializable")]);
    let store = PostgresStore::builder(pool_of(options, 4)).schema(&*place.schema).sweep_every(Duration::ZERO);
    let store = store.connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..4_u64 {
        let store = store.clone();
        tasks.spawn(async move {
            for n in 0..20_u64 {
                let batch: Vec<_> =
                    (n..n + 10).map(|n| request(consumer, n, u128::from(task * 1_000 + n) + 1)).collect();
                store.claim(&batch, LEASE).await.expect("no serialization failure");
            }
        });
    }
    tasks.join_all().await;
}

/// The pool is the user's: hapax gives back what it does not use, and a pool that is closed is let go.
#[tokio::test]
async fn connections_go_back_to_the_pool() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    process(&store, consumer, 0..10).await;
    let pool = place.pool.clone();
    let free = async {
        while pool.num_idle() < pool.size() as usize {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), free).await.expect("they go back when there is nothing to do");
    process(&store, consumer, 10..20).await;
    let closed = tokio::time::timeout(Duration::from_secs(10), pool.close()).await;
    closed.expect("closing the pool does not wait for the store");
    let error = store.claim(&[request(consumer, 1, 1)], LEASE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

/// A number that this database does not know: nothing of the batch is written.
#[tokio::test]
async fn a_consumer_of_another_database_is_refused_and_nothing_is_written() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let held = lease(&store, consumer, 1).await;
    for foreign in [0, consumer.0 + 1, u32::MAX] {
        let foreign = hapax::ConsumerId(foreign);
        let batch = [request(consumer, 2, 2), request(foreign, 3, 3)];
        let error = store.claim(&batch, LEASE).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
        let outcomes = [(held, Outcome::Processed), (hapax::Lease { consumer: foreign, ..held }, Outcome::Processed)];
        assert_eq!(store.record(&outcomes).await.unwrap_err().kind(), ErrorKind::Incompatible);
        let leases = [held, hapax::Lease { consumer: foreign, ..held }];
        assert_eq!(store.renew(&leases, LEASE).await.unwrap_err().kind(), ErrorKind::Incompatible);
    }
    let records = format!("SELECT count(*) FROM {}.hapax_record WHERE state = 0", place.schema);
    assert_eq!(number(&place.owner, records).await, 1);
}

/// What a person wrote stays text, whatever it holds.
#[tokio::test]
async fn any_text_can_be_the_trouble() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    for (n, text) in
        ["'; DROP TABLE hapax_record; --", "nul \0 and \\ and \"", "", "日本語 \u{1f980}", "{,}"].iter().enumerate()
    {
        let held = lease(&store, consumer, n as u64).await;
        let trouble = hapax::Trouble { id: (*text).into(), error: (*text).into() };
        let outcome = Outcome::Failed { after: Duration::ZERO, counted: true, trouble };
        assert_eq!(store.record(&[(held, outcome)]).await.unwrap(), [Recorded::Done]);
        let Claim::Granted(_, Some(history)) = claim(&store, consumer, n as u64, 1_000 + n as u128).await else {
            panic!("it is due at once")
        };
        assert_eq!(&*history.trouble.error, text.replace('\0', "\u{fffd}"));
    }
}

/// The lease ends by the server's own clock, and `now()` would not move inside a transaction.
#[tokio::test]
async fn a_lease_ends_by_the_clock_of_the_server() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let short = Duration::from_millis(1_500);
    let first = store.claim(&[request(consumer, 1, 1)], short).await.unwrap().remove(0);
    let Claim::Granted(first, None) = first else { panic!("{first:?}") };
    let wait = match claim(&store, consumer, 1, 2).await {
        Claim::Held { wait } => wait,
        other => panic!("{other:?}"),
    };
    assert!(wait <= short, "{wait:?}");
    tokio::time::sleep(wait + Duration::from_millis(50)).await;
    let Claim::Granted(second, Some(history)) = claim(&store, consumer, 1, 3).await else { panic!("it is over") };
    assert!(second.fence > first.fence && history.crashes == 1 && second.attempt == 2);
    assert_eq!(store.record(&[(first, Outcome::Processed)]).await.unwrap(), [Recorded::Fenced]);
}

/// The connection of a call that was dropped half way is closed, and the next call has another.
#[tokio::test]
async fn a_dropped_call_leaves_no_broken_line() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    for n in 0..30_u64 {
        let batch = [request(consumer, n, 1)];
        let call = store.claim(&batch, LEASE);
        let _dropped_or_done = tokio::time::timeout(Duration::from_micros(n * 60), call).await;
        let again = store.claim(&batch, LEASE).await.unwrap().remove(0);
        assert!(matches!(again, Claim::Granted(lease, _) if lease.attempt == 1), "{again:?}");
    }
    let mut connection = sqlx::PgConnection::connect_with(&server()).await.unwrap();
    connection.ping().await.unwrap();
}
