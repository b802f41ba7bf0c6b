//! What a consumer of RabbitMQ is told: names, topology, retry steps, deadlines. Checked at `build`, all at once.

use std::fmt;
use std::time::Duration;

use hapax::{Durability, Error, ErrorKind, Result, SecretUrl};
#[cfg(feature = "tls")]
use lapin::tcp::OwnedTLSConfig;

use crate::address::Address;
use crate::broker::RabbitBroker;
use crate::places::Places;

/// The longest name of a queue: AMQP's short string, less room for what is appended.
const NAME_BYTES_MAX: usize = 200;

/// Who creates queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// hapax creates what is missing, as quorum queues, and refuses a queue that exists with other arguments.
    Create,
    /// Queues must be there, whatever their arguments: the right `configure` is not needed.
    Check,
}

/// Everything but the address, checked.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) places: Places,
    pub(crate) topology: Topology,
    pub(crate) prefetch_max: u16,
    pub(crate) consumer_timeout: Duration,
    pub(crate) answer_timeout: Duration,
    pub(crate) durability: Durability,
}

/// Settings of a [`RabbitBroker`], from [`RabbitBroker::builder`].
#[derive(Clone)]
#[must_use]
pub struct RabbitBrokerBuilder {
    url: SecretUrl,
    queue: String,
    group: String,
    dead_letters: Option<String>,
    bindings: Vec<(String, String)>,
    retry_steps: Vec<Duration>,
    topology: Topology,
    delivery_limit: Option<u32>,
    prefetch_max: u16,
    consumer_timeout: Duration,
    answer_timeout: Duration,
    durability: Durability,
    #[cfg(feature = "tls")]
    tls: OwnedTLSConfig,
}

impl RabbitBrokerBuilder {
    /// After how many deliveries a queue that hapax creates drops a message by itself. Stated on the queue, because RabbitMQ
    /// 4 drops after 20 unless told otherwise, and because a negative number, "unlimited" on RabbitMQ 4, drops at the first
    /// redelivery on RabbitMQ 3.
    pub const DELIVERY_LIMIT: u32 = 1_000_000;
    /// The delivery limit of a quorum queue that was declared without one, from RabbitMQ 4.0 on.
    pub const DELIVERY_LIMIT_OF_SERVER: u32 = 20;
    /// The most unsettled deliveries of one consumer: RabbitMQ's own bound for quorum queues.
    pub const PREFETCH_MAX: u16 = 2_000;
    /// RabbitMQ's default for how long a delivery may stay unsettled.
    pub const CONSUMER_TIMEOUT: Duration = Duration::from_secs(30 * 60);
    /// The deadline of one call to the server.
    pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
    /// The retry steps: 1 s, doubled up to 4,096 s.
    pub const RETRY_STEPS: [Duration; 13] = {
        let mut steps = [Duration::ZERO; 13];
        let mut at = 0;
        while at < steps.len() {
            steps[at] = Duration::from_secs(1 << at);
            at += 1;
        }
        steps
    };

    pub(crate) fn new(url: SecretUrl, queue: String, group: String) -> Self {
        Self {
            url,
            queue,
            group,
            dead_letters: None,
            bindings: Vec::new(),
            retry_steps: Self::RETRY_STEPS.to_vec(),
            topology: Topology::Create,
            delivery_limit: None,
            prefetch_max: Self::PREFETCH_MAX,
            consumer_timeout: Self::CONSUMER_TIMEOUT,
            answer_timeout: Self::ANSWER_TIMEOUT,
            durability: Durability::Durable,
            #[cfg(feature = "tls")]
            tls: OwnedTLSConfig::default(),
        }
    }

    /// Whether queues are created or only checked. Default [`Topology::Create`].
    pub fn topology(mut self, topology: Topology) -> Self {
        self.topology = topology;
        self
    }

    /// Binds the queue to an exchange, which must exist, under a routing key; can be called several times. Without it the
    /// default exchange reaches the queue by its name. Done with [`Topology::Create`] only.
    pub fn bind(mut self, exchange: impl Into<String>, routing_key: impl Into<String>) -> Self {
        self.bindings.push((exchange.into(), routing_key.into()));
        self
    }

    /// The queue of the dead letters. Default `{queue}.{group}.dead`.
    pub fn dead_letters(mut self, queue: impl Into<String>) -> Self {
        self.dead_letters = Some(queue.into());
        self
    }

