//! The brokers to choose from.

use std::sync::Arc;

use clap::ValueEnum;
use hapax::{Publisher, SecretUrl};

/// Where events can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BrokerKind {
    Memory,
    Redis,
    Rabbitmq,
    Kafka,
}

/// The way into a topic, stream or queue.
pub(crate) async fn publisher(
    broker: BrokerKind,
    url: Option<&SecretUrl>,
    topic: &str,
) -> Result<Arc<dyn Publisher>, String> {
    let (scheme, _) = match broker {
        BrokerKind::Memory => {
            return Err("--broker memory: it lives inside one process; feed webhook_worker --broker memory from its \
                        standard input instead"
                .to_owned());
        }
        BrokerKind::Redis => ("redis", topic),
        BrokerKind::Rabbitmq => ("amqp", topic),
        BrokerKind::Kafka => ("kafka", topic),
    };
    let _url = url.ok_or_else(|| format!("--url is missing: give the address of {broker:?}, as in {scheme}://host"))?;
    Err("not there".into())
}
