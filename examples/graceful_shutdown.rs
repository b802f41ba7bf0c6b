//! Shutdown: what runs may finish, what waits is given back for another consumer, and nothing runs twice.

use std::sync::Arc;
use std::time::Duration;

use hapax::{Consumer, Context, Failure, Message};
use hapax_memory::{MemoryBroker, MemoryStore};
use tokio::sync::mpsc;

async fn slow(event: Arc<Message>, cx: Context<mpsc::Sender<String>>) -> Result<(), Failure> {
    let id = event.attributes.id.as_deref().unwrap_or_default().to_owned();
    cx.state().send(format!("{id} begins")).await?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    cx.state().send(format!("{id} ends")).await?;
    Ok(())
}

async fn consumer(
    broker: &MemoryBroker,
    store: &MemoryStore,
    log: &mpsc::Sender<String>,
) -> Result<Consumer, hapax::BuildError> {
    Consumer::builder("parcels", broker.another(), store.clone())
        .state(log.clone())
        .on_any(slow)
        .concurrency(2)
        .drain(Duration::from_secs(5))
        .build()
        .await
}

#[tokio::main]
async fn main() -> Result<(), hapax::BoxError> {
    let (broker, store) = (MemoryBroker::new("parcels"), MemoryStore::new());
    let (log, mut happened) = mpsc::channel(64);
    for id in 1..=5 {
        broker.publisher().send(Message::event("https://shop.example", id.to_string(), "com.shop.parcel")).await;
    }

    let first = consumer(&broker, &store, &log).await?;
    let handle = first.handle();
    // In a service: `first.run(hapax::shutdown_signal())`, which resolves on SIGTERM and Ctrl-C.
    let (shutdown, asked) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(first.run(async { drop(asked.await) }));
    for _ in 0..2 {
        println!("first: {}", happened.recv().await.unwrap_or_default());
    }
    println!("first is told to stop");
    drop(shutdown);
    running.await??;
    while let Ok(event) = happened.try_recv() {
        println!("first: {event}");
    }
    println!("first processed {}", handle.statistics().processed);

    let second = consumer(&broker, &store, &log).await?;
    let handle = second.handle();
    let running = tokio::spawn(second.run(std::future::pending()));
    broker.settled().await;
    handle.stop();
    running.await??;
    println!("second processed {}, duplicates {}", handle.statistics().processed, handle.statistics().duplicates);
    Ok(())
}
