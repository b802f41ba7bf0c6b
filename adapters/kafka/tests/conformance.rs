//! The Kafka broker passes its suite against Apache Kafka, with both protocols of the group; a topic of its own for
//! each case.

mod support;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use hapax::{Broker, Message, Publisher};
use hapax_kafka::rdkafka::message::{Header, Message as _, OwnedHeaders};
use hapax_testkit::conformance::{BrokerFixture, Clock};
use support::{Topic, as_stored};

struct KafkaTopic(Topic);

impl KafkaTopic {
    async fn classic() -> Self {
        Self(Topic::new(2).created().await)
    }

    async fn next_generation() -> Self {
        Self(Topic::new(2).with("group.protocol", "consumer").created().await)
    }
}

#[async_trait]
impl BrokerFixture for KafkaTopic {
    const CLOCK: Clock = Clock::Real;
    const UNIT: Duration = Duration::from_millis(350);

    async fn broker(&self) -> Arc<dyn Broker> {
        Arc::new(self.0.broker())
    }

    async fn publisher(&self) -> Arc<dyn Publisher> {
        Arc::new(self.0.publisher())
    }

    async fn publish_undecodable(&self) -> Bytes {
        let body = Bytes::from_static(b"{\"id\": ");
        let structured = Header { key: "content-type", value: Some("application/cloudevents+json") };
        self.0.raw(&self.0.topic, None, None, Some(&body), OwnedHeaders::new().insert(structured)).await;
        body
    }

    async fn dead_letters(&self) -> Vec<Message> {
        self.0.records(&self.0.dead()).await.iter().map(as_stored).collect()
    }

    async fn redrive(&self) {
        for mut record in self.0.records(&self.0.dead()).await {
            let headers = record.detach_headers().unwrap_or_default();
            self.0.raw(&self.0.topic, None, record.key(), record.payload(), headers).await;
        }
    }
}

hapax_testkit::broker_conformance!(classic_group, KafkaTopic::classic().await);
hapax_testkit::broker_conformance!(next_generation_group, KafkaTopic::next_generation().await);
