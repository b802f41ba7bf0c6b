//! `KafkaPublisher`: the way into topics, done when every in-sync replica has a message.

use std::collections::BTreeMap;
use std::fmt;

use async_trait::async_trait;
use hapax::{Error, ErrorKind, Outgoing, Publisher, Result, SecretUrl};

use crate::places::check_topic;
use crate::producer::{Producer, Sending};
use crate::properties::Properties;
use crate::wire;

/// What is said about a publisher before it is there.
#[derive(Clone)]
pub struct KafkaPublisherBuilder {
    url: SecretUrl,
    topic: Option<Box<str>>,
    structured: bool,
    properties: BTreeMap<String, String>,
}

impl KafkaPublisherBuilder {
    /// Where messages go that name no topic.
    #[must_use]
    pub fn topic(mut self, topic: impl Into<Box<str>>) -> Self {
        self.topic = Some(topic.into());
        self
    }

    /// Writes CloudEvents in structured mode: one JSON document. Binary mode is the default.
    #[must_use]
    pub fn structured(mut self) -> Self {
        self.structured = true;
        self
    }

    /// Any property of librdkafka, as for [`KafkaBrokerBuilder::property`](crate::KafkaBrokerBuilder::property).
    #[must_use]
    pub fn property(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.properties.insert(name.into(), value.into());
        self
    }

    /// Checks everything and reports every fault at once. Connects in the background.
    pub fn build(self) -> Result<KafkaPublisher> {
        let mut faults = Vec::new();
        let properties = Properties::new(&self.url, &self.properties, &mut faults);
        if let Some(topic) = &self.topic
            && let Err(refused) = check_topic("topic", topic)
        {
            faults.push(refused.to_string().trim_start_matches("open: ").to_owned());
        }
        if !faults.is_empty() {
            return Err(Error::new(ErrorKind::Configuration, "build").because(faults.join("; ")));
        }
        let producer = Producer::new(&properties, "build")?;
        Ok(KafkaPublisher { producer, topic: self.topic, structured: self.structured })
    }
}

impl fmt::Debug for KafkaPublisherBuilder {
    /// Names of properties, never values.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaPublisherBuilder")
            .field("url", &self.url)
            .field("topic", &self.topic)
            .field("structured", &self.structured)
            .field("properties", &self.properties.keys())
            .finish()
    }
}

/// Publishes to Kafka: acks from all in-sync replicas, idempotence on, the partition key as the record's key. Cheap to
/// clone.
///
/// ```no_run
/// # async fn send() -> hapax::Result<()> {
/// use hapax::{Message, Outgoing, Publisher};
/// use hapax_kafka::KafkaPublisher;
///
/// let publisher = KafkaPublisher::builder("kafka://127.0.0.1:9092".parse()?).topic("orders").build()?;
/// let placed = Message::event("https://shop.example", "42", "com.shop.order.placed").with_partition_key("customer 7");
/// for answer in publisher.publish(vec![Outgoing::new(placed)]).await {
///     answer?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct KafkaPublisher {
    producer: Producer,
    topic: Option<Box<str>>,
    structured: bool,
}

impl KafkaPublisher {
    /// A publisher to these servers; the URL is as for [`KafkaBroker::builder`](crate::KafkaBroker::builder).
    pub fn builder(url: SecretUrl) -> KafkaPublisherBuilder {
        KafkaPublisherBuilder { url, topic: None, structured: false, properties: BTreeMap::new() }
    }

    fn record(&self, outgoing: &Outgoing) -> Result<Sending> {
        let rejected = |why: &'static str| Error::new(ErrorKind::Rejected, "publish").because(why);
        let topic = outgoing.to.as_deref().or(self.topic.as_deref());
        let topic =
            topic.ok_or_else(|| rejected("the message names no topic, and the publisher has no default one"))?;
        check_topic("topic", topic).map_err(|_| rejected("the message names what cannot be a topic"))?;
        let (key, value, headers) = wire::record(&outgoing.message, self.structured)?;
        Ok(Sending { topic: topic.into(), key, value: Some(value), headers })
    }
}

#[async_trait]
impl Publisher for KafkaPublisher {
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        let records = batch.iter().map(|outgoing| self.record(outgoing)).collect();
        let unanswered = || Err(Error::new(ErrorKind::Unknown, "publish").because("there is no answer"));
        let mut answers: Vec<Result<()>> = batch.iter().map(|_| unanswered()).collect();
        self.producer.send("publish", records, |at, answer| answers[at] = answer).await;
        answers
    }
}
