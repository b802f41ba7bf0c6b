//! The real server of these tests, one queue each: names that nobody else has, lapin by hand for what an operator or a
//! foreign client would do, and everything deleted at the end.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "tests may panic")]

pub(crate) mod raw;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hapax::cloudevents::{Convention, decode};
use hapax::{
    Broker, DeadLetter, Delivery, Headers, Limits, Message, MessageLimits, Outgoing, Publisher, RESERVED_PREFIX,
    Reason, Receipt, Result, SecretUrl, Settlement, Want,
};
use hapax_rabbitmq::lapin::message::BasicGetMessage;
use hapax_rabbitmq::lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use hapax_rabbitmq::lapin::types::{AMQPValue, FieldTable, ShortString};
use hapax_rabbitmq::lapin::{self, BasicProperties, Channel, Connection, ConnectionProperties};
use hapax_rabbitmq::{RabbitBroker, RabbitBrokerBuilder, RabbitPublisher};
use hapax_testkit::proxy::Proxy;
use hapax_testkit::servers::Server;
use tokio::time::timeout;

pub(crate) const GROUP: &str = "billing";
pub(crate) const WANT: Want = Want { events: 64, bytes: 1 << 20 };
/// How long anything may take before a test fails.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// In which nothing should happen.
pub(crate) const QUIET: Duration = Duration::from_millis(700);

/// A queue that nobody else uses.
pub(crate) struct Rabbit {
    pub(crate) url: SecretUrl,
    pub(crate) queue: String,
    /// It deletes its queues in the end.
    mine: bool,
}

impl Rabbit {
    pub(crate) fn fresh() -> Self {
        Self::on(SecretUrl::parse(Server::RabbitMq.url()).unwrap())
    }

    pub(crate) fn on(url: SecretUrl) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self { url, queue: format!("hapax-test-{}-{now:x}-{number}", std::process::id()), mine: true }
    }

    /// The same queue through another address: a proxy, another user.
    pub(crate) fn at(&self, url: &str) -> Self {
        Self { url: SecretUrl::parse(url).unwrap(), queue: self.queue.clone(), mine: false }
    }

    pub(crate) fn dead(&self) -> String {
        format!("{}.{GROUP}.dead", self.queue)
    }

    pub(crate) fn wait(&self, step: &str) -> String {
        format!("{}.{GROUP}.retry.{step}", self.queue)
    }

    /// Steps are few and short: each is a queue.
    pub(crate) fn builder(&self) -> RabbitBrokerBuilder {
        let steps = [500, 1_500, 3_000].map(Duration::from_millis);
        RabbitBroker::builder(self.url.clone(), self.queue.clone(), GROUP).retry_steps(steps)
    }

    pub(crate) fn broker(&self) -> RabbitBroker {
        self.builder().build().expect("the settings hold")
    }

    pub(crate) async fn opened(&self) -> Arc<RabbitBroker> {
        let broker = Arc::new(self.broker());
        broker.open(limits(1024)).await.expect("the broker opens");
        broker
    }

    /// What an operator or a foreign client has.
    pub(crate) async fn connection(&self) -> Connection {
        let connecting = Connection::connect(self.url.expose(), ConnectionProperties::default());
        soon("connect", connecting).await.expect("the server is there")
    }

    /// Publishes these events to the queue.
    pub(crate) async fn publish(&self, ids: impl IntoIterator<Item = usize>) {
        let publisher = RabbitPublisher::builder(self.url.clone()).default_key(self.queue.clone()).build().unwrap();
        let batch = ids.into_iter().map(|id| Outgoing::new(event(id))).collect();
        for sent in soon("publish", publisher.publish(batch)).await {
            sent.unwrap();
        }
        publisher.close().await;
    }

    /// A proxy before the server, and this queue through it.
    pub(crate) async fn through_proxy(&self, parameters: &str) -> (Proxy, Self) {
        let url = self.url.expose();
        let (head, rest) = url.split_once("://").unwrap();
        let (authority, path) = rest.split_once('/').unwrap();
        let (user, host) = authority.rsplit_once('@').unwrap();
        let proxy = Proxy::start(host).await.unwrap();
        let by_proxy = self.at(&format!("{head}://{user}@{}/{path}{parameters}", proxy.address()));
        (proxy, by_proxy)
    }

    pub(crate) async fn send(&self, properties: BasicProperties, body: &[u8]) {
        let connection = self.connection().await;
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        put(&channel, &self.queue, properties, body).await;
        connection.close(200, "done".into()).await.unwrap();
    }

    pub(crate) async fn messages(&self, queue: &str) -> Option<u32> {
        let connection = self.connection().await;
        let channel = connection.create_channel().await.unwrap();
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let count = channel.queue_declare(short(queue), options, FieldTable::default()).await;
        let _ = connection.close(200, "done".into()).await;
        count.ok().map(|queue| queue.message_count())
    }

    pub(crate) async fn delete(&self, queue: &str) {
        let connection = self.connection().await;
        let channel = connection.create_channel().await.unwrap();
        channel.queue_delete(short(queue), QueueDeleteOptions::default()).await.unwrap();
        connection.close(200, "done".into()).await.unwrap();
    }

    /// Everything in a queue, in order; it goes back when the connection closes.
    pub(crate) async fn peek(&self, queue: &str) -> Vec<lapin::message::Delivery> {
        let connection = self.connection().await;
        let channel = connection.create_channel().await.unwrap();
        let mut all = Vec::new();
        while let Some(one) = get(&channel, queue).await {
            all.push(one.delivery);
        }
        connection.close(200, "done".into()).await.unwrap();
        all
    }

    /// Dead letters as they are stored.
    pub(crate) async fn dead_letters(&self) -> Vec<Message> {
        let dead = self.peek(&self.dead()).await;
        dead.iter().map(|one| as_stored(&one.properties, &one.data)).collect()
    }

    /// Moves every dead letter back as it is, as `rabbitmqadmin` or a shovel does.
    pub(crate) async fn redrive(&self) {
        let connection = self.connection().await;
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        while let Some(one) = get(&channel, &self.dead()).await {
            put(&channel, &self.queue, one.properties.clone(), &one.data).await;
            one.ack(BasicAckOptions::default()).await.unwrap();
        }
        connection.close(200, "done".into()).await.unwrap();
    }
}

