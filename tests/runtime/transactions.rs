//! Transactional handlers on a SQLite file: the effect and the processed mark commit together or not at all, whatever
//! happens around the commit. S13 EffectOnceTx.
//!
//! Real time against a real file, and short.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hapax::{Consumer, ConsumerBuilder, Context, ErrorKind, Failure, Level, Message, Reason, Status, StoreAdmin};
use hapax_sqlite::{SqliteStore, SqliteTx, Synchronous, sqlx};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use crate::rig::{Process, Rig, event, key};
use crate::script::{self, Fault, Script, Scripted};

pub(crate) const WAIT_MAX: Duration = Duration::from_secs(20);

/// A file that is removed at the end, and the rig's broker beside it.
pub(crate) struct Ground {
    pub(crate) rig: Rig,
    pub(crate) store: SqliteStore,
    path: PathBuf,
    pub(crate) script: Script,
}

impl Ground {
    pub(crate) async fn new() -> Self {
        static FILES: AtomicU64 = AtomicU64::new(0);
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("hapax-runtime-{}-{number}.db", std::process::id()));
        let store = SqliteStore::builder(&path).synchronous(Synchronous::Normal).connect().await.unwrap();
        sqlx::query("CREATE TABLE effects (event TEXT NOT NULL, attempt INTEGER NOT NULL)")
            .execute(store.pool())
            .await
            .unwrap();
        Self { rig: Rig::new(), store, path, script: Script::default() }
    }

    pub(crate) async fn start<S: Send + Sync + 'static>(
        &self,
        wire: impl FnOnce(ConsumerBuilder<(), Scripted<SqliteStore>>) -> ConsumerBuilder<S, Scripted<SqliteStore>>,
    ) -> Process {
        let store = Scripted::new(self.store.clone(), &self.script);
        // A file that is not synced is less durable than its neighbour in memory asks for: said, and allowed here.
        script::start_on(&self.rig, "billing", &self.script, store, |c| wire(c.require(Level::AtLeastOnce))).await
    }

    /// The effects: event and attempt, in the order of their commits.
    pub(crate) async fn effects(&self) -> Vec<(String, i64)> {
        let all = "SELECT event, attempt FROM effects ORDER BY rowid";
        sqlx::query_as(all).fetch_all(self.store.pool()).await.unwrap()
    }

    pub(crate) async fn status(&self, id: &str) -> Option<Status> {
        self.store.look_up("billing", key("billing", id)).await.unwrap().map(|record| record.status)
    }

    pub(crate) async fn settled(&self) {
        timeout(WAIT_MAX, self.rig.broker.settled()).await.unwrap_or_else(|_| {
            panic!("not settled: {:?}\n{}", self.rig.broker.standing(), self.rig.journal.lines().join("\n"))
        });
        sleep(Duration::from_millis(20)).await;
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        for ending in ["", "-wal", "-shm"] {
            let mut file = self.path.clone().into_os_string();
            file.push(ending);
            let _left_to_the_system = std::fs::remove_file(file).is_err();
        }
    }
}

async fn write(tx: &mut SqliteTx, cx: &Context<()>) -> Result<(), sqlx::Error> {
    let id = cx.message().attributes.id.as_deref().unwrap_or_default();
    let insert = sqlx::query("INSERT INTO effects VALUES (?, ?)").bind(id).bind(i64::from(cx.attempt()));
    insert.execute(&mut **tx).await.map(drop)
}

pub(crate) async fn effect(_: Arc<Message>, mut tx: SqliteTx, cx: Context<()>) -> Result<(), Failure> {
    write(&mut tx, &cx).await?;
    Ok(())
}

#[tokio::test]
async fn each_event_takes_effect_once_although_it_is_delivered_often() {
    let ground = Ground::new().await;
    let billing = ground.start(|c| c.on_any_tx(effect)).await;
    for _ in 0..3 {
        ground.rig.send_all(0..20).await;
    }
    ground.settled().await;
    let mut effects = ground.effects().await;
    effects.sort();
    let mut wanted: Vec<_> = (0..20).map(|id| (id.to_string(), 1)).collect();
    wanted.sort();
    assert_eq!(effects, wanted);
    assert_eq!((billing.statistics().processed, billing.statistics().duplicates), (20, 40));
    assert!(billing.handle.guarantee().to_string().contains("ExactlyOnceEffect"), "{}", billing.handle.guarantee());
}

