//! What librdkafka is told: the address, what hapax must own, what the user passes through, and that no client of ours
//! speaks plaintext where something else was asked for.
//!
//! All clients (the one that consumes, the one that sends, the one that looks at topics) are configured from here, so
//! that none of them can miss a setting of security.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hapax::SecretUrl;
use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;

/// What a client is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Client {
    /// Consumes in the group.
    Consumer,
    /// Sends: retries, dead letters, what is published.
    Producer,
    /// Looks at topics, and creates them on request.
    Admin,
}

/// The properties of all clients. `Debug` shows names only.
#[derive(Clone)]
pub(crate) struct Properties {
    servers: String,
    security: BTreeMap<String, String>,
    passed: BTreeMap<String, String>,
}

impl fmt::Debug for Properties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.security.keys()).entries(self.passed.keys()).finish()
    }
}

/// What hapax must own, and where it is set instead.
const OWNED: [(&str, &str); 22] = [
    ("bootstrap.servers", "give the servers in the url: kafka://host:9092,host:9092"),
    ("metadata.broker.list", "give the servers in the url: kafka://host:9092,host:9092"),
    ("group.id", "name the group in KafkaBroker::builder"),
    ("enable.auto.commit", "leave it out: only what is done is committed"),
    ("auto.commit.enable", "leave it out: only what is done is committed"),
    ("auto.commit.interval.ms", "set .commit_interval(..)"),
    ("enable.auto.offset.store", "leave it out: only what is done is committed"),
    (
        "allow.auto.create.topics",
        "call .declare(..): topics are created with a stated number of partitions or not at all",
    ),
    ("session.timeout.ms", "set .session_timeout(..)"),
    ("heartbeat.interval.ms", "leave it out: it follows from .session_timeout(..)"),
    ("acks", "leave it out: what is sent is done when all in-sync replicas have it"),
    ("request.required.acks", "leave it out: what is sent is done when all in-sync replicas have it"),
    ("enable.idempotence", "leave it out: it is on"),
    ("transactional.id", "leave it out: hapax does not use Kafka's transactions"),
    ("enable.partition.eof", "leave it out"),
    ("statistics.interval.ms", "leave it out: the lag is computed from statistics"),
    ("enabled_events", "leave it out"),
    ("log.queue", "leave it out"),
    ("opaque", "leave it out"),
    ("default_topic_conf", "leave it out"),
    ("message.max.bytes", "leave it out: the topics' max.message.bytes decides"),
    ("topic.metadata.propagation.max.ms", "leave it out"),
];

/// Under `group.protocol=consumer` the broker decides these (KIP-848).
const DECIDED_BY_THE_BROKER: [&str; 3] =
    ["partition.assignment.strategy", "session.timeout.ms", "heartbeat.interval.ms"];

/// Beginnings of names that mean something to a consumer only; librdkafka warns about them in others.
const CONSUMER_ONLY: [&str; 15] = [
    "auto.offset.reset",
    "check.crcs",
    "consume.",
    "coordinator.query.interval.ms",
    "fetch.",
    "group.",
    "isolation.level",
    "max.partition.fetch.bytes",
    "max.poll.interval.ms",
    "offset.",
    "partition.assignment.strategy",
    "queued.",
    "subscription.",
    "topic.blacklist",
    "auto.commit.",
];

/// The same for those who send.
const PRODUCER_ONLY: [&str; 15] = [
    "batch.",
    "compression.",
    "delivery.",
    "dr_",
    "enable.gapless.guarantee",
    "linger.ms",
    "max.in.flight",
    "message.send.max.retries",
    "message.timeout.ms",
    "msg_order_cmp",
    "partitioner",
    "queue.buffering.",
    "queuing.strategy",
    "request.timeout.ms",
    "sticky.partitioning.linger.ms",
];

const SECURITY_PROTOCOL: &str = "security.protocol";
/// librdkafka's most, so that it is the topic's limit that decides: what was taken from a topic must fit through here.
const MESSAGE_BYTES_MAX: &str = "1000000000";
/// Less than the runtime's call timeout, with what a sender waits for room: an answer comes while somebody waits for it.
const MESSAGE_TIMEOUT_MS: &str = "5000";
/// How long a topic that nobody has heard of may still turn up, less than that.
const TOPIC_UNKNOWN_MAX_MS: &str = "3000";

