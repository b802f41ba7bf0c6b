//! The topics at the broker: are they there, how safely and how long do they keep messages, and creating those that are
//! missing where that was asked for.
//!
//! Nothing is created unasked: a topic that appears by itself has the number of partitions that somebody chose for all
//! topics, and a misspelt one looks like an idle one. What cannot be described (no right to) is not promised.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hapax::{Durability, Error, ErrorKind, Result, redact};
use rdkafka::ClientContext;
use rdkafka::admin::{
    AdminClient, AdminOptions, ConfigResource, NewTopic, OwnedResourceSpecifier, ResourceSpecifier, TopicReplication,
};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::types::{RDKafkaErrorCode as Code, RDKafkaRespErr};
use tokio::time::{Instant, sleep};

use crate::client::Logging;
use crate::error::error;
use crate::places::Places;
use crate::properties::{Client, Properties};
use crate::settings::Declare;

/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(10);
/// How long one look at a topic may take: with [`HEAR`] less than the runtime waits for `open`, so that the reason is told.
const LOOK: Duration = Duration::from_secs(6);
/// How long it may take to hear why it failed.
const HEAR: Duration = Duration::from_millis(1_500);
/// Most of what it says that is listened to.
const HEARD_MAX: usize = 64;
/// How long until a server is asked again for what it did not know.
const AGAIN: Duration = Duration::from_millis(50);
/// How long describing topics may take: without an answer less is promised.
const DESCRIBE: Duration = Duration::from_secs(5);
/// How long a topic that was just created may take to be described.
const DESCRIBED_MAX: Duration = Duration::from_secs(3);
/// How long created topics may take to be seen by every server.
const SEEN_MAX: Duration = Duration::from_secs(15);

/// Room for the headers that a retry or a dead letter bears in addition.
const HEADER_BYTES: u64 = 64 << 10;
/// What a retry or dead-letter topic takes at least, where it is created here.
const OWN_BYTES_MIN: u64 = 2 << 20;
/// The property is a 32-bit number.
const BYTES_MAX: u64 = i32::MAX as u64;

type Admin = Arc<AdminClient<Logging>>;
/// What a topic is configured with; `None` where it may not be described.
type Config = Option<ConfigResource>;

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
    let admin = Going(Arc::new(admin));
    look(&admin.0, properties, places, declare).await
}

/// A client that goes on a thread of its own, however `check` ends: it joins its own thread.
struct Going(Admin);

impl Drop for Going {
    fn drop(&mut self) {
        let admin = Arc::clone(&self.0);
        // Without a thread it is dropped here: slow, but done.
        let _ = std::thread::Builder::new().name("hapax-kafka-end".to_owned()).spawn(move || last(admin));
    }
}

