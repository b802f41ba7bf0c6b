//! The memory broker and the memory store pass their suites.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use hapax::{Broker, Headers, Message, ProcessedStore, Publisher, StoreAdmin};
use hapax_memory::{MemoryBroker, MemoryStore};
use hapax_testkit::conformance::{BrokerFixture, Clock, StoreFixture};

/// A topic in memory and a group on it.
pub(crate) struct MemoryTopic(pub(crate) MemoryBroker);

impl MemoryTopic {
    pub(crate) fn competing() -> Self {
        Self(MemoryBroker::new("conformance"))
    }

    fn ordered() -> Self {
        Self(MemoryBroker::builder("conformance").ordered().build())
    }
}

#[async_trait]
impl BrokerFixture for MemoryTopic {
    const CLOCK: Clock = Clock::Paused;
    const UNIT: Duration = Duration::from_millis(100);

    async fn broker(&self) -> Arc<dyn Broker> {
        Arc::new(self.0.another())
    }

    async fn publisher(&self) -> Arc<dyn Publisher> {
        Arc::new(self.0.publisher())
    }

    async fn publish_undecodable(&self) -> Bytes {
        let body = Bytes::from_static(b"{\"id\": ");
        let headers: Headers = [("content-type", "application/cloudevents+json")].into_iter().collect();
        self.0.publisher().send_wire(headers, body.clone()).await;
        body
    }

    async fn dead_letters(&self) -> Vec<Message> {
        self.0.dead_letters().into_iter().map(|(message, _)| message).collect()
    }

    async fn redrive(&self) {
        self.0.redrive();
    }
}

/// Records in memory.
pub(crate) struct MemoryRecords(MemoryStore);

impl MemoryRecords {
    fn fresh() -> Self {
        Self(MemoryStore::new())
    }
}

#[async_trait]
impl StoreFixture for MemoryRecords {
    const CLOCK: Clock = Clock::Paused;
    const UNIT: Duration = Duration::from_millis(100);

    async fn store(&self) -> Arc<dyn ProcessedStore> {
        Arc::new(self.0.clone())
    }

    async fn again(&self) -> Arc<dyn ProcessedStore> {
        Arc::new(self.0.clone())
    }

    async fn admin(&self) -> Arc<dyn StoreAdmin> {
        Arc::new(self.0.clone())
    }
}

hapax_testkit::broker_conformance!(competing_consumers, MemoryTopic::competing());
hapax_testkit::broker_conformance!(one_ordered_partition, MemoryTopic::ordered());
hapax_testkit::store_conformance!(records, MemoryRecords::fresh());
