//! Redis Streams as a broker, and Redis as a store of processed events.

mod connect;
mod error;
mod script;

pub use connect::{CONNECT_TIMEOUT, RESPONSE_TIMEOUT, RedisServer};
pub use redis;
