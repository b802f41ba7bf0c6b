//! Batch handlers: an outcome for each event, whatever happens to the others. Every invariant of single handlers holds for
//! each event of a batch.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use hapax::{
    BatchHandler, Claim, ClaimRequest, Event, Failure, Fingerprint, Item, Otherwise, Outcome, Outcomes, ProcessedStore,
    Reason, Status, StoreAdmin, Trouble, TxBatchHandler,
};
use hapax_sqlite::{SqliteTx, sqlx};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, sleep};

use crate::rig::{Rig, Runs, TYPE, event, key};
use crate::script::Fault;
use crate::transactions::Ground;

#[derive(Serialize, Deserialize)]
struct Placed {
    id: String,
}

impl Event for Placed {
    const TYPE: &'static str = TYPE;
}

type Batch = Vec<Item<Placed, ()>>;
type Answer = std::pin::Pin<Box<dyn Future<Output = Result<Outcomes, Failure>> + Send>>;

/// The ids of every batch, in the order of their starts, and every run.
#[derive(Clone, Default)]
struct Batches {
    seen: Arc<Mutex<Vec<Vec<String>>>>,
    runs: Runs,
}

impl Batches {
    fn note<T>(&self, batch: &[Item<Placed, T>]) -> Vec<String> {
        let ids: Vec<_> = batch.iter().map(|item| item.event.id.clone()).collect();
        batch.iter().for_each(|item| drop(self.runs.note(&item.cx)));
        self.seen.lock().unwrap().push(ids.clone());
        ids
    }

    fn all(&self) -> Vec<Vec<String>> {
        self.seen.lock().unwrap().clone()
    }

    /// A handler that notes the batch, then does this.
    fn then<F, A>(&self, act: F) -> impl BatchHandler<Placed, ()> + use<F, A>
    where
        F: Fn(Vec<String>, Batch) -> A + Send + Sync + 'static,
        A: Future<Output = Result<Outcomes, Failure>> + Send + 'static,
    {
        let batches = self.clone();
        move |batch: Batch| -> Answer { Box::pin(act(batches.note(&batch), batch)) }
    }

    /// A handler that succeeds, after so long.
    fn take(&self, time: Duration) -> impl BatchHandler<Placed, ()> + use<> {
        self.then(move |_, _| async move {
            sleep(time).await;
            Ok(Outcomes::all_done())
        })
    }

    fn largest(&self) -> usize {
        self.all().iter().map(Vec::len).max().unwrap_or_default()
    }
}

