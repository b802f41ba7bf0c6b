//! The conformance suite under the rights that docs/redis.md grants the store, and no others: each case on a server of its
//! own, so that no other test's user is in the way, and with several partitions, so that batches are divided.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod store_fixture;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hapax::{ProcessedStore, StoreAdmin};
use hapax_redis::RedisStore;
use hapax_testkit::conformance::{Clock, StoreFixture};
use store_fixture::{Private, server};

/// The line that docs/redis.md gives.
const DOCUMENTED: &str = include_str!("../../../docs/redis.md");

struct Restricted {
    _server: Private,
    url: String,
    first: RedisStore,
}

/// What the page says of the store's user, as words for `ACL SETUSER`.
fn documented_rights() -> String {
    let line = DOCUMENTED.lines().find(|line| line.starts_with("ACL SETUSER hapax-store "));
    line.expect("the page has the store's rights").to_owned()
}

impl Restricted {
    async fn fresh() -> Self {
        let private = Private::start(&[]).await;
        private.ask::<()>(&documented_rights().replace("<password>", "pw")).await;
        let url = format!("redis://hapax-store:pw@127.0.0.1:{}", private.port());
        let first = RedisStore::builder(server(&url)).partitions(4).connect().await.unwrap();
        let health = first.probe().await.unwrap();
        assert!(health.trouble.is_none_or(|told| told.contains("appendfsync is unknown")));
        Self { _server: private, url, first }
    }
}

#[async_trait]
impl StoreFixture for Restricted {
    const CLOCK: Clock = Clock::Real;
    const UNIT: Duration = Duration::from_millis(120);

    async fn store(&self) -> Arc<dyn ProcessedStore> {
        Arc::new(self.first.clone())
    }

    async fn again(&self) -> Arc<dyn ProcessedStore> {
        Arc::new(RedisStore::builder(server(&self.url)).connect().await.unwrap())
    }

    async fn admin(&self) -> Arc<dyn StoreAdmin> {
        Arc::new(self.first.clone())
    }
}

hapax_testkit::store_conformance!(Restricted::fresh().await);
