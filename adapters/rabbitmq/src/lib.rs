//! RabbitMQ under hapax: [`RabbitBroker`] consumes a queue, [`RabbitPublisher`] sends.
//!
//! Quorum queues, confirms, prefetch for each consumer, connections of their own for consuming and publishing. The page
//! docs/rabbitmq.md tells set-up, least rights, what is created and what it promises.
//!
//! ```no_run
//! # async fn run() -> hapax::Result<()> {
//! use hapax_rabbitmq::RabbitBroker;
//!
//! let broker = RabbitBroker::builder("amqp://shop:secret@localhost/%2f".parse()?, "orders", "billing")
//!     .bind("shop.events", "order.*")
//!     .build()?;
//! // Consumer::builder("billing", broker, store) ..
//! # let _ = broker;
//! # Ok(())
//! # }
//! ```

mod address;
mod broker;
mod deadline;
mod error;
mod frames;
mod lane;
mod link;
mod outlet;
mod places;
mod publisher;
mod screen;
mod settings;
mod shared;
mod unsettled;
mod wire;

pub use broker::RabbitBroker;
pub use lapin;
pub use publisher::{RabbitPublisher, RabbitPublisherBuilder};
pub use settings::{RabbitBrokerBuilder, Topology};