#[tokio::test(start_paused = true)]
async fn a_batch_takes_what_has_gathered_and_each_event_takes_effect_once() {
    let (rig, batches) = (Rig::new(), Batches::default());
    for _ in 0..3 {
        rig.send_all(0..200).await;
    }
    let billing = rig
        .start("billing", |c| c.on_batch(batches.take(Duration::from_millis(5))).otherwise(Otherwise::DeadLetter))
        .await;
    rig.settled().await;
    assert_eq!((billing.statistics().processed, billing.statistics().duplicates), (200, 400));
    assert!((0..200).all(|id| batches.runs.of(&id.to_string()).len() == 1));
    assert!(batches.largest() > 8, "batches form by themselves: {:?}", batches.all());
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_bounded() {
    let (rig, batches) = (Rig::new(), Batches::default());
    rig.send_all(0..100).await;
    let _billing = rig
        .start("billing", |c| {
            c.on_batch(batches.take(Duration::from_millis(5))).batch_max(7).otherwise(Otherwise::DeadLetter)
        })
        .await;
    rig.settled().await;
    assert_eq!((batches.largest(), batches.runs.len()), (7, 100));
}

#[tokio::test(start_paused = true)]
async fn an_item_that_fails_fails_alone() {
    let (rig, batches) = (Rig::new(), Batches::default());
    let handler = batches.then(|ids, batch| async move {
        let outcome = |(id, item): (&String, &Item<Placed, ()>)| match (id.as_str(), item.cx.attempt()) {
            ("bad", _) => Err(Failure::permanent("bad")),
            ("later", 1) => Err(Failure::retryable("not yet")),
            _ => Ok(()),
        };
        Ok(ids.iter().zip(&batch).map(outcome).collect())
    });
    rig.send_all(["1", "bad", "2", "later", "3"]).await;
    let _billing = rig.start("billing", |c| c.on_batch(handler).otherwise(Otherwise::DeadLetter)).await;
    rig.settled().await;
    assert_eq!(batches.all()[0].len(), 5, "they came together");
    assert_eq!(rig.dead(), [("bad".to_owned(), Reason::Permanent)]);
    assert_eq!((batches.runs.attempts("1"), batches.runs.attempts("later")), (vec![1], vec![1, 2]));
}

/// Every way in which a batch can fail as a whole, by the doing of one event.
#[tokio::test(start_paused = true)]
async fn a_batch_that_fails_as_a_whole_is_run_again_one_by_one() {
    for way in ["error", "panic", "timeout", "too few outcomes"] {
        let (rig, batches) = (Rig::new(), Batches::default());
        let handler = batches.then(move |ids, _| async move {
            if !ids.contains(&"bad".to_owned()) {
                return Ok(Outcomes::all_done());
            }
            match way {
                "error" => Err(Failure::permanent("bad")),
                "panic" => panic!("bad"),
                "timeout" => std::future::pending().await,
                _ => Ok(std::iter::empty::<Result<(), Failure>>().collect()),
            }
        });
        rig.send_all(["1", "bad", "2"]).await;
        let _billing = rig
            .start("billing", |c| {
                c.on_batch(handler).attempts_max(1).timeout(Duration::from_secs(5)).otherwise(Otherwise::DeadLetter)
            })
            .await;
        rig.settled().await;
        let seen = batches.all();
        assert_eq!(seen[0], ["1", "bad", "2"], "{way}");
        let alone: Vec<_> = seen[1..].iter().map(Vec::len).collect();
        assert_eq!(alone, [1, 1, 1], "{way}: {seen:?}");
        assert_eq!(rig.dead().len(), 1, "{way}: only the culprit");
        assert_eq!(rig.dead()[0].0, "bad", "{way}");
        assert_eq!(rig.status("billing", "2").await, Some(Status::Processed), "{way}");
        assert_eq!(batches.runs.attempts("1"), [1, 1], "{way}: the same claim, the same attempt");
        assert_eq!(rig.journal.observed("BatchFailed"), 1, "{way}: told once");
    }
}

#[tokio::test(start_paused = true)]
async fn the_order_of_a_key_holds_and_a_batch_has_one_event_of_a_key() {
    let (rig, batches) = (Rig::ordered(), Batches::default());
    for n in 0..60 {
        rig.send(event(&format!("{n:02}")).with_partition_key(format!("key {}", n % 6))).await;
    }
    let _billing = rig
        .start("billing", |c| c.on_batch(batches.take(Duration::from_millis(3))).otherwise(Otherwise::DeadLetter))
        .await;
    rig.settled().await;
    for key in 0..6 {
        let of_key: Vec<_> =
            batches.runs.ids().into_iter().filter(|id| id.parse::<u32>().unwrap() % 6 == key).collect();
        assert!(of_key.is_sorted() && of_key.len() == 10, "{of_key:?}");
    }
    assert_eq!(batches.largest(), 6, "one of each key: {:?}", batches.all());
}

#[tokio::test(start_paused = true)]
async fn an_event_waits_half_a_second_at_most_for_the_batch_before() {
    let (rig, batches) = (Rig::new(), Batches::default());
    let handler = batches.then(|ids, _| async move {
        if ids == ["slow"] {
            sleep(Duration::from_secs(30)).await;
        }
        Ok(Outcomes::all_done())
    });
    let billing = rig.start("billing", |c| c.on_batch(handler).otherwise(Otherwise::DeadLetter)).await;
    rig.send(event("slow")).await;
    rig.until("the first runs", || batches.all().len() == 1).await;
    let sent = Instant::now();
    rig.send_all(["1", "2"]).await;
    rig.until("the others ran", || billing.statistics().processed == 2).await;
    assert!(sent.elapsed() >= Duration::from_millis(400), "it gathers: {:?}", sent.elapsed());
    assert!(sent.elapsed() <= Duration::from_millis(900), "not for ever: {:?}", sent.elapsed());
    assert_eq!(batches.all()[1], ["1", "2"]);
    rig.settled().await;
}

#[tokio::test(start_paused = true)]
async fn a_stop_gives_back_what_had_not_begun_and_records_what_ended() {
    let (rig, batches) = (Rig::new(), Batches::default());
    let gate = Arc::new(Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let handler = batches.then(move |_, _| {
        let gate = Arc::clone(&opened);
        async move {
            gate.acquire().await.expect("open").forget();
            Ok(Outcomes::all_done())
        }
    });
    let billing = rig
        .start("billing", |c| c.on_batch(handler).drain(Duration::from_secs(2)).otherwise(Otherwise::DeadLetter))
        .await;
    rig.send(event("first")).await;
    rig.until("the first runs", || batches.all().len() == 1).await;
    rig.send_all(["second", "third"]).await;
    rig.until("they run too", || batches.all().len() == 2).await;
    gate.add_permits(1);
    billing.stop().await;
    let processed = rig.status("billing", "first").await == Some(Status::Processed);
    assert!(processed, "what ended is recorded");
    let record = rig.record("billing", "second").await.expect("it was claimed");
    assert_ne!(record.status, Status::Processed);
    let again = Batches::default();
    let _next = rig.start("billing", |c| c.on_batch(again.take(Duration::ZERO)).otherwise(Otherwise::DeadLetter)).await;
    rig.settled().await;
    let mut ids = again.runs.ids();
    ids.sort();
    assert_eq!(ids, ["second", "third"]);
    assert_eq!(again.runs.attempts("second"), [1], "the attempt was given back");
}

#[tokio::test(start_paused = true)]
async fn after_two_crashes_each_of_the_batch_runs_alone() {
    let (rig, second) = (Rig::new(), Batches::default());
    rig.send_all(["1", "2", "3"]).await;
    for _ in 0..2 {
        let first = Batches::default();
        let handler = first.then(|_, _| std::future::pending());
        let billing = rig.start("billing", |c| c.on_batch(handler).otherwise(Otherwise::DeadLetter)).await;
        rig.until("they run", || first.runs.len() == 3).await;
        assert_eq!(first.all().len(), 1, "together, also behind one crash: {:?}", first.all());
        billing.crash().await;
    }
    let _next = rig
        .start("billing", |c| c.on_batch(second.take(Duration::from_millis(5))).otherwise(Otherwise::DeadLetter))
        .await;
    rig.settled().await;
    assert_eq!(second.all().len(), 3, "a killer takes no innocents with it: {:?}", second.all());
    assert!(second.runs.all().iter().all(|run| run.crashes == 2));
}

#[tokio::test(start_paused = true)]
async fn a_lost_lease_is_that_of_one_event() {
    let (rig, batches) = (Rig::new(), Batches::default());
    let (entered, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (inside, goes) = (Arc::clone(&entered), Arc::clone(&go));
    let handler = batches.then(move |ids, _| {
        let (inside, goes) = (Arc::clone(&inside), Arc::clone(&goes));
        async move {
            if ids.len() > 1 {
                inside.notify_one();
                goes.notified().await;
            }
            Ok(Outcomes::all_done())
        }
    });
    rig.send_all(["1", "2", "3"]).await;
    let billing = rig.start("billing", |c| c.on_batch(handler).otherwise(Otherwise::DeadLetter)).await;
    entered.notified().await;
    assert!(rig.store.forget("billing", key("billing", "2")).await.unwrap());
    rig.until("the loss is seen", || rig.journal.observed("LeaseLost") == 1).await;
    go.notify_one();
    rig.settled().await;
    assert_eq!(billing.statistics().processed, 3);
    assert_eq!(batches.runs.of("1").len(), 1, "the others of its batch are not run again");
    assert_eq!(batches.runs.of("2").len(), 2);
}

// --- in a transaction ---------------------------------------------------------------------------------------------------

/// A handler that writes each event, then answers.
fn writes<F>(batches: &Batches, answer: F) -> impl TxBatchHandler<Placed, SqliteTx, (), Error = Failure> + use<F>
where
    F: Fn(&Item<Placed, ()>) -> Result<(), Failure> + Clone + Send + Sync + 'static,
{
    let batches = batches.clone();
    move |batch: Batch, mut tx: SqliteTx| -> Answer {
        batches.note(&batch);
        let answer = answer.clone();
        Box::pin(async move {
            for item in &batch {
                let insert = sqlx::query("INSERT INTO effects VALUES (?, ?)").bind(&item.event.id);
                insert.bind(i64::from(item.cx.attempt())).execute(&mut *tx).await?;
            }
            Ok(batch.iter().map(answer).collect())
        })
    }
}

async fn effects(ground: &Ground) -> Vec<String> {
    let mut effects: Vec<_> = ground.effects().await.into_iter().map(|(event, _)| event).collect();
    effects.sort();
    effects
}

fn ids(ids: std::ops::Range<u32>) -> Vec<String> {
    let mut ids: Vec<_> = ids.map(|id| id.to_string()).collect();
    ids.sort();
    ids
}

#[tokio::test]
async fn effects_and_marks_of_a_batch_commit_together() {
    let (ground, batches) = (Ground::new().await, Batches::default());
    ground.rig.send_all(0..50).await;
    ground.rig.send_all(0..50).await;
    let billing = ground.start(|c| c.on_batch_tx(writes(&batches, |_| Ok(()))).otherwise(Otherwise::DeadLetter)).await;
    ground.settled().await;
    assert_eq!(effects(&ground).await, ids(0..50));
    assert_eq!(billing.statistics().processed, 50);
    assert!(batches.all().len() < 25, "few transactions: {:?}", batches.all());
    assert!(billing.handle.guarantee().to_string().contains("ExactlyOnceEffect"), "{}", billing.handle.guarantee());
}

#[tokio::test]
async fn an_item_that_fails_leaves_no_effect_and_the_others_have_theirs_once() {
    let (ground, batches) = (Ground::new().await, Batches::default());
    ground.rig.send_all(0..20).await;
    let answer = |item: &Item<Placed, ()>| match item.event.id.as_str() {
        "7" | "13" => Err(Failure::permanent("bad")),
        _ => Ok(()),
    };
    let _billing = ground.start(|c| c.on_batch_tx(writes(&batches, answer)).otherwise(Otherwise::DeadLetter)).await;
    ground.settled().await;
    let wanted: Vec<_> = ids(0..20).into_iter().filter(|id| id != "7" && id != "13").collect();
    assert_eq!(effects(&ground).await, wanted);
    assert_eq!(ground.rig.dead().len(), 2);
    assert!(batches.runs.all().iter().all(|run| run.attempt == 1), "the same claims");
}

#[tokio::test]
async fn the_lost_answer_of_a_batch_s_commit_is_found_and_nothing_repeats() {
    for fault in [Fault::LoseReply, Fault::Refuse(hapax::ErrorKind::Unknown)] {
        let (ground, batches) = (Ground::new().await, Batches::default());
        ground.script.next("commit", fault);
        ground.rig.send_all(0..10).await;
        let _billing = ground
            .start(|c| {
                c.on_batch_tx(writes(&batches, |_| Ok(())))
                    .delay(Duration::from_millis(10))
                    .otherwise(Otherwise::DeadLetter)
            })
            .await;
        ground.settled().await;
        assert_eq!(effects(&ground).await, ids(0..10));
        assert!(ground.script.is_over());
    }
}

#[tokio::test]
async fn one_fenced_event_takes_nothing_else_of_its_batch_with_it() {
    let (ground, batches) = (Ground::new().await, Batches::default());
    ground.rig.send_all(0..10).await;
    let gate = ground.script.gate("begin");
    let billing = ground.start(|c| c.on_batch_tx(writes(&batches, |_| Ok(()))).otherwise(Otherwise::DeadLetter)).await;
    ground.rig.until("it begins", || ground.script.is_over()).await;
    // While it waits for its transaction, another claims the event and gives it back.
    let three = key("billing", "3");
    assert!(ground.store.forget("billing", three).await.unwrap());
    let consumer = ground.store.open("billing", Duration::from_hours(1)).await.unwrap();
    let message = event("3");
    let fingerprint = Fingerprint::of(message.attributes.content_type.as_deref(), &message.data);
    let request = ClaimRequest { consumer, key: three, fingerprint, token: 3, reopen: None };
    let claims = ground.store.claim(&[request], Duration::from_secs(30)).await.unwrap();
    let Claim::Granted(lease, _) = &claims[0] else { panic!("free: {claims:?}") };
    let outcome = Outcome::Failed { after: Duration::ZERO, counted: false, trouble: Trouble::default() };
    ground.store.record(&[(*lease, outcome)]).await.unwrap();
    gate.add_permits(1);
    ground.settled().await;
    assert_eq!(effects(&ground).await, ids(0..10));
    assert_eq!((billing.statistics().processed, billing.statistics().fenced), (10, 1));
}
