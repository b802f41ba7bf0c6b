//! What `connect` and `probe` look at before a consumer starts, and that no error tells a credential.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod store_fixture;

use hapax::{Consumer, Context, Durability, ErrorKind, Failure, Level, Message, ProcessedStore, StoreHealth, Window};
use hapax_memory::MemoryBroker;
use hapax_redis::{RedisServer, RedisStore};
use std::sync::Arc;
use std::time::Duration;
use store_fixture::{Private, eventually, free_port, open, request, server};

const CANARY: &str = "canary-4711";

async fn health(options: &[&str]) -> StoreHealth {
    let server = Private::start(options).await;
    server.store().await.probe().await.unwrap()
}

async fn nothing(_: Arc<Message>, _: Context<()>) -> Result<(), Failure> {
    Ok(())
}

#[tokio::test]
async fn eviction_policy_refused_at_start() {
    // https://github.com/redis/redis/issues/6576: allkeys-lru evicted what was thought to be kept.
    for policy in ["allkeys-lru", "volatile-ttl"] {
        let server = Private::start(&["--maxmemory-policy", policy]).await;
        let store = server.store().await;
        assert!(store.probe().await.unwrap().evicts);
        let builder = || {
            let broker = MemoryBroker::builder("topic").build();
            Consumer::builder("billing", broker, store.clone()).on_any(nothing).require(Level::AtLeastOnce)
        };
        let refused = builder().build().await.expect_err("it is refused").to_string();
        assert!(refused.contains("store-evicts") && refused.contains("noeviction"), "{refused}");
        assert!(builder().allow(Window::StoreLoss).build().await.is_ok(), "allowed by name");
        server.ask::<()>("CONFIG SET maxmemory-policy noeviction").await;
        assert!(builder().build().await.is_ok(), "and sound once it is set right");
    }
}

#[tokio::test]
async fn durability_follows_from_persistence() {
    assert_eq!(health(&[]).await.durability, Durability::Durable);
    assert_eq!(health(&["--appendfsync", "everysec"]).await.durability, Durability::Lossy);
    let snapshots = health(&["--appendonly", "no", "--save", "60 1"]).await;
    assert_eq!(snapshots.durability, Durability::Process, "what is newer than the snapshot dies with the process");
    assert!(snapshots.trouble.unwrap().contains("AOF is off"));
    let sound = health(&[]).await;
    assert_eq!((sound.name, sound.evicts, sound.loses_on_failover, sound.trouble), ("redis", false, false, None));
    assert!(sound.version.split('.').count() >= 2, "{}", sound.version);
}

#[tokio::test]
async fn without_the_right_to_config_the_least_is_assumed_and_told() {
    let server = Private::start(&[]).await;
    server.ask::<()>("ACL SETUSER plain on >pw ~* +@all -config").await;
    let store =
        RedisStore::open(format!("redis://plain:pw@127.0.0.1:{}", server.port()).parse().unwrap()).await.unwrap();
    let health = store.probe().await.unwrap();
    assert_eq!(health.durability, Durability::Lossy);
    assert!(health.trouble.unwrap().contains("appendfsync is unknown"));
}

#[tokio::test]
async fn a_replica_is_refused_and_a_primary_with_replicas_may_lose_on_failover() {
    let primary = Private::start(&[]).await;
    let replica = Private::start(&["--replicaof", &format!("127.0.0.1 {}", primary.port())]).await;
    let refused = RedisStore::builder(replica.at()).connect().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Configuration);
    assert!(refused.to_string().contains("replica") && refused.to_string().contains("redis-sentinel://"), "{refused}");
    let store = primary.store().await;
    eventually("the primary knows its replica", async || store.probe().await.unwrap().loses_on_failover).await;
}

