//! Dead letters, read with the brokers' own clients and no adapter of ours: what an operator would find.

use std::collections::BTreeMap;
use std::time::Duration;

use lapin::options::BasicGetOptions;
use lapin::types::AMQPValue;
use lapin::{Connection, ConnectionProperties};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde_json::Value;
use tokio::time::timeout;

use crate::options::BrokerKind;

/// Longest time for one look.
const LOOK_MAX: Duration = Duration::from_secs(30);
/// More letters than this are not read.
const LETTERS_MAX: usize = 100_000;

/// One dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Letter {
    pub(crate) id: String,
    pub(crate) reason: String,
    pub(crate) attempts: u32,
    /// Whether its data is that of its id.
    pub(crate) intact: bool,
}

/// All dead letters of the group.
pub(crate) async fn read(broker: BrokerKind, url: &str, topic: &str, group: &str) -> Result<Vec<Letter>, String> {
    let place = match broker {
        // The stream and what belongs to it are in one slot of a cluster.
        BrokerKind::Redis => format!("{{{topic}}}.{group}.dead"),
        BrokerKind::Rabbitmq | BrokerKind::Kafka => format!("{topic}.{group}.dead"),
    };
    let reading = async {
        match broker {
            BrokerKind::Redis => from_redis(url, &place).await.map_err(|error| error.to_string()),
            BrokerKind::Rabbitmq => from_rabbitmq(url, &place).await.map_err(|error| error.to_string()),
            BrokerKind::Kafka => {
                let (url, place) = (url.to_owned(), place.clone());
                let reading = tokio::task::spawn_blocking(move || from_kafka(&url, &place));
                reading.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
            }
        }
    };
    let letters = timeout(LOOK_MAX, reading).await.map_err(|_| format!("{place} was not read within {LOOK_MAX:?}"))?;
    letters.map_err(|error| format!("dead letters at {place}: {error}"))
}

async fn from_redis(url: &str, place: &str) -> redis::RedisResult<Vec<Letter>> {
    let client = redis::Client::open(url)?;
    let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(LOOK_MAX));
    let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
    let range: redis::streams::StreamRangeReply = redis::cmd("XRANGE")
        .arg(place)
        .arg("-")
        .arg("+")
        .arg("COUNT")
        .arg(LETTERS_MAX)
        .query_async(&mut connection)
        .await?;
    let letters = range.ids.into_iter().map(|entry| {
        let mut fields = BTreeMap::new();
        for (name, value) in entry.map {
            if let Ok(bytes) = redis::from_redis_value::<Vec<u8>>(value) {
                fields.insert(name, bytes);
            }
        }
        let data = fields.remove("data").unwrap_or_default();
        letter(&fields, "ce_id", &data)
    });
    Ok(letters.collect())
}

async fn from_rabbitmq(url: &str, place: &str) -> lapin::Result<Vec<Letter>> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    let mut letters = Vec::new();
    // Not acked: they go back when the connection closes.
    while let Some(got) = channel.basic_get(place.into(), BasicGetOptions::default()).await? {
        let properties = &got.delivery.properties;
        let mut fields = BTreeMap::new();
        for (name, value) in properties.headers().iter().flat_map(|headers| headers.inner()) {
            let text = match value {
                AMQPValue::LongString(text) => text.as_bytes().to_vec(),
                AMQPValue::ShortString(text) => text.as_str().as_bytes().to_vec(),
                AMQPValue::LongInt(number) => number.to_string().into_bytes(),
                AMQPValue::LongLongInt(number) => number.to_string().into_bytes(),
                _ => continue,
            };
            fields.insert(name.to_string(), text);
        }
        letters.push(letter(&fields, "cloudEvents_id", &got.delivery.data));
        if letters.len() == LETTERS_MAX {
            break;
        }
    }
    connection.close(200, "read".into()).await?;
    Ok(letters)
}

fn from_kafka(url: &str, place: &str) -> rdkafka::error::KafkaResult<Vec<Letter>> {
    let servers = url.trim_start_matches("kafka://");
    let consumer: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", servers).set("group.id", "rig-witness").create()?;
    let metadata = consumer.fetch_metadata(Some(place), Duration::from_secs(10))?;
    let mut list = TopicPartitionList::new();
    let mut left = 0_i64;
    for topic in metadata.topics().iter().filter(|topic| topic.error().is_none()) {
        for partition in topic.partitions() {
            list.add_partition_offset(place, partition.id(), Offset::Beginning)?;
            let (low, high) = consumer.fetch_watermarks(place, partition.id(), Duration::from_secs(10))?;
            left += high - low;
        }
    }
    consumer.assign(&list)?;
    let mut letters = Vec::new();
    let mut quiet = 0;
    while left > 0 && quiet < 10 && letters.len() < LETTERS_MAX {
        let Some(message) = consumer.poll(Duration::from_secs(1)) else {
            quiet += 1;
            continue;
        };
        let message = message?;
        left -= 1;
        let mut fields = BTreeMap::new();
        for header in message.headers().iter().flat_map(|headers| headers.iter()) {
            fields.insert(header.key.to_owned(), header.value.unwrap_or_default().to_vec());
        }
        letters.push(letter(&fields, "ce_id", message.payload().unwrap_or_default()));
    }
    Ok(letters)
}

fn letter(fields: &BTreeMap<String, Vec<u8>>, id_field: &str, data: &[u8]) -> Letter {
    let text = |name: &str| fields.get(name).map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    let body: Value = serde_json::from_slice(data).unwrap_or_default();
    // In structured mode the body is the whole event.
    let (id, data) = match text(id_field) {
        Some(id) => (id, &body),
        None => (body["id"].as_str().unwrap_or_default().to_owned(), &body["data"]),
    };
    let number = data["number"].as_u64();
    let intact = number.is_some_and(|number| id == crate::producer::id(number));
    let attempts = text("hapax-attempts").and_then(|text| text.parse().ok()).unwrap_or_default();
    Letter { id, reason: text("hapax-reason").unwrap_or_default(), attempts, intact }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_is_read_in_both_modes_and_a_foreign_body_shows() {
        let fields =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(n, v)| (n.to_string(), v.as_bytes().to_vec())).collect();
        let binary = fields(&[("ce_id", "e-7"), ("hapax-reason", "conflict"), ("hapax-attempts", "2")]);
        let expected = Letter { id: "e-7".into(), reason: "conflict".into(), attempts: 2, intact: true };
        assert_eq!(letter(&binary, "ce_id", br#"{"number":7}"#), expected);
        assert!(!letter(&binary, "ce_id", br#"{"number":8}"#).intact);
        let structured = fields(&[("hapax-reason", "conflict"), ("hapax-attempts", "2")]);
        assert_eq!(letter(&structured, "ce_id", br#"{"id":"e-7","data":{"number":7}}"#), expected);
    }
}
