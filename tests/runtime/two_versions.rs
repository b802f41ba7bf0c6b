//! Two versions of hapax on one store during a rolling deploy: what is stored is public API, and a version that does not
//! know what it finds says so and changes nothing, or keeps to the safe side.
//!
//! There is one version so far. What can be shown: a newer schema is refused at start and ends a running consumer with
//! nothing settled; words of a newer version are read as the safe one; records stay readable over reopening.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hapax::{Consumer, Context, ErrorKind, Failure, Level, Message, Reason, Status, StoreAdmin};
use hapax_sqlite::{SqliteStore, Synchronous, sqlx};
use tokio::time::timeout;

use crate::rig::{Rig, Runs, event, key};

struct File(PathBuf);

impl File {
    fn new() -> Self {
        static FILES: AtomicU64 = AtomicU64::new(0);
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("hapax-versions-{}-{number}.db", std::process::id())))
    }

    async fn open(&self) -> hapax::Result<SqliteStore> {
        SqliteStore::builder(&self.0).synchronous(Synchronous::Normal).connect().await
    }
}

impl Drop for File {
    fn drop(&mut self) {
        for ending in ["", "-wal", "-shm"] {
            let mut file = self.0.clone().into_os_string();
            file.push(ending);
            let _left_to_the_system = std::fs::remove_file(file).is_err();
        }
    }
}

/// What a newer version does first when it is deployed beside us.
async fn upgrade(store: &SqliteStore) {
    let newer = "UPDATE hapax_meta SET value = 2 WHERE name = 'schema'";
    sqlx::query(newer).execute(store.pool()).await.unwrap();
}

async fn ok(_: Arc<Message>, _: Context<()>) -> Result<(), Failure> {
    Ok(())
}

#[tokio::test]
async fn a_newer_schema_is_refused_at_start_and_left_as_it_is() {
    let file = File::new();
    let store = file.open().await.unwrap();
    upgrade(&store).await;
    store.close().await;
    let error = file.open().await.expect_err("it is newer");
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    assert!(error.to_string().contains("newer"), "{error}");
}

#[tokio::test]
async fn an_older_process_beside_a_newer_schema_starts_no_consumer() {
    let (file, rig) = (File::new(), Rig::new());
    let store = file.open().await.unwrap();
    upgrade(&store).await;
    let builder = Consumer::builder("billing", rig.broker.another(), store.clone());
    let error = builder.require(Level::AtLeastOnce).on_any(ok).build().await.expect_err("the probe says so");
    assert!(error.to_string().contains("newer"), "{error}");
}

#[tokio::test]
async fn an_older_consumer_that_meets_a_newer_schema_ends_and_settles_nothing() {
    let (file, rig, runs) = (File::new(), Rig::new(), Runs::default());
    let store = file.open().await.unwrap();
    let builder = Consumer::builder("billing", rig.broker.another(), store.clone());
    let consumer = builder.require(Level::AtLeastOnce).on_any(runs.ok()).build().await.unwrap();
    upgrade(&store).await;
    rig.send(event("1")).await;
    let ended = timeout(Duration::from_secs(10), consumer.run(std::future::pending())).await.expect("it ends");
    assert_eq!(ended.expect_err("going on could be wrong").kind(), ErrorKind::Incompatible);
    assert_eq!((runs.len(), rig.broker.standing().ready), (0, 1), "the newer process has it");
}

#[tokio::test]
async fn a_reason_of_a_newer_version_keeps_its_event_set_aside() {
    let (file, rig, runs) = (File::new(), Rig::new(), Runs::default());
    let store = file.open().await.unwrap();
    let wire = |store: SqliteStore, rig: &Rig| {
        Consumer::builder("billing", rig.broker.another(), store).require(Level::AtLeastOnce)
    };
    let failing =
        wire(store.clone(), &rig).on_any(runs.answer(|_| Err(Failure::permanent("no")))).build().await.unwrap();
    let handle = failing.handle();
    let running = tokio::spawn(failing.run(std::future::pending()));
    rig.send(event("1")).await;
    timeout(Duration::from_secs(10), rig.broker.settled()).await.unwrap();
    handle.stop();
    running.await.unwrap().unwrap();
    let newer = "UPDATE hapax_record SET reason = 'sent-to-the-moon'";
    assert_eq!(sqlx::query(newer).execute(store.pool()).await.unwrap().rows_affected(), 1);

    let next = wire(store.clone(), &rig).on_any(runs.ok()).build().await.unwrap();
    let handle = next.handle();
    let running = tokio::spawn(next.run(std::future::pending()));
    rig.send(event("1")).await;
    timeout(Duration::from_secs(10), rig.broker.settled()).await.unwrap();
    let record = store.look_up("billing", key("billing", "1")).await.unwrap().unwrap();
    assert_eq!((record.status, runs.len()), (Status::DeadLettered, 1), "it does not run because of a word");
    assert_eq!(rig.broker.redrive(), 1);
    timeout(Duration::from_secs(10), rig.broker.settled()).await.unwrap();
    assert_eq!(runs.len(), 2, "and its own letter still opens it");
    handle.stop();
    running.await.unwrap().unwrap();
}

#[test]
fn words_of_a_newer_version_read_as_the_safe_ones() {
    assert_eq!(Reason::from_word("sent-to-the-moon"), Reason::Permanent);
}

/// The deploy itself: the old process and the new one share the store, and either finds what the other ended.
#[tokio::test]
async fn what_one_process_ended_another_finds_ended_over_a_restart_of_the_store() {
    let (file, rig, runs) = (File::new(), Rig::new(), Runs::default());
    for deploy in 0..2 {
        let store = file.open().await.unwrap();
        let builder = Consumer::builder("billing", rig.broker.another(), store.clone());
        let consumer = builder.require(Level::AtLeastOnce).on_any(runs.ok()).build().await.unwrap();
        let handle = consumer.handle();
        let running = tokio::spawn(consumer.run(std::future::pending()));
        rig.send_all(0..10).await;
        timeout(Duration::from_secs(10), rig.broker.settled()).await.unwrap();
        assert_eq!(runs.len(), 10, "deploy {deploy}");
        handle.stop();
        running.await.unwrap().unwrap();
        store.close().await;
    }
}
