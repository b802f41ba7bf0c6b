//! What the tests against Apache Kafka share: topics and groups that nobody else uses, and a look at what is really there.
#![allow(dead_code, reason = "each test binary takes what it needs")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hapax::cloudevents::{Convention, decode};
use hapax::{
    Broker, Delivery, Headers, Limits, Message, MessageLimits, Outgoing, Publisher, RESERVED_PREFIX, SecretUrl,
    Settlement, Want,
};
use hapax_kafka::rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use hapax_kafka::rdkafka::client::DefaultClientContext;
use hapax_kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use hapax_kafka::rdkafka::message::{Headers as _, Message as _, OwnedMessage};
use hapax_kafka::rdkafka::producer::{FutureProducer, FutureRecord};
use hapax_kafka::rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use hapax_kafka::rdkafka::{ClientConfig, message::OwnedHeaders};
use hapax_kafka::{Declare, KafkaBroker, KafkaBrokerBuilder, KafkaPublisher};
use hapax_testkit::servers::Server;
use tokio::time::timeout;

pub(crate) const WANT: Want = Want { events: 64, bytes: 1 << 20 };
/// How long anything may take before a test fails.
pub(crate) const SOON: Duration = Duration::from_secs(20);

static NAMES: AtomicU32 = AtomicU32::new(0);

/// A name that no other test, nor an earlier run, has.
pub(crate) fn unique(what: &str) -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    let number = NAMES.fetch_add(1, Ordering::Relaxed);
    format!("{what}-{}-{}-{number}", since.as_millis(), std::process::id())
}

pub(crate) fn limits() -> Limits {
    Limits {
        events: 1024,
        bytes: 16 << 20,
        held_max: Duration::from_secs(60),
        drain: Duration::from_secs(2),
        message: MessageLimits::DEFAULT,
    }
}

/// A topic and a group on it.
pub(crate) struct Topic {
    pub(crate) url: SecretUrl,
    pub(crate) topic: String,
    pub(crate) group: String,
    pub(crate) partitions: u16,
    pub(crate) properties: Vec<(&'static str, &'static str)>,
    pub(crate) step: Duration,
    publisher: OnceLock<KafkaPublisher>,
}

impl Topic {
    pub(crate) fn new(partitions: u16) -> Self {
        Self::at(Server::Kafka.url().parse().expect("the address of Kafka is a url"), partitions)
    }

    /// On other servers than those of `scripts/brokers`.
    pub(crate) fn at(url: SecretUrl, partitions: u16) -> Self {
        let properties = Vec::new();
        Self {
            url,
            topic: unique("orders"),
            group: unique("billing"),
            partitions,
            properties,
            step: Duration::from_secs(5),
            publisher: OnceLock::new(),
        }
    }

    pub(crate) fn with(mut self, name: &'static str, value: &'static str) -> Self {
        self.properties.push((name, value));
        self
    }

    /// Only the topic itself is shared out among members.
    pub(crate) fn without_retries(mut self) -> Self {
        self.step = Duration::ZERO;
        self
    }

    pub(crate) fn builder(&self) -> KafkaBrokerBuilder {
        let builder = KafkaBroker::builder(self.url.clone(), self.group.as_str(), [self.topic.as_str()])
            .retry_steps(Some(self.step).filter(|step| !step.is_zero()))
            .declare(Declare::partitions(self.partitions))
            .commit_interval(Duration::from_millis(20));
        self.properties.iter().fold(builder, |builder, (name, value)| builder.property(*name, *value))
    }

    pub(crate) fn broker(&self) -> KafkaBroker {
        self.builder().build().expect("good settings")
    }

    pub(crate) async fn opened(&self) -> Arc<KafkaBroker> {
        let broker = Arc::new(self.broker());
        broker.open(limits()).await.expect("the broker opens");
        broker
    }

    pub(crate) fn dead(&self) -> String {
        format!("{}.{}.dead", self.topic, self.group)
    }

    pub(crate) fn retry(&self) -> String {
        format!("{}.{}.retry.{}s", self.topic, self.group, self.step.as_secs())
    }

    pub(crate) fn servers(&self) -> String {
        self.url.expose().trim_start_matches("kafka://").to_owned()
    }

