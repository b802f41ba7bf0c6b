//! The API as users write it: what the design, the README and ARCHITECTURE.md show, compiled and run.
//!
//! A snippet that is shown and does not compile is worse than none; so each one stands here, on the memory broker and on
//! the store it is shown with.

mod architecture;
mod handlers;
mod readme;
mod service;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hapax::{Consumer, ConsumerHandle, Event, Message};
use hapax_memory::MemoryBroker;
use hapax_sqlite::{SqliteStore, sqlx};
use serde::{Deserialize, Serialize};

/// Version 2: knows its currency.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct OrderPlaced {
    order: i64,
    cents: i64,
    currency: String,
}

impl Event for OrderPlaced {
    const TYPE: &'static str = "com.shop.order.placed";
    const VERSION: u32 = 2;
}

/// Version 1, as older producers still send it.
#[derive(Serialize, Deserialize)]
struct OrderPlacedV1 {
    order: i64,
    cents: i64,
}

impl Event for OrderPlacedV1 {
    const TYPE: &'static str = "com.shop.order.placed";
}

impl From<OrderPlacedV1> for OrderPlaced {
    fn from(old: OrderPlacedV1) -> Self {
        Self { order: old.order, cents: old.cents, currency: "EUR".to_owned() }
    }
}

fn placed(order: i64, cents: i64) -> Message {
    let event = OrderPlaced { order, cents, currency: "CHF".to_owned() };
    message(order, "com.shop.order.placed.v2", &event)
}

fn placed_by_an_older_producer(order: i64, cents: i64) -> Message {
    message(order, "com.shop.order.placed", &OrderPlacedV1 { order, cents })
}

fn message(id: i64, ty: &str, event: &impl Serialize) -> Message {
    Message::event("https://shop.example", id.to_string(), ty).with_json(event).expect("it has a JSON form")
}

/// Publishes, waits until each message was acked or set aside, and stops.
async fn deliver(
    consumer: Consumer,
    broker: &MemoryBroker,
    messages: impl IntoIterator<Item = Message>,
) -> ConsumerHandle {
    let handle = consumer.handle();
    let running = tokio::spawn(consumer.run(std::future::pending()));
    for message in messages {
        broker.publisher().send(message).await;
    }
    let settled = tokio::time::timeout(Duration::from_secs(30), broker.settled()).await;
    assert!(settled.is_ok(), "not every message was settled");
    handle.stop();
    running.await.expect("no panic").expect("it drains");
    handle
}

/// A SQLite store in a folder of its own, with a table of the user's.
struct Shop {
    store: SqliteStore,
    folder: PathBuf,
}

impl Shop {
    async fn open() -> Self {
        static FOLDERS: AtomicU32 = AtomicU32::new(0);
        let number = FOLDERS.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("hapax-api-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let store = SqliteStore::open(folder.join("shop.db")).await.expect("a store");
        let create = "CREATE TABLE invoices (number INTEGER, cents INTEGER, currency TEXT)";
        sqlx::query(create).execute(store.pool()).await.expect("a table");
        Self { store, folder }
    }

    async fn invoices(&self) -> Vec<(i64, i64, String)> {
        let rows = sqlx::query_as("SELECT number, cents, currency FROM invoices ORDER BY number");
        rows.fetch_all(self.store.pool()).await.expect("they are read")
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        // Left to the system if something still has it open.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// What handlers write down.
#[derive(Clone, Default)]
struct Noted(Arc<std::sync::Mutex<Vec<String>>>);

impl Noted {
    fn note(&self, what: impl Into<String>) {
        self.0.lock().expect("nobody panics while noting").push(what.into());
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().expect("nobody panics while noting").clone()
    }
}
