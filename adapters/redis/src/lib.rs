//! Redis Streams as a broker, and Redis as a store of processed events.
mod connect;
mod error;
mod script;
mod store;

pub use connect::{CONNECT_TIMEOUT, RESPONSE_TIMEOUT, RedisServer};
pub use redis;
pub use store::{CLUSTER_PARTITIONS, FORMAT_VERSION, PREFIX, RedisStore, RedisStoreBuilder};
