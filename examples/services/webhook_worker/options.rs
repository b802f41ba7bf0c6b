//! What can be chosen on the command line, and which choices go together. Everything that is wrong is told at once, each
//! with the flag's name and the remedy.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use hapax::SecretUrl;

/// The most of its lease that a handler inside an SQLite transaction may take: others cannot renew theirs meanwhile.
const SQLITE_SHARE: (u64, u64) = (2, 3);

/// Consumes events of a broker, and applies one effect for each, whatever is repeated, lost or killed.
///
/// Every setting of hapax that has no flag here is read from the environment: WEBHOOK_WORKER_RETENTION=10d.
#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// Where events come from. `memory` reads CloudEvents from standard input, one JSON document a line
    #[arg(long)]
    pub(crate) broker: BrokerKind,
    /// The broker's address: redis://host:6379, amqp://user:password@host:5672/vhost, kafka://host:9092
    #[arg(long, value_name = "URL")]
    pub(crate) url: Option<SecretUrl>,
    /// The topic (Kafka), the stream (Redis) or the queue (RabbitMQ)
    #[arg(long, value_name = "NAME")]
    pub(crate) topic: String,
    /// The group of workers that share the events; it is the consumer's name in the store, too
    #[arg(long, value_name = "NAME")]
    pub(crate) group: String,
    /// Where it is kept what was processed
    #[arg(long)]
    pub(crate) store: Option<StoreKind>,
    /// The store's address: redis://host:6379, postgres://user:password@host:5432/db, or SQLite's FILE
    #[arg(long, value_name = "URL")]
    pub(crate) store_url: Option<String>,
    /// Whether events of one key wait for each other [default: as the broker keeps it]
    ///
    /// On a broker that hands one key to several workers (redis, rabbitmq) `key` orders within each worker alone; it is
    /// told at start as the open window Overtaken.
    #[arg(long, verbatim_doc_comment)]
    pub(crate) order: Option<OrderKind>,
    /// Most handlers at once
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub(crate) concurrency: u16,
    /// How long others wait for the events of a worker that died; renewed while the handler runs
    #[arg(long, value_name = "N", default_value_t = 30_000)]
    pub(crate) lease_ms: u64,
    /// How long the handler waits before its effect commits
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=600_000))]
    pub(crate) handler_ms: u64,
    /// The share of attempts that fail before the effect, from 0 to 1; they are tried again
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = share)]
    pub(crate) fail_rate: f64,
    /// Effects as rows of the store's table `effects`, in one transaction with the record; or as lines of FILE
    /// [default: table, where the store has tables]
    #[arg(long, value_name = "table|FILE")]
    pub(crate) effects: Option<PathBuf>,
    /// Serves /livez, /readyz, /report and /metrics
    #[arg(long, value_name = "ADDR")]
    pub(crate) http: Option<SocketAddr>,
    /// Creates what is missing at the broker (topic, group, places of retries and dead letters), and ends
    #[arg(long)]
    pub(crate) declare_only: bool,
    /// Ends when for so long nothing has arrived and nothing was under way, here or as a retry at the broker
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) exit_when_idle: Option<Duration>,
    /// Prints the counts as JSON, as the last line
    #[arg(long)]
    pub(crate) json: bool,
}

/// The brokers that it consumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BrokerKind {
    Memory,
    Redis,
    Rabbitmq,
    Kafka,
}

/// The stores that it records in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum StoreKind {
    Memory,
    Sqlite,
    Redis,
    Postgres,
}

/// What waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OrderKind {
    None,
    Key,
}

/// Where effects take place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effects {
    /// In the transaction that records the event.
    Table,
    /// At the end of this file.
    File(PathBuf),
}

impl StoreKind {
    fn has_tables(self) -> bool {
        matches!(self, Self::Sqlite | Self::Postgres)
    }
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().map_err(|_| "a number from 0 to 1, such as 0.2".to_owned())?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err("a share goes from 0 to 1".to_owned()) }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.filter(|idle| !idle.is_zero()).ok_or_else(|| "a number of seconds above 0, such as 5 or 0.5".to_owned())
}

/// With TLS, for a cluster or for sentinels a scheme has letters more: rediss, redis-cluster.
fn begins(url: &SecretUrl, schemes: &[&str]) -> bool {
    schemes.iter().any(|scheme| url.scheme().starts_with(scheme))
}

