//! The three clients, as their documentation shows them: receive some, acknowledge up to where all are done.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use rdkafka::ClientConfig;
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use rdkafka::{Message as _, Offset, TopicPartitionList};
use redis::aio::MultiplexedConnection;
use redis::streams::{StreamReadOptions, StreamReadReply};
use redis::{AsyncCommands, AsyncConnectionConfig};

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

pub enum Source {
    Kafka { consumer: StreamConsumer, topic: String },
    Rabbit { channel: lapin::Channel, consumer: Box<lapin::Consumer>, _connection: lapin::Connection },
    Redis { reads: MultiplexedConnection, writes: MultiplexedConnection, topic: String, group: String },
}

pub type Error = Box<dyn std::error::Error + Send + Sync>;

impl Source {
    /// `ahead` is how many unacknowledged messages the broker may hand out.
    pub async fn open(broker: &str, url: &str, topic: &str, group: &str, ahead: u16) -> Result<Self, Error> {
        match broker {
            "kafka" => {
                let consumer: StreamConsumer = ClientConfig::new()
                    .set("bootstrap.servers", url.trim_start_matches("kafka://"))
                    .set("group.id", group)
                    .set("auto.offset.reset", "earliest")
                    .set("enable.auto.commit", "true")
                    .set("auto.commit.interval.ms", "1000")
                    .set("enable.auto.offset.store", "false")
                    .create()?;
                consumer.subscribe(&[topic])?;
                Ok(Self::Kafka { consumer, topic: topic.to_owned() })
            }
            "rabbitmq" => {
                let connection = lapin::Connection::connect(url, lapin::ConnectionProperties::default()).await?;
                let channel = connection.create_channel().await?;
                channel.basic_qos(ahead, BasicQosOptions::default()).await?;
                let consumer = channel
                    .basic_consume(topic.into(), "".into(), BasicConsumeOptions::default(), FieldTable::default())
                    .await?;
                Ok(Self::Rabbit { channel, consumer: Box::new(consumer), _connection: connection })
            }
            _ => {
                let client = redis::Client::open(url)?;
                let blocking = AsyncConnectionConfig::new().set_response_timeout(None);
                let reads = client.get_multiplexed_async_connection_with_config(&blocking).await?;
                let mut writes = client.get_multiplexed_async_connection_with_config(&blocking).await?;
                // The group may be there already.
                let _: Result<(), _> = writes.xgroup_create_mkstream(topic, group, "0").await;
                Ok(Self::Redis { reads, writes, topic: topic.to_owned(), group: group.to_owned() })
            }
        }
    }

    /// Waits for one message and takes what is there already, up to `most`.
    pub async fn receive(&mut self, most: usize) -> Result<Vec<Received>, Error> {
        let mut received = Vec::with_capacity(most);
        match self {
            Self::Kafka { consumer, .. } => {
                let read = |message: rdkafka::message::BorrowedMessage<'_>| Received {
                    id: message.key().unwrap_or_default().to_vec(),
                    payload: message.payload().unwrap_or_default().to_vec(),
                    tag: Tag::Kafka { partition: message.partition(), offset: message.offset() },
                };
                received.push(read(consumer.recv().await?));
                while received.len() < most {
                    match futures_util::FutureExt::now_or_never(consumer.recv()) {
                        Some(message) => received.push(read(message?)),
                        None => break,
                    }
                }
            }
            Self::Rabbit { consumer, .. } => {
                let read = |delivery: lapin::message::Delivery| Received {
                    id: delivery.properties.message_id().as_ref().map(|id| id.as_bytes().to_vec()).unwrap_or_default(),
                    payload: delivery.data,
                    tag: Tag::Rabbit(delivery.delivery_tag),
                };
                let first = consumer.next().await.ok_or("the consumer was cancelled")??;
                received.push(read(first));
                while received.len() < most {
                    match futures_util::FutureExt::now_or_never(consumer.next()) {
                        Some(Some(delivery)) => received.push(read(delivery?)),
                        _ => break,
                    }
                }
            }
            Self::Redis { reads, topic, group, .. } => {
                let options = StreamReadOptions::default().group(&*group, "one").count(most).block(1_000);
                let reply: Option<StreamReadReply> = reads.xread_options(&[&*topic], &[">"], &options).await?;
                for entry in reply.into_iter().flat_map(|reply| reply.keys).flat_map(|key| key.ids) {
                    let field = |name: &str| entry.get::<Vec<u8>>(name).unwrap_or_default();
                    received.push(Received {
                        id: field("ce_id"),
                        payload: field("data"),
                        tag: Tag::Redis(entry.id.clone()),
                    });
                }
            }
        }
        Ok(received)
    }

    /// Acknowledges these, all of them done, and the last ones of what was received so far.
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
            Self::Redis { writes, topic, group, .. } => {
                let ids: Vec<_> = done.iter().filter_map(|received| match &received.tag {
                    Tag::Redis(id) => Some(id.as_str()),
                    _ => None,
                });
                let ids: Vec<_> = ids.collect();
                let _: u64 = writes.xack(&*topic, &*group, &ids).await?;
            }
        }
        Ok(())
    }

    /// Acknowledges one message and waits for it, as a consumer does that takes one after the other.
    pub async fn acknowledge_one(&mut self, done: &Received) -> Result<(), Error> {
        match (&mut *self, &done.tag) {
            (Self::Kafka { consumer, topic }, Tag::Kafka { partition, offset }) => {
                let mut list = TopicPartitionList::new();
                list.add_partition_offset(topic, *partition, Offset::Offset(offset + 1))?;
                consumer.commit(&list, CommitMode::Async)?;
            }
            (Self::Rabbit { channel, .. }, Tag::Rabbit(tag)) => {
                channel.basic_ack(*tag, BasicAckOptions::default()).await?;
            }
            (Self::Redis { writes, topic, group, .. }, Tag::Redis(id)) => {
                let _: u64 = writes.xack(&*topic, &*group, &[id]).await?;
            }
            _ => unreachable!("a message is acknowledged where it came from"),
        }
        Ok(())
    }

    /// What was acknowledged is durable at the broker.
    pub async fn close(self) -> Result<(), Error> {
        match self {
            Self::Kafka { consumer, .. } => {
                tokio::task::spawn_blocking(move || {
                    // Nothing stored since the last automatic commit is no error of ours.
                    let _ = consumer.commit_consumer_state(CommitMode::Sync);
                    consumer.unsubscribe();
                })
                .await?;
            }
            Self::Rabbit { _connection, .. } => _connection.close(200, "done".into()).await?,
            Self::Redis { .. } => {}
        }
        tokio::time::sleep(Duration::ZERO).await;
        Ok(())
    }
}
