//! Exactly one effect: the handler's rows and the mark that its event was processed commit in one transaction.
//!
//! A handler that fails after it has written leaves no row, and an event that is delivered again adds none.

use hapax::{Consumer, Context, Event, Failure, Message, Otherwise};
use hapax_memory::MemoryBroker;
use hapax_sqlite::{SqliteStore, SqliteTx, sqlx};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct OrderPlaced {
    order: i64,
    cents: i64,
}

impl Event for OrderPlaced {
    const TYPE: &'static str = "com.shop.order.placed";
}

async fn invoice(event: OrderPlaced, mut tx: SqliteTx, cx: Context<()>) -> Result<(), Failure> {
    let insert = "INSERT INTO invoices (number, cents) VALUES (?, ?)";
    sqlx::query(insert).bind(event.order).bind(event.cents).execute(&mut *tx).await?;
    if event.cents < 0 {
        return Err(Failure::permanent("an invoice over less than nothing"));
    }
    if cx.attempt() == 1 {
        return Err(Failure::retryable("the power fails, say"));
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), hapax::BoxError> {
    let folder = std::env::temp_dir().join(format!("hapax-transactional-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let store = SqliteStore::open(folder.join("shop.db")).await?;
    sqlx::query("CREATE TABLE invoices (number INTEGER, cents INTEGER)").execute(store.pool()).await?;

    let broker = MemoryBroker::new("orders");
    let consumer = Consumer::builder("invoicing", broker.another(), store.clone())
        .on_tx(invoice)
        .otherwise(Otherwise::DeadLetter)
        .build()
        .await?;
    println!("promised: {}", consumer.guarantee().level());
    let handle = consumer.handle();
    let running = tokio::spawn(consumer.run(std::future::pending()));

    for (order, cents) in [(1, 450), (2, 1200), (3, -1), (1, 450), (2, 1200)] {
        let event = OrderPlaced { order, cents };
        let message = Message::event("https://shop.example", order.to_string(), OrderPlaced::TYPE).with_json(&event)?;
        broker.publisher().send(message).await;
    }
    broker.settled().await;
    handle.stop();
    running.await??;

    let rows: Vec<(i64, i64)> =
        sqlx::query_as("SELECT number, cents FROM invoices ORDER BY number").fetch_all(store.pool()).await?;
    for (number, cents) in rows {
        println!("invoice {number}: {cents} cents");
    }
    let done = handle.statistics();
    println!("processed {}, duplicates {}, dead-lettered {}", done.processed, done.duplicates, done.dead_lettered);
    store.close().await;
    std::fs::remove_dir_all(folder)?;
    Ok(())
}
