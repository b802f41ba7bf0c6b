//! Topics, filled before a run or at a pace: CloudEvents in binary mode, by the brokers' own clients.

use std::time::{Duration, Instant};

use compare_kit::{now_us, payload};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Connection, ConnectionProperties};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};
use redis::aio::MultiplexedConnection;

pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Of each topic in Kafka.
const PARTITIONS: i32 = 4;
/// Messages that are sent before their confirmations are awaited.
const AT_ONCE: usize = 1_000;
const PATIENCE: Duration = Duration::from_secs(30);

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub struct Content {
    pub size: usize,
    /// The share of messages that repeat an earlier one.
    pub duplicates: f64,
    /// Ordering keys; 0 is one for each message.
    pub keys: u64,
}

impl Content {
    pub const fn of(size: usize) -> Self {
        Self { size, duplicates: 0.0, keys: 0 }
    }

    /// How many distinct events so many messages are.
    pub fn distinct(&self, messages: u64) -> u64 {
        (0..messages).filter(|number| !self.repeats(*number)).count() as u64
    }

    fn repeats(&self, number: u64) -> bool {
        let due = |number: u64| (number as f64 * self.duplicates) as u64;
        number > 0 && due(number + 1) > due(number)
    }

    /// The event's number: its own, or that of one which came before, each as often as any other.
    fn event(&self, number: u64) -> u64 {
        if !self.repeats(number) {
            return number;
        }
        let mut event = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) % number;
        while self.repeats(event) {
            event = (event + 1) % number;
        }
        event
    }
}

/// One message on its way.
struct Sent {
    id: String,
    key: Option<String>,
    payload: Vec<u8>,
}

impl Sent {
    fn new(content: &Content, number: u64, sent_us: u64) -> Self {
        let number = content.event(number);
        let key = (content.keys > 0).then(|| format!("{}", number % content.keys));
        Self { id: format!("{number:016}"), key, payload: payload(content.size, sent_us) }
    }
}

pub enum Feed {
    Kafka { producer: Box<ThreadedProducer<DefaultProducerContext>>, admin: Box<AdminClient<DefaultClientContext>> },
    Rabbit { url: String, connection: Connection },
    Redis { connection: MultiplexedConnection },
}

/// On a new connection where the server has ended the last one: RabbitMQ 3.10 does that where a queue is deleted while its log
/// is cut, and one queue's end is not to be that of all rounds that follow.
async fn channel(url: &str, connection: &mut Connection) -> Result<lapin::Channel, Error> {
    if !connection.status().connected() {
        *connection = Connection::connect(url, ConnectionProperties::default()).await?;
    }
    Ok(connection.create_channel().await?)
}

impl Feed {
    /// `at_a_pace`: every message is sent at once instead of with others.
    pub async fn open(broker: &str, url: &str, at_a_pace: bool) -> Result<Self, Error> {
        Ok(match broker {
            "kafka" => {
                let mut config = ClientConfig::new();
                config.set("bootstrap.servers", url.trim_start_matches("kafka://"));
                let admin = Box::new(config.create()?);
                config.set("linger.ms", if at_a_pace { "0" } else { "5" });
                config.set("queue.buffering.max.messages", "200000");
                Self::Kafka { producer: Box::new(config.create()?), admin }
            }
            "rabbitmq" => {
                let connection = Connection::connect(url, ConnectionProperties::default()).await?;
                Self::Rabbit { url: url.to_owned(), connection }
            }
            "redis" => {
                let client = redis::Client::open(url)?;
                Self::Redis { connection: client.get_multiplexed_async_connection().await? }
            }
            other => return Err(format!("there is no broker {other}").into()),
        })
    }