/// JasperFx/wolverine@dd3ed9bc6 (#3327): the status was Handled before the commit, and stayed so behind a rollback.
#[tokio::test]
async fn rollback_leaves_no_completed_flag() {
    async fn fails_after_its_effect(_: Arc<Message>, mut tx: SqliteTx, cx: Context<()>) -> Result<(), Failure> {
        write(&mut tx, &cx).await?;
        match (cx.attempt(), cx.message().attributes.id.as_deref()) {
            (_, Some("never")) => Err(Failure::permanent("no")),
            (1, _) => Err(Failure::retryable("not yet").after(Duration::from_millis(10))),
            _ => Ok(()),
        }
    }
    let ground = Ground::new().await;
    let _billing = ground.start(|c| c.on_any_tx(fails_after_its_effect)).await;
    ground.rig.send_all(["twice", "never"]).await;
    ground.settled().await;
    assert_eq!(ground.effects().await, [("twice".to_owned(), 2)], "only the attempt that was recorded");
    assert_eq!(ground.status("twice").await, Some(Status::Processed));
    assert_eq!(ground.rig.dead(), [("never".to_owned(), Reason::Permanent)]);
}

#[tokio::test]
async fn a_panic_takes_the_effect_back() {
    async fn panics_once(_: Arc<Message>, mut tx: SqliteTx, cx: Context<()>) -> Result<(), Failure> {
        write(&mut tx, &cx).await?;
        assert!(cx.attempt() > 1, "boom");
        Ok(())
    }
    let ground = Ground::new().await;
    let _billing = ground.start(|c| c.on_any_tx(panics_once).delay(Duration::from_millis(10))).await;
    ground.rig.send(event("1")).await;
    ground.settled().await;
    assert_eq!(ground.effects().await, [("1".to_owned(), 2)]);
}

#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_found_and_not_repeated() {
    let ground = Ground::new().await;
    ground.script.next("commit", Fault::LoseReply);
    let billing = ground.start(|c| c.on_any_tx(effect)).await;
    ground.rig.send(event("1")).await;
    ground.settled().await;
    assert!(ground.script.is_over());
    assert_eq!(ground.effects().await, [("1".to_owned(), 1)]);
    let statistics = billing.statistics();
    assert_eq!((statistics.processed, statistics.duplicates), (1, 0), "its own, and no duplicate");
}

#[tokio::test]
async fn a_commit_that_did_not_take_place_is_run_again() {
    for fault in [Fault::Refuse(ErrorKind::Unknown), Fault::Refuse(ErrorKind::Unavailable)] {
        let ground = Ground::new().await;
        ground.script.next("commit", fault);
        let billing = ground.start(|c| c.on_any_tx(effect).delay(Duration::from_millis(10))).await;
        ground.rig.send(event("1")).await;
        ground.settled().await;
        assert_eq!(ground.effects().await, [("1".to_owned(), 2)], "the first attempt's effect is gone");
        assert_eq!(billing.statistics().processed, 1);
    }
}

#[tokio::test]
async fn a_store_that_lends_no_transaction_is_no_failure_of_the_handler() {
    let ground = Ground::new().await;
    for verb in ["begin", "record-in"] {
        ground.script.next(verb, Fault::Refuse(ErrorKind::Unavailable));
    }
    let _billing = ground.start(|c| c.on_any_tx(effect).attempts_max(1)).await;
    ground.rig.send(event("1")).await;
    ground.settled().await;
    assert!(ground.script.is_over());
    assert_eq!(ground.effects().await, [("1".to_owned(), 1)], "no attempt was used up");
    assert_eq!(ground.rig.dead(), []);
}

