//! Kafka as a broker.
