//! `KafkaBrokerBuilder`: what is said about a consumer before it opens, and the check of it, all faults at once.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hapax::{Error, ErrorKind, Result, SecretUrl};

use crate::broker::KafkaBroker;
use crate::places::Places;
use crate::properties::Properties;

/// Topics that are missing are created with this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Declare {
    pub(crate) partitions: i32,
    pub(crate) replication: Option<i32>,
}

impl Declare {
    /// With this many partitions. The servers' `default.replication.factor` holds unless
    /// [`replication`](Self::replication) is called.
    pub fn partitions(partitions: u16) -> Self {
        Self { partitions: i32::from(partitions), replication: None }
    }

    /// With so many replicas of each partition. Three, and `min.insync.replicas=2` at the servers, is what survives the
    /// loss of a machine.
    #[must_use]
    pub fn replication(self, replicas: u16) -> Self {
        Self { replication: Some(i32::from(replicas)), ..self }
    }
}

/// What is said about a consumer before it opens.
///
/// ```
/// use std::time::Duration;
///
/// use hapax_kafka::{Declare, KafkaBroker};
///
/// let broker = KafkaBroker::builder("kafka://127.0.0.1:9092".parse()?, "billing", ["orders"])
///     .retry_steps([Duration::from_secs(10), Duration::from_secs(300)])
///     .declare(Declare::partitions(6).replication(3))
///     .property("client.rack", "eu-1a")
///     .build()?;
/// # Ok::<(), hapax::Error>(())
/// ```
#[derive(Clone)]
pub struct KafkaBrokerBuilder {
    url: SecretUrl,
    group: Box<str>,
    topics: Vec<Box<str>>,
    properties: BTreeMap<String, String>,
    retry_steps: Vec<Duration>,
    session_timeout: Option<Duration>,
    commit_interval: Duration,
    declare: Option<Declare>,
}

/// The checked settings of a consumer.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) properties: Properties,
    pub(crate) group: Box<str>,
    pub(crate) places: Arc<Places>,
    pub(crate) session_timeout: Option<Duration>,
    pub(crate) commit_interval: Duration,
    pub(crate) declare: Option<Declare>,
    pub(crate) poll_interval_max: Duration,
}

impl KafkaBrokerBuilder {
    /// Delays that have a retry topic: 15 s, 1 min, 5 min.
    pub const RETRY_STEPS: [Duration; 3] = [Duration::from_secs(15), Duration::from_secs(60), Duration::from_secs(300)];
    /// Most delay steps.
    pub const RETRY_STEPS_MAX: usize = 16;
    /// How long what is done may wait for its commit: 100 ms.
    pub const COMMIT_INTERVAL: Duration = Duration::from_millis(100);
    /// librdkafka's default of `max.poll.interval.ms`: 5 min.
    pub const POLL_INTERVAL_MAX: Duration = Duration::from_secs(300);

    pub(crate) fn new(url: SecretUrl, group: Box<str>, topics: Vec<Box<str>>) -> Self {
        Self {
            url,
            group,
            topics,
            properties: BTreeMap::new(),
            retry_steps: Self::RETRY_STEPS.to_vec(),
            session_timeout: None,
            commit_interval: Self::COMMIT_INTERVAL,
            declare: None,
        }
    }

    /// Any property of librdkafka (its CONFIGURATION.md). Those that hapax must own are refused by `build`, with what to
    /// do instead. Values are never printed.
    ///
    /// `group.protocol=consumer` takes the protocol of KIP-848 (Kafka 4.0 and later).
    #[must_use]
    pub fn property(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.properties.insert(name.into(), value.into());
        self
    }

    /// The delays that have a retry topic of their own for each topic, `{topic}.{group}.retry.{step}`. A retry waits in
    /// the topic of the first step that is long enough, until its own time; the longest step is the longest retry that
    /// the broker takes. None at all: every retry waits in this process.
    #[must_use]
    pub fn retry_steps(mut self, steps: impl IntoIterator<Item = Duration>) -> Self {
        self.retry_steps = steps.into_iter().collect();
        self
    }

    /// After how long without a heartbeat the group gives this member up: after a crash its partitions are idle for so
    /// long. librdkafka's default is 45 s; the servers' `group.min.session.timeout.ms` is 6 s. Not used with
    /// `group.protocol=consumer`, where the servers decide.
    #[must_use]
    pub fn session_timeout(mut self, timeout: Duration) -> Self {
        self.session_timeout = Some(timeout);
        self
    }

    /// How long what is done may wait for its commit. A crash delivers again what was not committed; it is found
    /// processed.
    #[must_use]
    pub fn commit_interval(mut self, interval: Duration) -> Self {
        self.commit_interval = interval;
        self
    }