/// A process stands still between its claim and its transaction, another takes the event over and ends it; what the
/// first writes when it wakes must not be there beside the other's.
#[tokio::test]
async fn a_fenced_transaction_leaves_nothing() {
    let ground = Ground::new().await;
    let lease = Duration::from_secs(1);
    let begin = ground.script.gate("begin");
    let zombie =
        ground.start(|c| c.on_any_tx(effect).lease(lease).call_timeout(lease / 3).in_flight_max(1).concurrency(1));
    let zombie = zombie.await;
    ground.rig.send(event("1")).await;
    timeout(WAIT_MAX, async {
        while !ground.script.is_over() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("claimed, and about to begin");
    ground.script.freeze();
    let plain = Script::default();
    let other = script::start_on(&ground.rig, "billing", &plain, ground.store.clone(), |c| {
        c.require(Level::AtLeastOnce).on_any_tx(effect).lease(lease).call_timeout(lease / 3)
    });
    let other = other.await;
    assert!(ground.rig.broker.redeliver(1));
    timeout(WAIT_MAX, async {
        while other.statistics().processed == 0 {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("taken over");
    begin.add_permits(1);
    sleep(Duration::from_millis(200)).await;
    assert_eq!(ground.effects().await, [("1".to_owned(), 2)], "the late one is fenced inside its transaction");
    ground.script.thaw();
    ground.settled().await;
    assert_eq!(ground.effects().await, [("1".to_owned(), 2)]);
    assert_eq!((zombie.statistics().processed, zombie.statistics().duplicates), (0, 1));
}

#[tokio::test]
async fn slow_handlers_with_many_waiting_lose_no_lease() {
    async fn slow(_: Arc<Message>, mut tx: SqliteTx, cx: Context<()>) -> Result<(), Failure> {
        write(&mut tx, &cx).await?;
        sleep(Duration::from_millis(60)).await;
        Ok(())
    }
    let ground = Ground::new().await;
    let lease = Duration::from_secs(2);
    let billing = ground.start(|c| c.on_any_tx(slow).lease(lease).call_timeout(lease / 3)).await;
    ground.rig.send_all(0..64).await;
    let begun = Instant::now();
    ground.settled().await;
    assert!(begun.elapsed() > lease, "all of them took longer than a lease");
    assert_eq!(ground.effects().await.len(), 64);
    let statistics = billing.statistics();
    assert_eq!((statistics.leases_lost, statistics.fenced, statistics.processed), (0, 0, 64));
}

#[tokio::test]
async fn a_process_that_dies_in_its_transaction_leaves_nothing_and_another_takes_over() {
    let ground = Ground::new().await;
    let begun = Arc::new(Notify::new());
    let dies = {
        let begun = Arc::clone(&begun);
        move |_: Arc<Message>, mut tx: SqliteTx, cx: Context<()>| {
            let begun = Arc::clone(&begun);
            async move {
                write(&mut tx, &cx).await?;
                begun.notify_one();
                std::future::pending::<Result<(), Failure>>().await
            }
        }
    };
    let lease = Duration::from_secs(1);
    let first = ground.start(|c| c.on_any_tx(dies).lease(lease).call_timeout(lease / 3)).await;
    ground.rig.send(event("1")).await;
    begun.notified().await;
    first.crash().await;
    let _second = ground.start(|c| c.on_any_tx(effect).lease(lease).call_timeout(lease / 3)).await;
    ground.settled().await;
    assert_eq!(ground.effects().await, [("1".to_owned(), 2)]);
}

#[tokio::test]
async fn a_stop_in_the_middle_of_a_transaction_gives_it_back() {
    let ground = Ground::new().await;
    let begun = Arc::new(Notify::new());
    let hangs = {
        let begun = Arc::clone(&begun);
        move |_: Arc<Message>, mut tx: SqliteTx, cx: Context<()>| {
            let begun = Arc::clone(&begun);
            async move {
                write(&mut tx, &cx).await?;
                begun.notify_one();
                std::future::pending::<Result<(), Failure>>().await
            }
        }
    };
    let first = ground.start(|c| c.on_any_tx(hangs).drain(Duration::from_millis(100))).await;
    ground.rig.send(event("1")).await;
    begun.notified().await;
    first.stop().await;
    assert_eq!((ground.effects().await, ground.status("1").await), (vec![], Some(Status::Waiting)));
    let second = ground.start(|c| c.on_any_tx(effect)).await;
    ground.settled().await;
    assert_eq!(ground.effects().await, [("1".to_owned(), 1)], "the same attempt again");
    second.stop().await;
}

#[tokio::test]
async fn one_consumer_writes_what_another_has_no_say_in() {
    let ground = Ground::new().await;
    let _billing = ground.start(|c| c.on_any_tx(effect)).await;
    let shipping = Consumer::builder("shipping", ground.rig.broker.group("shipping"), ground.store.clone());
    let shipping = shipping.require(Level::AtLeastOnce).on_any_tx(effect).build().await.unwrap();
    let handle = shipping.handle();
    let running = tokio::spawn(shipping.run(std::future::pending()));
    ground.rig.send(event("1")).await;
    ground.settled().await;
    timeout(WAIT_MAX, async {
        while handle.statistics().processed == 0 {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("it runs for the second consumer too");
    assert_eq!(ground.effects().await, [("1".to_owned(), 1), ("1".to_owned(), 1)]);
    handle.stop();
    running.await.unwrap().unwrap();
}
