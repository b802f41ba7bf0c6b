//! The broker suite against a real RabbitMQ.

mod rabbit;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use hapax::{Broker, Message, Publisher};
use hapax_rabbitmq::RabbitPublisher;
use hapax_rabbitmq::lapin::BasicProperties;
use hapax_testkit::conformance::broker::Quirks;
use hapax_testkit::conformance::{BrokerFixture, Clock};
use rabbit::Rabbit;

#[async_trait]
impl BrokerFixture for Rabbit {
    const CLOCK: Clock = Clock::Real;
    const UNIT: Duration = Duration::from_millis(250);

    async fn broker(&self) -> Arc<dyn Broker> {
        Arc::new(Self::broker(self))
    }

    async fn publisher(&self) -> Arc<dyn Publisher> {
        // The queue must be there before the first message, as it is where consumers were deployed before producers.
        Self::broker(self).declare().await.expect("the queues are declared");
        let builder = RabbitPublisher::builder(self.url.clone()).default_key(self.queue.clone());
        Arc::new(builder.build().expect("the settings hold"))
    }

    async fn publish_undecodable(&self) -> Bytes {
        Self::broker(self).declare().await.expect("the queues are declared");
        let body = Bytes::from_static(b"{\"specversion\":\"1.0\",\"id\":");
        let properties = BasicProperties::default().with_content_type("application/cloudevents+json".into());
        self.send(properties, &body).await;
        body
    }

    async fn dead_letters(&self) -> Vec<Message> {
        Self::dead_letters(self).await
    }

    async fn redrive(&self) {
        Self::redrive(self).await;
    }

    fn quirks(&self) -> Quirks {
        // RabbitMQ counts every release before version 4.3.
        Quirks { one_header_a_name: true, counts_every_release: true }
    }
}

hapax_testkit::broker_conformance!(Rabbit::fresh());
