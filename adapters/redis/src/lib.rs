//! Redis Streams as a broker, and Redis as a store of processed events. Redis 7.0 or newer for the broker, 6.2 for the
//! store; one node, sentinels or a cluster, with TLS by the feature `tls`.
//!
//! ```no_run
//! # async fn start() -> hapax::Result<()> {
//! use hapax_redis::{RedisBroker, RedisServer, RedisStore};
//!
//! let server = RedisServer::at("redis://billing:secret@redis-1:6379/0".parse()?)?;
//! let broker = RedisBroker::builder(server.clone(), "orders", "billing").build()?;
//! let store = RedisStore::builder(server).connect().await?;
//! # let _ = (broker, store);
//! # Ok(())
//! # }
//! ```
//!
//! # What each verb of the store is in Redis
//!
//! | contract | commands |
//! |---|---|
//! | `open` | a script: the consumer's number and retention in two hashes |
//! | `claim`, `renew` | one script for each partition of the batch: `TIME`, `MGET`, the state machine of `hapax::record`, `MSET` |
//! | `record` | the same; what ended is written by `SET .. PX` with the retention |
//! | `probe` | `INFO`; `CONFIG GET appendfsync` where that is allowed |
//! | `look_up`, `forget` | a script |
//! | `list` | a script with `SCAN`, step by step through the database |
//! | `sweep` | nothing: Redis expires by itself |
//!
//! What the broker's verbs are is told at [`RedisBroker`], settings, rights, promises and traps of both in
//! `docs/redis.md` of the repository.
//!
//! # Limits of the store
//!
//! - No transactional handlers.
//! - A failover may lose what was acknowledged, and a server without AOF loses it at a restart: `probe` says so, and the
//!   guarantee is computed from it. An eviction policy is refused at start.
//! - Events under way never expire: what a broker lost in the middle stays claimed until it is forgotten by hand.
//! - The clock is the server's. One set forward ends leases early; one set back makes leases and retries last longer.
//!   Fences grow all the same.

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