    /// How long retried messages wait: each delay is rounded up to one of these, and each has a queue of its own.
    /// Default [`RETRY_STEPS`](Self::RETRY_STEPS).
    pub fn retry_steps(mut self, steps: impl IntoIterator<Item = Duration>) -> Self {
        self.retry_steps = steps.into_iter().collect();
        self
    }

    /// After how many deliveries the queue drops a message by itself: declared with [`Topology::Create`], believed with
    /// [`Topology::Check`]. Default [`DELIVERY_LIMIT`](Self::DELIVERY_LIMIT); with [`Topology::Check`] what RabbitMQ takes by
    /// itself from 4.0 on, [`DELIVERY_LIMIT_OF_SERVER`](Self::DELIVERY_LIMIT_OF_SERVER), since nobody can look at it.
    pub fn delivery_limit(mut self, deliveries: u32) -> Self {
        self.delivery_limit = Some(deliveries);
        self
    }

    /// The most deliveries that RabbitMQ hands over unsettled, where that is less than the consumer's `in_flight_max`.
    /// RabbitMQ counts messages and not bytes, so this bounds memory. Default and most [`PREFETCH_MAX`](Self::PREFETCH_MAX).
    pub fn prefetch_max(mut self, deliveries: u16) -> Self {
        self.prefetch_max = deliveries;
        self
    }

    /// The server's `consumer_timeout`, where it is not the default: how long a delivery may stay unsettled before RabbitMQ
    /// takes it back. Default [`CONSUMER_TIMEOUT`](Self::CONSUMER_TIMEOUT).
    pub fn consumer_timeout(mut self, timeout: Duration) -> Self {
        self.consumer_timeout = timeout;
        self
    }

    /// The deadline of connecting and of each call to the server; publishing to a server that blocks publishers waits so
    /// long. A settlement answers two seconds later at the latest: keep it three below the consumer's `call_timeout`. Default [`ANSWER_TIMEOUT`](Self::ANSWER_TIMEOUT).
    pub fn answer_timeout(mut self, timeout: Duration) -> Self {
        self.answer_timeout = timeout;
        self
    }

    /// How safely a queue that hapax did not create keeps messages; say [`Durability::Lossy`] for a classic durable queue.
    /// Default [`Durability::Durable`], which quorum queues are.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }

    /// Certificates for `amqps`: a chain to trust beside the system's, and an identity of this client.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, tls: OwnedTLSConfig) -> Self {
        self.tls = tls;
        self
    }

    /// Checks everything; does not connect. Fails with [`ErrorKind::Configuration`] and names every fault.
    pub fn build(self) -> Result<RabbitBroker> {
        let mut faults = Vec::new();
        check_name("queue", &self.queue, &mut faults);
        check_name("group", &self.group, &mut faults);
        let dead = self.dead_letters.unwrap_or_else(|| format!("{}.{}.dead", self.queue, self.group));
        if faults.is_empty() {
            check_name("dead_letters", &dead, &mut faults);
        }
        if dead == self.queue {
            faults.push("dead_letters: it is the queue itself, which would deliver dead letters for ever".to_owned());
        }
        for (exchange, key) in &self.bindings {
            if exchange.is_empty() || exchange.len() > 255 || key.len() > 255 {
                let why = "an exchange has a name, and names and routing keys have at most 255 bytes";
                faults.push(format!("bind({exchange:?}, {key:?}): {why}"));
            }
        }
        let (mut steps, day) = (self.retry_steps, Duration::from_secs(24 * 60 * 60));
        steps.sort_unstable();
        steps.dedup();
        if steps.is_empty() || steps.len() > 64 || steps.iter().any(|s| s.as_millis() == 0 || *s > 30 * day) {
            faults.push("retry_steps: give 1 to 64 of them, each from 1 ms to 30 days".to_owned());
        }
        if self.prefetch_max == 0 || self.prefetch_max > Self::PREFETCH_MAX {
            faults.push(format!("prefetch_max: it is from 1 to {}, quorum queues take no more", Self::PREFETCH_MAX));
        }
        if self.delivery_limit == Some(0) {
            faults.push("delivery_limit: 0 would drop a message at its first redelivery; give 1 or more".to_owned());
        }
        if self.answer_timeout.as_millis() == 0 {
            faults.push("answer_timeout: give at least 1 ms".to_owned());
        }
        let address = Address::parse(&self.url, self.answer_timeout);
        #[cfg(feature = "tls")]
        let address = address.and_then(|address| address.with_tls(self.tls));
        match address {
            Ok(address) if faults.is_empty() => {
                let places = Places {
                    work: self.queue,
                    group: self.group,
                    dead,
                    steps,
                    bindings: self.bindings,
                    delivery_limit: self.delivery_limit.unwrap_or(match self.topology {
                        Topology::Create => Self::DELIVERY_LIMIT,
                        Topology::Check => Self::DELIVERY_LIMIT_OF_SERVER,
                    }),
                };
                Ok(RabbitBroker::new(
                    address,
                    Settings {
                        places,
                        topology: self.topology,
                        prefetch_max: self.prefetch_max,
                        consumer_timeout: self.consumer_timeout,
                        answer_timeout: self.answer_timeout,
                        durability: self.durability,
                    },
                ))
            }
            address => {
                faults.extend(address.err().map(|error| error.to_string()));
                Err(Error::new(ErrorKind::Configuration, "build").because(faults.join("; ")))
            }
        }
    }
}

