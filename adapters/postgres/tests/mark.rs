//! The mark as `docs/postgres.md` gives it, word for word, in a transaction that hapax knows nothing of.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::sync::Arc;
use std::time::Duration;

use fixture::{LEASE, Place, claim, lease, pool_of, server};
use hapax::{Claim, Consumer, Context, ErrorKind, Failure, Lease, Level, Message, Outcome, ProcessedStore, Recorded};
use hapax_memory::MemoryBroker;
use hapax_postgres::sqlx::{self, PgPool, Postgres, Transaction};

/// The first block of SQL after its comment.
fn mark() -> &'static str {
    let page = include_str!("../../../docs/postgres.md");
    let (_, after) = page.split_once("<!-- the mark -->").expect("the page has the mark");
    let (_, sql) = after.split_once("```sql\n").expect("as SQL");
    sql.split_once("```").expect("to its end").0
}

/// A pool of the user's, which finds the tables by its search path.
fn users_pool(place: &Place) -> PgPool {
    pool_of(server().options([("search_path", place.schema.as_str())]), 3)
}

async fn effect_and_mark(
    pool: &PgPool,
    key: String,
    fence: i64,
) -> Result<(Transaction<'static, Postgres>, u64), sqlx::Error> {
    let mut tx = pool.begin().await?;
    sqlx::query("INSERT INTO effects (what) VALUES ($1)").bind(&key).execute(&mut *tx).await?;
    let marked = sqlx::query(mark()).bind(&key).bind("billing").bind(fence).execute(&mut *tx).await?;
    Ok((tx, marked.rows_affected()))
}

async fn marked(pool: &PgPool, lease: &Lease) -> (Transaction<'static, Postgres>, u64) {
    effect_and_mark(pool, lease.key.to_hex(), lease.fence.get() as i64).await.unwrap()
}

#[tokio::test]
async fn the_mark_commits_with_the_effect_and_the_holder_finds_it_done() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let pool = users_pool(&place);
    let held = lease(&store, consumer, 1).await;
    let (tx, rows) = marked(&pool, &held).await;
    assert_eq!(rows, 1);
    tx.commit().await.unwrap();
    assert_eq!(store.record(&[(held, Outcome::Processed)]).await.unwrap(), [Recorded::AlreadyDone]);
    assert!(matches!(claim(&store, consumer, 1, 9).await, Claim::Processed { .. }));
    // And once is once.
    let (_dropped, rows) = marked(&pool, &held).await;
    assert_eq!(rows, 0);
}

#[tokio::test]
async fn the_mark_of_a_holder_that_was_overtaken_marks_nothing() {
    let place = Place::fresh().await;
    let (store, consumer) = place.opened().await;
    let pool = users_pool(&place);
    let zombie = lease(&store, consumer, 1).await;
    place.pass(LEASE * 2).await;
    let Claim::Granted(holder, _) = claim(&store, consumer, 1, 2).await else { panic!("it is free") };
    let (tx, rows) = marked(&pool, &zombie).await;
    assert_eq!(rows, 0);
    tx.rollback().await.unwrap();
    let (tx, rows) = marked(&pool, &holder).await;
    assert_eq!(rows, 1);
    // Rolled back, it never was.
    tx.rollback().await.unwrap();
    assert_eq!(store.record(&[(holder, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
}

/// While the user's transaction is open, a claim of that event waits a bounded time and answers.
#[tokio::test]
async fn a_mark_that_is_not_committed_yet_holds_up_its_event_only() {
    let place = Place::fresh().await;
    let store = place.builder().lock_timeout(Duration::from_millis(200)).connect().await.unwrap();
    let consumer = store.open("billing", fixture::RETENTION).await.unwrap();
    let pool = users_pool(&place);
    let held = lease(&store, consumer, 1).await;
    let (tx, _) = marked(&pool, &held).await;
    assert!(matches!(claim(&store, consumer, 1, 2).await, Claim::Held { .. }));
    assert!(matches!(claim(&store, consumer, 2, 3).await, Claim::Granted(..)));
    assert_eq!(store.record(&[(held, Outcome::Processed)]).await.unwrap_err().kind(), ErrorKind::Unavailable);
    tx.commit().await.unwrap();
    assert_eq!(store.record(&[(held, Outcome::Processed)]).await.unwrap(), [Recorded::AlreadyDone]);
}

/// As the page tells users to write it, in a handler that hapax runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_writes_the_mark_itself_has_one_effect_for_each_event() {
    const EVENTS: usize = 200;
    async fn handle(_: Arc<Message>, cx: Context<PgPool>) -> Result<(), Failure> {
        let (tx, rows) = effect_and_mark(cx.state(), cx.idempotency_key(), cx.fence() as i64).await?;
        if rows != 1 {
            return Err(Failure::retryable("another holds it"));
        }
        tx.commit().await?;
        Ok(())
    }
    let place = Place::fresh().await;
    let store = place.store().await;
    let broker = MemoryBroker::builder("orders").capacity(2 * EVENTS).ordered().build();
    for number in 0..EVENTS {
        for _ in 0..2 {
            broker.publisher().try_publish(&Message::event("/shop", format!("{number}"), "order.placed")).unwrap();
        }
    }
    let builder = Consumer::builder("billing", broker, store).state(users_pool(&place)).on_any(handle);
    let consumer = builder.require(Level::Deduplicated).build().await.unwrap();
    let handle = consumer.handle();
    let running = tokio::spawn(consumer.run(std::future::pending()));
    let done = async {
        while handle.statistics().processed < EVENTS as u64 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), done).await.expect("all are processed");
    handle.stop();
    running.await.unwrap().unwrap();
    let mut effects = place.rows().await;
    effects.dedup();
    assert_eq!(effects.len(), EVENTS);
    assert_eq!(place.rows().await.len(), EVENTS);
}
