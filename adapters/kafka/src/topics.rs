//! The topics at the broker: are they there, how safely and how long do they keep messages, and creating those that are
//! missing where that was asked for.
//!
//! Nothing is created unasked: a topic that appears by itself has the number of partitions that somebody chose for all
//! topics, and a misspelt one looks like an idle one. What cannot be described (no right to) is not promised.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hapax::{Durability, Error, ErrorKind, Result};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::types::{RDKafkaErrorCode as Code, RDKafkaRespErr};
use tokio::time::{Instant, sleep};

use crate::client::Logging;
use crate::error::error;
use crate::places::Places;
use crate::properties::{Client, Properties};
use crate::settings::Declare;

/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(10);
/// How long describing topics may take: without an answer less is promised.
const DESCRIBE: Duration = Duration::from_secs(5);
/// How long created topics may take to be seen by every server.
const SEEN_MAX: Duration = Duration::from_secs(15);

/// What the topics promise.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    pub(crate) durability: Durability,
    /// The longest retention of the topics that are consumed.
    pub(crate) kept: Option<Duration>,
}

/// A topic as the servers tell it.
#[derive(Clone, Copy, Debug)]
struct Shape {
    replicas: usize,
}

/// Checks the topics, creates what is missing if that was asked for, and says what they promise.
pub(crate) async fn check(properties: &Properties, places: &Arc<Places>, declare: Option<&Declare>) -> Result<Facts> {
    let admin: AdminClient<Logging> =
        properties.config(Client::Admin).create_with_context(Logging).map_err(|refused| error("open", refused))?;
    let admin = Arc::new(admin);
    let looked = look(&admin, properties, places, declare).await;
    // Joins a thread.
    drop(tokio::task::spawn_blocking(move || drop(admin)));
    looked
}

async fn look(
    admin: &Arc<AdminClient<Logging>>,
    properties: &Properties,
    places: &Arc<Places>,
    declare: Option<&Declare>,
) -> Result<Facts> {
    let mut shapes = shapes(admin, places).await?;
    let mut missing = missing(places, &shapes);
    if let Some(declare) = declare.filter(|_| !missing.is_empty()) {
        create(admin, places, &missing, declare).await?;
        let until = Instant::now() + SEEN_MAX;
        while !missing.is_empty() && Instant::now() < until {
            sleep(Duration::from_millis(50)).await;
            shapes = self::shapes(admin, places).await?;
            missing = self::missing(places, &shapes);
        }
    }
    if !missing.is_empty() {
        return Err(absent(properties, &missing));
    }
    Ok(facts(admin, places, &shapes).await)
}

fn missing(places: &Places, shapes: &BTreeMap<Arc<str>, Shape>) -> Vec<Arc<str>> {
    let all = places.subscribed.iter().map(|place| &place.name).chain(&places.dead);
    all.filter(|name| !shapes.contains_key(*name)).cloned().collect()
}

fn absent(properties: &Properties, missing: &[Arc<str>]) -> Error {
    let names: Vec<&str> = missing.iter().map(|name| &**name).collect();
    Error::new(ErrorKind::Configuration, "open").because(format!(
        "there is no topic {}: create each (kafka-topics.sh --bootstrap-server {} --create --topic {} --partitions N \
         --replication-factor R), or have them created: .declare(Declare::partitions(N).replication(R))",
        names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
        properties.servers(),
        names[0],
    ))
}

