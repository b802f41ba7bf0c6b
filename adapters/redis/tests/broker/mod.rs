//! What the suites of the broker share: the server, names of their own, and a look behind the broker with a client that knows
//! nothing of hapax.
#![allow(dead_code, reason = "each suite takes what it needs")]

use std::num::NonZeroU64;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hapax::cloudevents::{Convention, decode};
use hapax::{
    Broker, DeadLetter, Delivery, Headers, Limits, Message, MessageLimits, Outgoing, Publisher, Reason, Receipt,
    Settlement, Want,
};
use hapax_redis::redis::{self, Value, from_redis_value};
use hapax_redis::{RedisBroker, RedisPublisher, RedisServer};
use hapax_testkit::servers::Server;

pub(crate) const WANT: Want = Want { events: 64, bytes: 1 << 20 };

/// After how long these suites let members take over.
pub(crate) const TAKE_OVER: Duration = Duration::from_millis(1200);

pub(crate) fn url() -> String {
    Server::Redis.url()
}

pub(crate) fn server() -> RedisServer {
    server_at(&url())
}

pub(crate) fn server_at(url: &str) -> RedisServer {
    RedisServer::at(url.parse().expect("a url")).expect("a server's url")
}

/// A name that no other test and no other run has.
pub(crate) fn unique(what: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos();
    format!("test.{what}.{}.{now}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn limits(held_max: Duration) -> Limits {
    let drain = Duration::from_secs(1);
    Limits { events: 1024, bytes: 16 << 20, held_max, drain, message: MessageLimits::DEFAULT }
}

pub(crate) async fn opened(broker: RedisBroker) -> RedisBroker {
    broker.open(limits(Duration::from_secs(60))).await.expect("the broker opens");
    broker
}

pub(crate) async fn member(stream: &str) -> RedisBroker {
    opened(RedisBroker::builder(server(), stream, "g").take_over_after(TAKE_OVER).build().expect("in order")).await
}

pub(crate) fn event(id: usize) -> Message {
    Message::event("https://tests.example", id.to_string(), "com.example.tested")
        .with_data("text/plain", format!("{id}"))
}

pub(crate) async fn publish(stream: &str, ids: std::ops::Range<usize>) {
    let publisher = RedisPublisher::new(server(), stream).expect("a name");
    for sent in publisher.publish(ids.map(event).map(Outgoing::new).collect()).await {
        sent.expect("the server takes it");
    }
}

pub(crate) fn id(delivery: &Delivery) -> usize {
    delivery.message.attributes.id.as_deref().and_then(|id| id.parse().ok()).expect("a number as id")
}

pub(crate) fn letter() -> Box<DeadLetter> {
    Box::new(DeadLetter {
        reason: Reason::Permanent,
        error: "no such order".into(),
        consumer: "tests".into(),
        attempts: 1,
        first: SystemTime::UNIX_EPOCH,
        last: SystemTime::UNIX_EPOCH,
        origin: None,
        reopen: NonZeroU64::new(7),
    })
}

/// How long anything may take before a test fails.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// Waits until the broker has told of this many entries that were trimmed away; nothing arrives meanwhile.
pub(crate) async fn until_trimmed(broker: &RedisBroker, count: u64) {
    let waiting = async {
        while broker.trimmed() < count {
            silence(broker, Duration::from_millis(100)).await;
        }
    };
    let done = tokio::time::timeout(SOON, waiting).await;
    assert!(done.is_ok(), "{} of {count} are told", broker.trimmed());
}

/// Receives until there are `count`.
pub(crate) async fn receive(broker: &RedisBroker, count: usize) -> Vec<Delivery> {
    let mut all = Vec::new();
    let receiving = async {
        while all.len() < count {
            // What fails while a server is away is asked again, as a consumer does.
            all.extend(broker.receive(WANT).await.unwrap_or_default());
        }
    };
    let done = tokio::time::timeout(SOON, receiving).await;
    assert!(done.is_ok(), "{} of {count} arrived", all.len());
    all
}

pub(crate) async fn silence(broker: &RedisBroker, how_long: Duration) {
    if let Ok(arrived) = tokio::time::timeout(how_long, broker.receive(WANT)).await {
        panic!("nothing should arrive, but {:?} did", arrived.map(|all| all.iter().map(id).collect::<Vec<_>>()));
    }
}

pub(crate) async fn settle(broker: &RedisBroker, receipt: Receipt, settlement: Settlement) {
    let item = [(receipt, settlement)];
    for _ in 0..50 {
        match broker.settle(&item).await.remove(0) {
            // As a consumer does: a connection that broke is noticed by the first call.
            Err(error) if error.is_retryable() => tokio::time::sleep(Duration::from_millis(20)).await,
            answer => return answer.expect("it is settled"),
        }
    }
    panic!("the server does not come back");
}

pub(crate) async fn ack(broker: &RedisBroker, deliveries: &[Delivery]) {
    for delivery in deliveries {
        settle(broker, delivery.receipt, Settlement::Ack).await;
    }
}

/// A client of its own, without hapax.
#[derive(Clone)]
pub(crate) struct Client(redis::aio::MultiplexedConnection);

impl Client {
    pub(crate) async fn connect() -> Self {
        Self::to(&url()).await
    }

    pub(crate) async fn to(url: &str) -> Self {
        let client = redis::Client::open(url).expect("a url");
        let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(10)));
        Self(client.get_multiplexed_async_connection_with_config(&config).await.expect("Redis is there"))
    }

    pub(crate) async fn try_command(&self, words: &[&str]) -> redis::RedisResult<Value> {
        let mut command = redis::Cmd::new();
        command.arg(words);
        command.query_async(&mut self.0.clone()).await
    }

    pub(crate) async fn command(&self, words: &[&str]) -> Value {
        self.try_command(words).await.unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    pub(crate) async fn number(&self, words: &[&str]) -> i64 {
        from_redis_value(self.command(words).await).expect("a number")
    }

    pub(crate) async fn add(&self, stream: &str, fields: &[(&str, &[u8])]) -> String {
        let mut command = redis::cmd("XADD");
        command.arg(stream).arg("*");
        for (name, value) in fields {
            command.arg(*name).arg(*value);
        }
        command.query_async(&mut self.0.clone()).await.expect("XADD")
    }

    /// The fields of every entry.
    pub(crate) async fn entries(&self, stream: &str) -> Vec<Vec<(String, Vec<u8>)>> {
        let entries: Vec<(String, Vec<Vec<u8>>)> =
            from_redis_value(self.command(&["XRANGE", stream, "-", "+"]).await).expect("entries");
        let fields = |(_, flat): (String, Vec<Vec<u8>>)| {
            flat.chunks(2).map(|pair| (String::from_utf8(pair[0].clone()).expect("text"), pair[1].clone())).collect()
        };
        entries.into_iter().map(fields).collect()
    }

    /// Entries as messages, with the headers of hapax beside their own.
    pub(crate) async fn messages(&self, stream: &str) -> Vec<Message> {
        let read = |fields: Vec<(String, Vec<u8>)>| {
            let (body, headers): (Vec<_>, Vec<_>) = fields.into_iter().partition(|(name, _)| name == "data");
            let body = body.into_iter().next().map(|(_, body)| Bytes::from(body)).unwrap_or_default();
            let ours: Vec<_> = headers.iter().filter(|(name, _)| name.starts_with("hapax-")).cloned().collect();
            let headers: Headers = headers.into_iter().collect();
            let mut message = decode(headers, body, &Convention::REDIS, &MessageLimits::DEFAULT);
            ours.into_iter().for_each(|(name, value)| message.headers.push(name, value));
            message
        };
        self.entries(stream).await.into_iter().map(read).collect()
    }

    /// How many entries are pending for the group.
    pub(crate) async fn pending(&self, stream: &str) -> i64 {
        let Value::Array(summary) = self.command(&["XPENDING", stream, "g"]).await else { panic!("a summary") };
        from_redis_value(summary[0].clone()).expect("a number")
    }
}
