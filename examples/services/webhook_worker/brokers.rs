//! The brokers to choose from, and what the worker asks of one beside consuming it.

use std::sync::Arc;

use hapax::{Broker, Result};
use hapax_memory::MemoryBroker;

use crate::options::{BrokerKind, Options};

/// A topic with a group, on the broker that was chosen. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) enum Queue {
    /// In this process.
    Memory(Arc<MemoryBroker>),
}

impl Queue {
    /// Connects nothing yet but what its client needs.
    pub(crate) async fn new(options: &Options) -> Result<Self> {
        let (topic, group) = (options.topic.as_str(), options.group.as_str());
        Ok(match options.broker {
            BrokerKind::Memory => Self::Memory(Arc::new(MemoryBroker::builder(topic).group(group).build())),
            other => return Err(hapax::Error::new(hapax::ErrorKind::Configuration, "x").because(format!("{other:?}"))),
        })
    }

    /// As the consumer takes it.
    pub(crate) fn broker(&self) -> Arc<dyn Broker> {
        match self {
            Self::Memory(broker) => Arc::clone(broker) as _,
        }
    }

    /// Creates what is missing: topic, group, places of retries and dead letters.
    pub(crate) async fn declare(&self) -> Result<()> {
        match self {
            Self::Memory(_) => Ok(()),
        }
    }

    /// How many messages of the group wait for a retry at the broker.
    pub(crate) async fn waiting(&self) -> Result<u64> {
        match self {
            Self::Memory(broker) => Ok(broker.standing().later as u64),
        }
    }

    /// Whether it is settled what this worker receives.
    pub(crate) fn has_assignment(&self) -> bool {
        match self {
            Self::Memory(_) => true,
        }
    }
}
