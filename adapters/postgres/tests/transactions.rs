//! Effects and mark commit together or not at all, and no transaction is left open, whatever the handler, the network or
//! another transaction does.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::time::Duration;

use fixture::{LEASE, Place, RETENTION, claim, key, lease, number, pool_of, request, run, server};
use hapax::{
    Claim, ErrorKind, Lease, Outcome, ProcessedStore, Recorded, Renewal, Result, Status, StoreAdmin, TransactionalStore,
};
use hapax_postgres::sqlx::{self, AssertSqlSafe, Executor};
use hapax_postgres::{PgLent, PgTx, PostgresStore};
use hapax_testkit::proxy::{After, Proxy};

async fn status(store: &PostgresStore, n: u64) -> Option<Status> {
    store.look_up("billing", key(n)).await.unwrap().map(|view| view.status)
}

/// The two ways in which a transaction ends: the runtime takes the first.
const WAYS: [Way; 2] = [Way::AtOnce, Way::InTwo];

#[derive(Clone, Copy, Debug)]
enum Way {
    AtOnce,
    InTwo,
}

impl Way {
    async fn end(self, store: &PostgresStore, mut lent: PgLent, lease: Lease) -> Result<Recorded> {
        let mark = [(lease, Outcome::Processed)];
        let answers = match self {
            Self::AtOnce => store.record_and_commit(lent, &mark).await?,
            Self::InTwo => {
                let answers = store.record_in(&mut lent, &mark).await?;
                store.commit(lent).await?;
                answers
            }
        };
        Ok(answers[0])
    }
}

async fn written(place: &Place, store: &PostgresStore, row: &str) -> PgLent {
    let (mut tx, lent) = store.begin().await.unwrap();
    place.write(&mut tx, row).await;
    lent
}

/// How many transactions stay open on this schema's tables.
async fn open_transactions(place: &Place) -> i64 {
    let locks = format!(
        "SELECT count(DISTINCT l.pid) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation \
         JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = '{}' AND l.mode = 'RowExclusiveLock'",
        place.schema
    );
    number(&place.owner, locks).await
}

async fn no_transaction_stays_open(place: &Place) {
    let ended = async {
        while open_transactions(place).await > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), ended).await.expect("every transaction ends");
}

