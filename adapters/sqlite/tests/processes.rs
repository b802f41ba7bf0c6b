//! Several processes on one file, and processes that are killed: what was acknowledged stays, each effect is there once.
//!
//! The worker processes are this test program itself, started for [`worker`] with the file in the environment.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use fixture::{Folder, key, request};
use hapax::{Claim, ErrorKind, Outcome, ProcessedStore, Recorded, Status, StoreAdmin, TransactionalStore};
use hapax_sqlite::{SqliteStore, sqlx};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

const FILE: &str = "HAPAX_SQLITE_TEST_FILE";
const WORK: &str = "HAPAX_SQLITE_TEST_WORK";
const LEASE: Duration = Duration::from_millis(500);

/// Does the work of a child process; in the parent's run there is none, and nothing is claimed to be tested.
#[tokio::test(flavor = "multi_thread")]
async fn worker() {
    let (Ok(file), Ok(work)) = (std::env::var(FILE), std::env::var(WORK)) else { return };
    let store = SqliteStore::open(file).await.unwrap();
    let consumer = ProcessedStore::open(&store, "billing", fixture::RETENTION).await.unwrap();
    sqlx::query("CREATE TABLE IF NOT EXISTS effects (event INTEGER NOT NULL)").execute(store.pool()).await.unwrap();
    println!("worker opened");
    match work.as_str() {
        "record" => {
            for n in 0.. {
                record(&store, consumer, n).await;
            }
        }
        "hold" => {
            let Claim::Granted(..) = store.claim(&[request(consumer, 1, 1)], LEASE).await.unwrap()[0] else { return };
            let (mut tx, _lent) = store.begin().await.unwrap();
            sqlx::query("INSERT INTO effects VALUES (1)").execute(&mut *tx).await.unwrap();
            println!("worker holds");
            std::future::pending::<()>().await;
        }
        events => {
            let events: u64 = events.parse().unwrap();
            for n in 0..events {
                transact(&store, consumer, n).await;
            }
            println!("worker finished");
        }
    }
}

async fn record(store: &SqliteStore, consumer: hapax::ConsumerId, n: u64) {
    let token = fastrand::u128(..);
    if let Claim::Granted(lease, _) = store.claim(&[request(consumer, n, token)], LEASE).await.unwrap()[0] {
        store.record(&[(lease, Outcome::Processed)]).await.unwrap();
        println!("worker acknowledged {n}");
    }
}

/// One effect and its mark, whoever gets the event.
async fn transact(store: &SqliteStore, consumer: hapax::ConsumerId, n: u64) {
    let token = fastrand::u128(..);
    let Claim::Granted(lease, _) = store.claim(&[request(consumer, n, token)], LEASE).await.unwrap()[0] else { return };
    let (mut tx, mut lent) = store.begin().await.unwrap();
    sqlx::query("INSERT INTO effects VALUES (?)").bind(n as i64).execute(&mut *tx).await.unwrap();
    drop(tx);
    if store.record_in(&mut lent, &[(lease, Outcome::Processed)]).await.unwrap() == [Recorded::Done] {
        store.commit(lent).await.unwrap();
    }
}

struct Worker {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Worker {
    fn start(file: &Path, work: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "worker", "--nocapture"])
            .env(FILE, file)
            .env(WORK, work)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// The rest of the next line that begins with `worker` and `word`.
    async fn says(&mut self, word: &str) -> Option<String> {
        while let Some(line) = self.lines.next_line().await.unwrap() {
            if let Some(rest) = line.split_once("worker ").and_then(|(_, said)| said.strip_prefix(word)) {
                return Some(rest.trim().to_owned());
            }
        }
        None
    }

    /// Kills it as `kill -9` does, and answers which events it had acknowledged besides.
    async fn kill(mut self) -> Vec<u64> {
        self.child.kill().await.unwrap();
        let mut acknowledged = Vec::new();
        while let Some(n) = self.says("acknowledged").await {
            acknowledged.extend(n.parse::<u64>());
        }
        acknowledged
    }
}

async fn assert_sound(store: &SqliteStore, processed: &[u64]) {
    let said: String = sqlx::query_scalar("PRAGMA integrity_check").fetch_one(store.pool()).await.unwrap();
    assert_eq!(said, "ok");
    for n in processed {
        let found = store.look_up("billing", key(*n)).await.unwrap();
        assert_eq!(found.map(|view| view.status), Some(Status::Processed), "event {n} was acknowledged");
    }
}

