//! Kafka under hapax: a consumer group as a broker, and a publisher.
//!
//! ```no_run
//! # async fn open(limits: hapax::Limits) -> hapax::Result<()> {
//! use hapax::Broker;
//! use hapax_kafka::{Declare, KafkaBroker};
//!
//! let broker = KafkaBroker::builder("kafka://127.0.0.1:9092".parse()?, "billing", ["orders"])
//!     .declare(Declare::partitions(6))
//!     .build()?;
//! # broker.open(limits).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What each verb is at Kafka
//!
//! | contract | Kafka |
//! |---|---|
//! | `open` | topics checked, or created on request; a member of the group, subscribed to the topics and their retry topics |
//! | `receive` | fetched by a thread that polls without pause; partitions are paused where enough is buffered |
//! | `Ack` | done here; the offset behind the contiguous done prefix is committed within `commit_interval` |
//! | `Release` | no verb of Kafka: handed out again here, or fetched by whoever gets the partition |
//! | `Retry` | produced to `{topic}.{group}.retry.{step}` with acks of all in-sync replicas, then done |
//! | `DeadLetter` | produced to `{topic}.{group}.dead` likewise, then done |
//! | a session | one assignment of one partition |
//! | `stop` | nothing more is handed out; membership and settling go on |
//! | `close` | the last commit, and leaving the group |
//!
//! # Limits
//!
//! - What is done behind something that is not is kept by this process: a crash delivers it again, and it is found processed.
//!   A partition is fetched at most 16,384 offsets beyond the first that is not done.
//! - A retry is overtaken by what follows it, so with order by key retries wait in this process.
//! - Kafka counts no deliveries: [`Delivery::count`](hapax::Delivery::count) is `None`, the record counts.
//! - Kafka's transactions are not used.
//!
//! TLS, GSSAPI and zstd are the features `tls`, `sasl` and `zstd`, which build librdkafka with the system's libraries.

mod assignment;
mod broker;
mod client;
mod committer;
mod error;
mod fetched;
mod member;
mod places;
mod poller;
mod producer;
mod properties;
mod publisher;
mod settings;
mod state;
mod topics;
mod tracker;
mod waiting;
mod wire;

pub use broker::KafkaBroker;
pub use publisher::{KafkaPublisher, KafkaPublisherBuilder};
pub use rdkafka;
pub use settings::{Declare, KafkaBrokerBuilder};