#[tokio::test]
async fn handlers_run_beside_one_another_and_beside_claims_and_renewals() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let (one, two) = (lease(&store, consumer, 1).await, lease(&store, consumer, 2).await);
    let (mut first, mut second) = (store.begin().await.unwrap(), store.begin().await.unwrap());
    place.write(&mut first.0, "one").await;
    place.write(&mut second.0, "two").await;
    assert!(matches!(claim(&store, consumer, 3, 3).await, Claim::Granted(..)));
    // A renewal changes the very record in which the transaction is about to end: it must not make it fail.
    assert_eq!(store.renew(&[one, two], LEASE * 2).await.unwrap(), [Renewal::Renewed; 2]);
    for ((tx, mut lent), lease) in [(second, two), (first, one)] {
        drop(tx);
        assert_eq!(store.record_in(&mut lent, &[(lease, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
        store.commit(lent).await.unwrap();
    }
    assert_eq!(place.rows().await, ["one", "two"]);
}

#[tokio::test]
async fn a_savepoint_takes_back_a_part_only() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let lease = lease(&store, consumer, 1).await;
    let (mut tx, mut lent) = store.begin().await.unwrap();
    place.write(&mut tx, "kept").await;
    for (what, keeps) in [("rolled back", false), ("dropped", false), ("committed", true)] {
        let mut part = tx.savepoint().await.unwrap();
        let insert = format!("INSERT INTO {}.effects VALUES ('{what}')", place.schema);
        part.execute(AssertSqlSafe(insert)).await.unwrap();
        match what {
            "rolled back" => part.rollback().await.unwrap(),
            _ if keeps => part.commit().await.unwrap(),
            _ => drop(part),
        }
    }
    // What fails in a savepoint does not break the whole.
    let mut part = tx.transaction().await.unwrap();
    part.execute("SELECT 1 / 0").await.unwrap_err();
    part.rollback().await.unwrap();
    drop(tx);
    assert_eq!(store.record_in(&mut lent, &[(lease, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    store.commit(lent).await.unwrap();
    assert_eq!(place.rows().await, ["committed", "kept"]);
}

/// A failed statement aborts the whole transaction, and a COMMIT then answers ROLLBACK without an error
/// (<https://www.postgresql.org/docs/current/sql-commit.html>): it must not pass for a commit.
#[tokio::test]
async fn an_error_that_the_handler_swallows_is_its_failure() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    for (n, way) in (1..).zip(WAYS) {
        let lease = lease(&store, consumer, n).await;
        let (mut tx, lent) = store.begin().await.unwrap();
        place.write(&mut tx, "lost").await;
        tx.execute("SELECT 1 / 0").await.unwrap_err();
        drop(tx);
        let error = way.end(&store, lent, lease).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected, "{way:?}: {error}");
        assert_eq!((place.rows().await.len(), status(&store, n).await), (0, Some(Status::Claimed)), "{way:?}");
    }
}

/// The answer to a query that the handler gave up comes when it is recorded.
#[tokio::test]
async fn an_error_that_the_handler_did_not_wait_for_is_its_failure() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    for (n, way) in (1..).zip(WAYS) {
        let lease = lease(&store, consumer, n).await;
        let (mut tx, lent) = store.begin().await.unwrap();
        place.write(&mut tx, "lost").await;
        let dividing = tx.execute("SELECT 1 / (random() * 0)::integer FROM pg_sleep(0.3)");
        tokio::time::timeout(Duration::from_millis(20), dividing).await.expect_err("it takes longer");
        drop(tx);
        let error = way.end(&store, lent, lease).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected, "{way:?}: {error}");
        assert_eq!((place.rows().await.len(), status(&store, n).await), (0, Some(Status::Claimed)), "{way:?}");
    }
}

#[tokio::test]
async fn a_transaction_that_the_handler_ended_is_not_recorded_in() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let endings = ["COMMIT", "ROLLBACK", "COMMIT; BEGIN", "ROLLBACK AND CHAIN"];
    for (n, (way, ending)) in (0..).zip(WAYS.into_iter().flat_map(|way| endings.map(|ending| (way, ending)))) {
        let lease = lease(&store, consumer, n).await;
        let (mut tx, lent) = store.begin().await.unwrap();
        sqlx::raw_sql(ending).execute(&mut *tx).await.unwrap();
        drop(tx);
        let error = way.end(&store, lent, lease).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected, "{way:?}, {ending}: {error}");
        assert!(error.to_string().contains("a COMMIT or ROLLBACK of its own"), "{way:?}, {ending}: {error}");
        assert_eq!(status(&store, n).await, Some(Status::Claimed), "{way:?}, {ending}");
    }
    no_transaction_stays_open(&place).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_dropped_at_any_moment_leaves_no_open_transaction() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let held = lease(&store, consumer, 1).await;
    for n in 0..40_u64 {
        let life = async {
            let mut lent = written(&place, &store, "dropped").await;
            store.record_in(&mut lent, &[(held, Outcome::Processed)]).await.unwrap();
            std::future::pending::<()>().await;
        };
        tokio::time::timeout(Duration::from_micros(n * 150), life).await.unwrap_err();
    }
    no_transaction_stays_open(&place).await;
    assert_eq!(place.rows().await.len(), 0);
    // And no connection of the pool is inside one without knowing it.
    for _ in 0..5 {
        place
            .pool
            .execute(AssertSqlSafe(format!("INSERT INTO {}.effects VALUES ('seen')", place.schema)))
            .await
            .unwrap();
    }
    assert_eq!(place.rows().await.len(), 5);
    let lent = written(&place, &store, "kept").await;
    drop(lent);
    assert_eq!(store.record(&[(held, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
}

#[tokio::test]
async fn a_transaction_kept_in_a_task_is_told_and_later_rolled_back() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let lease = lease(&store, consumer, 1).await;
    let (mut tx, mut lent) = store.begin().await.unwrap();
    place.write(&mut tx, "kept").await;
    let (release, released) = tokio::sync::oneshot::channel::<()>();
    let keeper = tokio::spawn(async move {
        let _ended = released.await;
        drop(tx);
    });
    let error = store.record_in(&mut lent, &[(lease, Outcome::Processed)]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
    drop(lent);
    release.send(()).unwrap();
    keeper.await.unwrap();
    no_transaction_stays_open(&place).await;
    assert_eq!(place.rows().await.len(), 0);
}

#[tokio::test]
async fn a_deferred_constraint_fails_the_commit_and_leaves_nothing() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let lease = lease(&store, consumer, 1).await;
    let schema = &place.schema;
    run(
        &place.owner,
        format!(
            "CREATE TABLE {schema}.parents (id int PRIMARY KEY); \
             CREATE TABLE {schema}.children (parent int REFERENCES {schema}.parents DEFERRABLE INITIALLY DEFERRED)"
        ),
    )
    .await;
    for way in WAYS {
        let (mut tx, lent) = store.begin().await.unwrap();
        tx.execute(AssertSqlSafe(format!("INSERT INTO {schema}.children VALUES (1)"))).await.unwrap();
        drop(tx);
        let error = way.end(&store, lent, lease).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected, "{way:?}: {error}");
        assert_eq!(status(&store, 1).await, Some(Status::Claimed), "{way:?}");
    }
}

/// What a handler did to its session makes the record or the commit fail: its failure, and nobody else's. The consumer
/// would stop for an error of configuration or a bug.
#[tokio::test]
async fn a_transaction_that_its_handler_broke_is_the_handlers_failure() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let schema = &place.schema;
    run(
        &place.owner,
        format!(
            "CREATE TABLE {schema}.checked (id int); \
             CREATE FUNCTION {schema}.refuse() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN RAISE EXCEPTION 'refused at the end'; END $$; \
             CREATE CONSTRAINT TRIGGER late AFTER INSERT ON {schema}.checked DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW WHEN (NEW.id = 1) EXECUTE FUNCTION {schema}.refuse(); \
             CREATE FUNCTION {schema}.divide() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN 1 / 0; END $$; \
             CREATE CONSTRAINT TRIGGER zero AFTER INSERT ON {schema}.checked DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW WHEN (NEW.id = 0) EXECUTE FUNCTION {schema}.divide()"
        ),
    )
    .await;
    // 42501 and 25006 where it is recorded, P0001 and 22012 at the commit.
    let broken = [
        "SET LOCAL ROLE pg_read_all_settings".to_owned(),
        "SET TRANSACTION READ ONLY".to_owned(),
        format!("INSERT INTO {schema}.checked VALUES (1)"),
        format!("INSERT INTO {schema}.checked VALUES (0)"),
    ];
    let each = WAYS.into_iter().flat_map(|way| broken.iter().map(move |statement| (way, statement)));
    for (n, (way, statement)) in (0..).zip(each) {
        let held = lease(&store, consumer, n).await;
        let (mut tx, lent) = store.begin().await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&mut *tx).await.unwrap();
        drop(tx);
        let error = way.end(&store, lent, held).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected, "{way:?}, {statement}: {error}");
        assert_eq!(status(&store, n).await, Some(Status::Claimed), "{way:?}, {statement}");
    }
    // What the commit runs into although the handler did its part may be gone next time: asked for by its own claim, it
    // counts as an attempt.
    run(
        &place.owner,
        format!(
            "CREATE FUNCTION {schema}.locked() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN RAISE EXCEPTION 'locked' USING ERRCODE = '55P03'; END $$; \
             CREATE CONSTRAINT TRIGGER locked AFTER INSERT ON {schema}.checked DEFERRABLE INITIALLY DEFERRED \
             FOR EACH ROW WHEN (NEW.id = 2) EXECUTE FUNCTION {schema}.locked()"
        ),
    )
    .await;
    let held = lease(&store, consumer, 100).await;
    let (mut tx, lent) = store.begin().await.unwrap();
    tx.execute(AssertSqlSafe(format!("INSERT INTO {schema}.checked VALUES (2)"))).await.unwrap();
    drop(tx);
    let error = store.record_and_commit(lent, &[(held, Outcome::Processed)]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown, "{error}");
    no_transaction_stays_open(&place).await;
}

