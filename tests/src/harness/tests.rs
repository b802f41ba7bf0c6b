//! The harness itself: each verb does what it says, and each assertion can fail with a text that tells why.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use hapax::{
    Broker, Consumer, ConsumerBuilder, Context, Event, Failure, Level, Message, Order, Otherwise, ProcessedStore,
    Reason,
};
use serde::{Deserialize, Serialize};

use super::Harness;
use crate::stage::NoPublisher;

#[derive(Serialize, Deserialize)]
struct OrderPlaced {
    cents: i64,
}

impl Event for OrderPlaced {
    const TYPE: &'static str = "com.shop.order.placed";
    const VERSION: u32 = 2;
}

#[derive(Serialize, Deserialize)]
struct Charged {
    cents: i64,
}

impl Event for Charged {
    const TYPE: &'static str = "com.shop.charged";
}

#[derive(Clone, Default)]
struct App {
    charges: Arc<Mutex<Vec<i64>>>,
    failures: Arc<Mutex<VecDeque<Failure>>>,
    at_once: Arc<AtomicU32>,
    at_once_max: Arc<AtomicU32>,
}

impl App {
    fn charges(&self) -> Vec<i64> {
        self.charges.lock().unwrap().clone()
    }

    fn failing(failures: impl IntoIterator<Item = Failure>) -> Self {
        Self { failures: Arc::new(Mutex::new(failures.into_iter().collect())), ..Self::default() }
    }
}

async fn charge(event: OrderPlaced, cx: Context<App>) -> Result<(), Failure> {
    let app = cx.state();
    let now = app.at_once.fetch_add(1, Ordering::SeqCst) + 1;
    app.at_once_max.fetch_max(now, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(10)).await;
    app.at_once.fetch_sub(1, Ordering::SeqCst);
    if let Some(failure) = app.failures.lock().unwrap().pop_front() {
        return Err(failure);
    }
    app.charges.lock().unwrap().push(event.cents);
    cx.publish(&Charged { cents: event.cents }).send()?;
    Ok(())
}

/// Written once, for production and for tests.
fn billing<T: ProcessedStore>(app: App, broker: impl Broker, store: T) -> ConsumerBuilder<App, T> {
    Consumer::builder("billing", broker, store)
        .state(app)
        .publisher(NoPublisher)
        .attempts_max(3)
        .on(charge)
        .otherwise(Otherwise::DeadLetter)
}

fn harness(app: &App) -> Harness {
    let app = app.clone();
    Harness::new(move |broker, store| billing(app.clone(), broker, store))
}

fn order(id: &str, cents: i64) -> Message {
    Message::event("/shop", id, "com.shop.order.placed.v2").with_json(&OrderPlaced { cents }).unwrap()
}

/// The text with which `what` panics.
fn failure_of(what: impl FnOnce()) -> String {
    let panic = std::panic::catch_unwind(AssertUnwindSafe(what)).expect_err("it was to fail");
    panic.downcast_ref::<String>().cloned().unwrap_or_else(|| panic.downcast_ref::<&str>().unwrap().to_string())
}

#[tokio::test(start_paused = true)]
async fn an_event_is_processed_and_its_copies_are_duplicates() {
    let app = App::default();
    let mut harness = harness(&app);
    harness.deliver_together([order("1", 5), order("1", 5), order("2", 7)]);
    harness.settle().await;
    harness.deliver_again("1");
    harness.settle().await;
    harness.assert_processed("1");
    harness.assert_duplicate("1");
    harness.assert_attempts("1", 1);
    harness.assert_processed("/shop 2");
    assert_eq!(app.charges(), [5, 7]);
    let statistics = harness.statistics();
    assert_eq!((statistics.delivered, statistics.processed, statistics.duplicates), (4, 2, 2));
    let told = failure_of(|| harness.assert_duplicate("2"));
    assert!(told.starts_with("no delivery of event 2 was found to be a duplicate:\n"), "{told}");
}

#[tokio::test(start_paused = true)]
async fn a_crash_before_the_record_runs_the_event_again_when_its_lease_is_over() {
    let app = App::default();
    let mut harness = harness(&app);
    harness.crash_before_record();
    let id = harness.deliver_event(&OrderPlaced { cents: 5 });
    let before = tokio::time::Instant::now();
    harness.settle().await;
    assert!(before.elapsed() >= Duration::from_secs(29), "the lease is waited for: {:?}", before.elapsed());
    harness.assert_processed(&id);
    harness.assert_attempts(&id, 2);
    assert_eq!(app.charges(), [5, 5], "the window that the promise declares");
    let published: Vec<_> = harness.published().into_iter().map(|o| o.message.attributes.id).collect();
    assert_eq!(published.len(), 2);
    assert_eq!(published[0], published[1], "what is sent again has the same id");
}

#[tokio::test(start_paused = true)]
async fn a_crash_before_the_ack_runs_nothing_again() {
    let app = App::default();
    let mut harness = harness(&app);
    harness.crash_before_ack();
    harness.deliver(order("1", 5));
    harness.settle().await;
    harness.assert_processed("1");
    harness.assert_duplicate("1");
    harness.assert_attempts("1", 1);
}

