//! Redis Streams as a broker, and Redis as a store of processed events.

mod broker;
mod connect;
mod error;
mod publisher;
mod script;
mod store;

pub use broker::{MissingGroup, RedisBroker, RedisBrokerBuilder, Topology, Trimmed};
pub use connect::{CONNECT_TIMEOUT, RESPONSE_TIMEOUT, RedisServer};
pub use publisher::RedisPublisher;
pub use redis;
pub use store::{CLUSTER_PARTITIONS, FORMAT_VERSION, PREFIX, RedisStore, RedisStoreBuilder};