    /// Creates topics that are missing at `open`: those named, the retry topics and the dead-letter topics. Without it
    /// a missing topic is an error that names the command.
    #[must_use]
    pub fn declare(mut self, declare: Declare) -> Self {
        self.declare = Some(declare);
        self
    }

    /// Checks everything and reports every fault at once. Connects to nothing.
    pub fn build(self) -> Result<KafkaBroker> {
        let mut faults = Vec::new();
        let properties = Properties::new(&self.url, &self.properties, &mut faults);
        let mut steps = self.retry_steps;
        steps.sort_unstable();
        steps.dedup();
        if steps.len() > Self::RETRY_STEPS_MAX {
            faults.push(format!("retry_steps are {}: at most {}", steps.len(), Self::RETRY_STEPS_MAX));
        }
        if steps.first().is_some_and(|step| *step < Duration::from_millis(1)) || steps.iter().any(has_less_than_ms) {
            faults.push("retry_steps are whole milliseconds, at least one".to_owned());
        }
        if self.topics.is_empty() {
            faults.push("topics: name at least one".to_owned());
        }
        let mut topics = self.topics;
        topics.sort_unstable();
        topics.dedup();
        if self.commit_interval.is_zero() || self.commit_interval > Duration::from_secs(60) {
            faults.push("commit_interval is above 0 and at most 60 s".to_owned());
        }
        if self.session_timeout.is_some_and(|timeout| timeout < Duration::from_millis(1)) {
            faults.push("session_timeout is at least 1 ms".to_owned());
        }
        if self.declare.is_some_and(|declare| declare.partitions == 0 || declare.replication == Some(0)) {
            faults.push("declare: partitions and replication are at least 1".to_owned());
        }
        let interval = properties.get("max.poll.interval.ms").and_then(|ms| ms.parse().ok());
        let poll_interval_max = interval.map_or(Self::POLL_INTERVAL_MAX, Duration::from_millis);
        let places = Places::new(&topics, &self.group, &steps);
        let why = |error: Error| error.to_string().trim_start_matches("open: ").to_owned();
        match (places.map_err(why), faults.is_empty()) {
            (Ok(places), true) => Ok(KafkaBroker::new(Settings {
                properties,
                group: self.group,
                places: Arc::new(places),
                session_timeout: self.session_timeout,
                commit_interval: self.commit_interval,
                declare: self.declare,
                poll_interval_max,
            })),
            (places, _) => {
                faults.extend(places.err());
                Err(Error::new(ErrorKind::Configuration, "build").because(faults.join("; ")))
            }
        }
    }
}

fn has_less_than_ms(step: &Duration) -> bool {
    !step.subsec_nanos().is_multiple_of(1_000_000)
}

impl fmt::Debug for KafkaBrokerBuilder {
    /// Names of properties, never values.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaBrokerBuilder")
            .field("url", &self.url)
            .field("group", &self.group)
            .field("topics", &self.topics)
            .field("properties", &self.properties.keys())
            .field("retry_steps", &self.retry_steps)
            .field("session_timeout", &self.session_timeout)
            .field("commit_interval", &self.commit_interval)
            .field("declare", &self.declare)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder(url: &str, group: &str, topics: &[&str]) -> KafkaBrokerBuilder {
        KafkaBroker::builder(url.parse().expect("a url"), group, topics.iter().copied())
    }

    #[test]
    fn every_fault_is_told_at_once() {
        let refused = builder("redis://a", "my group", &["orders"])
            .property("acks", "1")
            .commit_interval(Duration::ZERO)
            .retry_steps([Duration::from_nanos(1)])
            .declare(Declare::partitions(0))
            .build()
            .expect_err("many faults");
        assert_eq!(refused.kind(), ErrorKind::Configuration);
        let text = refused.to_string();
        for part in ["url begins", "`acks`", "commit_interval", "retry_steps", "declare", "group"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn no_topic_is_a_fault() {
        let refused = builder("kafka://a", "g", &[]).build().expect_err("nothing to consume");
        assert!(refused.to_string().contains("topics"), "{refused}");
    }

    #[test]
    fn secrets_are_in_no_text() {
        let canary = "canary-hunter2";
        let given = builder(&format!("kafka://app:{canary}@a"), "g", &["orders"])
            .property("sasl.password", canary)
            .property("ssl.key.pem", canary)
            .property("sasl.mechanism", canary)
            .property("security.protocol", "sasl_plaintext");
        let mut texts = format!("{given:?}");
        match given.build() {
            Ok(broker) => texts += &format!("{broker:?}"),
            Err(refused) => texts += &format!("{refused:?} {refused}"),
        }
        assert!(!texts.to_ascii_lowercase().contains(canary), "{texts}");
    }
}