    pub async fn create(&mut self, topic: &str) -> Result<(), Error> {
        match self {
            Self::Kafka { admin, .. } => {
                let new = NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(1));
                for answer in admin.create_topics(&[new], &AdminOptions::new()).await? {
                    answer.map_err(|(topic, why)| format!("topic {topic}: {why}"))?;
                }
            }
            Self::Rabbit { url, connection } => {
                // As hapax declares it.
                let mut arguments = FieldTable::default();
                arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
                arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(1_000_000));
                let channel = channel(url, connection).await?;
                let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
                channel.queue_declare(topic.into(), options, arguments).await?;
                channel.close(200, "done".into()).await?;
            }
            Self::Redis { .. } => {}
        }
        Ok(())
    }

    /// Sends the messages of these numbers; done when the broker has them.
    pub async fn fill(&mut self, topic: &str, content: &Content, numbers: std::ops::Range<u64>) -> Result<(), Error> {
        let mut sender = self.sender(topic).await?;
        for number in numbers {
            // Not the time: a message that is sent again has the same content.
            sender.send(&Sent::new(content, number, 1)).await?;
        }
        sender.finish().await
    }

    /// Sends messages without a time until `ready`, then `events` of them, so many a second, evenly.
    pub async fn pace(
        &mut self,
        topic: &str,
        content: &Content,
        per_second: u64,
        events: u64,
        ready: impl Fn() -> bool,
    ) -> Result<(), Error> {
        const WARM_UP: u64 = 1 << 40;
        let mut sender = self.sender(topic).await?;
        let begun = Instant::now();
        for number in WARM_UP.. {
            sender.send(&Sent::new(content, number, 0)).await?;
            sender.finish().await?;
            if ready() {
                break;
            }
            if begun.elapsed() > PATIENCE {
                return Err("nothing was handled for half a minute".into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        let begun = Instant::now();
        let mut sent = 0;
        while sent < events {
            let due = ((begun.elapsed().as_secs_f64() * per_second as f64) as u64).min(events);
            while sent < due {
                sender.send(&Sent::new(content, sent, now_us())).await?;
                sent += 1;
            }
            sender.flush().await?;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        sender.finish().await
    }

    async fn sender<'a>(&'a mut self, topic: &'a str) -> Result<Sender<'a>, Error> {
        Ok(match self {
            Self::Kafka { producer, .. } => Sender::Kafka { producer, topic },
            Self::Rabbit { url, connection } => {
                let channel = channel(url, connection).await?;
                channel.confirm_select(ConfirmSelectOptions::default()).await?;
                Sender::Rabbit { channel, topic, confirms: Vec::new() }
            }
            Self::Redis { connection } => Sender::Redis { connection, topic, pipe: redis::pipe(), waiting: 0 },
        })
    }

    /// Deletes the topic, and what hapax and others made beside it.
    pub async fn delete(&mut self, topic: &str, group: &str) {
        // What is not there need not be deleted, and what stays hurts nobody.
        match self {
            Self::Kafka { admin, .. } => {
                let dead = format!("{topic}.{group}.dead");
                let _ = admin.delete_topics(&[topic, &dead], &AdminOptions::new()).await;
            }
            Self::Rabbit { url, connection } => {
                let Ok(channel) = channel(url, connection).await else { return };
                let waits = (0..13).map(|step| format!("{topic}.{group}.retry.{}s", 1 << step));
                for queue in [topic.to_owned(), format!("{topic}.{group}.dead")].into_iter().chain(waits) {
                    let _ = channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await;
                }
                let _ = channel.close(200, "done".into()).await;
            }
            Self::Redis { connection } => {
                let _: Result<(), _> = redis::cmd("UNLINK").arg(topic).query_async(connection).await;
            }
        }
    }

    /// Forgets a group, which would otherwise be kept with the stream.
    pub async fn delete_group(&mut self, topic: &str, group: &str) {
        if let Self::Redis { connection } = self {
            let _: Result<(), _> =
                redis::cmd("XGROUP").arg("DESTROY").arg(topic).arg(group).query_async(connection).await;
        }
        if let Self::Kafka { admin, .. } = self {
            let _ = admin.delete_groups(&[group], &AdminOptions::new()).await;
        }
    }
}

enum Sender<'a> {
    Kafka { producer: &'a ThreadedProducer<DefaultProducerContext>, topic: &'a str },
    Rabbit { channel: lapin::Channel, topic: &'a str, confirms: Vec<lapin::PublisherConfirm> },
    Redis { connection: &'a mut MultiplexedConnection, topic: &'a str, pipe: redis::Pipeline, waiting: usize },
}

const ATTRIBUTES: [(&str, &str); 3] = [("source", "/compare"), ("type", "measured"), ("specversion", "1.0")];

impl Sender<'_> {
    async fn send(&mut self, sent: &Sent) -> Result<(), Error> {
        match self {
            Self::Kafka { producer, topic } => {
                let add = |headers: OwnedHeaders, name: &str, value: &str| {
                    headers.insert(Header { key: &format!("ce_{name}"), value: Some(value) })
                };
                let headers = add(OwnedHeaders::new_with_capacity(4), "id", &sent.id);
                let headers = ATTRIBUTES.iter().fold(headers, |headers, (name, value)| add(headers, name, value));
                let key = sent.key.as_ref().unwrap_or(&sent.id);
                let mut record = BaseRecord::to(topic).key(key).payload(&sent.payload).headers(headers);
                while let Err((error, back)) = producer.send(record) {
                    if !matches!(error, KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull)) {
                        return Err(error.into());
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    record = back;
                }
            }
            Self::Rabbit { channel, topic, confirms } => {
                let mut table = FieldTable::default();
                let attributes = [("id", sent.id.as_str())].into_iter().chain(ATTRIBUTES);
                for (name, value) in attributes.chain(sent.key.as_deref().map(|key| ("partitionkey", key))) {
                    table.insert(format!("cloudEvents_{name}").into(), AMQPValue::LongString(value.into()));
                }
                let properties = BasicProperties::default().with_delivery_mode(2).with_headers(table);
                let properties = properties.with_message_id(sent.id.as_str().into());
                let options = BasicPublishOptions::default();
                let confirm = channel.basic_publish("".into(), (*topic).into(), options, &sent.payload, properties);
                confirms.push(confirm.await?);
                if confirms.len() >= AT_ONCE {
                    self.confirmed().await?;
                }
            }
            Self::Redis { topic, pipe, waiting, .. } => {
                let command = pipe.cmd("XADD").arg(*topic).arg("*").arg("ce_id").arg(&sent.id);
                for (name, value) in ATTRIBUTES {
                    command.arg(format!("ce_{name}")).arg(value);
                }
                if let Some(key) = &sent.key {
                    command.arg("ce_partitionkey").arg(key);
                }
                command.arg("data").arg(&sent.payload).ignore();
                *waiting += 1;
                if *waiting >= AT_ONCE {
                    self.flush().await?;
                }
            }
        }
        Ok(())
    }

    /// What was given is on its way.
    async fn flush(&mut self) -> Result<(), Error> {
        if let Self::Redis { connection, pipe, waiting, .. } = self
            && *waiting > 0
        {
            pipe.query_async::<()>(*connection).await?;
            *waiting = 0;
            pipe.clear();
        }
        Ok(())
    }

    async fn confirmed(&mut self) -> Result<(), Error> {
        if let Self::Rabbit { confirms, .. } = self {
            for confirm in confirms.drain(..) {
                confirm.await?;
            }
        }
        Ok(())
    }

    /// What was given is at the broker.
    async fn finish(&mut self) -> Result<(), Error> {
        self.flush().await?;
        self.confirmed().await?;
        if let Self::Kafka { producer, .. } = self {
            producer.flush(PATIENCE)?;
        }
        Ok(())
    }
}
