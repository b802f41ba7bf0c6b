//! Failures: what may succeed later is tried again, what never will is set aside with its reason, and sent back once the
//! cause is mended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hapax::{Consumer, Context, Event, Failure, Message, Otherwise};
use hapax_memory::{MemoryBroker, MemoryStore};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct OrderPlaced {
    order: u32,
    country: String,
}

impl Event for OrderPlaced {
    const TYPE: &'static str = "com.shop.order.placed";
}

/// Whether somebody has taught us to ship there.
static ATLANTIS_IS_KNOWN: AtomicBool = AtomicBool::new(false);

async fn ship(event: OrderPlaced, cx: Context<()>) -> Result<(), Failure> {
    let attempt = cx.attempt();
    if event.country == "Atlantis" && !ATLANTIS_IS_KNOWN.load(Ordering::SeqCst) {
        println!("order {}: no such country", event.order);
        return Err(Failure::permanent("no such country"));
    }
    if event.order == 1 && attempt < 3 {
        println!("order {}: attempt {attempt} fails", event.order);
        return Err(Failure::retryable("the carrier is busy"));
    }
    println!("order {}: shipped at attempt {attempt}", event.order);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), hapax::BoxError> {
    let broker = MemoryBroker::new("orders");
    let consumer = Consumer::builder("shipping", broker.another(), MemoryStore::new())
        .on(ship)
        .otherwise(Otherwise::DeadLetter)
        .concurrency(1)
        .delay(Duration::from_millis(20))
        .build()
        .await?;
    let handle = consumer.handle();
    let running = tokio::spawn(consumer.run(std::future::pending()));

    for (order, country) in [(1, "Norway"), (2, "Atlantis")] {
        let event = OrderPlaced { order, country: country.to_owned() };
        let message = Message::event("https://shop.example", order.to_string(), OrderPlaced::TYPE).with_json(&event)?;
        broker.publisher().send(message).await;
    }
    broker.settled().await;

    for (message, letter) in broker.dead_letters() {
        let id = message.attributes.id.as_deref().unwrap_or_default();
        println!("set aside: order {id}, {}: {}", letter.reason, letter.error);
    }

    // The cause is mended. A dead letter that is sent back bears a token that lets it run once more; a copy of the event
    // without the token is a duplicate for ever.
    ATLANTIS_IS_KNOWN.store(true, Ordering::SeqCst);
    println!("sent back: {}", broker.redrive());
    broker.settled().await;

    handle.stop();
    running.await??;
    println!("left in the dead letters: {}", broker.dead_letters().len());
    Ok(())
}
