//! The three clients, as their documentation shows them: receive some, acknowledge up to where all are done.

use std::sync::Arc;

use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use rdkafka::ClientConfig;
use rdkafka::Message as _;
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use redis::aio::MultiplexedConnection;
use redis::streams::{StreamReadOptions, StreamReadReply};
use redis::{AsyncCommands, AsyncConnectionConfig};

pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// RabbitMQ's bound for unsettled messages of a quorum queue.
const AHEAD: u16 = 2_000;

/// A message, and what the broker wants back for it.
pub struct Received {
    pub id: Vec<u8>,
    pub payload: Vec<u8>,
    pub tag: Tag,
}

pub enum Tag {
    Kafka { partition: i32, offset: i64 },
    Rabbit(u64),
    Redis(String),
}

/// Where messages come from.
pub enum Reader {
    Kafka(Arc<StreamConsumer>),
    Rabbit(Box<lapin::Consumer>),
    Redis { connection: MultiplexedConnection, topic: String, group: String },
}

/// Where acknowledgements go.
#[allow(clippy::large_enum_variant, reason = "a process has one of it")]
pub enum Acker {
    Kafka { consumer: Arc<StreamConsumer>, topic: String },
    Rabbit { channel: lapin::Channel, connection: lapin::Connection },
    Redis { connection: MultiplexedConnection, topic: String, group: String },
}

/// Both halves, which different tasks may use.
pub async fn open(broker: &str, url: &str, topic: &str, group: &str) -> Result<(Reader, Acker), Error> {
    let (topic, group) = (topic.to_owned(), group.to_owned());
    match broker {
        "kafka" => {
            // As the client's example for at-least-once delivery: commits by itself what was stored.
            let consumer: StreamConsumer = ClientConfig::new()
                .set("bootstrap.servers", url.trim_start_matches("kafka://"))
                .set("group.id", group)
                .set("auto.offset.reset", "earliest")
                .set("enable.auto.commit", "true")
                .set("auto.commit.interval.ms", "1000")
                .set("enable.auto.offset.store", "false")
                .create()?;
            consumer.subscribe(&[&topic])?;
            let consumer = Arc::new(consumer);
            Ok((Reader::Kafka(Arc::clone(&consumer)), Acker::Kafka { consumer, topic }))
        }
        "rabbitmq" => {
            let connection = lapin::Connection::connect(url, lapin::ConnectionProperties::default()).await?;
            let channel = connection.create_channel().await?;
            channel.basic_qos(AHEAD, BasicQosOptions::default()).await?;
            let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
            let consumer = channel.basic_consume(topic.into(), "".into(), options, arguments).await?;
            Ok((Reader::Rabbit(Box::new(consumer)), Acker::Rabbit { channel, connection }))
        }
        _ => {
            let client = redis::Client::open(url)?;
            let blocking = AsyncConnectionConfig::new().set_response_timeout(None);
            let reads = client.get_multiplexed_async_connection_with_config(&blocking).await?;
            let mut writes = client.get_multiplexed_async_connection_with_config(&blocking).await?;
            // The group may be there already.
            let _: Result<(), _> = writes.xgroup_create_mkstream(&topic, &group, "0").await;
            let reader = Reader::Redis { connection: reads, topic: topic.clone(), group: group.clone() };
            Ok((reader, Acker::Redis { connection: writes, topic, group }))
        }
    }
}

impl Reader {
    /// Waits for one message and takes what is there already, up to `most`. Empty where nothing came for a second.
    pub async fn receive(&mut self, most: usize) -> Result<Vec<Received>, Error> {
        let mut received = Vec::with_capacity(most);
        match self {
            Self::Kafka(consumer) => {
                received.push(of_kafka(&consumer.recv().await?));
                while received.len() < most {
                    match consumer.recv().now_or_never() {
                        Some(message) => received.push(of_kafka(&message?)),
                        None => break,
                    }
                }
            }
            Self::Rabbit(consumer) => {
                received.push(of_rabbit(consumer.next().await.ok_or("the consumer was cancelled")??));
                while received.len() < most {
                    match consumer.next().now_or_never() {
                        Some(Some(delivery)) => received.push(of_rabbit(delivery?)),
                        _ => break,
                    }
                }
            }
            Self::Redis { connection, topic, group } => {
                let options = StreamReadOptions::default().group(&*group, "one").count(most).block(1_000);
                let reply: Option<StreamReadReply> = connection.xread_options(&[&*topic], &[">"], &options).await?;
                for mut entry in reply.into_iter().flat_map(|reply| reply.keys).flat_map(|key| key.ids) {
                    let mut field = |name: &str| match entry.map.remove(name) {
                        Some(redis::Value::BulkString(bytes)) => bytes,
                        _ => Vec::new(),
                    };
                    let (id, payload) = (field("ce_id"), field("data"));
                    received.push(Received { id, payload, tag: Tag::Redis(entry.id) });
                }
            }
        }
        Ok(received)
    }
}

fn of_kafka(message: &rdkafka::message::BorrowedMessage<'_>) -> Received {
    Received {
        id: message.key().unwrap_or_default().to_vec(),
        payload: message.payload().unwrap_or_default().to_vec(),
        tag: Tag::Kafka { partition: message.partition(), offset: message.offset() },
    }
}

fn of_rabbit(delivery: lapin::message::Delivery) -> Received {
    let id = delivery.properties.message_id().as_ref().map(|id| id.as_str().as_bytes().to_vec());
    Received { id: id.unwrap_or_default(), payload: delivery.data, tag: Tag::Rabbit(delivery.delivery_tag) }
}

impl Acker {
    /// Acknowledges these, all of them done: the last ones of what was received so far.
    pub async fn acknowledge(&mut self, done: &[Received]) -> Result<(), Error> {
        match self {
            Self::Kafka { consumer, topic } => {
                for received in done {
                    if let Tag::Kafka { partition, offset } = received.tag {
                        consumer.store_offset(topic, partition, offset)?;
                    }
                }
            }
            Self::Rabbit { channel, .. } => {
                let tags = done.iter().filter_map(|received| match received.tag {
                    Tag::Rabbit(tag) => Some(tag),
                    _ => None,
                });
                if let Some(last) = tags.max() {
                    channel.basic_ack(last, BasicAckOptions { multiple: true }).await?;
                }
            }
            Self::Redis { connection, topic, group } => {
                let ids = done.iter().filter_map(|received| match &received.tag {
                    Tag::Redis(id) => Some(id.as_str()),
                    _ => None,
                });
                let ids: Vec<_> = ids.collect();
                if !ids.is_empty() {
                    let _: u64 = connection.xack(&*topic, &*group, &ids).await?;
                }
            }
        }
        Ok(())
    }

    /// What was acknowledged is at the broker.
    pub async fn close(self) -> Result<(), Error> {
        match self {
            Self::Kafka { consumer, .. } => {
                // Nothing stored since the last automatic commit is no error of ours.
                let commit = move || drop(consumer.commit_consumer_state(CommitMode::Sync));
                tokio::task::spawn_blocking(commit).await?;
            }
            Self::Rabbit { connection, .. } => connection.close(200, "done".into()).await?,
            Self::Redis { .. } => {}
        }
        Ok(())
    }
}
