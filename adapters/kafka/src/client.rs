//! What librdkafka calls back with that is not about the group: its log and its errors, into `tracing`, redacted.

use hapax::redact;
use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel as Level;
use rdkafka::error::KafkaError;

/// The context of clients that are no member of a group.
#[derive(Clone, Debug)]
pub(crate) struct Logging;

impl ClientContext for Logging {
    fn log(&self, level: Level, facility: &str, text: &str) {
        log(level, facility, text);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason = %redact(reason), "librdkafka");
    }
}

/// A line of librdkafka's log. Connections come and go, and the client sees to it: that is no warning of ours.
pub(crate) fn log(level: Level, facility: &str, text: &str) {
    let text = redact(text);
    match level {
        Level::Emerg | Level::Alert | Level::Critical => tracing::error!(facility, %text, "librdkafka"),
        Level::Error | Level::Warning if facility != "CONFWARN" && facility != "FAIL" => {
            tracing::warn!(facility, %text, "librdkafka");
        }
        _ => tracing::debug!(facility, %text, "librdkafka"),
    }
}