/// sqlx would release the savepoint and call that a commit, and would roll back to it and call that a rollback.
#[tokio::test]
async fn a_savepoint_left_open_does_not_pass_for_a_commit() {
    let place = Place::fresh().await;
    // One connection, so that the next to use it is the one that finds what was left.
    let store = PostgresStore::builder(pool_of(server(), 1)).schema(&*place.schema).sweep_every(Duration::ZERO);
    let store = store.connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let held = lease(&store, consumer, 1).await;
    for way in WAYS {
        let (mut tx, lent) = store.begin().await.unwrap();
        std::mem::forget(tx.savepoint().await.unwrap());
        place.write(&mut tx, "lost").await;
        drop(tx);
        let error = way.end(&store, lent, held).await.expect_err("nothing was committed");
        assert_eq!(error.kind(), ErrorKind::Rejected, "{way:?}: {error}");
    }
    assert_eq!(
        store.record(&[(held, Outcome::Processed)]).await.unwrap(),
        [Recorded::Done],
        "on a connection in order"
    );
    assert_eq!(place.rows().await.len(), 0);
}

/// The values of a row stay out of what is logged: PostgreSQL quotes them in an error's detail.
#[tokio::test]
async fn no_value_of_a_row_is_shown() {
    const CANARY: &str = "canary-4111111111111111";
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let unique = format!("ALTER TABLE {}.effects ADD UNIQUE (what) DEFERRABLE INITIALLY DEFERRED", place.schema);
    run(&place.owner, unique).await;
    let held = lease(&store, consumer, 1).await;
    let (mut tx, mut lent) = store.begin().await.unwrap();
    place.write(&mut tx, CANARY).await;
    place.write(&mut tx, CANARY).await;
    drop(tx);
    assert_eq!(store.record_in(&mut lent, &[(held, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    let error = store.commit(lent).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected, "{error}");
    assert!(error.to_string().contains("23505"), "{error}");
    let shown = format!("{error} {error:?} {:#?}", std::error::Error::source(&error));
    assert!(!shown.contains(CANARY), "{shown}");
}

/// The pool is exhausted: `begin` answers in bounded time and waits for nobody for ever.
#[tokio::test]
async fn beginning_is_bounded_in_time() {
    let place = Place::fresh().await;
    let store = PostgresStore::builder(pool_of(server(), 2)).schema(&*place.schema).sweep_every(Duration::ZERO);
    let store = store.connect().await.unwrap();
    let taken = [store.pool().acquire().await.unwrap(), store.pool().acquire().await.unwrap()];
    let begun = tokio::time::timeout(Duration::from_secs(15), store.begin()).await.expect("an answer");
    let error = begun.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    drop(taken);
    store.begin().await.unwrap();
}

/// Consumers that share a store share its pool: however many handlers want a transaction, two connections are left for
/// claims, renewals and records.
#[tokio::test]
async fn the_transactions_of_all_clones_leave_connections_for_claims() {
    let place = Place::fresh().await;
    let store = PostgresStore::builder(pool_of(server(), 4)).schema(&*place.schema).sweep_every(Duration::ZERO);
    let store = store.connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let held = lease(&store, consumer, 1).await;
    let running = (store.begin().await.unwrap(), store.clone().begin().await.unwrap());
    let other = store.clone();
    let mut waiting = tokio::spawn(async move { other.begin().await });
    let early = tokio::time::timeout(Duration::from_millis(500), &mut waiting).await;
    assert!(early.is_err(), "a third waits its turn");
    let renewed = tokio::time::timeout(Duration::from_secs(3), store.renew(&[held], LEASE)).await;
    assert_eq!(renewed.expect("a connection is free").unwrap(), [Renewal::Renewed]);
    let (first, second) = running;
    drop(first);
    let third =
        tokio::time::timeout(Duration::from_secs(5), waiting).await.expect("its turn has come").unwrap().unwrap();
    // The handler's half alone does not end a turn.
    let (tx, lent) = third;
    drop(tx);
    let early = tokio::time::timeout(Duration::from_millis(300), store.begin()).await;
    assert!(early.is_err(), "its transaction is still to be committed");
    drop((lent, second));
    store.begin().await.unwrap();
}

async fn through_a_proxy(place: &Place) -> (Proxy, PostgresStore, hapax::ConsumerId) {
    let upstream = format!("{}:{}", server().get_host(), server().get_port());
    let proxy = Proxy::start(upstream).await.unwrap();
    let options = server().host("127.0.0.1").port(proxy.address().port());
    let store = PostgresStore::builder(pool_of(options, 4)).schema(&*place.schema).sweep_every(Duration::ZERO);
    let store = store.connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    (proxy, store, consumer)
}

/// The commit took place and its answer was lost: the caller is told that it does not know, asks again with the same
/// token, and the effect is there once.
#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_unknown_and_takes_effect_once() {
    for way in WAYS {
        let place = Place::fresh().await;
        let (proxy, store, consumer) = through_a_proxy(&place).await;
        let Claim::Granted(lease, None) = claim(&store, consumer, 1, 11).await else { panic!("it is free") };
        let mut lent = written(&place, &store, "once").await;
        let mark = [(lease, Outcome::Processed)];
        let ended = match way {
            Way::AtOnce => {
                proxy.cut_after_request(After::Reply);
                store.record_and_commit(lent, &mark).await.map(drop)
            }
            Way::InTwo => {
                assert_eq!(store.record_in(&mut lent, &mark).await.unwrap(), [Recorded::Done]);
                proxy.cut_after_request(After::Reply);
                store.commit(lent).await
            }
        };
        assert_eq!(ended.map_err(|error| error.kind()), Err(ErrorKind::Unknown), "{way:?}");
        assert!(proxy.resets() > 0, "the answer was lost, and nothing else");
        proxy.heal();
        let again = claim(&store, consumer, 1, 11).await;
        assert!(matches!(again, Claim::Processed { .. }), "{way:?}: {again:?}");
        assert_eq!(place.rows().await, ["once"], "{way:?}");
    }
}

/// Whoever gives up waiting for the end finds both, effect and mark, or neither.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_dropped_at_any_moment_leaves_effect_and_mark_or_neither() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let mut committed = Vec::new();
    for n in 0..40_u64 {
        let held = lease(&store, consumer, n).await;
        let lent = written(&place, &store, &format!("{n:03}")).await;
        let mark = [(held, Outcome::Processed)];
        let ending = store.record_and_commit(lent, &mark);
        let _given_up = tokio::time::timeout(Duration::from_micros(n * 100), ending).await;
        no_transaction_stays_open(&place).await;
        if status(&store, n).await == Some(Status::Processed) {
            committed.push(format!("{n:03}"));
        }
    }
    assert_eq!(place.rows().await, committed);
}

/// Where it is wanted handlers pass connections on to one another. They leave no transaction open on them, and the pool has
/// them back.
#[tokio::test]
async fn handlers_share_connections_and_the_pool_has_them_back() {
    let place = Place::fresh().await;
    let pool = pool_of(server(), 5);
    let store = PostgresStore::builder(pool.clone()).schema(&*place.schema).sweep_every(Duration::ZERO);
    let store = store.reuse_connections(true).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let mut held = Vec::new();
    for n in 0..100 {
        held.push(lease(&store, consumer, n).await);
    }
    let mut marks = 0;
    for (n, held) in held.into_iter().enumerate() {
        let (mut tx, lent) = store.begin().await.unwrap();
        let (own, began): (bool, bool) = sqlx::query_as(
            "SELECT pg_current_xact_id_if_assigned() IS NULL, now() > clock_timestamp() - interval '10 s'",
        )
        .fetch_one(&mut *tx)
        .await
        .unwrap();
        assert!(own && began, "a transaction of its own");
        place.write(&mut tx, &format!("{n:03}")).await;
        let prepared = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%hapax_record%'";
        let count: i64 = sqlx::query_scalar(prepared).fetch_one(&mut *tx).await.unwrap();
        marks += count;
        drop(tx);
        assert_eq!(store.record_and_commit(lent, &[(held, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    }
    assert_eq!(place.rows().await.len(), 100);
    assert!(marks > 50, "handlers in a row share a connection, on which the mark is prepared: {marks}");
    no_transaction_stays_open(&place).await;
    let free = async {
        while pool.num_idle() < pool.size() as usize {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), free).await.expect("they go back when there is nothing to do");
    tokio::time::timeout(Duration::from_secs(10), pool.close()).await.expect("closing the pool does not wait");
}

/// Whoever waits for the pool goes before the next handler.
#[tokio::test]
async fn a_pool_without_room_has_each_connection_back() {
    let place = Place::fresh().await;
    let pool = pool_of(server(), 3);
    let store = PostgresStore::builder(pool.clone()).schema(&*place.schema).sweep_every(Duration::ZERO);
    let store = store.reuse_connections(true).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let held = lease(&store, consumer, 1).await;
    let lent = written(&place, &store, "kept").await;
    let mut others = Vec::new();
    while pool.size() < 3 || pool.num_idle() > 0 {
        others.push(pool.acquire().await.unwrap());
    }
    let waiting = tokio::spawn({
        let pool = pool.clone();
        async move { pool.acquire().await.map(drop) }
    });
    assert_eq!(store.record_and_commit(lent, &[(held, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    // Handlers that come at once do not get it first, for a second and 64 times in a row.
    let next = tokio::time::timeout(Duration::from_secs(10), store.begin());
    let (waited, next) = tokio::join!(waiting, next);
    waited.unwrap().unwrap();
    next.expect("its turn comes").unwrap();
}

/// A mark that was prepared in a message that failed is prepared all the same.
#[tokio::test]
async fn a_mark_that_cannot_be_set_leaves_the_connection_in_order() {
    let place = Place::fresh().await;
    let store = place.builder().reuse_connections(true).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let mut held = Vec::new();
    for n in 0..12 {
        held.push(lease(&store, consumer, n).await);
    }
    for (n, held) in (0..).zip(held) {
        if n % 2 == 0 {
            assert!(store.forget("billing", key(n)).await.unwrap());
        }
        let lent = written(&place, &store, &format!("{n:03}")).await;
        let wanted = if n % 2 == 0 { Recorded::Vanished } else { Recorded::Done };
        assert_eq!(store.record_and_commit(lent, &[(held, Outcome::Processed)]).await.unwrap(), [wanted], "event {n}");
    }
    assert_eq!(place.rows().await.len(), 12);
}

/// The server ended a connection between two handlers: the next has another.
#[tokio::test]
async fn a_kept_connection_that_the_server_ended_is_replaced() {
    let place = Place::fresh().await;
    let store = place.builder().reuse_connections(true).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    for n in 0..5 {
        let held = lease(&store, consumer, n).await;
        let (mut tx, lent) = store.begin().await.expect("whatever became of the connection");
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
        drop(tx);
        let answers = store.record_and_commit(lent, &[(held, Outcome::Processed)]).await.unwrap();
        assert_eq!(answers, [Recorded::Done]);
        run(&place.owner, &format!("SELECT pg_terminate_backend({pid})")).await;
    }
}

/// A handler that ends the transaction by itself is told so where the mark is prepared too.
#[tokio::test]
async fn a_handler_that_ends_a_kept_transaction_is_told_so() {
    let place = Place::fresh().await;
    let store = place.builder().reuse_connections(true).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    for (round, end) in ["COMMIT", "ROLLBACK", "COMMIT; BEGIN"].into_iter().enumerate() {
        let first = 10 * round as u64;
        for n in first..first + 5 {
            let held = lease(&store, consumer, n).await;
            let (mut tx, lent) = store.begin().await.unwrap();
            if n == first + 4 {
                sqlx::raw_sql(AssertSqlSafe(end)).execute(&mut *tx).await.unwrap();
            }
            drop(tx);
            let answer = store.record_and_commit(lent, &[(held, Outcome::Processed)]).await;
            if n < first + 4 {
                assert_eq!(answer.unwrap(), [Recorded::Done]);
            } else {
                let error = answer.expect_err(end);
                assert_eq!(error.kind(), ErrorKind::Rejected, "{end}: {error}");
                assert!(error.to_string().contains("ended"), "{end}: {error}");
            }
        }
        no_transaction_stays_open(&place).await;
    }
}

/// The commit did not arrive: the same token is granted the same lease, and the handler runs again.
#[tokio::test]
async fn a_commit_that_never_arrived_leaves_nothing_and_the_lease_as_it_was() {
    let place = Place::fresh().await;
    let (proxy, store, consumer) = through_a_proxy(&place).await;
    let Claim::Granted(lease, None) = claim(&store, consumer, 1, 11).await else { panic!("it is free") };
    let mut lent = written(&place, &store, "lost").await;
    store.record_in(&mut lent, &[(lease, Outcome::Processed)]).await.unwrap();
    proxy.drop_connections();
    proxy.resets_reach(1).await;
    assert_eq!(store.commit(lent).await.unwrap_err().kind(), ErrorKind::Unknown);
    no_transaction_stays_open(&place).await;
    let again = store.claim(&[request(consumer, 1, 11)], LEASE).await;
    let again = match again {
        Ok(answers) => answers,
        // The line that was kept was cut as well.
        Err(_) => store.claim(&[request(consumer, 1, 11)], LEASE).await.unwrap(),
    };
    assert!(matches!(&again[0], Claim::Granted(same, _) if *same == lease), "{again:?}");
    assert_eq!(place.rows().await.len(), 0);
}

/// Claims and records whose answers are lost are asked again as they were.
#[tokio::test]
async fn a_batch_whose_answer_is_lost_can_be_asked_again() {
    let place = Place::fresh().await;
    let (proxy, store, consumer) = through_a_proxy(&place).await;
    proxy.cut_after_request(After::Reply);
    let batch = [request(consumer, 1, 1), request(consumer, 2, 2)];
    assert!(store.claim(&batch, LEASE).await.unwrap_err().is_retryable());
    proxy.heal();
    store.claim(&batch, LEASE).await.unwrap();
    // The second use of a connection prepares on it: from here on a call is one message.
    let claims = store.claim(&batch, LEASE).await.unwrap();
    let held: Vec<_> = claims
        .iter()
        .map(|claim| match claim {
            Claim::Granted(lease, None) if lease.attempt == 1 => *lease,
            other => panic!("{other:?}"),
        })
        .collect();
    let outcomes = [(held[0], Outcome::Processed), (held[1], fixture::failed())];
    proxy.cut_after_request(After::Reply);
    assert!(store.record(&outcomes).await.unwrap_err().is_retryable());
    proxy.heal();
    assert_eq!(store.record(&outcomes).await.unwrap(), [Recorded::AlreadyDone; 2]);
}

/// A server that neither answers nor closes: the call ends by itself, and its connection is not used again.
#[tokio::test]
async fn a_server_that_does_not_answer_ends_the_call() {
    let place = Place::fresh().await;
    let upstream = format!("{}:{}", server().get_host(), server().get_port());
    let proxy = Proxy::start(upstream).await.unwrap();
    let options = server().host("127.0.0.1").port(proxy.address().port());
    let builder = PostgresStore::builder(pool_of(options, 4)).schema(&*place.schema).sweep_every(Duration::ZERO);
    let store = builder.statement_timeout(Duration::from_secs(1)).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    proxy.freeze();
    let asked = tokio::time::timeout(Duration::from_secs(10), store.claim(&[request(consumer, 1, 1)], LEASE)).await;
    let error = asked.expect("a deadline").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown, "{error}");
    proxy.drop_connections();
    proxy.heal();
    assert!(matches!(claim(&store, consumer, 1, 1).await, Claim::Granted(..)));
}

/// A handler's types: what the documentation shows compiles.
#[tokio::test]
async fn queries_run_on_the_transaction_by_reference() {
    let place = Place::fresh().await;
    let store = place.store().await;
    async fn one(mut tx: PgTx) -> Result<i32, sqlx::Error> {
        sqlx::query_scalar("SELECT 1").persistent(false).fetch_one(&mut *tx).await
    }
    let (tx, lent) = store.begin().await.unwrap();
    assert_eq!(one(tx).await.unwrap(), 1);
    drop(lent);
}

/// Somebody else's claim of the next event is under way: this commit does without it, and nothing of it is undone.
#[tokio::test]
async fn a_commit_whose_next_event_is_being_claimed_takes_place() {
    let place = Place::fresh().await;
    for reuses in [false, true] {
        let builder = place.builder().lock_timeout(Duration::from_millis(200)).reuse_connections(reuses);
        let store = builder.connect().await.unwrap();
        let consumer = store.open("billing", RETENTION).await.unwrap();
        let first = if reuses { 10 } else { 0 };
        for n in first..first + 4 {
            let held = lease(&store, consumer, n).await;
            let mut other = place.owner.begin().await.unwrap();
            let next = request(consumer, n + 100, 1);
            let insert = format!(
                "INSERT INTO {}.hapax_record (key, consumer, state, time, fence, attempt, crashes, fingerprint) \
                 VALUES ('{}', {}, 0, 0, 1, 1, 0, '{}')",
                place.schema,
                next.key.to_hex(),
                consumer.0,
                key(1).to_hex()
            );
            sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut *other).await.unwrap();
            let row = format!("row {n}");
            let lent = written(&place, &store, &row).await;
            let answer = store.commit_and_claim(lent, &[(held, Outcome::Processed)], &next, LEASE).await;
            assert_eq!(answer.unwrap(), (vec![Recorded::Done], None));
            assert!(place.rows().await.contains(&row));
            other.rollback().await.unwrap();
            // Whoever is not kept away any more has it.
            assert!(matches!(claim(&store, consumer, n + 100, 1).await, Claim::Granted(..)));
        }
        no_transaction_stays_open(&place).await;
    }
}

/// Claims that travel with a commit keep above the fences of what was removed, on connections that are kept too.
#[tokio::test]
async fn a_claim_with_a_commit_has_a_fence_above_what_was_removed() {
    let place = Place::fresh().await;
    let store = place.builder().reuse_connections(true).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let floor = 1_u64 << 52;
    let mut held = lease(&store, consumer, 0).await;
    run(&place.owner, &format!("UPDATE {}.hapax_meta SET value = {floor} WHERE name = 'fence_floor'", place.schema))
        .await;
    for n in 1..12 {
        let lent = written(&place, &store, "row").await;
        let next = request(consumer, n, 1);
        let answer = store.commit_and_claim(lent, &[(held, Outcome::Processed)], &next, LEASE).await.unwrap();
        assert_eq!(answer.0, [Recorded::Done]);
        held = answer.1.expect("nobody knows it yet");
        assert!(held.fence.get() > floor);
        assert_eq!(store.renew(&[held], LEASE).await.unwrap(), [Renewal::Renewed]);
    }
}

/// What a handler chose for its transaction, a short limit or a snapshot that stands still, is no reason to undo it for the
/// sake of the next event, which another has claimed or is claiming.
#[tokio::test]
async fn a_commit_takes_place_whatever_its_handler_set() {
    let place = Place::fresh().await;
    let store = place.builder().reuse_connections(true).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    for (n, set) in [
        (0, "SET LOCAL statement_timeout = '50ms'"),
        (1, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"),
        (2, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"),
    ] {
        let (held, next) = (lease(&store, consumer, n).await, request(consumer, n + 100, 1));
        let (mut tx, lent) = store.begin().await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(set)).execute(&mut *tx).await.unwrap();
        place.write(&mut tx, set).await;
        drop(tx);
        let mut other = place.owner.begin().await.unwrap();
        let insert = format!(
            "INSERT INTO {}.hapax_record (key, consumer, state, time, fence, attempt, crashes, fingerprint) \
             SELECT '{}', consumer, 0, 0, 1, 1, 0, fingerprint FROM {0}.hapax_record WHERE key = '{}'",
            place.schema,
            next.key.to_hex(),
            held.key.to_hex()
        );
        sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut *other).await.unwrap();
        let other = if n == 0 {
            Some(other)
        } else {
            other.commit().await.unwrap();
            None
        };
        let answer = store.commit_and_claim(lent, &[(held, Outcome::Processed)], &next, LEASE).await;
        assert_eq!(answer.expect(set), (vec![Recorded::Done], None), "{set}");
        assert!(place.rows().await.contains(&set.to_owned()));
        drop(other);
    }
    no_transaction_stays_open(&place).await;
}

/// A claim that somebody else inserts and does not commit keeps back no other event of its batch.
#[tokio::test]
async fn an_event_that_is_being_claimed_keeps_no_other_back() {
    let place = Place::fresh().await;
    let store = place.builder().lock_timeout(Duration::from_millis(100)).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    let batch: Vec<_> = (0..8).map(|n| request(consumer, n, 1)).collect();
    let mut other = place.owner.begin().await.unwrap();
    let insert = format!(
        "INSERT INTO {}.hapax_record (key, consumer, state, time, fence, attempt, crashes, fingerprint) \
         VALUES ('{}', {}, 0, 0, 1, 1, 0, '{}')",
        place.schema,
        batch[3].key.to_hex(),
        consumer.0,
        key(1).to_hex()
    );
    sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut *other).await.unwrap();
    let refused = store.claim(&batch, LEASE).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Rejected, "to be halved: {refused}");
    let alone = store.claim(&batch[3..4], LEASE).await.unwrap_err();
    assert_eq!(alone.kind(), ErrorKind::Unavailable, "alone it is asked for again: {alone}");
    other.rollback().await.unwrap();
    assert!(store.claim(&batch, LEASE).await.unwrap().iter().all(|claim| matches!(claim, Claim::Granted(..))));
}
