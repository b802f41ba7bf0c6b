//! The brokers, with their defaults.

use std::sync::Arc;

use compare_kit::Arguments;
use hapax::{BoxError, Broker, SecretUrl};
use hapax_kafka::{Declare, KafkaBroker};
use hapax_rabbitmq::RabbitBroker;
use hapax_redis::{RedisBroker, RedisServer};

pub fn open(arguments: &Arguments) -> Result<Arc<dyn Broker>, BoxError> {
    let Arguments { broker, topic, group, .. } = arguments;
    let url = SecretUrl::parse(&*arguments.url)?;
    Ok(match broker.as_str() {
        "kafka" => {
            let broker = KafkaBroker::builder(url, &**group, [&**topic]);
            // A member of a group that died must not hold up the next run.
            Arc::new(broker.declare(Declare::partitions(1)).retry_steps([]).build()?)
        }
        "rabbitmq" => Arc::new(RabbitBroker::builder(url, topic, group).build()?),
        "redis" => Arc::new(RedisBroker::builder(RedisServer::at(url)?, &**topic, &**group).build()?),
        other => return Err(format!("there is no broker {other}").into()),
    })
}
