//! The way out: one idempotent producer with acks from all in-sync replicas, for retries, dead letters and what is
//! published.
//!
//! Its queue is bounded; when it is full a sender waits for a bounded time. Dropping a producer joins a thread, so it is
//! done on a thread of its own.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder;
use bytes::Bytes;
use hapax::{Error, ErrorKind, Result};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::OwnedHeaders;
use rdkafka::producer::future_producer::DeliveryFuture;
use rdkafka::producer::{FutureProducer, FutureRecord};
use tokio::time::{Instant, sleep};

use crate::client::Logging;
use crate::error::error;
use crate::properties::{Client, Properties};

/// How long a sender waits for room in a full queue.
const ROOM_MAX: Duration = Duration::from_secs(10);

/// A record on its way out.
pub(crate) struct Sending {
    pub(crate) topic: Arc<str>,
    pub(crate) key: Option<Bytes>,
    pub(crate) value: Option<Bytes>,
    pub(crate) headers: OwnedHeaders,
}

/// A producer; cheap to clone.
#[derive(Clone)]
pub(crate) struct Producer(Arc<Guarded>);

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Producer")
    }
}

struct Guarded(Option<FutureProducer<Logging>>);

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
        let producer = properties.config(Client::Producer).create_with_context(Logging);
        Ok(Self(Arc::new(Guarded(Some(producer.map_err(|refused| error(operation, refused))?)))))
    }

    fn client(&self) -> Option<&FutureProducer<Logging>> {
        self.0.0.as_ref()
    }

    /// Sends all in order, one answer each, when every in-sync replica has it.
    pub(crate) async fn send(&self, operation: &'static str, records: Vec<Result<Sending>>) -> Vec<Result<()>> {
        let mut queued = Vec::with_capacity(records.len());
        let room_until = Instant::now() + ROOM_MAX;
        for record in records {
            queued.push(match record {
                Ok(record) => self.enqueue(operation, &record, room_until).await,
                Err(refused) => Err(refused),
            });
        }
        let mut answers = Vec::with_capacity(queued.len());
        for queued in queued {
            answers.push(match queued {
                Ok(delivery) => match delivery.await {
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err((refused, _))) => Err(error(operation, refused)),
                    Err(_) => Err(error(operation, KafkaError::Canceled)),
                },
                Err(refused) => Err(refused),
            });
        }
        answers
    }

    async fn enqueue(&self, operation: &'static str, record: &Sending, until: Instant) -> Result<DeliveryFuture> {
        let Some(client) = self.client() else {
            return Err(Error::new(ErrorKind::Internal, operation).because("the producer is gone"));
        };
        let waits = backon::ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(2))
            .with_max_delay(Duration::from_millis(100))
            .with_jitter()
            .without_max_times();
        let mut waits = waits.build();
        loop {
            let mut outgoing = FutureRecord::<[u8], [u8]>::to(&record.topic).headers(record.headers.clone());
            outgoing.key = record.key.as_deref();
            outgoing.payload = record.value.as_deref();
            match client.send_result(outgoing) {
                Ok(delivery) => return Ok(delivery),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) if Instant::now() < until => {
                    sleep(waits.next().unwrap_or(Duration::from_millis(100))).await;
                }
                Err((refused, _)) => return Err(error(operation, refused)),
            }
        }
    }
}
