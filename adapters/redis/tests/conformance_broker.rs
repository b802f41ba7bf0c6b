//! The whole broker suite against a real Redis: one stream and one group of its own for each case.

mod broker;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use hapax::{Broker, Message, Publisher};
use hapax_redis::{RedisBroker, RedisPublisher};
use hapax_testkit::conformance::{BrokerFixture, Clock};

use broker::{Client, server, unique};

struct Stream {
    stream: String,
    client: Client,
}

impl Stream {
    async fn fresh() -> Self {
        Self { stream: unique("conformance"), client: Client::connect().await }
    }

    fn member(&self) -> RedisBroker {
        let builder = RedisBroker::builder(server(), self.stream.as_str(), "conformance");
        builder.take_over_after(Self::UNIT * 4).build().expect("the settings are in order")
    }

    fn dead(&self) -> String {
        format!("{{{}}}.conformance.dead", self.stream)
    }
}

#[async_trait]
impl BrokerFixture for Stream {
    const CLOCK: Clock = Clock::Real;
    const UNIT: Duration = Duration::from_millis(400);

    async fn broker(&self) -> Arc<dyn Broker> {
        Arc::new(self.member())
    }

    async fn publisher(&self) -> Arc<dyn Publisher> {
        Arc::new(RedisPublisher::new(server(), self.stream.as_str()).expect("a name"))
    }

    async fn publish_undecodable(&self) -> Bytes {
        let body = Bytes::from_static(b"{\"specversion\": not JSON \xff");
        let fields = [("content-type", &b"application/cloudevents+json"[..]), ("data", &body)];
        self.client.add(&self.stream, &fields).await;
        body
    }

    async fn dead_letters(&self) -> Vec<Message> {
        self.client.messages(&self.dead()).await
    }

    async fn redrive(&self) {
        for fields in self.client.entries(&self.dead()).await {
            let fields: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), &value[..])).collect();
            self.client.add(&self.stream, &fields).await;
        }
        self.client.command(&["DEL", &self.dead()]).await;
    }
}

hapax_testkit::broker_conformance!(Stream::fresh().await);
