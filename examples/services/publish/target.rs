//! The brokers to choose from.

use std::sync::Arc;

use clap::ValueEnum;
use hapax::{Publisher, SecretUrl};
use hapax_kafka::KafkaPublisher;
use hapax_rabbitmq::RabbitPublisher;
use hapax_redis::{RedisPublisher, RedisServer};

/// Where events can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BrokerKind {
    Memory,
    Redis,
    Rabbitmq,
    Kafka,
}

/// The way into a topic, stream or queue.
pub(crate) fn publisher(
    broker: BrokerKind,
    url: Option<&SecretUrl>,
    topic: &str,
) -> Result<Arc<dyn Publisher>, String> {
    let scheme = match broker {
        BrokerKind::Memory => {
            return Err(
                "--broker memory: it lives inside one process, where nobody else can reach it; pipe the events \
                        into webhook_worker --broker memory"
                    .to_owned(),
            );
        }
        BrokerKind::Redis => "redis",
        BrokerKind::Rabbitmq => "amqp",
        BrokerKind::Kafka => "kafka",
    };
    let url = url.ok_or_else(|| format!("--url is missing: give the address of {broker:?}, as in {scheme}://host"))?;
    connect(broker, url.clone(), topic).map_err(|error| format!("--url {url}: {error}"))
}

/// Each connects when it first sends.
fn connect(broker: BrokerKind, url: SecretUrl, topic: &str) -> hapax::Result<Arc<dyn Publisher>> {
    Ok(match broker {
        BrokerKind::Rabbitmq => Arc::new(RabbitPublisher::builder(url).default_key(topic).build()?),
        BrokerKind::Kafka => Arc::new(KafkaPublisher::builder(url).topic(topic).build()?),
        BrokerKind::Redis | BrokerKind::Memory => Arc::new(RedisPublisher::new(RedisServer::at(url)?, topic)?),
    })
}
