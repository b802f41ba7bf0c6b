//! Where the real servers of a test are: told by variables, never guessed, never skipped; models of what they do,
//! and certificates for those that a test starts itself.
//!
//! `scripts/brokers up` starts them, `scripts/brokers env` prints the variables. A test that needs a server asks here for
//! its address; without one it fails with a message that names the command.

pub mod certificates;
pub mod group;
pub mod queue;
pub mod stream;

use std::env::VarError;

/// A server that tests run against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// Redis, one node.
    Redis,
    /// RabbitMQ, one node.
    RabbitMq,
    /// Apache Kafka, one node.
    Kafka,
    /// PostgreSQL.
    Postgres,
}

impl Server {
    /// The variable that holds its address.
    pub const fn variable(self) -> &'static str {
        match self {
            Self::Redis => "HAPAX_REDIS_URL",
            Self::RabbitMq => "HAPAX_RABBITMQ_URL",
            Self::Kafka => "HAPAX_KAFKA_URL",
            Self::Postgres => "HAPAX_POSTGRES_URL",
        }
    }

    /// Its address.
    ///
    /// # Panics
    ///
    /// When the variable is missing or empty: a missing server fails a test, with the command that starts it.
    pub fn url(self) -> String {
        match std::env::var(self.variable()) {
            Ok(url) if !url.is_empty() => url,
            Ok(_) | Err(VarError::NotPresent) => panic!(
                "{} is not set; start the servers and set it: scripts/brokers up && eval \"$(scripts/brokers env)\"",
                self.variable()
            ),
            Err(VarError::NotUnicode(_)) => panic!("{} is not UTF-8", self.variable()),
        }
    }
}