impl Drop for Rabbit {
    /// Quorum queues cost the server memory; tests that run often would fill it.
    fn drop(&mut self) {
        if !self.mine {
            return;
        }
        let (url, queue) = (self.url.clone(), self.queue.clone());
        let names = [queue.clone(), format!("{queue}.{GROUP}.dead")].into_iter();
        let waits = ["500ms", "1500ms", "3s", "1s"].map(|step| format!("{queue}.{GROUP}.retry.{step}"));
        let names: Vec<_> = names.chain(waits).collect();
        let cleaner = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let clean = async {
                let Ok(connection) = Connection::connect(url.expose(), ConnectionProperties::default()).await else {
                    return;
                };
                if let Ok(channel) = connection.create_channel().await {
                    for name in names {
                        let _ = channel.queue_delete(short(&name), QueueDeleteOptions::default()).await;
                    }
                }
                let _ = connection.close(200, "done".into()).await;
            };
            runtime.block_on(async { timeout(SOON, clean).await })
        });
        let _ = cleaner.join();
    }
}

pub(crate) fn limits(events: usize) -> Limits {
    Limits {
        events,
        bytes: 16 << 20,
        held_max: Duration::from_secs(60),
        drain: Duration::from_secs(2),
        message: MessageLimits::DEFAULT,
    }
}

pub(crate) fn short(text: &str) -> ShortString {
    ShortString::try_new(text).unwrap()
}

pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    timeout(SOON, future).await.unwrap_or_else(|_| panic!("{what}: not within {SOON:?}"))
}

pub(crate) async fn get(channel: &Channel, queue: &str) -> Option<BasicGetMessage> {
    channel.basic_get(short(queue), BasicGetOptions::default()).await.unwrap()
}

pub(crate) async fn put(channel: &Channel, queue: &str, properties: BasicProperties, body: &[u8]) {
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let confirm =
        channel.basic_publish("".into(), short(queue), options, body, properties).await.unwrap().await.unwrap();
    assert!(matches!(confirm, lapin::Confirmation::Ack(None)), "{confirm:?}");
}

/// Receives until there are `count`, in bounded time.
pub(crate) async fn receive(broker: &RabbitBroker, count: usize) -> Vec<Delivery> {
    let receiving = async {
        let mut all = Vec::new();
        while all.len() < count {
            match soon("receive", broker.receive(Want { events: count - all.len(), ..WANT })).await {
                Ok(more) => all.extend(more),
                Err(error) => assert!(error.is_retryable(), "{error}"),
            }
        }
        all
    };
    timeout(SOON * 3, receiving).await.unwrap_or_else(|_| panic!("{count} deliveries: not within {:?}", SOON * 3))
}

pub(crate) async fn silence(broker: &RabbitBroker, how_long: Duration) {
    if let Ok(Ok(arrived)) = timeout(how_long, broker.receive(WANT)).await {
        panic!("nothing should arrive, but {:?} did", ids(&arrived));
    }
}

pub(crate) async fn settle(broker: &RabbitBroker, receipt: Receipt, settlement: Settlement) -> Result<()> {
    soon("settle", broker.settle(&[(receipt, settlement)])).await.remove(0)
}

pub(crate) fn ids(deliveries: &[Delivery]) -> Vec<String> {
    let id = |delivery: &Delivery| delivery.message.attributes.id.as_deref().unwrap_or("(no id)").to_owned();
    deliveries.iter().map(id).collect()
}

pub(crate) fn event(id: usize) -> Message {
    Message::event("https://test.example", id.to_string(), "com.example.tested").with_data("text/plain", "data")
}

pub(crate) fn letter() -> Settlement {
    Settlement::DeadLetter(Box::new(DeadLetter {
        reason: Reason::Permanent,
        error: "no such order".into(),
        consumer: GROUP.into(),
        attempts: 1,
        first: SystemTime::UNIX_EPOCH,
        last: SystemTime::UNIX_EPOCH,
        origin: None,
        reopen: std::num::NonZeroU64::new(7),
    }))
}

/// A stored message with the headers of hapax among its headers.
fn as_stored(properties: &BasicProperties, body: &[u8]) -> Message {
    let mut headers = Headers::new();
    if let Some(content_type) = properties.content_type() {
        headers.push("content-type", content_type.as_str().to_owned());
    }
    let mut ours = Vec::new();
    for (name, value) in properties.headers().as_ref().map(FieldTable::inner).into_iter().flatten() {
        // Numbers are the server's own: how often it was looked at.
        let AMQPValue::LongString(text) = value else { continue };
        let value = Bytes::copy_from_slice(text.as_bytes());
        if name.as_str().starts_with(RESERVED_PREFIX) {
            ours.push((name.as_str().to_owned(), value));
        } else {
            headers.push(name.as_str(), value);
        }
    }
    let body = Bytes::copy_from_slice(body);
    let mut message = decode(headers, body, &Convention::RABBITMQ, &MessageLimits::DEFAULT);
    for (name, value) in ours {
        message.headers.push(name, value);
    }
    message
}