impl fmt::Debug for RabbitBrokerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitBrokerBuilder")
            .field("url", &self.url)
            .field("queue", &self.queue)
            .field("group", &self.group)
            .field("topology", &self.topology)
            .finish_non_exhaustive()
    }
}

/// A name of a queue, or a part of one.
pub(crate) fn check_name(field: &str, name: &str, faults: &mut Vec<String>) {
    if name.is_empty() {
        faults.push(format!("{field}: it is empty; give a name"));
    } else if name.len() > NAME_BYTES_MAX {
        faults.push(format!("{field}: it is longer than {NAME_BYTES_MAX} bytes; take a shorter name"));
    } else if name.starts_with("amq.") {
        faults
            .push(format!("{field}: {name:?} begins with `amq.`, which RabbitMQ keeps for itself; take another name"));
    } else if name.chars().any(char::is_control) {
        faults.push(format!("{field}: {name:?} has a control character; take another name"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder(queue: &str, group: &str) -> RabbitBrokerBuilder {
        let url = SecretUrl::parse("amqp://shop:c4nary@localhost/%2f").unwrap();
        RabbitBrokerBuilder::new(url, queue.to_owned(), group.to_owned())
    }

    #[test]
    fn every_fault_is_told_at_once_with_its_field() {
        let error = builder("amq.orders", "")
            .prefetch_max(0)
            .retry_steps([])
            .delivery_limit(0)
            .bind("", "key")
            .answer_timeout(Duration::ZERO)
            .build()
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration);
        for field in
            ["queue:", "group:", "prefetch_max:", "retry_steps:", "delivery_limit:", "bind(", "answer_timeout:"]
        {
            assert!(error.to_string().contains(field), "{field} is missing in {error}");
        }
    }

    /// A queue that nobody looked at has the limit that its server takes by itself, until somebody says otherwise.
    #[test]
    fn the_delivery_limit_of_a_queue_that_is_only_checked_is_not_believed_to_be_ours() {
        let most = |builder: RabbitBrokerBuilder| {
            let broker = builder.build().expect("good settings");
            hapax::Broker::capabilities(&broker).deliveries_max
        };
        assert_eq!(most(builder("orders", "billing")), Some(1_000_000));
        assert_eq!(most(builder("orders", "billing").topology(Topology::Check)), Some(20));
        assert_eq!(most(builder("orders", "billing").topology(Topology::Check).delivery_limit(50)), Some(50));
    }

    #[test]
    fn dead_letters_do_not_go_back_to_the_queue() {
        let error = builder("orders", "billing").dead_letters("orders").build().unwrap_err();
        assert!(error.to_string().contains("dead_letters"), "{error}");
    }

    #[test]
    fn a_name_too_long_for_amqp_is_refused() {
        assert!(builder(&"q".repeat(201), "billing").build().is_err());
        assert!(builder(&"q".repeat(150), &"g".repeat(150)).build().is_err(), "the derived name is too long");
        assert!(builder(&"q".repeat(100), "billing").build().is_ok());
    }

    #[test]
    fn settings_do_not_show_credentials() {
        let shown = format!("{:?} {:?}", builder("orders", "billing"), builder("orders", "billing").build().unwrap());
        assert!(!shown.contains("c4nary"), "{shown}");
    }
}
