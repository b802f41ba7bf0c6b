//! A broker that notes how long each event took from its publication until it was settled.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use hapax::{Broker, Capabilities, Delivery, Limits, Message, Receipt, Result, Settlement, Want};
use hapax_memory::MemoryBroker;

/// The memory broker, watched.
#[derive(Clone, Debug)]
pub struct Timed {
    broker: Arc<MemoryBroker>,
    notes: Arc<Mutex<Notes>>,
}

#[derive(Debug, Default)]
struct Notes {
    published: HashMap<String, Instant>,
    under_way: HashMap<Receipt, Instant>,
    settled_us: Vec<f64>,
}

impl Timed {
    /// Watches `broker`.
    pub fn new(broker: MemoryBroker) -> Self {
        Self { broker: Arc::new(broker), notes: Arc::default() }
    }

    /// Publishes a message, from now on.
    pub fn publish(&self, message: &Message) {
        let id = id(message);
        self.with(|notes| notes.published.insert(id, Instant::now()));
        self.broker.publisher().try_publish(message).expect("the topic has room");
    }

    /// Microseconds of each settled event, in the order in which they were settled.
    pub fn settled_us(&self) -> Vec<f64> {
        self.with(|notes| notes.settled_us.clone())
    }

    fn with<T>(&self, note: impl FnOnce(&mut Notes) -> T) -> T {
        note(&mut self.notes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn id(message: &Message) -> String {
    message.attributes.id.as_deref().unwrap_or_default().to_owned()
}

#[async_trait]
impl Broker for Timed {
    async fn open(&self, limits: Limits) -> Result<()> {
        self.broker.open(limits).await
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        let deliveries = self.broker.receive(want).await?;
        self.with(|notes| {
            for delivery in &deliveries {
                if let Some(published) = notes.published.remove(&id(&delivery.message)) {
                    notes.under_way.insert(delivery.receipt, published);
                }
            }
        });
        Ok(deliveries)
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        let answers = self.broker.settle(batch).await;
        let now = Instant::now();
        self.with(|notes| {
            for (receipt, _) in batch {
                if let Some(published) = notes.under_way.remove(receipt) {
                    notes.settled_us.push(now.duration_since(published).as_secs_f64() * 1e6);
                }
            }
        });
        answers
    }

    async fn stop(&self) -> Result<()> {
        self.broker.stop().await
    }

    async fn close(&self) -> Result<()> {
        self.broker.close().await
    }

    fn capabilities(&self) -> Capabilities {
        self.broker.capabilities()
    }
}
