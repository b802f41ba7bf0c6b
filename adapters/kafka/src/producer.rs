//! The way out: one idempotent producer with acks from all in-sync replicas, for retries, dead letters and what is
//! published.
//!
//! Its queue is bounded; when it is full a sender waits for a bounded time. Dropping a producer joins a thread, so it is
//! done on a thread of its own.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hapax::{Error, ErrorKind, Result};
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::OwnedHeaders;
use rdkafka::producer::future_producer::DeliveryFuture;
use rdkafka::producer::{FutureProducer, FutureRecord, Producer as _};
use tokio::time::{Instant, sleep};

use crate::client::Logging;
use crate::error::error;
use crate::properties::{Client, Properties};

/// How long a sender waits for room in a full queue: with `message.timeout.ms` less than the runtime's call timeout, so that
/// an answer is there before nobody waits for it.
const ROOM_MAX: Duration = Duration::from_secs(3);

/// A record on its way out.
pub(crate) struct Sending {
    pub(crate) topic: Arc<str>,
    pub(crate) key: Option<Bytes>,
    pub(crate) value: Option<Bytes>,
    pub(crate) headers: OwnedHeaders,
}

/// A producer; cheap to clone. One that failed for good is replaced by another.
#[derive(Clone)]
pub(crate) struct Producer(Arc<Slot>);

struct Slot {
    config: ClientConfig,
    current: Mutex<Arc<Guarded>>,
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Producer")
    }
}

struct Guarded(Option<FutureProducer<Logging>>);

impl Guarded {
    fn new(config: &ClientConfig, operation: &'static str) -> Result<Arc<Self>> {
        let producer = config.create_with_context(Logging).map_err(|refused| error(operation, refused))?;
        Ok(Arc::new(Self(Some(producer))))
    }

    /// Whether nothing can be sent with it any more: an idempotent producer ends where its numbers no longer fit those of
    /// a server.
    fn is_lost(&self) -> bool {
        self.0.as_ref().is_some_and(|producer| producer.client().fatal_error().is_some())
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(producer) = self.0.take() {
            // Without a thread it is dropped here: slow, but done.
            let _ = std::thread::Builder::new().name("hapax-kafka-end".to_owned()).spawn(move || drop(producer));
        }
    }
}

impl Producer {
    pub(crate) fn new(properties: &Properties, operation: &'static str) -> Result<Self> {
        let config = properties.config(Client::Producer);
        let current = Mutex::new(Guarded::new(&config, operation)?);
        Ok(Self(Arc::new(Slot { config, current })))
    }

    fn current(&self) -> MutexGuard<'_, Arc<Guarded>> {
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts another in the place of one that is lost. Answers whether it was.
    fn replace_if_lost(&self, used: &Arc<Guarded>) -> bool {
        if !used.is_lost() {
            return false;
        }
        let mut current = self.current();
        // Else somebody did it before.
        if Arc::ptr_eq(&current, used) {
            match Guarded::new(&self.0.config, "send") {
                Ok(other) => {
                    tracing::warn!("a producer is lost for good, and is replaced");
                    *current = other;
                }
                Err(error) => {
                    tracing::error!(%error, "a producer is lost for good, and there is no other yet");
                    return false;
                }
            }
        }
        true
    }

    /// Sends all in order, and tells one answer each, by number, as soon as it is known: dropping this loses no answer
    /// that was there. Done is what every in-sync replica has.
    pub(crate) async fn send(
        &self,
        operation: &'static str,
        records: Vec<Result<Sending>>,
        mut answered: impl FnMut(usize, Result<()>),
    ) {
        let mut under_way = FuturesUnordered::new();
        let room_until = Instant::now() + ROOM_MAX;
        for (at, record) in records.into_iter().enumerate() {
            let record = match record {
                Ok(record) => record,
                Err(refused) => {
                    answered(at, Err(refused));
                    continue;
                }
            };
            let mut waits = room_waits();
            loop {
                match self.enqueue(&record) {
                    Ok((used, delivery)) => {
                        under_way.push(self.confirm(operation, at, record, used, delivery));
                        break;
                    }
                    Err(KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull)) if Instant::now() < room_until => {
                        let wait = waits.next().unwrap_or(Duration::from_millis(100));
                        tokio::select! {
                            biased;
                            Some((at, answer)) = under_way.next() => answered(at, answer),
                            () = sleep(wait) => {}
                        }
                    }
                    Err(refused) => {
                        answered(at, Err(told(operation, &record.topic, refused)));
                        break;
                    }
                }
            }
        }
        while let Some((at, answer)) = under_way.next().await {
            answered(at, answer);
        }
    }

    async fn confirm(
        &self,
        operation: &'static str,
        at: usize,
        record: Sending,
        used: Arc<Guarded>,
        delivery: DeliveryFuture,
    ) -> (usize, Result<()>) {
        let answer = match delivery.await {
            Ok(Ok(_)) => return (at, Ok(())),
            Ok(Err((refused, _))) => refused,
            Err(_) => KafkaError::Canceled,
        };
        self.replace_if_lost(&used);
        (at, Err(told(operation, &record.topic, answer)))
    }

    /// Puts a record into the queue; of another producer where this one is lost.
    fn enqueue(&self, record: &Sending) -> KafkaResult<(Arc<Guarded>, DeliveryFuture)> {
        let mut last = false;
        loop {
            let used = Arc::clone(&self.current());
            let Some(client) = used.0.as_ref() else { return Err(KafkaError::Canceled) };
            let mut outgoing = FutureRecord::<[u8], [u8]>::to(&record.topic).headers(record.headers.clone());
            outgoing.key = record.key.as_deref();
            outgoing.payload = record.value.as_deref();
            match client.send_result(outgoing) {
                Ok(delivery) => return Ok((used, delivery)),
                Err(_) if !last && self.replace_if_lost(&used) => last = true,
                Err((refused, _)) => return Err(refused),
            }
        }
    }
}

fn room_waits() -> ExponentialBackoff {
    let waits = backon::ExponentialBuilder::default().with_min_delay(Duration::from_millis(2));
    waits.with_max_delay(Duration::from_millis(100)).with_jitter().without_max_times().build()
}

/// The error of one record. A topic that is not there is a fault of settings where somebody publishes; where a retry or a
/// dead letter is placed `open` has seen the topic, and it may come back.
fn told(operation: &'static str, topic: &str, refused: KafkaError) -> Error {
    use RDKafkaErrorCode as Code;
    let code = refused.rdkafka_error_code();
    if matches!(code, Some(Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition)) {
        let kind = if operation == "publish" { ErrorKind::Configuration } else { ErrorKind::Unavailable };
        let why =
            format!("there is no topic `{topic}`, or this user may not see it: create it (kafka-topics.sh --create)");
        return Error::new(kind, operation).because(why).with_source(refused);
    }
    error(operation, refused)
}
