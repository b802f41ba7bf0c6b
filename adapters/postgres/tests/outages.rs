//! The server crashes and comes back: what was acknowledged is there, the store goes on by itself, and nothing is done
//! twice.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::sync::Arc;
use std::time::Duration;

use fixture::{Cluster, LEASE, RETENTION, claim, lease, leases, number, pool_of, process, request, run};
use hapax::{
    Claim, Consumer, Context, Failure, Level, Message, Order, Outcome, ProcessedStore, Recorded, TransactionalStore,
};
use hapax_memory::MemoryBroker;
use hapax_postgres::sqlx;
use hapax_postgres::{PgTx, PostgresStore};

#[tokio::test]
async fn a_store_goes_on_after_its_server_crashed() {
    let cluster = Cluster::start(&[]).await;
    let store = PostgresStore::builder(pool_of(cluster.options(), 4)).migrate(true).connect().await.unwrap();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    process(&store, consumer, 0..50).await;
    let held = lease(&store, consumer, 100).await;
    let (tx, mut lent) = store.begin().await.unwrap();
    drop(tx);
    store.record_in(&mut lent, &[(held, Outcome::Processed)]).await.unwrap();
    cluster.crash();
    let error = store.commit(lent).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    let error = store.claim(&[request(consumer, 101, 1)], LEASE).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert!(store.probe().await.unwrap_err().is_retryable());
    cluster.up(&[]).await;
    let back = async {
        while store.probe().await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), back).await.expect("it is back without a restart of ours");
    assert!(matches!(claim(&store, consumer, 49, 77).await, Claim::Processed { .. }));
    assert_eq!(store.record(&[(held, Outcome::Processed)]).await.unwrap(), [Recorded::Done], "the lease outlived it");
    assert_eq!(leases(&store, consumer, 200..210).await.len(), 10);
}

async fn effect(message: Arc<Message>, mut tx: PgTx, _: Context<()>) -> Result<(), Failure> {
    let insert = sqlx::query("INSERT INTO effects (id) VALUES ($1)").bind(message.attributes.id.as_deref());
    insert.execute(&mut *tx).await?;
    Ok(())
}

/// A whole consumer with a transactional handler over two crashes of its server: one effect for each event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_event_takes_effect_once_over_crashes_of_the_server() {
    const EVENTS: usize = 600;
    let cluster = Cluster::start(&[]).await;
    let pool = pool_of(cluster.options(), 8);
    let store = PostgresStore::builder(pool.clone()).migrate(true).connect().await.unwrap();
    run(&pool, "CREATE TABLE effects (id text NOT NULL)").await;
    let broker = MemoryBroker::builder("orders").capacity(2 * EVENTS).ordered().build();
    for number in 0..EVENTS {
        let message = Message::event("/shop", format!("{number}"), "order.placed");
        broker.publisher().try_publish(&message).unwrap();
        if number % 10 == 0 {
            broker.publisher().try_publish(&message).unwrap();
        }
    }
    let builder = Consumer::builder("billing", broker, store.clone()).on_any_tx(effect);
    let builder =
        builder.order(Order::Unordered).concurrency(8).lease(Duration::from_secs(3)).require(Level::ExactlyOnceEffect);
    let consumer = builder.call_timeout(Duration::from_secs(1)).build().await.unwrap();
    let handle = consumer.handle();
    let running = tokio::spawn(consumer.run(std::future::pending()));
    for share in [4, 2] {
        while handle.statistics().processed < (EVENTS / share) as u64 / 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cluster.crash();
        tokio::time::sleep(Duration::from_millis(300)).await;
        cluster.up(&[]).await;
    }
    let done = async {
        // A commit whose answer was lost is found processed and not counted as such: ask the store.
        loop {
            let processed = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM hapax_record WHERE state = 3");
            match processed.persistent(false).fetch_one(&pool).await {
                Ok(processed) if processed == EVENTS as i64 => return,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), done).await.expect("it goes on by itself");
    handle.stop();
    running.await.unwrap().unwrap();
    assert_eq!(number(&pool, "SELECT count(*) FROM effects").await, EVENTS as i64);
    assert_eq!(number(&pool, "SELECT count(DISTINCT id) FROM effects").await, EVENTS as i64);
}
