//! A broker and a store in memory, for tests, examples and simulations: the executable reference of hapax.
//!
//! Both keep every clause of their contracts and nothing else: they live as long as the process, know no clock but
//! tokio's and no randomness but a seed, so that a test under the paused clock repeats exactly.
//!
//! ```
//! use hapax::{Broker, Limits, Message, MessageLimits, Settlement, Want};
//! use hapax_memory::MemoryBroker;
//! # use std::time::Duration;
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(async {
//! let broker = MemoryBroker::new("orders");
//! broker.publisher().send(Message::event("https://shop.example", "42", "com.shop.order.placed")).await;
//!
//! # let (drain, held_max) = (Duration::from_secs(1), Duration::from_secs(60));
//! # let limits = Limits { events: 16, bytes: 1 << 20, held_max, drain, message: MessageLimits::DEFAULT };
//! broker.open(limits).await?;
//! let deliveries = broker.receive(Want { events: 16, bytes: 1 << 20 }).await?;
//! broker.settle(&[(deliveries[0].receipt, Settlement::Ack)]).await.remove(0)?;
//! broker.settled().await;
//! # Ok::<(), hapax::Error>(()) })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod broker;
mod publisher;
mod store;

pub use broker::{MemoryBroker, MemoryBrokerBuilder, Standing};
pub use publisher::MemoryPublisher;
pub use store::{MemoryStore, MemoryStoreBuilder};
