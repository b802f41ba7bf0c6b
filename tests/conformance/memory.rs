//! The memory broker and the memory store pass their suites.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use hapax::{Broker, Headers, Message, ProcessedStore, Publisher, StoreAdmin};
use hapax_memory::{MemoryBroker, MemoryStore};
use hapax_testkit::conformance::{self, BrokerFixture, Clock, StoreFixture};
use hapax_testkit::faulty::{Faults, FaultyStore};

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

/// The same on a server that takes up to a fifth of a unit for each call.
struct SlowRecords(MemoryRecords);

#[async_trait]
impl StoreFixture for SlowRecords {
    const CLOCK: Clock = Clock::Paused;
    const UNIT: Duration = Duration::from_millis(100);

    async fn store(&self) -> Arc<dyn ProcessedStore> {
        let slow = Faults { delay: 1.0, delay_max: Self::UNIT / 5, ..Faults::none(0) };
        Arc::new(FaultyStore::new(self.0.store().await, slow.switch()))
    }

    async fn again(&self) -> Arc<dyn ProcessedStore> {
        self.store().await
    }

    async fn admin(&self) -> Arc<dyn StoreAdmin> {
        self.0.admin().await
    }
}

/// A history is compared with what a clock of the suite's own says, and the calls' time is not on that.
#[test]
fn a_slow_server_passes_too() {
    let case = async { conformance::store::a_batch_equals_its_items(&SlowRecords(MemoryRecords::fresh())).await };
    conformance::run("a_batch_equals_its_items", Clock::Paused, case);
}

hapax_testkit::broker_conformance!(competing_consumers, MemoryTopic::competing());
hapax_testkit::broker_conformance!(one_ordered_partition, MemoryTopic::ordered());
hapax_testkit::store_conformance!(records, MemoryRecords::fresh());
