//! A cluster and sentinels of the test's own: records over several nodes, nodes that restart, a primary that dies.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod store_fixture;

use std::process::Command;
use std::time::Duration;

use hapax::{Claim, Outcome, ProcessedStore, Recorded, Renewal, Status, StoreAdmin};
use hapax_redis::redis::cmd;
use hapax_redis::{CLUSTER_PARTITIONS, RedisServer, RedisStore};
use store_fixture::{LEASE, Private, claim, doomed, eventually, free_port, key, lease, open, process, request};

/// Three nodes without replicas, assembled.
async fn cluster() -> (Vec<Private>, RedisServer) {
    let mut nodes = Vec::new();
    for _ in 0..3 {
        let bus = free_port().to_string();
        let options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port", &bus];
        nodes.push(Private::start(&options).await);
    }
    let places: Vec<_> = nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
    let made =
        Command::new("redis-cli").args(["--cluster", "create"]).args(&places).arg("--cluster-yes").output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stdout));
    for node in &nodes {
        eventually("the cluster is assembled", async || {
            let info: String = node.try_ask(cmd("CLUSTER").arg("INFO")).await.unwrap();
            info.contains("cluster_state:ok")
        })
        .await;
    }
    let url = format!("redis-cluster://{}", places.join(","));
    (nodes, RedisServer::at(url.parse().unwrap()).unwrap().response_timeout(Duration::from_secs(3)))
}

#[tokio::test]
async fn a_cluster_holds_the_records_in_many_slots() {
    let (mut nodes, server) = cluster().await;
    let store = RedisStore::builder(server.clone()).connect().await.unwrap();
    assert_eq!(store.partitions(), CLUSTER_PARTITIONS);
    let consumer = open(&store).await;
    process(&store, consumer, 0..2_000).await;
    for node in &nodes {
        assert!(node.ask::<u64>("DBSIZE").await > 100, "every node holds some");
        node.ask::<()>("SCRIPT FLUSH").await;
    }
    let batch: Vec<_> = (0..4_000).map(|n| request(consumer, n, 1 << 80)).collect();
    let claims = store.claim(&batch, LEASE).await.unwrap();
    let mut leases = Vec::new();
    for (n, claim) in claims.into_iter().enumerate() {
        match claim {
            Claim::Processed { .. } => assert!(n < 2_000),
            Claim::Granted(lease, None) => leases.push(lease),
            other => panic!("{n}: {other:?}"),
        }
    }
    assert_eq!(leases.len(), 2_000);
    assert!(store.renew(&leases, LEASE).await.unwrap().iter().all(|renewal| *renewal == Renewal::Renewed));
    let dooms: Vec<_> = leases[..50].iter().map(|lease| (*lease, doomed())).collect();
    assert_eq!(store.record(&dooms).await.unwrap(), [Recorded::Done; 50]);
    assert_eq!(store.list("billing", Status::Doomed, 1_000).await.unwrap().len(), 50);
    assert!(store.forget("billing", key(3)).await.unwrap());
    let health = store.probe().await.unwrap();
    assert!(health.loses_on_failover, "a cluster may lose the last writes");
    // One node dies and comes back: the others go on, and it is found again.
    nodes[0].kill();
    nodes[0].run().await;
    eventually("every partition answers again", async || {
        let outcomes: Vec<_> = leases[50..].iter().map(|lease| (*lease, Outcome::Processed)).collect();
        match store.record(&outcomes).await {
            Ok(recorded) => recorded.iter().all(|one| matches!(one, Recorded::Done | Recorded::AlreadyDone)),
            Err(error) => {
                assert!(error.is_retryable(), "{error}");
                false
            }
        }
    })
    .await;
}