    pub(crate) fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.servers());
        config
    }

    pub(crate) fn publisher(&self) -> KafkaPublisher {
        let made = || KafkaPublisher::builder(self.url.clone()).topic(self.topic.as_str()).build();
        // A new producer waits half a second for its first number (librdkafka).
        self.publisher.get_or_init(|| made().expect("good settings")).clone()
    }

    /// The topic, before any member asks for it.
    pub(crate) async fn created(self) -> Self {
        let admin: AdminClient<DefaultClientContext> = self.config().create().expect("an admin client");
        let new = NewTopic::new(&self.topic, i32::from(self.partitions), TopicReplication::Fixed(1));
        let created = admin.create_topics([&new], &AdminOptions::new()).await.expect("the server answers");
        created.into_iter().next().expect("one answer").expect("the topic is created");
        self
    }

    pub(crate) async fn publish(&self, ids: impl IntoIterator<Item = usize>) {
        self.publish_all(ids.into_iter().map(event)).await;
    }

    pub(crate) async fn publish_all(&self, messages: impl IntoIterator<Item = Message>) {
        for sent in self.publisher().publish(messages.into_iter().map(Outgoing::new).collect()).await {
            sent.expect("the broker takes a message");
        }
    }

    /// Sends a record as it is, to a topic and partition.
    pub(crate) async fn raw(
        &self,
        topic: &str,
        partition: Option<i32>,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: OwnedHeaders,
    ) {
        let producer: FutureProducer = self.config().create().expect("a producer");
        let mut record = FutureRecord::<[u8], [u8]>::to(topic).headers(headers);
        (record.partition, record.key, record.payload) = (partition, key, value);
        producer.send(record, SOON).await.expect("the server takes it");
    }

    /// Everything that is in a topic.
    pub(crate) async fn records(&self, topic: &str) -> Vec<OwnedMessage> {
        let (config, topic) = (self.config(), topic.to_owned());
        let reading = tokio::task::spawn_blocking(move || records(config, &topic));
        reading.await.expect("reading does not panic")
    }

    /// What the group has committed for the partitions of a topic: offsets by partition.
    pub(crate) async fn committed(&self, topic: &str) -> Vec<Option<i64>> {
        let mut config = self.config();
        config.set("group.id", &self.group);
        let (topic, partitions) = (topic.to_owned(), i32::from(self.partitions));
        let asking = tokio::task::spawn_blocking(move || {
            let consumer: BaseConsumer = config.create().expect("a consumer");
            let mut list = TopicPartitionList::new();
            list.add_partition_range(&topic, 0, partitions - 1);
            let told = consumer.committed_offsets(list, SOON).expect("the group's offsets");
            let offset =
                |element: &hapax_kafka::rdkafka::topic_partition_list::TopicPartitionListElem<'_>| match element
                    .offset()
                {
                    Offset::Offset(offset) => Some(offset),
                    _ => None,
                };
            told.elements().iter().map(offset).collect()
        });
        asking.await.expect("asking does not panic")
    }

    /// Waits until the group has committed this much of the topic, all partitions together.
    pub(crate) async fn until_committed(&self, sum: i64) {
        let waiting = async {
            while self.committed(&self.topic).await.into_iter().flatten().sum::<i64>() != sum {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if timeout(SOON, waiting).await.is_err() {
            panic!("{:?} is committed, not {sum}", self.committed(&self.topic).await);
        }
    }
}

/// Many topics make a server slow; those of a test go with it.
impl Drop for Topic {
    fn drop(&mut self) {
        if std::env::var(Server::Kafka.variable()).is_ok_and(|url| url != self.url.expose()) {
            return;
        }
        let (config, topics) = (self.config(), [self.topic.clone(), self.dead(), self.retry()]);
        let deleting = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let admin: Result<AdminClient<DefaultClientContext>, _> = config.create();
            if let (Ok(runtime), Ok(admin)) = (runtime, admin) {
                let names: Vec<&str> = topics.iter().map(String::as_str).collect();
                let options = AdminOptions::new().request_timeout(Some(Duration::from_secs(5)));
                // Those that were never created are refused, each by itself.
                let _ = runtime.block_on(admin.delete_topics(&names, &options));
            }
        });
        let _ = deleting.join();
    }
}

