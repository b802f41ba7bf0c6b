//! `RabbitPublisher`: to queues through the default exchange, or to an exchange under routing keys.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hapax::{Error, ErrorKind, Outgoing, Publisher, Result, SecretUrl};
#[cfg(feature = "tls")]
use lapin::tcp::OwnedTLSConfig;
use tokio::time::Instant;

use crate::address::Address;
use crate::lane::Parcel;
use crate::outlet::{Lanes, Outlet};
use crate::settings::RabbitBrokerBuilder;
use crate::wire;

/// Publishes CloudEvents in binary mode, persistent, with confirms; connects at first use and again after every loss.
///
/// [`Outgoing::to`] is a queue, or, where an [exchange](RabbitPublisherBuilder::exchange) is set, a routing key. A message
/// that no queue takes is an error unless that is [allowed](RabbitPublisherBuilder::unroutable_is_fine).
///
/// ```no_run
/// # async fn run() -> hapax::Result<()> {
/// use hapax::{Message, Outgoing, Publisher};
/// use hapax_rabbitmq::RabbitPublisher;
///
/// let publisher = RabbitPublisher::builder("amqp://shop:secret@localhost/%2f".parse()?).default_key("orders").build()?;
/// let placed = Message::event("https://shop.example", "42", "com.shop.order.placed");
/// for sent in publisher.publish(vec![Outgoing::new(placed)]).await {
///     sent?;
/// }
/// # Ok(())
/// # }
/// ```
pub struct RabbitPublisher {
    outlet: Outlet,
    answer_timeout: Duration,
    exchange: String,
    default_key: Option<String>,
    mandatory: bool,
}

/// Settings of a [`RabbitPublisher`], from [`RabbitPublisher::builder`].
#[derive(Clone)]
#[must_use]
pub struct RabbitPublisherBuilder {
    url: SecretUrl,
    answer_timeout: Duration,
    exchange: String,
    default_key: Option<String>,
    mandatory: bool,
    #[cfg(feature = "tls")]
    tls: OwnedTLSConfig,
}

impl RabbitPublisher {
    /// A publisher to this server.
    pub fn builder(url: SecretUrl) -> RabbitPublisherBuilder {
        RabbitPublisherBuilder {
            url,
            answer_timeout: RabbitBrokerBuilder::ANSWER_TIMEOUT,
            exchange: String::new(),
            default_key: None,
            mandatory: true,
            #[cfg(feature = "tls")]
            tls: OwnedTLSConfig::default(),
        }
    }

    /// To one queue, where another has checked the address.
    pub(crate) fn to_queue(queue: &str, address: Arc<Address>, answer_timeout: Duration) -> Self {
        let outlet = Outlet::new(address, format!("publisher {queue}"), Lanes::One, answer_timeout);
        Self { outlet, answer_timeout, exchange: String::new(), default_key: Some(queue.to_owned()), mandatory: true }
    }

    /// Says goodbye to the server; publishing again connects again.
    pub async fn close(&self) {
        self.outlet.close().await;
    }

    fn parcel(&self, outgoing: &Outgoing) -> Result<Parcel> {
        let wrong = |why: String| Error::new(ErrorKind::Rejected, "publish").because(why);
        let key = outgoing.to.as_deref().or(self.default_key.as_deref());
        let key = key.ok_or_else(|| wrong("where to? Set .default_key(..), or Outgoing::to".to_owned()))?;
        let routing_key = wire::short(key).map_err(|_| wrong(format!("{key:?} is longer than 255 bytes")))?;
        let exchange = wire::short(&self.exchange)?;
        let (properties, body) = wire::write(&outgoing.message)?;
        Ok(Parcel { exchange, routing_key, properties, body, mandatory: self.mandatory })
    }
}

impl RabbitPublisherBuilder {
    /// The exchange. Default the default exchange, whose routing keys are the names of queues.
    pub fn exchange(mut self, exchange: impl Into<String>) -> Self {
        self.exchange = exchange.into();
        self
    }

    /// The queue or routing key of messages that name none.
    pub fn default_key(mut self, key: impl Into<String>) -> Self {
        self.default_key = Some(key.into());
        self
    }

    /// A message that no queue takes is dropped without an error: for events to which nobody needs to listen.
    pub fn unroutable_is_fine(mut self) -> Self {
        self.mandatory = false;
        self
    }

    /// The deadline of a batch. Default [`RabbitBrokerBuilder::ANSWER_TIMEOUT`].
    pub fn answer_timeout(mut self, timeout: Duration) -> Self {
        self.answer_timeout = timeout;
        self
    }

    /// Certificates for `amqps`: a chain to trust beside the system's, and an identity of this client.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, tls: OwnedTLSConfig) -> Self {
        self.tls = tls;
        self
    }

    /// Checks the settings; does not connect. Fails with [`ErrorKind::Configuration`].
    pub fn build(self) -> Result<RabbitPublisher> {
        let address = Address::parse(&self.url, self.answer_timeout)?;
        #[cfg(feature = "tls")]
        let address = address.with_tls(self.tls)?;
        let outlet = Outlet::new(Arc::new(address), "publisher".to_owned(), Lanes::One, self.answer_timeout);
        Ok(RabbitPublisher {
            outlet,
            answer_timeout: self.answer_timeout,
            exchange: self.exchange,
            default_key: self.default_key,
            mandatory: self.mandatory,
        })
    }
}

impl fmt::Debug for RabbitPublisherBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitPublisherBuilder")
            .field("url", &self.url)
            .field("exchange", &self.exchange)
            .field("default_key", &self.default_key)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Publisher for RabbitPublisher {
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        let parcels: Vec<Result<Parcel>> = batch.iter().map(|outgoing| self.parcel(outgoing)).collect();
        let good: Vec<Parcel> = parcels.iter().filter_map(|parcel| parcel.as_ref().ok().cloned()).collect();
        let mut sent = self.outlet.publish(&good, Instant::now() + self.answer_timeout).await.into_iter();
        let none = || Err(Error::new(ErrorKind::Internal, "publish").because("no answer"));
        parcels.into_iter().map(|parcel| parcel.and_then(|_| sent.next().unwrap_or_else(none))).collect()
    }
}

impl fmt::Debug for RabbitPublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitPublisher")
            .field("outlet", &self.outlet)
            .field("exchange", &self.exchange)
            .field("default_key", &self.default_key)
            .finish_non_exhaustive()
    }
}