#[tokio::test]
async fn what_was_acknowledged_survives_a_kill() {
    let folder = Folder::new();
    let mut worker = Worker::start(&folder.file(), "record");
    let mut acknowledged = Vec::new();
    while acknowledged.len() < 100 {
        acknowledged.push(worker.says("acknowledged").await.expect("the worker goes on").parse().unwrap());
    }
    acknowledged.extend(worker.kill().await);
    assert!(folder.path().join("events.db-wal").metadata().unwrap().len() > 0, "nothing was left to recover");
    let store = SqliteStore::open(folder.file()).await.unwrap();
    assert_sound(&store, &acknowledged).await;
}

/// Bug 24 of semantics.md section 4: killed again while recovering from a kill.
#[tokio::test]
async fn embedded_store_double_crash() {
    let folder = Folder::new();
    let mut acknowledged = Vec::new();
    for round in 0..12_u64 {
        let mut worker = Worker::start(&folder.file(), "record");
        if round % 2 == 0 {
            // Long enough to write.
            for _ in 0..20 {
                acknowledged.push(worker.says("acknowledged").await.expect("the worker goes on").parse().unwrap());
            }
        } else {
            // Killed while it opens and recovers, or a little later.
            tokio::time::sleep(Duration::from_millis(fastrand::u64(1..40))).await;
        }
        acknowledged.extend(worker.kill().await);
    }
    let store = SqliteStore::open(folder.file()).await.unwrap();
    assert_sound(&store, &acknowledged).await;
}

#[tokio::test]
async fn a_kill_inside_a_handler_leaves_no_effect_and_gives_the_event_to_another() {
    let folder = Folder::new();
    let mut worker = Worker::start(&folder.file(), "hold");
    worker.says("holds").await.expect("the worker holds a transaction");
    let store = SqliteStore::open(folder.file()).await.unwrap();
    let consumer = ProcessedStore::open(&store, "billing", fixture::RETENTION).await.unwrap();
    worker.kill().await;
    tokio::time::sleep(LEASE).await;
    let taken = store.claim(&[request(consumer, 1, 2)], LEASE).await.unwrap().remove(0);
    assert!(matches!(taken, Claim::Granted(lease, Some(history)) if lease.attempt == 2 && history.crashes == 1));
    let effects: i64 = sqlx::query_scalar("SELECT count(*) FROM effects").fetch_one(store.pool()).await.unwrap();
    assert_eq!(effects, 0);
}

/// Four processes create one file at once and share its events; one more is killed in between.
#[tokio::test(flavor = "multi_thread")]
async fn several_processes_on_one_file_give_each_event_one_effect() {
    let folder = Folder::new();
    let events = 300;
    let mut workers: Vec<_> = (0..4).map(|_| Worker::start(&folder.file(), &events.to_string())).collect();
    let mut victim = Worker::start(&folder.file(), &events.to_string());
    victim.says("opened").await.expect("it opens");
    victim.kill().await;
    for worker in &mut workers {
        assert!(worker.says("finished").await.is_some(), "a worker failed");
    }
    let store = SqliteStore::open(folder.file()).await.unwrap();
    let consumer = ProcessedStore::open(&store, "billing", fixture::RETENTION).await.unwrap();
    tokio::time::sleep(LEASE).await;
    // What the victim had claimed.
    for n in 0..events {
        transact(&store, consumer, n).await;
    }
    let effects: Vec<i64> =
        sqlx::query_scalar("SELECT event FROM effects ORDER BY event").fetch_all(store.pool()).await.unwrap();
    assert_eq!(effects, (0..events as i64).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_lock_that_another_process_keeps_is_unavailable_not_a_hang() {
    let folder = Folder::new();
    let mut worker = Worker::start(&folder.file(), "hold");
    worker.says("holds").await.expect("the worker holds a transaction");
    // Opening what is there already writes nothing, so it does not wait for the lock.
    let store = SqliteStore::builder(folder.file()).busy_timeout(Duration::from_millis(200)).connect().await.unwrap();
    let consumer = ProcessedStore::open(&store, "billing", fixture::RETENTION).await.unwrap();
    store.probe().await.unwrap();
    let told = store.claim(&[request(consumer, 2, 2)], LEASE).await.unwrap_err();
    assert_eq!(told.kind(), ErrorKind::Unavailable, "{told}");
    assert_eq!(store.begin().await.unwrap_err().kind(), ErrorKind::Unavailable);
    worker.kill().await;
    assert!(matches!(store.claim(&[request(consumer, 2, 2)], LEASE).await.unwrap()[..], [Claim::Granted(..)]));
}