impl Properties {
    /// Reads the URL and the properties, and tells every fault.
    pub(crate) fn new(url: &SecretUrl, passed: &BTreeMap<String, String>, faults: &mut Vec<String>) -> Self {
        let mut passed = passed.clone();
        let mut security: BTreeMap<String, String> = BTreeMap::new();
        let address = Address::split(url, faults);
        for (name, value) in address.query {
            passed.entry(name).or_insert(value);
        }
        if let Some((user, password)) = address.credentials {
            security.insert("sasl.username".to_owned(), user);
            security.insert("sasl.password".to_owned(), password);
            if !passed.contains_key("sasl.mechanism") && !passed.contains_key("sasl.mechanisms") {
                security.insert("sasl.mechanism".to_owned(), "PLAIN".to_owned());
            }
        }
        let own = |name: &str| name == SECURITY_PROTOCOL || name.starts_with("sasl.") || name.starts_with("ssl.");
        for (name, value) in std::mem::take(&mut passed) {
            if own(&name) {
                security.insert(name, value);
            } else {
                passed.insert(name, value);
            }
        }
        for (name, instead) in OWNED {
            if passed.contains_key(name) {
                faults.push(format!("property `{name}` is hapax' own: {instead}"));
            }
        }
        // A group that has no committed offset yet would begin behind what it received before a crash, and behind what it
        // put into its retry topics.
        if passed.get("auto.offset.reset").is_some_and(|reset| ["latest", "largest", "end"].contains(&reset.as_str())) {
            faults.push(
                "property `auto.offset.reset` skips messages that were received and not yet committed: leave it out; for a \
                 group that is to begin with what comes next, commit that first: kafka-consumer-groups.sh --group G \
                 --topic T --reset-offsets --to-latest --execute"
                    .to_owned(),
            );
        }
        if passed.get("group.protocol").is_some_and(|protocol| protocol.eq_ignore_ascii_case("consumer")) {
            for name in DECIDED_BY_THE_BROKER.iter().filter(|name| passed.contains_key(**name)) {
                faults.push(format!("property `{name}` is the broker's under group.protocol=consumer: leave it out"));
            }
        }
        let protocol = protocol(address.tls, &security, faults);
        security.insert(SECURITY_PROTOCOL.to_owned(), protocol.to_owned());
        let properties = Self { servers: address.servers, security, passed };
        properties.check(protocol, faults);
        properties
    }

    /// What librdkafka itself says: is the property known, is the power compiled in.
    fn check(&self, protocol: &str, faults: &mut Vec<String>) {
        let features = ClientConfig::new()
            .create_native_config()
            .and_then(|native| native.get("builtin.features"))
            .unwrap_or_default();
        let features: Vec<&str> = features.split(',').map(str::trim).collect();
        let mechanism = self.security.get("sasl.mechanism").or_else(|| self.security.get("sasl.mechanisms"));
        let mechanism = mechanism.map_or("GSSAPI", String::as_str).to_ascii_uppercase();
        let mut needed = Vec::new();
        if protocol.ends_with("ssl") {
            needed.push(("ssl", "tls", format!("{SECURITY_PROTOCOL}={protocol}")));
        }
        if protocol.starts_with("sasl") {
            let (power, feature) = match mechanism.as_str() {
                "PLAIN" => ("sasl_plain", "tls"),
                "OAUTHBEARER" => ("sasl_oauthbearer", "tls"),
                name if name.starts_with("SCRAM") => ("sasl_scram", "tls"),
                _ => ("sasl_gssapi", "sasl"),
            };
            needed.push((power, feature, "the mechanism that property `sasl.mechanism` names".to_owned()));
        }
        let mut lacking = false;
        for (power, feature, asked) in needed {
            if !features.contains(&power) {
                lacking = true;
                faults.push(format!("{asked} needs the feature `{feature}` of hapax-kafka, which is not compiled in"));
            }
        }
        if lacking || !faults.is_empty() {
            return;
        }
        for client in [Client::Consumer, Client::Producer] {
            if let Err(refused) = self.config(client).create_native_config() {
                faults.push(crate::error::error("open", refused).to_string());
                return;
            }
        }
    }

