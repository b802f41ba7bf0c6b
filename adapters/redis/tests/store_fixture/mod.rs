//! What the suites of the store start from: a private redis-server that a test may restart, fill and break, and claims.
#![allow(dead_code, reason = "each suite takes what it needs")]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use hapax::{Claim, ClaimRequest, ConsumerId, EventKey, Fingerprint, Lease, Outcome, ProcessedStore, Reason, Trouble};
use hapax_redis::redis::{self, Cmd, FromRedisValue};
use hapax_redis::{RedisServer, RedisStore};

pub(crate) const LEASE: Duration = Duration::from_secs(30);
pub(crate) const RETENTION: Duration = Duration::from_secs(3600);

/// How long a server may take to start, to load, or to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// A name that no other test has.
pub(crate) fn unique() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
    format!("t{since}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A redis-server of the test's own, with its data in a folder that is removed at the end.
pub(crate) struct Private {
    child: Option<Child>,
    folder: PathBuf,
    port: u16,
    options: Vec<String>,
}

impl Private {
    /// Sound for records unless `options` say otherwise: they come later and win.
    pub(crate) async fn start(options: &[&str]) -> Self {
        let folder = std::env::temp_dir().join(format!("hapax-redis-{}", unique()));
        std::fs::create_dir(&folder).unwrap();
        let sound =
            ["--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction", "--save", ""];
        let options = sound.iter().chain(options).map(|option| (*option).to_owned()).collect();
        let mut server = Self { child: None, folder, port: free_port(), options };
        server.run().await;
        server
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(crate) fn at(&self) -> RedisServer {
        server(&self.url())
    }

    pub(crate) async fn store(&self) -> RedisStore {
        RedisStore::builder(self.at()).connect().await.unwrap()
    }

    /// Starts it, on the data that there is.
    pub(crate) async fn run(&mut self) {
        let port = self.port.to_string();
        let log = std::fs::File::create(self.folder.join("log")).unwrap();
        let child = Command::new("redis-server")
            .args(["--port", &port, "--bind", "127.0.0.1", "--dir"])
            .arg(&self.folder)
            .args(&self.options)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        self.child = Some(child);
        if !self.options.iter().any(|option| option == "--tls-port" || option == "--requirepass") {
            eventually("it answers", async || self.try_ask::<String>(&redis::cmd("PING")).await.is_ok()).await;
        }
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ended_before = child.kill().is_err();
            child.wait().unwrap();
        }
    }

    pub(crate) async fn try_ask<T: FromRedisValue>(&self, command: &Cmd) -> redis::RedisResult<T> {
        let client = redis::Client::open(self.url()).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await?;
        command.query_async(&mut connection).await
    }

    /// A command of the test's own, on a connection of its own: words divided by spaces.
    pub(crate) async fn ask<T: FromRedisValue>(&self, words: &str) -> T {
        let mut words = words.split(' ');
        let mut command = redis::cmd(words.next().unwrap());
        for word in words {
            command.arg(word);
        }
        self.try_ask(&command).await.unwrap()
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        self.kill();
        let _leave_it = std::fs::remove_dir_all(&self.folder).is_err();
    }
}

/// Waits for something that a real server does in its own time.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "not within {PATIENCE:?}: {what}");
}

pub(crate) fn server(url: &str) -> RedisServer {
    RedisServer::at(url.parse().unwrap()).unwrap().response_timeout(Duration::from_secs(3))
}

/// A store with a prefix of its own on a server that others use too.
pub(crate) async fn shared_store(url: &str) -> RedisStore {
    RedisStore::builder(server(url)).prefix(unique()).connect().await.unwrap()
}

pub(crate) async fn open(store: &RedisStore) -> ConsumerId {
    ProcessedStore::open(store, "billing", RETENTION).await.unwrap()
}

pub(crate) fn key(n: u64) -> EventKey {
    EventKey::of("billing", "shop", &n.to_string())
}

pub(crate) fn request(consumer: ConsumerId, n: u64, token: u128) -> ClaimRequest {
    ClaimRequest { consumer, key: key(n), fingerprint: Fingerprint::of(None, b"data"), token, reopen: None }
}

pub(crate) async fn claim(store: &RedisStore, consumer: ConsumerId, n: u64, token: u128) -> Claim {
    store.claim(&[request(consumer, n, token)], LEASE).await.unwrap().remove(0)
}

/// Claims an event that must be free.
pub(crate) async fn lease(store: &RedisStore, consumer: ConsumerId, n: u64) -> Lease {
    match claim(store, consumer, n, u128::from(n) + 1_000_000).await {
        Claim::Granted(lease, _) => lease,
        other => panic!("event {n} is not free: {other:?}"),
    }
}

/// Claims and records as processed.
pub(crate) async fn process(store: &RedisStore, consumer: ConsumerId, events: std::ops::Range<u64>) {
    let requests: Vec<_> = events.map(|n| request(consumer, n, u128::from(n) + 1)).collect();
    let claims = store.claim(&requests, LEASE).await.unwrap();
    let outcomes: Vec<_> = claims
        .into_iter()
        .map(|claim| match claim {
            Claim::Granted(lease, _) => (lease, Outcome::Processed),
            other => panic!("not free: {other:?}"),
        })
        .collect();
    store.record(&outcomes).await.unwrap();
}

pub(crate) fn trouble() -> Trouble {
    Trouble { id: "order-1".into(), error: "card declined".into() }
}

pub(crate) fn failed() -> Outcome {
    Outcome::Failed { after: Duration::from_secs(1), counted: true, trouble: trouble() }
}

pub(crate) fn doomed() -> Outcome {
    Outcome::Doomed { reason: Reason::Permanent, trouble: trouble() }
}