#[tokio::test]
async fn the_number_of_partitions_is_chosen_once() {
    let server = Private::start(&[]).await;
    let first = RedisStore::builder(server.at()).partitions(4).connect().await.unwrap();
    assert_eq!(first.partitions(), 4);
    assert_eq!(server.store().await.partitions(), 4, "found where it is not set");
    let refused = RedisStore::builder(server.at()).partitions(5).connect().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Configuration);
    assert!(refused.to_string().contains("4 partitions"), "{refused}");
    for partitions in [0, 1025] {
        let refused = RedisStore::builder(server.at()).partitions(partitions).connect().await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Configuration);
    }
    assert_eq!(RedisStore::builder(server.at()).prefix("other").connect().await.unwrap().partitions(), 1);
}

#[tokio::test]
async fn a_store_of_another_version_is_refused() {
    let server = Private::start(&[]).await;
    for version in [1, 3] {
        server.ask::<()>(&format!("HSET {{hapax:0}}store version {version} partitions 1")).await;
        let refused = RedisStore::builder(server.at()).connect().await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Incompatible);
        assert!(refused.to_string().contains(&format!("version {version}")), "{refused}");
    }
}

#[tokio::test]
async fn another_database_is_another_store() {
    let server = Private::start(&[]).await;
    let url = |database| format!("{}/{database}", server.url()).parse().unwrap();
    let (first, second) = (RedisStore::open(url(0)).await.unwrap(), RedisStore::open(url(3)).await.unwrap());
    let consumer = open(&first).await;
    assert_eq!(open(&second).await, consumer, "the number comes from the name");
    store_fixture::process(&first, consumer, 0..1).await;
    store_fixture::process(&second, consumer, 0..1).await;
    let refused = RedisStore::open(url(99)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Configuration, "{refused}");
}

#[tokio::test]
async fn no_error_and_no_debug_tells_a_credential() {
    let private = Private::start(&[]).await;
    private.ask::<()>(&format!("ACL SETUSER {CANARY}-user on >{CANARY} ~* +@all -@dangerous +info")).await;
    let port = private.port();
    let good = format!("redis://{CANARY}-user:{CANARY}@127.0.0.1:{port}");
    let store = RedisStore::builder(server(&good)).connect().await.unwrap();
    let consumer = open(&store).await;
    let mut texts = vec![format!("{store:?}"), format!("{:?}", server(&good))];
    texts.push(format!("{:?}", RedisStore::builder(server(&good))));
    let nowhere = free_port();
    for url in [
        format!("redis://{CANARY}-user:{CANARY}-wrong@127.0.0.1:{port}"),
        format!("redis://{CANARY}-user:{CANARY}@127.0.0.1:{nowhere}/0"),
        format!("redis-cluster://{CANARY}-user:{CANARY}@127.0.0.1:{nowhere},127.0.0.1:{nowhere}"),
        format!(
            "redis-sentinel://{CANARY}-user:{CANARY}@127.0.0.1:{nowhere}?sentinelServiceName=m&sentinelPassword={CANARY}"
        ),
    ] {
        let at = server(&url).connect_timeout(Duration::from_secs(2));
        texts.push(format!("{at:?}"));
        let error = RedisStore::builder(at).connect().await.unwrap_err();
        texts.extend([format!("{error}"), format!("{error:?}")]);
    }
    private.ask::<()>(&format!("ACL SETUSER {CANARY}-user on -mget")).await;
    let error = store.claim(&[request(consumer, 1, 1)], store_fixture::LEASE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "a right that was taken away: {error}");
    texts.extend([format!("{error}"), format!("{error:?}")]);
    for text in texts {
        assert!(!text.replace(&format!("{CANARY}-user"), "").contains(CANARY), "{text}");
    }
}

#[tokio::test]
async fn wrong_credentials_and_no_server_are_told_apart() {
    let private = Private::start(&[]).await;
    private.ask::<()>("ACL SETUSER bill on >right ~* +@all").await;
    let wrong = format!("redis://bill:wrong@127.0.0.1:{}", private.port());
    let refused = RedisStore::open(wrong.parse().unwrap()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Configuration, "{refused}");
    let nobody = RedisServer::at(format!("redis://127.0.0.1:{}", free_port()).parse().unwrap()).unwrap();
    let refused = RedisStore::builder(nobody).connect().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
}