impl Options {
    /// Where effects take place, as far as it was said or is plain. [`check`](Self::check) tells where it is not.
    pub(crate) fn effects(&self) -> Option<Effects> {
        match &self.effects {
            Some(path) if path.as_os_str() == "table" => Some(Effects::Table),
            Some(path) => Some(Effects::File(path.clone())),
            None => self.store.filter(|store| store.has_tables()).map(|_| Effects::Table),
        }
    }

    /// How long one attempt may take; `None` leaves it to hapax, where a transaction of SQLite binds it to the lease.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        let bound = self.store == Some(StoreKind::Sqlite) && self.effects() == Some(Effects::Table);
        (!bound).then(|| Duration::from_millis(self.handler_ms) + Duration::from_secs(10))
    }

    /// Whether events of one key wait for each other: asked for, or kept by the broker.
    pub(crate) fn is_ordered(&self) -> bool {
        self.order.map_or(self.broker == BrokerKind::Kafka, |order| order == OrderKind::Key)
    }

    /// Every choice that goes with no other, with its remedy.
    pub(crate) fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        self.check_broker(&mut wrong);
        if self.declare_only {
            if self.broker == BrokerKind::Memory {
                wrong.push("--declare-only: the memory broker ends with its process; leave it out".to_owned());
            }
            return wrong;
        }
        match self.store {
            Some(store) => self.check_store(store, &mut wrong),
            None => wrong.push(
                "--store is missing: give --store memory, sqlite, redis or postgres, or --declare-only".to_owned(),
            ),
        }
        wrong
    }

    fn check_broker(&self, wrong: &mut Vec<String>) {
        let schemes: &[&str] = match self.broker {
            BrokerKind::Memory => &[],
            BrokerKind::Redis => &["redis", "unix"],
            BrokerKind::Rabbitmq => &["amqp"],
            BrokerKind::Kafka => &["kafka"],
        };
        match (&self.url, self.broker) {
            (Some(_), BrokerKind::Memory) => {
                wrong.push("--url: the memory broker has no address; leave it out, or take another --broker".into());
            }
            (None, BrokerKind::Memory) => {}
            (None, broker) => {
                wrong.push(format!("--url is missing: give the address of {broker:?}, as in {}://host", schemes[0]));
            }
            (Some(url), broker) if !begins(url, schemes) => wrong.push(format!(
                "--url {url}: {broker:?} is reached by {}://..; correct the address, or --broker",
                schemes[0]
            )),
            (Some(_), _) => {}
        }
    }

    fn check_store(&self, store: StoreKind, wrong: &mut Vec<String>) {
        let schemes: &[&str] = match store {
            StoreKind::Memory | StoreKind::Sqlite => &[],
            StoreKind::Redis => &["redis", "unix"],
            StoreKind::Postgres => &["postgres"],
        };
        match (self.store_url.as_deref(), store) {
            (Some(_), StoreKind::Memory) => {
                wrong
                    .push("--store-url: the memory store has no address; leave it out, or take another --store".into());
            }
            (None, StoreKind::Memory) | (Some(_), StoreKind::Sqlite) => {}
            (None, StoreKind::Sqlite) => wrong.push("--store-url is missing: give the FILE of the database".into()),
            (None, store) => {
                wrong.push(format!(
                    "--store-url is missing: give the address of {store:?}, as in {}://host",
                    schemes[0]
                ));
            }
            (Some(url), store) => match SecretUrl::parse(url) {
                Err(error) => wrong.push(format!("--store-url: {error}")),
                Ok(url) if !begins(&url, schemes) => wrong.push(format!(
                    "--store-url {url}: {store:?} is reached by {}://..; correct the address, or --store",
                    schemes[0]
                )),
                Ok(_) => {}
            },
        }
        match self.effects() {
            None => wrong.push(format!("--effects is missing: {store:?} has no tables; give --effects FILE")),
            Some(Effects::Table) if !store.has_tables() => wrong.push(format!(
                "--effects table: {store:?} has no tables; give --effects FILE, or --store sqlite or postgres"
            )),
            Some(Effects::Table) if store == StoreKind::Sqlite => self.check_sqlite(wrong),
            Some(_) => {}
        }
    }

    fn check_sqlite(&self, wrong: &mut Vec<String>) {
        let most = self.lease_ms / SQLITE_SHARE.1 * SQLITE_SHARE.0;
        if self.handler_ms >= most {
            wrong.push(format!(
                "--handler-ms {}: a transaction of SQLite holds up every other write, so the handler must end within two \
                 thirds of the lease; give less than {most}, or a longer --lease-ms, or --effects FILE",
                self.handler_ms
            ));
        }
    }
}