#[tokio::test]
async fn one_partition_in_a_cluster_keeps_batches_whole_under_the_documented_rights() {
    let (nodes, _) = cluster().await;
    let page = include_str!("../../../docs/redis.md");
    let rights = page.lines().find(|line| line.starts_with("ACL SETUSER hapax-store ")).expect("the store's rights");
    for node in &nodes {
        // With the two that docs/redis.md adds for a cluster.
        node.ask::<()>(&format!("{} +cluster|slots +ping", rights.replace("<password>", "pw"))).await;
    }
    let url = format!("redis-cluster://hapax-store:pw@127.0.0.1:{}", nodes[1].port());
    let server = RedisServer::at(url.parse().unwrap()).unwrap();
    let store = RedisStore::builder(server).partitions(1).prefix("hapax:whole").connect().await.unwrap();
    let consumer = open(&store).await;
    process(&store, consumer, 0..500).await;
    let mut sizes = Vec::new();
    for node in &nodes {
        sizes.push(node.ask::<u64>("DBSIZE").await);
    }
    sizes.sort_unstable();
    assert!(sizes[0] == 0 && sizes[1] == 0 && sizes[2] > 500, "{sizes:?}");
}

/// A primary, a replica and a sentinel that watches them.
struct Watched {
    primary: Private,
    replica: Private,
    sentinel: std::process::Child,
    url: String,
}

impl Watched {
    async fn start() -> Self {
        let primary = Private::start(&[]).await;
        let replica = Private::start(&["--replicaof", &format!("127.0.0.1 {}", primary.port())]).await;
        let port = free_port();
        let file = primary.folder().join("sentinel.conf");
        let text = format!(
            "port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {} 1\nsentinel down-after-milliseconds main \
             500\nsentinel failover-timeout main 3000\n",
            primary.port()
        );
        std::fs::write(&file, text).unwrap();
        let log = std::fs::File::create(primary.folder().join("sentinel.log")).unwrap();
        let sentinel =
            Command::new("redis-server").arg(&file).args(["--sentinel"]).stdout(log).spawn().expect("redis-server");
        eventually("the replica is in step", async || {
            replica.ask::<String>("INFO replication").await.contains("master_link_status:up")
        })
        .await;
        let url = format!("redis-sentinel://127.0.0.1:{port}/0?sentinelServiceName=main");
        let watched = Self { primary, replica, sentinel, url };
        eventually("the sentinel knows the replica", async || watched.sentinel_knows_replica(port).await).await;
        watched
    }

    async fn sentinel_knows_replica(&self, port: u16) -> bool {
        let out = Command::new("redis-cli").args(["-p", &port.to_string(), "sentinel", "replicas", "main"]).output();
        String::from_utf8_lossy(&out.unwrap().stdout).contains(&self.replica.port().to_string())
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ended_before = self.sentinel.kill().is_err();
        let _reaped = self.sentinel.wait().is_err();
    }
}

#[tokio::test]
async fn sentinels_name_the_next_primary() {
    let mut watched = Watched::start().await;
    let server = RedisServer::at(watched.url.parse().unwrap()).unwrap().response_timeout(Duration::from_secs(2));
    let store = RedisStore::builder(server).connect().await.unwrap();
    assert!(store.probe().await.unwrap().loses_on_failover);
    let consumer = open(&store).await;
    process(&store, consumer, 0..10).await;
    let held = lease(&store, consumer, 100).await;
    eventually("the replica has it", async || watched.replica.ask::<u64>("DBSIZE").await >= 15).await;
    watched.primary.kill();
    let mut recorded = Vec::new();
    eventually("the store follows to the replica", async || match store.record(&[(held, Outcome::Processed)]).await {
        Ok(answers) => {
            recorded = answers;
            true
        }
        Err(error) => {
            assert!(error.is_retryable(), "{error}");
            false
        }
    })
    .await;
    assert_eq!(recorded, [Recorded::Done]);
    assert!(matches!(claim(&store, consumer, 5, 99).await, Claim::Processed { .. }), "what was copied is known");
    assert!(lease(&store, consumer, 7_000).await.fence > held.fence);
}
