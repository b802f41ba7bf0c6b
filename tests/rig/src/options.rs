//! What one run of the rig is told.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

/// Breaks real workers, brokers and stores, and checks that every event took effect once.
///
/// Servers and binaries come from scripts/rig, which is what people call.
#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// Where events come from
    #[arg(long)]
    pub(crate) broker: BrokerKind,
    /// Where workers record
    #[arg(long)]
    pub(crate) store: StoreKind,
    /// How long faults are injected
    #[arg(long, default_value_t = 10.0)]
    pub(crate) minutes: f64,
    /// Which plan: the same seed draws the same faults at the same times
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Whether events of one key are to run in order; judged where the broker keeps it (kafka)
    #[arg(long, default_value = "none")]
    pub(crate) order: OrderKind,
    /// Where effects take place [default: table, where the store has tables]
    #[arg(long)]
    pub(crate) effects: Option<EffectsKind>,
    /// Worker processes, besides one that joins and leaves
    #[arg(long, default_value_t = 3)]
    pub(crate) workers: u32,
    /// Events a second
    #[arg(long, default_value_t = 60)]
    pub(crate) rate: u32,
    /// The lease of every worker
    #[arg(long, default_value_t = 4000)]
    pub(crate) lease_ms: u64,
    /// How long a handler takes [default: 150; 5 where handlers queue for SQLite's one writer]
    #[arg(long)]
    pub(crate) handler_ms: Option<u64>,
    /// The share of attempts that fail
    #[arg(long, default_value_t = 0.02)]
    pub(crate) fail_rate: f64,
    /// Only faults whose names begin with one of these, for narrowing down: kill,store-
    #[arg(long, value_delimiter = ',')]
    pub(crate) only: Vec<String>,
    /// Prints the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The script that starts and stops servers
    #[arg(long, default_value = "scripts/brokers")]
    pub(crate) brokers: PathBuf,
    /// The folder of `webhook_worker` and `publish`
    #[arg(long, default_value = "target/debug/examples")]
    pub(crate) bin: PathBuf,
    /// Where the history and the logs go; a folder for each run is made there
    #[arg(long, default_value = "target/rig")]
    pub(crate) out: PathBuf,
}

/// A broker of the rig.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BrokerKind {
    Redis,
    Rabbitmq,
    Kafka,
}

/// A store of the rig.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum StoreKind {
    Redis,
    Postgres,
    Sqlite,
}

/// What waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OrderKind {
    None,
    Key,
}

/// Where effects take place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EffectsKind {
    /// Rows that commit with the record.
    Table,
    /// Lines of a file.
    File,
}

impl BrokerKind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Rabbitmq => "rabbitmq",
            Self::Kafka => "kafka",
        }
    }
}

impl StoreKind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Postgres => "postgres",
            Self::Sqlite => "sqlite",
        }
    }

    /// SQLite is a file of the workers.
    pub(crate) const fn is_server(self) -> bool {
        !matches!(self, Self::Sqlite)
    }
}

impl OrderKind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Key => "key",
        }
    }
}

impl Options {
    pub(crate) fn faulty(&self) -> Duration {
        Duration::from_secs_f64(self.minutes * 60.0)
    }

    pub(crate) fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    pub(crate) fn effects(&self) -> EffectsKind {
        let default = if self.store == StoreKind::Redis { EffectsKind::File } else { EffectsKind::Table };
        self.effects.unwrap_or(default)
    }

    pub(crate) fn handler_ms(&self) -> u64 {
        let default = if self.store == StoreKind::Sqlite && self.transactional() { 5 } else { 150 };
        self.handler_ms.unwrap_or(default)
    }

    /// Whether effects commit with the record.
    pub(crate) fn transactional(&self) -> bool {
        self.effects() == EffectsKind::Table
    }

    /// Whether broker and store are one server.
    pub(crate) fn one_server(&self) -> bool {
        self.broker == BrokerKind::Redis && self.store == StoreKind::Redis
    }
}