    /// The value of a property that was passed through.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.passed.get(name).map(String::as_str)
    }

    /// Whether the group's protocol is that of KIP-848.
    pub(crate) fn is_next_generation(&self) -> bool {
        self.get("group.protocol").is_some_and(|protocol| protocol.eq_ignore_ascii_case("consumer"))
    }

    /// The servers, for the command in a text.
    pub(crate) fn servers(&self) -> &str {
        &self.servers
    }

    /// The configuration of one client.
    pub(crate) fn config(&self, client: Client) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set_log_level(RDKafkaLogLevel::Warning);
        config.set("bootstrap.servers", &self.servers).set("allow.auto.create.topics", "false");
        // What comes back after an outage is found again within a second or two.
        config.set("reconnect.backoff.max.ms", "2000").set("client.id", "hapax");
        match client {
            Client::Consumer => {
                config
                    .set("enable.auto.commit", "false")
                    .set("enable.auto.offset.store", "false")
                    .set("auto.offset.reset", "earliest")
                    .set("statistics.interval.ms", "1000")
                    // Buffered ahead by the client, beside what this adapter buffers: enough to be fast, little enough to
                    // be thrown away when a partition is paused. The back-off is lowered with it (librdkafka waits a second).
                    .set("queued.min.messages", "2000")
                    .set("queued.max.messages.kbytes", "16384")
                    .set("fetch.queue.backoff.ms", "10");
                if !self.is_next_generation() {
                    config.set("partition.assignment.strategy", "cooperative-sticky");
                }
            }
            Client::Producer => {
                config
                    .set("acks", "all")
                    .set("enable.idempotence", "true")
                    .set("linger.ms", "2")
                    .set("message.timeout.ms", MESSAGE_TIMEOUT_MS)
                    .set("topic.metadata.propagation.max.ms", TOPIC_UNKNOWN_MAX_MS)
                    .set("message.max.bytes", MESSAGE_BYTES_MAX);
            }
            Client::Admin => {}
        }
        let foreign: &[&[&str]] = match client {
            Client::Consumer => &[&PRODUCER_ONLY],
            Client::Producer => &[&CONSUMER_ONLY],
            Client::Admin => &[&PRODUCER_ONLY, &CONSUMER_ONLY],
        };
        for (name, value) in &self.passed {
            if !foreign.iter().any(|list| list.iter().any(|start| name.starts_with(start))) {
                config.set(name, value);
            }
        }
        for (name, value) in &self.security {
            config.set(name, value);
        }
        config
    }

    /// The configuration of a member of the group.
    pub(crate) fn member(&self, group: &str, session_timeout: Option<Duration>) -> ClientConfig {
        let mut config = self.config(Client::Consumer);
        config.set("group.id", group);
        if let Some(timeout) = session_timeout.filter(|_| !self.is_next_generation()) {
            config.set("session.timeout.ms", timeout.as_millis().to_string());
            config.set("heartbeat.interval.ms", (timeout.as_millis() / 4).clamp(1, 3_000).to_string());
        }
        config
    }
}

/// The URL, split.
#[derive(Default)]
struct Address {
    servers: String,
    tls: bool,
    credentials: Option<(String, String)>,
    query: Vec<(String, String)>,
}

impl Address {
    fn split(url: &SecretUrl, faults: &mut Vec<String>) -> Self {
        let tls = match url.scheme() {
            "kafka" => false,
            "kafkas" | "kafka+ssl" => true,
            _ => {
                faults.push("url begins with kafka:// or, for TLS, with kafkas://".to_owned());
                return Self::default();
            }
        };
        let Some((_, rest)) = url.expose().split_once("://") else {
            faults.push("url is kafka://host:port, several servers behind a comma".to_owned());
            return Self::default();
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if !path.is_empty() {
            faults.push("url has a path: topics and group are named in the builder".to_owned());
        }
        let (user, hosts) = authority.rsplit_once('@').map_or((None, authority), |(user, hosts)| (Some(user), hosts));
        let with_port = |host: &str| match host.rsplit_once(':') {
            Some((_, port)) if !port.ends_with(']') => host.to_owned(),
            _ => format!("{host}:9092"),
        };
        let servers: Vec<String> = hosts.split(',').filter(|host| !host.is_empty()).map(with_port).collect();
        if servers.is_empty() {
            faults.push("url names no server: kafka://host:9092".to_owned());
        }
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let query = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let credentials = user.map(|user| {
            let (user, password) = user.split_once(':').unwrap_or((user, ""));
            (decoded(user), decoded(password))
        });
        let query = query.map(|(name, value)| (decoded(name), decoded(value))).collect();
        Self { servers: servers.join(","), tls, credentials, query }
    }
}

/// Percent-decoded. What does not decode stays as it is.
fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8(out).unwrap_or_else(|_| text.to_owned())
}

