//! Many events in one transaction: one commit for what would be a hundred, and an outcome for each event.
//!
//! An order that no invoice can be written for fails alone: nothing of the first try is left, and the others run again without it.

use hapax::{Consumer, Event, Failure, Item, Message, Otherwise, Outcomes};
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

async fn invoices(batch: Vec<Item<OrderPlaced, ()>>, mut tx: SqliteTx) -> Result<Outcomes, Failure> {
    let mut insert = sqlx::QueryBuilder::new("INSERT INTO invoices (number, cents) ");
    insert.push_values(&batch, |mut row, item| {
        row.push_bind(item.event.order).push_bind(item.event.cents);
    });
    insert.build().execute(&mut *tx).await?;
    let outcome = |item: &Item<OrderPlaced, ()>| match item.event.cents {
        ..0 => Err(Failure::permanent("an invoice over less than nothing")),
        _ => Ok(()),
    };
    Ok(batch.iter().map(outcome).collect())
}

#[tokio::main]
async fn main() -> Result<(), hapax::BoxError> {
    let folder = std::env::temp_dir().join(format!("hapax-batches-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let store = SqliteStore::open(folder.join("shop.db")).await?;
    sqlx::query("CREATE TABLE invoices (number INTEGER, cents INTEGER)").execute(store.pool()).await?;

    let broker = MemoryBroker::new("orders");
    for order in 1..=100 {
        let event = OrderPlaced { order, cents: if order == 42 { -1 } else { 450 } };
        let message = Message::event("https://shop.example", order.to_string(), OrderPlaced::TYPE).with_json(&event)?;
        broker.publisher().send(message.clone()).await;
        broker.publisher().send(message).await;
    }

    let consumer = Consumer::builder("invoicing", broker.another(), store.clone())
        .on_batch_tx(invoices)
        .otherwise(Otherwise::DeadLetter)
        .build()
        .await?;
    println!("promised: {}", consumer.guarantee().level());
    let handle = consumer.handle();
    let running = tokio::spawn(consumer.run(std::future::pending()));
    broker.settled().await;
    handle.stop();
    running.await??;

    let counted = "SELECT count(*), count(DISTINCT number), min(cents) FROM invoices";
    let (rows, numbers, least): (i64, i64, i64) = sqlx::query_as(counted).fetch_one(store.pool()).await?;
    println!("{rows} invoices of {numbers} orders, none below {least} cents");
    let done = handle.statistics();
    println!("processed {}, duplicates {}, dead-lettered {}", done.processed, done.duplicates, done.dead_lettered);
    store.close().await;
    std::fs::remove_dir_all(folder)?;
    Ok(())
}
