//! Order: events of one key take effect one after the other, as they were published; other keys do not wait for them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hapax::{Consumer, Context, Failure, Message, Order};
use hapax_memory::{MemoryBroker, MemoryStore};

/// What happened, by key.
type Log = Arc<Mutex<BTreeMap<String, Vec<String>>>>;

async fn step(event: Arc<Message>, cx: Context<Log>) -> Result<(), Failure> {
    let attributes = &event.attributes;
    let key = attributes.partition_key.as_deref().unwrap_or_default();
    let id = attributes.id.as_deref().unwrap_or_default();
    // The first of each order is the slowest, and fails once: the others of its key wait for it all the same.
    if id.ends_with("placed") {
        tokio::time::sleep(Duration::from_millis(30)).await;
        if cx.attempt() == 1 {
            return Err(Failure::retryable("try me again"));
        }
    }
    let mut log = cx.state().lock().unwrap_or_else(PoisonError::into_inner);
    log.entry(key.to_owned()).or_default().push(id.to_owned());
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), hapax::BoxError> {
    let log = Log::default();
    // Order needs a broker that keeps one: a Kafka topic, or here a topic of one partition.
    let broker = MemoryBroker::builder("orders").ordered().build();
    let consumer = Consumer::builder("warehouse", broker.another(), MemoryStore::new())
        .state(Arc::clone(&log))
        .on_any(step)
        .order(Order::PerKey)
        .delay(Duration::from_millis(20))
        .build()
        .await?;
    let handle = consumer.handle();
    let running = tokio::spawn(consumer.run(std::future::pending()));

    for what in ["placed", "paid", "packed", "shipped"] {
        for order in 1..=3 {
            let message = Message::event("https://shop.example", format!("{order}-{what}"), "com.shop.order.changed")
                .with_partition_key(format!("order/{order}"));
            broker.publisher().send(message).await;
        }
    }
    broker.settled().await;
    handle.stop();
    running.await??;

    for (key, events) in &*log.lock().unwrap_or_else(PoisonError::into_inner) {
        println!("{key}: {}", events.join(" "));
    }
    Ok(())
}