/// The protocol that everything that was said agrees on. Nothing becomes plaintext by leaving something out.
fn protocol(tls: bool, security: &BTreeMap<String, String>, faults: &mut Vec<String>) -> &'static str {
    let sasl = security.keys().any(|name| name.starts_with("sasl."));
    let ssl = security.keys().any(|name| name.starts_with("ssl."));
    let asked = security.get(SECURITY_PROTOCOL).map(|asked| asked.to_ascii_lowercase());
    let asked = match asked.as_deref() {
        None => {
            return match (tls || ssl, sasl) {
                (true, true) => "sasl_ssl",
                (true, false) => "ssl",
                (false, false) => "plaintext",
                (false, true) => {
                    faults.push(
                        "credentials would travel in plaintext: begin the url with kafkas://, or say \
                         security.protocol=sasl_plaintext"
                            .to_owned(),
                    );
                    "sasl_plaintext"
                }
            };
        }
        Some("plaintext") => "plaintext",
        Some("ssl") => "ssl",
        Some("sasl_plaintext") => "sasl_plaintext",
        Some("sasl_ssl") => "sasl_ssl",
        Some(_) => {
            faults.push(format!("property `{SECURITY_PROTOCOL}` is plaintext, ssl, sasl_plaintext or sasl_ssl"));
            return "ssl";
        }
    };
    if (tls || ssl) && !asked.ends_with("ssl") {
        let why = if tls { "the url begins with kafkas://" } else { "there are properties of ssl" };
        faults.push(format!("property `{SECURITY_PROTOCOL}` is {asked}, but {why}: say ssl or sasl_ssl"));
    }
    if sasl && !asked.starts_with("sasl") {
        faults.push(format!(
            "property `{SECURITY_PROTOCOL}` is {asked}, but there are credentials or properties of sasl: say sasl_ssl"
        ));
    }
    asked
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str, passed: &[(&str, &str)]) -> (Properties, Vec<String>) {
        let passed = passed.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut faults = Vec::new();
        let url = url.parse().expect("a url");
        (Properties::new(&url, &passed, &mut faults), faults)
    }

    #[test]
    fn several_servers_with_and_without_port() {
        let (properties, faults) = read("kafka://a,b:9093,[::1]:9094,[::2]", &[]);
        assert_eq!((properties.servers(), faults), ("a:9092,b:9093,[::1]:9094,[::2]:9092", vec![]));
    }

    #[test]
    fn what_hapax_owns_is_refused_with_its_name_and_the_remedy() {
        for (name, _) in OWNED {
            let (_, faults) = read("kafka://a", &[(name, "1")]);
            assert_eq!(faults.len(), 1, "{faults:?}");
            assert!(faults[0].starts_with(&format!("property `{name}` ")), "{faults:?}");
        }
        let (_, faults) = read("kafka://a", &[("acks", "1"), ("group.id", "g")]);
        assert_eq!(faults.len(), 2, "all at once: {faults:?}");
    }

    /// A crash before the first commit would skip what was received, and every retry of it.
    #[test]
    fn beginning_with_what_comes_next_is_refused_with_the_command() {
        for reset in ["latest", "largest", "end"] {
            let (_, faults) = read("kafka://a", &[("auto.offset.reset", reset)]);
            assert!(faults.len() == 1 && faults[0].contains("--reset-offsets"), "{faults:?}");
        }
        for reset in ["earliest", "error"] {
            assert_eq!(read("kafka://a", &[("auto.offset.reset", reset)]).1, Vec::<String>::new());
        }
    }

    /// The runtime gives a call to the broker 10 s by default.
    #[test]
    fn what_is_sent_has_an_answer_before_the_runtime_gives_up() {
        let (properties, _) = read("kafka://a", &[]);
        let config = properties.config(Client::Producer);
        let number = |name| config.get(name).and_then(|value| value.parse::<u64>().ok()).expect("a number");
        assert!(number("message.timeout.ms") <= 5_000);
        assert!(number("topic.metadata.propagation.max.ms") < number("message.timeout.ms"));
        assert_eq!(number("message.max.bytes"), 1_000_000_000, "the topic decides");
    }

    #[test]
    fn any_other_property_reaches_the_clients_it_is_for() {
        let given = [("fetch.min.bytes", "17"), ("compression.type", "lz4"), ("socket.keepalive.enable", "true")];
        let (properties, faults) = read("kafka://a/?client.rack=b%2F1", &given);
        assert_eq!(faults, Vec::<String>::new());
        let value = |client, name| properties.config(client).get(name).map(str::to_owned);
        assert_eq!(value(Client::Consumer, "fetch.min.bytes").as_deref(), Some("17"));
        assert_eq!(value(Client::Producer, "fetch.min.bytes"), None);
        assert_eq!(value(Client::Producer, "compression.type").as_deref(), Some("lz4"));
        for client in [Client::Consumer, Client::Producer, Client::Admin] {
            assert_eq!(value(client, "socket.keepalive.enable").as_deref(), Some("true"));
            assert_eq!(value(client, "client.rack").as_deref(), Some("b/1"));
            assert_eq!(value(client, "allow.auto.create.topics").as_deref(), Some("false"), "nor does a sender create");
        }
        let (_, faults) = read("kafka://a", &[("fetch.min.bits", "17")]);
        assert!(faults[0].contains("`fetch.min.bits`"), "{faults:?}");
    }

    #[test]
    fn the_broker_decides_under_the_protocol_of_kip_848() {
        let (properties, faults) = read("kafka://a", &[("group.protocol", "consumer")]);
        assert_eq!(faults, Vec::<String>::new());
        let member = properties.member("g", Some(Duration::from_secs(6)));
        for name in DECIDED_BY_THE_BROKER {
            assert_eq!(member.get(name), None, "{name}");
        }
        let (classic, _) = read("kafka://a", &[]);
        let member = classic.member("g", Some(Duration::from_secs(6)));
        assert_eq!(member.get("session.timeout.ms"), Some("6000"));
        assert_eq!(member.get("partition.assignment.strategy"), Some("cooperative-sticky"));
        let (_, faults) =
            read("kafka://a", &[("group.protocol", "consumer"), ("partition.assignment.strategy", "range")]);
        assert!(faults[0].contains("partition.assignment.strategy"), "{faults:?}");
    }

    /// Bug 62 of semantics.md section 4 (JasperFx/wolverine#3344): a builder of one client dropped the settings of
    /// security that another had.
    #[test]
    fn security_config_reaches_every_client() {
        let given = [
            ("security.protocol", "sasl_plaintext"),
            ("sasl.mechanism", "PLAIN"),
            ("sasl.username", "u"),
            ("sasl.password", "p"),
        ];
        let (properties, _) = read("kafka://a", &given);
        for client in [Client::Consumer, Client::Producer, Client::Admin] {
            for (name, value) in given {
                assert_eq!(properties.config(client).get(name), Some(value), "{client:?} {name}");
            }
        }
        assert_eq!(properties.member("g", None).get("sasl.password"), Some("p"));
    }

    /// Bug 62, second half (ag2ai/faststream#2935): a client silently spoke plaintext.
    #[test]
    fn tls_requested_never_plaintext() {
        let cases: [(&str, &[(&str, &str)]); 5] = [
            ("kafkas://a", &[("security.protocol", "plaintext")]),
            ("kafkas://u:p@a", &[("security.protocol", "sasl_plaintext")]),
            ("kafka://a", &[("ssl.ca.location", "/ca.pem"), ("security.protocol", "plaintext")]),
            ("kafka://u:p@a", &[]),
            ("kafka://a", &[("sasl.username", "u"), ("security.protocol", "plaintext")]),
        ];
        for (url, given) in cases {
            let (_, faults) = read(url, given);
            assert!(!faults.is_empty(), "{url} {given:?}");
        }
        for (url, given, expected) in [
            ("kafkas://a", vec![], "ssl"),
            ("kafka://a", vec![("ssl.ca.location", "/ca.pem")], "ssl"),
            ("kafkas://u:p@a", vec![], "sasl_ssl"),
            ("kafka://a", vec![], "plaintext"),
        ] {
            let (properties, _) = read(url, &given);
            for client in [Client::Consumer, Client::Producer, Client::Admin] {
                assert_eq!(properties.config(client).get("security.protocol"), Some(expected), "{url}");
            }
        }
    }

    #[cfg(not(feature = "tls"))]
    #[test]
    fn tls_without_the_feature_is_a_named_fault() {
        let (_, faults) = read("kafkas://a", &[]);
        // Another package of the build may have asked rdkafka for it.
        if let Some(fault) = faults.first() {
            assert!(fault.contains("feature `tls`"), "{fault}");
        }
    }

    #[test]
    fn no_text_holds_a_secret() {
        let canary = "canary-hunter2";
        let given = [("ssl.key.pem", canary), ("sasl.jaas.nothing", canary), ("acks", canary)];
        let (properties, faults) = read(&format!("kafka://u:{canary}@a/?sasl.mechanisms={canary}"), &given);
        let texts = format!("{properties:?} {faults:?}");
        assert!(!texts.contains(canary), "{texts}");
    }
}
