//! The brokers to choose from, and what the worker asks of one beside consuming it.

use std::sync::Arc;
use std::time::Duration;

use hapax::{Broker, Error, ErrorKind, Result};
use hapax_kafka::{Declare, KafkaBroker};
use hapax_memory::MemoryBroker;
use hapax_rabbitmq::RabbitBroker;
use hapax_redis::{RedisBroker, RedisServer};

use crate::options::{BrokerKind, Options};

/// Of topics that are created here: so many workers can share one.
const PARTITIONS: u16 = 6;
/// How long Kafka waits for a worker that died; the least that its servers take by default.
const SESSION_TIMEOUT: Duration = Duration::from_secs(6);

/// A topic with a group, on the broker that was chosen. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) enum Queue {
    /// In this process.
    Memory(Arc<MemoryBroker>),
    /// A consumer group on a stream.
    Redis(Arc<RedisBroker>),
    /// Competing consumers of a queue.
    Rabbit(Arc<RabbitBroker>),
    /// A consumer group on a topic.
    Kafka(Arc<KafkaBroker>),
}

impl Queue {
    /// Connects nothing yet.
    pub(crate) fn new(options: &Options) -> Result<Self> {
        let (topic, group) = (options.topic.as_str(), options.group.as_str());
        let url = || {
            let missing = || Error::new(ErrorKind::Configuration, "start").because("--url is missing");
            options.url.clone().ok_or_else(missing)
        };
        Ok(match options.broker {
            BrokerKind::Memory => Self::Memory(Arc::new(MemoryBroker::builder(topic).group(group).build())),
            BrokerKind::Redis => {
                let lease = Duration::from_millis(options.lease_ms);
                let broker = RedisBroker::builder(RedisServer::at(url()?)?, topic, group).take_over_after(lease);
                Self::Redis(Arc::new(broker.build()?))
            }
            BrokerKind::Rabbitmq => Self::Rabbit(Arc::new(RabbitBroker::builder(url()?, topic, group).build()?)),
            BrokerKind::Kafka => {
                let broker = KafkaBroker::builder(url()?, group, [topic])
                    .session_timeout(SESSION_TIMEOUT)
                    .declare(Declare::partitions(PARTITIONS));
                Self::Kafka(Arc::new(broker.build()?))
            }
        })
    }

    /// As the consumer takes it.
    pub(crate) fn broker(&self) -> Arc<dyn Broker> {
        match self {
            Self::Memory(broker) => Arc::clone(broker) as _,
            Self::Redis(broker) => Arc::clone(broker) as _,
            Self::Rabbit(broker) => Arc::clone(broker) as _,
            Self::Kafka(broker) => Arc::clone(broker) as _,
        }
    }

    /// Creates what is missing: topic, group, places of retries and dead letters.
    pub(crate) async fn declare(&self) -> Result<()> {
        match self {
            Self::Memory(_) => Ok(()),
            Self::Redis(broker) => broker.declare().await,
            Self::Rabbit(broker) => broker.declare().await,
            Self::Kafka(broker) => broker.check().await,
        }
    }

    /// How many messages of the group wait for a retry at the broker.
    pub(crate) async fn waiting(&self) -> Result<u64> {
        match self {
            Self::Memory(broker) => Ok(broker.standing().later as u64),
            Self::Redis(broker) => broker.waiting_for_retry().await,
            Self::Rabbit(broker) => broker.waiting_for_retry().await,
            Self::Kafka(broker) => broker.waiting_for_retry().await,
        }
    }

    /// Whether what waits for this worker reaches it: only Kafka shares that out first, and fetches it then.
    pub(crate) fn is_caught_up(&self) -> bool {
        match self {
            Self::Memory(_) | Self::Redis(_) | Self::Rabbit(_) => true,
            Self::Kafka(broker) => broker.is_caught_up(),
        }
    }
}