/// Waits until nobody else has it, which a future that is being dropped shows soon, and lets it go.
fn last(mut admin: Admin) {
    while let Err(shared) = Arc::try_unwrap(admin) {
        admin = shared;
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

async fn look(
    admin: &Admin,
    properties: &Properties,
    places: &Arc<Places>,
    declare: Option<&Declare>,
) -> Result<Facts> {
    let mut shapes = shapes(admin, properties, places).await?;
    let missing = missing(places, &shapes);
    let mut patience = Duration::ZERO;
    if !missing.is_empty() {
        let Some(declare) = declare else { return Err(absent(properties, &missing)) };
        let own: Vec<&Arc<str>> = places.own().collect();
        let (own, mains): (Vec<_>, Vec<_>) = missing.iter().cloned().partition(|name| own.contains(&name));
        // The topics themselves first: what they take says what their retries and dead letters must take.
        if !mains.is_empty() {
            create(admin, &mains, declare, None).await?;
            seen(admin, properties, places, &mains).await?;
        }
        if !own.is_empty() {
            let taken = largest(admin, &mains_of(places)).await?;
            create(admin, &own, declare, Some(taken)).await?;
        }
        shapes = seen(admin, properties, places, &missing).await?;
        patience = DESCRIBED_MAX;
    }
    facts(admin, places, &shapes, patience).await
}

/// Waits until the servers tell of topics that were just created.
async fn seen(
    admin: &Admin,
    properties: &Properties,
    places: &Arc<Places>,
    created: &[Arc<str>],
) -> Result<BTreeMap<Arc<str>, Shape>> {
    let until = Instant::now() + SEEN_MAX;
    loop {
        let shapes = shapes(admin, properties, places).await?;
        let unseen: Vec<Arc<str>> = created.iter().filter(|name| !shapes.contains_key(*name)).cloned().collect();
        if unseen.is_empty() {
            return Ok(shapes);
        }
        if Instant::now() >= until {
            return Err(absent(properties, &unseen));
        }
        sleep(AGAIN).await;
    }
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
async fn shapes(admin: &Admin, properties: &Properties, places: &Arc<Places>) -> Result<BTreeMap<Arc<str>, Shape>> {
    let (admin, places, properties) = (Arc::clone(admin), Arc::clone(places), properties.clone());
    let asked = tokio::task::spawn_blocking(move || {
        let mut shapes = BTreeMap::new();
        for name in places.subscribed.iter().map(|place| &place.name).chain(&places.dead) {
            let metadata = admin.inner().fetch_metadata(Some(name), LOOK);
            let metadata = metadata.map_err(|refused| because(refused, &properties, name))?;
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

/// An error that says why, where the servers cannot be reached: an admin client hands on nothing of what librdkafka says
/// about its connections, so another client tries once more.
fn because(refused: KafkaError, properties: &Properties, topic: &str) -> Error {
    let told = error("open", refused);
    if told.kind() != ErrorKind::Unavailable {
        return told;
    }
    let Ok(client) =
        properties.config(Client::Admin).create_with_context::<_, BaseConsumer<Hearing>>(Hearing::default())
    else {
        return told;
    };
    let _ = client.fetch_metadata(Some(topic), HEAR);
    // What it said meanwhile. Log lines come between, and end a poll with nothing.
    for _ in 0..HEARD_MAX {
        if client.context().heard().is_some() {
            break;
        }
        let _ = client.poll(Duration::ZERO);
    }
    match client.context().heard() {
        Some(why) => Error::new(ErrorKind::Unavailable, "open").because(why).with_source(told),
        None => told,
    }
}

/// The context of a client that is asked why servers cannot be reached.
#[derive(Debug, Default)]
struct Hearing(OnceLock<String>);

impl Hearing {
    fn heard(&self) -> Option<String> {
        self.0.get().cloned()
    }
}

impl ClientContext for Hearing {
    fn error(&self, error: KafkaError, reason: &str) {
        // That all are down says nothing about why.
        if error.rdkafka_error_code() != Some(Code::AllBrokersDown) {
            let _ = self.0.set(redact(reason).into_owned());
        }
    }
}

impl ConsumerContext for Hearing {}

fn mains_of(places: &Places) -> Vec<&str> {
    places.subscribed[..places.mains()].iter().map(|place| &*place.name).collect()
}

/// The largest message that one of these topics takes, as far as they may be described. Without an answer it fails, and can
/// be tried again: what is created too small stays so, and is refused ever after.
async fn largest(admin: &Admin, topics: &[&str]) -> Result<u64> {
    let told = match described(admin, topics, DESCRIBED_MAX).await {
        Ok(told) => told,
        Err(refused) => {
            let told = error("open", refused);
            return if told.kind() == ErrorKind::Unknown { Err(told) } else { Ok(0) };
        }
    };
    let most = told.iter().filter_map(|told| number(told, "max.message.bytes"));
    Ok(most.filter_map(|most| u64::try_from(most).ok()).max().unwrap_or(0))
}

/// Creates topics; those that are for messages of others take what those take, with headers.
async fn create(admin: &Admin, missing: &[Arc<str>], declare: &Declare, taken: Option<u64>) -> Result<()> {
    let most = taken.map(|taken| (taken + HEADER_BYTES).clamp(OWN_BYTES_MIN, BYTES_MAX).to_string());
    let new: Vec<NewTopic<'_>> = missing
        .iter()
        .map(|name| {
            let replication = TopicReplication::Fixed(declare.replication.unwrap_or(-1));
            let mut new = NewTopic::new(name, declare.partitions, replication);
            if let Some(most) = &most {
                new = new.set("max.message.bytes", most);
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

/// What topics are configured with. A server that has not heard yet of a new topic says as little as one that may not
/// tell, so whoever has just created one asks again for a while.
async fn described(admin: &Admin, topics: &[&str], patience: Duration) -> Result<Vec<Config>, KafkaError> {
    let asked: Vec<ResourceSpecifier<'_>> = topics.iter().map(|name| ResourceSpecifier::Topic(name)).collect();
    let options = AdminOptions::new().request_timeout(Some(DESCRIBE));
    let until = Instant::now() + patience;
    loop {
        let told = admin.describe_configs(&asked, &options).await?;
        // By name: nothing says that the answers come in the order of the questions.
        let mut told: BTreeMap<String, ConfigResource> = told.into_iter().flatten().filter_map(by_name).collect();
        let told: Vec<Config> = topics.iter().map(|name| told.remove(*name)).collect();
        if told.iter().all(Option::is_some) || Instant::now() >= until {
            return Ok(told);
        }
        sleep(AGAIN).await;
    }
}

/// A topic that is refused has no properties, and its error is not handed on (rdkafka 0.39).
fn by_name(told: ConfigResource) -> Option<(String, ConfigResource)> {
    if told.entries.is_empty() {
        return None;
    }
    let OwnedResourceSpecifier::Topic(name) = &told.specifier else { return None };
    Some((name.clone(), told))
}

fn value(told: &Config, key: &str) -> Option<String> {
    told.as_ref()?.get(key)?.value.clone()
}

fn number(told: &Config, key: &str) -> Option<i64> {
    value(told, key)?.parse().ok()
}

/// Kafka acknowledges before it flushes, so one server alone does not survive a crash of its machine; two in-sync ones
/// that must both have a message do, one of them.
async fn facts(
    admin: &Admin,
    places: &Places,
    shapes: &BTreeMap<Arc<str>, Shape>,
    patience: Duration,
) -> Result<Facts> {
    let mut facts = Facts { durability: Durability::Durable, kept: Some(Duration::ZERO) };
    let subscribed = places.subscribed.iter().map(|place| &place.name);
    let names: Vec<&str> = subscribed.chain(&places.dead).map(|name| &**name).collect();
    let told = match described(admin, &names, patience).await {
        Ok(told) => told,
        Err(refused) => {
            tracing::debug!(error = %refused, "topics cannot be described: their retention is unknown");
            return Ok(Facts { durability: Durability::Lossy, kept: None });
        }
    };
    let most: Vec<Option<i64>> = told.iter().map(|told| number(told, "max.message.bytes")).collect();
    for (at, name) in names.iter().enumerate() {
        let main = if at < places.subscribed.len() { places.main(at) } else { at - places.subscribed.len() };
        fits(names[main], most[main], name, most[at])?;
    }
    for (name, told) in names.iter().zip(&told).take(places.subscribed.len()) {
        let replicas = shapes.get(*name).map_or(0, |shape| shape.replicas);
        let in_sync = number(told, "min.insync.replicas").unwrap_or(1);
        let flushed = number(told, "flush.messages") == Some(1);
        if !flushed && (replicas < 2 || in_sync < 2) {
            facts.durability = Durability::Lossy;
        }
        let compacted = value(told, "cleanup.policy").is_none_or(|policy| policy.contains("compact"));
        let kept = number(told, "retention.ms").filter(|_| !compacted).and_then(|ms| u64::try_from(ms).ok());
        facts.kept = facts.kept.zip(kept.map(Duration::from_millis)).map(|(most, kept)| most.max(kept));
    }
    Ok(facts)
}

/// Refuses a topic that takes less than the one whose retries or dead letters go there: such a message could not leave
/// its partition, and nothing behind it would be committed.
fn fits(main: &str, main_bytes: Option<i64>, own: &str, own_bytes: Option<i64>) -> Result<()> {
    let Some((main_bytes, own_bytes)) = main_bytes.zip(own_bytes).filter(|_| main != own) else { return Ok(()) };
    let room = i64::try_from(HEADER_BYTES).unwrap_or(i64::MAX);
    if own_bytes < main_bytes {
        return Err(Error::new(ErrorKind::Configuration, "open").because(format!(
            "topic `{own}` takes messages of {own_bytes} bytes, and `{main}` of {main_bytes}: set its max.message.bytes to \
             {} or more",
            main_bytes.saturating_add(room)
        )));
    }
    if own_bytes < main_bytes.saturating_add(room) {
        tracing::warn!(
            topic = own,
            own_bytes,
            main_bytes,
            "max.message.bytes leaves little room for the headers of retries and dead letters"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_that_takes_less_than_its_main_topic_is_refused_with_both_names() {
        let refused = fits("orders", Some(8_000_000), "orders.g.dead", Some(2_000_000)).expect_err("it takes less");
        assert_eq!(refused.kind(), ErrorKind::Configuration);
        for part in ["`orders.g.dead`", "`orders`", "max.message.bytes", "8065536"] {
            assert!(refused.to_string().contains(part), "{part} in {refused}");
        }
        fits("orders", Some(1_000), "orders.g.dead", Some(1_000)).expect("the headers may fit");
        fits("orders", None, "orders.g.dead", Some(1)).expect("what may not be described is not judged");
    }
}