#[tokio::test(start_paused = true)]
async fn failures_are_retried_until_the_event_is_processed_or_dead_lettered_and_a_redrive_runs_it_again() {
    let app = App::failing([Failure::retryable("busy"), Failure::retryable("busy")]);
    let mut first = harness(&app);
    first.deliver(order("1", 5));
    first.settle().await;
    first.assert_processed("1");
    first.assert_attempts("1", 3);

    let app = App::failing((0..3).map(|_| Failure::retryable("busy")));
    let mut second = harness(&app);
    second.deliver(order("1", 5));
    second.settle().await;
    second.assert_dead_lettered("1", Reason::AttemptsExhausted);
    let told = failure_of(|| second.assert_processed("1"));
    assert!(told.starts_with("event 1 was to be processed, but was dead-lettered:\n"), "{told}");
    for part in ["claimed by worker 1: attempt 3", "failed, to be tried again after", ": busy", "as attempts-exhausted"]
    {
        assert!(told.contains(part), "{part:?} is missing in {told}");
    }
    let told = failure_of(|| second.assert_dead_lettered("1", Reason::Permanent));
    assert!(told.contains("to be dead-lettered as permanent, but was as attempts-exhausted"), "{told}");
    assert_eq!(second.redrive(), 1);
    second.settle().await;
    second.assert_processed("1");
    assert_eq!(app.charges(), [5]);
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_its_retry_is_left_to_wait() {
    let app = App::failing([Failure::retryable("busy").after(Duration::from_secs(60))]);
    let mut harness = harness(&app);
    harness.deliver(order("1", 5));
    harness.until_waiting().await;
    harness.assert_attempts("1", 1);
    harness.advance(Duration::from_secs(58)).await;
    harness.assert_attempts("1", 1);
    harness.advance(Duration::from_secs(3)).await;
    harness.assert_processed("1");
}

#[tokio::test(start_paused = true)]
async fn what_no_handler_takes_is_dead_lettered_unrun() {
    let app = App::default();
    let mut harness = harness(&app);
    harness.deliver(Message::event("/shop", "1", "com.shop.other"));
    harness.deliver(Message::event("/shop", "2", "com.shop.order.placed.v2").with_data("application/json", "{"));
    harness.deliver_wire(hapax::Headers::new(), "x").await;
    harness.settle().await;
    harness.assert_dead_lettered("1", Reason::UnknownType);
    harness.assert_dead_lettered("2", Reason::Undecodable);
    harness.assert_not_run("1");
    assert_eq!(harness.statistics().dead_lettered, 3);
    let told = failure_of(|| harness.assert_processed("1"));
    assert!(told.starts_with("event 1 was to be processed, but was never started:\n"), "{told}");
    let told = failure_of(|| harness.assert_not_run("nothing"));
    assert!(told.contains("nothing called nothing was delivered"), "{told}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_fails_is_asked_again() {
    let app = App::default();
    let mut harness = harness(&app);
    harness.fail_store(3);
    harness.deliver(order("1", 5));
    harness.settle().await;
    harness.assert_processed("1");
    assert_eq!(app.charges(), [5]);
    let told = failure_of(|| harness.assert_duplicate("1"));
    assert_eq!(told.matches("the store fails on purpose: claim").count(), 3, "{told}");
}

#[tokio::test(start_paused = true)]
async fn disorder_is_the_same_for_the_same_seed_and_another_for_another() {
    let run = async |seed| {
        let app = App::default();
        let mut harness = harness(&app);
        harness.reorder(seed);
        harness.deliver_together((1..=20).map(|n| order(&n.to_string(), n)));
        harness.settle().await;
        app.charges()
    };
    let first = run(1).await;
    assert_eq!(first, run(1).await);
    assert_ne!(first, run(2).await);
    assert_ne!(first, (1..=20).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn an_ordered_broker_and_order_by_key_run_one_after_the_other() {
    let app = App::default();
    let wired = app.clone();
    let mut harness =
        Harness::new(move |broker, store| billing(wired.clone(), broker, store).order(Order::PerKey)).ordered();
    harness.deliver_together((1..=5).map(|n| order(&n.to_string(), n).with_partition_key("k")));
    harness.settle().await;
    assert_eq!((app.charges(), app.at_once_max.load(Ordering::SeqCst)), (vec![1, 2, 3, 4, 5], 1));
}

#[tokio::test(start_paused = true)]
async fn workers_share_the_deliveries_and_a_copy_at_another_worker_waits() {
    let app = App::default();
    let mut harness = harness(&app).workers(3);
    harness.deliver_together((0..30).map(|n| order(&(n % 10).to_string(), n % 10)));
    harness.settle().await;
    let mut charges = app.charges();
    charges.sort_unstable();
    assert_eq!(charges, (0..10).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn what_was_published_is_asserted_by_type_and_content() {
    let app = App::default();
    let mut harness = harness(&app);
    harness.deliver(order("1", 5));
    harness.settle().await;
    harness.assert_published("com.shop.charged", |message| message.data.as_ref() == br#"{"cents":5}"#);
    let told = failure_of(|| harness.assert_published("com.shop.charged", |message| message.data.is_empty()));
    assert!(told.starts_with("no published com.shop.charged is as it was to be"), "{told}");
    let told = failure_of(|| harness.assert_published("com.shop.refunded", |_| true));
    assert!(told.contains("nothing of type com.shop.refunded was published"), "{told}");
}

#[tokio::test(start_paused = true)]
async fn a_refused_wiring_is_told_and_not_waited_for() {
    let mut harness = Harness::new(|broker, store| {
        Consumer::builder("billing", broker, store).state(App::default()).on(charge).require(Level::ExactlyOnceEffect)
    });
    let panic = AssertUnwindSafe(harness.settle()).catch_unwind().await.expect_err("it is refused");
    let told = panic.downcast_ref::<String>().unwrap();
    assert!(told.starts_with("the wiring is refused"), "{told}");
}

#[tokio::test(start_paused = true)]
async fn a_hang_is_told_with_what_is_in_flight() {
    async fn never(_: OrderPlaced, _: Context<()>) -> Result<(), Failure> {
        std::future::pending().await
    }
    let mut harness = Harness::new(|broker, store| {
        Consumer::builder("billing", broker, store).on(never).otherwise(Otherwise::Ignore)
    });
    harness = harness.deadline(Duration::from_secs(30));
    harness.deliver(order("1", 5));
    let panic = AssertUnwindSafe(harness.settle()).catch_unwind().await.expect_err("it hangs");
    let told = panic.downcast_ref::<String>().unwrap();
    for part in ["not everything ended within 30s", "1 in hand", "event 1:", "handler started by worker 1, attempt 1"] {
        assert!(told.contains(part), "{part:?} is missing in {told}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_is_found_by_an_id_that_is_taken_from_elsewhere() {
    let app = App::default();
    let wired = app.clone();
    let mut harness = Harness::new(move |broker, store| {
        billing(wired.clone(), broker, store).id_from(hapax::IdFrom::Header("x-order".into()))
    });
    harness.deliver(order("a", 5).with_header("x-order", "17"));
    harness.deliver(order("b", 5).with_header("x-order", "17"));
    harness.settle().await;
    harness.assert_processed("header:x-order:17");
    harness.assert_duplicate("header:x-order:17");
    assert_eq!(app.charges(), [5]);
}

#[tokio::test(start_paused = true)]
async fn a_store_taken_unwatched_still_tells_processed_from_duplicate() {
    let app = App::default();
    let wired = app.clone();
    let mut harness = Harness::new(move |broker, store| billing(wired.clone(), broker, store.unwatched()));
    harness.deliver_together([order("1", 5), order("1", 5)]);
    harness.settle().await;
    harness.assert_processed("1");
    harness.assert_duplicate("1");
    let told = failure_of(|| harness.crash_before_record());
    assert!(told.contains("unwatched"), "{told}");
}

/// Against a real file, with the clock running.
#[tokio::test]
async fn a_transactional_handler_that_crashes_before_its_commit_leaves_its_rows_once() {
    use hapax_sqlite::{SqliteStore, SqliteTx, Synchronous, sqlx};

    async fn invoice(event: OrderPlaced, mut tx: SqliteTx, _: Context<()>) -> Result<(), Failure> {
        sqlx::query("INSERT INTO invoices (cents) VALUES (?)").bind(event.cents).execute(&mut *tx).await?;
        Ok(())
    }
    fn wiring<T: hapax::TransactionalStore<Tx = SqliteTx>>(broker: impl Broker, store: T) -> ConsumerBuilder<(), T> {
        let builder = Consumer::builder("billing", broker, store).lease(Duration::from_secs(1));
        builder.on_tx(invoice).otherwise(Otherwise::Ignore)
    }

    let path = std::env::temp_dir().join(format!("hapax-harness-{}.db", std::process::id()));
    let store = SqliteStore::builder(&path).synchronous(Synchronous::Normal).connect().await.unwrap();
    sqlx::query("CREATE TABLE invoices (cents INTEGER NOT NULL)").execute(store.pool()).await.unwrap();
    let mut harness = Harness::with_store(store.clone(), wiring);
    harness.crash_before_record();
    let id = harness.deliver_event(&OrderPlaced { cents: 5 });
    harness.deliver_again(&id);
    harness.settle().await;
    harness.assert_processed(&id);
    harness.assert_duplicate(&id);
    harness.assert_attempts(&id, 2);
    let rows: Vec<i64> = sqlx::query_scalar("SELECT cents FROM invoices").fetch_all(store.pool()).await.unwrap();
    assert_eq!(rows, [5]);
    drop(harness);
    store.close().await;
    for ending in ["", "-wal", "-shm"] {
        let mut file = path.clone().into_os_string();
        file.push(ending);
        // SQLite takes the others along when it closes.
        let _ = std::fs::remove_file(file);
    }
}