fn records(config: ClientConfig, topic: &str) -> Vec<OwnedMessage> {
    let mut config = config;
    config.set("group.id", unique("reader")).set("enable.auto.commit", "false").set("enable.partition.eof", "false");
    let consumer: BaseConsumer = config.create().expect("a consumer");
    let metadata = consumer.fetch_metadata(Some(topic), SOON).expect("metadata");
    let partitions: Vec<i32> = metadata.topics()[0].partitions().iter().map(|partition| partition.id()).collect();
    let mut list = TopicPartitionList::new();
    let mut expected = 0;
    for partition in partitions {
        let (low, high) = consumer.fetch_watermarks(topic, partition, SOON).expect("watermarks");
        expected += usize::try_from(high - low).expect("a number");
        list.add_partition_offset(topic, partition, Offset::Beginning).expect("an offset");
    }
    consumer.assign(&list).expect("an assignment");
    let mut found = Vec::new();
    let mut patience = 100;
    while found.len() < expected && patience > 0 {
        match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(record)) => found.push(record.detach()),
            _ => patience -= 1,
        }
    }
    assert_eq!(found.len(), expected, "everything in {topic} is read");
    found
}

/// A stored record with hapax' own headers among the headers.
pub(crate) fn as_stored(record: &OwnedMessage) -> Message {
    let mut headers = Headers::new();
    for header in record.headers().into_iter().flat_map(|headers| headers.iter()) {
        headers.push(header.key, Bytes::copy_from_slice(header.value.unwrap_or_default()));
    }
    let own: Vec<_> = headers
        .iter()
        .filter(|(name, _)| name.starts_with(RESERVED_PREFIX))
        .map(|(name, value)| (name.to_owned(), value.clone()))
        .collect();
    let body = Bytes::copy_from_slice(record.payload().unwrap_or_default());
    let mut message = decode(headers, body, &Convention::KAFKA, &MessageLimits::DEFAULT);
    for (name, value) in own {
        message.headers.push(name, value);
    }
    message
}

pub(crate) fn event(id: usize) -> Message {
    Message::event("https://kafka.example", id.to_string(), "com.example.tested")
        .with_data("text/plain", format!("data of {id}"))
        .with_partition_key(format!("key {id}"))
}

pub(crate) fn id(delivery: &Delivery) -> usize {
    delivery.message.attributes.id.as_deref().and_then(|id| id.parse().ok()).expect("a number as the id")
}

pub(crate) fn ids(deliveries: &[Delivery]) -> Vec<usize> {
    let mut ids: Vec<usize> = deliveries.iter().map(id).collect();
    ids.sort_unstable();
    ids
}

/// Receives until there are `count`.
pub(crate) async fn receive(broker: &KafkaBroker, count: usize) -> Vec<Delivery> {
    let mut all = Vec::new();
    while all.len() < count {
        let more = timeout(SOON, broker.receive(WANT)).await;
        let Ok(more) = more else { panic!("only {:?} of {count} arrived", ids(&all)) };
        match more {
            Ok(more) => all.extend(more),
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
    }
    assert_eq!(all.len(), count, "more arrived than was there: {:?}", ids(&all));
    all
}

pub(crate) async fn silence(broker: &KafkaBroker, how_long: Duration) {
    if let Ok(Ok(arrived)) = timeout(how_long, broker.receive(WANT)).await {
        panic!("nothing should arrive, but {:?} did", ids(&arrived));
    }
}

pub(crate) async fn settle(broker: &KafkaBroker, delivery: &Delivery, settlement: Settlement) {
    broker.settle(&[(delivery.receipt, settlement)]).await.remove(0).expect("a live receipt is settled");
}

pub(crate) async fn ack(broker: &KafkaBroker, deliveries: &[Delivery]) {
    let batch: Vec<_> = deliveries.iter().map(|delivery| (delivery.receipt, Settlement::Ack)).collect();
    for answer in broker.settle(&batch).await {
        answer.expect("a live receipt is settled");
    }
}

/// Waits for something that another thread does.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, waiting).await.unwrap_or_else(|_| panic!("{what}: not within {SOON:?}"));
}