/// Every topic that is there. One request each: all topics of a cluster can be many thousands.
async fn shapes(admin: &Arc<AdminClient<Logging>>, places: &Arc<Places>) -> Result<BTreeMap<Arc<str>, Shape>> {
    let (admin, places) = (Arc::clone(admin), Arc::clone(places));
    let asked = tokio::task::spawn_blocking(move || {
        let mut shapes = BTreeMap::new();
        for name in places.subscribed.iter().map(|place| &place.name).chain(&places.dead) {
            let metadata =
                admin.inner().fetch_metadata(Some(name), REQUEST).map_err(|refused| error("open", refused))?;
            for topic in metadata.topics() {
                match topic.error() {
                    None if !topic.partitions().is_empty() => {
                        let replicas = topic.partitions().iter().map(|partition| partition.replicas().len()).min();
                        shapes.insert(Arc::clone(name), Shape { replicas: replicas.unwrap_or(0) });
                    }
                    Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED) => {
                        return Err(Error::new(ErrorKind::Configuration, "open").because(format!(
                            "topic `{name}` may not be described: grant READ on it (docs/kafka.md)"
                        )));
                    }
                    _ => {}
                }
            }
        }
        Ok(shapes)
    });
    asked.await.map_err(|_| Error::new(ErrorKind::Internal, "open").because("looking at topics panicked"))?
}

async fn create(
    admin: &Arc<AdminClient<Logging>>,
    places: &Places,
    missing: &[Arc<str>],
    declare: &Declare,
) -> Result<()> {
    let own: Vec<&Arc<str>> = places.own().collect();
    let new: Vec<NewTopic<'_>> = missing
        .iter()
        .map(|name| {
            let replication = TopicReplication::Fixed(declare.replication.unwrap_or(-1));
            let mut new = NewTopic::new(name, declare.partitions, replication);
            if own.contains(&name) {
                // Room for the headers that a retry or a dead letter bears in addition.
                new = new.set("max.message.bytes", "2097152");
            }
            new
        })
        .collect();
    let options = AdminOptions::new().request_timeout(Some(REQUEST)).operation_timeout(Some(REQUEST));
    let created = admin.create_topics(&new, &options).await.map_err(|refused| error("open", refused))?;
    for answer in created {
        match answer {
            // Another worker that started at the same time.
            Ok(_) | Err((_, Code::TopicAlreadyExists)) => {}
            Err((name, code)) => {
                return Err(Error::new(ErrorKind::Configuration, "open").because(format!(
                    "topic `{name}` could not be created ({code}): grant CREATE, or create it beforehand"
                )));
            }
        }
    }
    Ok(())
}

/// Kafka acknowledges before it flushes, so one server alone does not survive a crash of its machine; two in-sync ones
/// that must both have a message do, one of them.
async fn facts(admin: &Arc<AdminClient<Logging>>, places: &Places, shapes: &BTreeMap<Arc<str>, Shape>) -> Facts {
    let mut facts = Facts { durability: Durability::Durable, kept: Some(Duration::ZERO) };
    let names: Vec<&str> = places.subscribed.iter().map(|place| &*place.name).collect();
    let asked: Vec<ResourceSpecifier<'_>> = names.iter().map(|name| ResourceSpecifier::Topic(name)).collect();
    let options = AdminOptions::new().request_timeout(Some(DESCRIBE));
    let told = match admin.describe_configs(&asked, &options).await {
        Ok(told) => told,
        Err(refused) => {
            tracing::debug!(error = %refused, "topics cannot be described: their retention is unknown");
            return Facts { durability: Durability::Lossy, kept: None };
        }
    };
    for (name, told) in names.iter().zip(told) {
        let value = |key: &str| -> Option<String> { told.as_ref().ok()?.get(key)?.value.clone() };
        let number = |key: &str| value(key).and_then(|value| value.parse::<i64>().ok());
        let replicas = shapes.get(*name).map_or(0, |shape| shape.replicas);
        let in_sync = number("min.insync.replicas").unwrap_or(1);
        let flushed = number("flush.messages") == Some(1);
        if !flushed && (replicas < 2 || in_sync < 2) {
            facts.durability = Durability::Lossy;
        }
        let compacted = value("cleanup.policy").is_none_or(|policy| policy.contains("compact"));
        let kept = number("retention.ms").filter(|_| !compacted).and_then(|ms| u64::try_from(ms).ok());
        facts.kept = facts.kept.zip(kept.map(Duration::from_millis)).map(|(most, kept)| most.max(kept));
    }
    facts
}
