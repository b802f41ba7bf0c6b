//! The conformance suite of stores, each case under a prefix of its own on the shared server.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use hapax::{ProcessedStore, StoreAdmin};
use hapax_redis::{RedisServer, RedisStore};
use hapax_testkit::conformance::{Clock, StoreFixture};
use hapax_testkit::servers::Server;

struct Records {
    server: RedisServer,
    prefix: String,
    first: RedisStore,
}

impl Records {
    async fn fresh() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
        let prefix = format!("kit-{since}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let server = RedisServer::at(Server::Redis.url().parse().unwrap()).unwrap();
        let builder = RedisStore::builder(server.clone()).prefix(prefix.clone());
        Self { server, prefix, first: builder.connect().await.unwrap() }
    }
}

#[async_trait]
impl StoreFixture for Records {
    const CLOCK: Clock = Clock::Real;
    const UNIT: Duration = Duration::from_millis(120);

    async fn store(&self) -> Arc<dyn ProcessedStore> {
        Arc::new(self.first.clone())
    }

    async fn again(&self) -> Arc<dyn ProcessedStore> {
        let builder = RedisStore::builder(self.server.clone()).prefix(self.prefix.clone());
        Arc::new(builder.connect().await.unwrap())
    }

    async fn admin(&self) -> Arc<dyn StoreAdmin> {
        Arc::new(self.first.clone())
    }
}

hapax_testkit::store_conformance!(Records::fresh().await);
