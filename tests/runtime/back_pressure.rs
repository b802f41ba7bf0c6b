//! Back-pressure: what a consumer holds is bounded, in events and in bytes, whatever stands still; and what waits holds
//! up nothing else. H1 BoundedInFlight, L2 NoStarvation.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use hapax::{Broker, Capabilities, Consumer, Delivery, Failure, Limits, Receipt, Result, Settlement, Want};
use hapax_memory::MemoryBroker;
use tokio::time::sleep;

use crate::rig::{Rig, Runs, event};

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A broker that notes how much was unsettled at most.
struct Witness {
    inner: MemoryBroker,
    limited: bool,
    held: Mutex<BTreeMap<Receipt, usize>>,
    most: Arc<Most>,
}

#[derive(Default)]
struct Most {
    events: AtomicUsize,
    bytes: AtomicUsize,
}

impl Most {
    fn seen(&self) -> (usize, usize) {
        (self.events.load(Ordering::SeqCst), self.bytes.load(Ordering::SeqCst))
    }
}

impl Witness {
    fn new(inner: MemoryBroker, limited: bool) -> (Self, Arc<Most>) {
        let most = Arc::new(Most::default());
        (Self { inner, limited, held: Mutex::default(), most: Arc::clone(&most) }, most)
    }
}

#[async_trait]
impl Broker for Witness {
    async fn open(&self, limits: Limits) -> Result<()> {
        // Where it has no bounds of its own, what is seen is what the consumer asked for.
        let unlimited = Limits { events: 1 << 20, bytes: usize::MAX, ..limits };
        self.inner.open(if self.limited { limits } else { unlimited }).await
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        let deliveries = self.inner.receive(want).await?;
        let mut held = self.held.lock().unwrap();
        held.extend(deliveries.iter().map(|delivery| (delivery.receipt, delivery.message.bytes())));
        self.most.events.fetch_max(held.len(), Ordering::SeqCst);
        self.most.bytes.fetch_max(held.values().sum(), Ordering::SeqCst);
        Ok(deliveries)
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        let answers = self.inner.settle(batch).await;
        let mut held = self.held.lock().unwrap();
        held.retain(|held, _| batch.iter().all(|(receipt, _)| receipt != held));
        answers
    }

    async fn stop(&self) -> Result<()> {
        self.inner.stop().await
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
}

#[tokio::test(start_paused = true)]
async fn in_flight_events_never_exceed_their_bound() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let (witness, most) = Witness::new(rig.broker.another(), false);
    let sometimes = runs.then(|run, _| async move {
        sleep(Duration::from_millis(run.fence % 7)).await;
        if run.attempt == 1 && run.id.ends_with('3') { Err(Failure::retryable("again")) } else { Ok(()) }
    });
    let builder = Consumer::builder("billing", witness, rig.store.clone()).seed(1).on_any(sometimes);
    let consumer = builder.in_flight_max(32).concurrency(8).build().await.unwrap();
    rig.send_all(0..500).await;
    let _running = tokio::spawn(consumer.run(std::future::pending()));
    rig.settled().await;
    assert_eq!(most.seen().0, 32, "used to the full and not beyond");
    assert_eq!(runs.len(), 550);
}

/// How many bytes were unsettled at most, with a bound of 20,000 and messages of up to 2,000.
async fn most_bytes(limited: bool) -> usize {
    let (rig, runs) = (Rig::new(), Runs::default());
    let (witness, most) = Witness::new(rig.broker.another(), limited);
    let builder = Consumer::builder("billing", witness, rig.store.clone()).seed(1);
    let builder = builder.on_any(runs.take(seconds(1))).in_flight_bytes_max(20_000);
    let consumer = builder.body_max(2_000).header_bytes_max(500).build().await.unwrap();
    for n in 0..100 {
        let data = format!("\"{}\"", "x".repeat(100 + n * 37 % 1_700));
        rig.send(event(&n.to_string()).with_data("application/json", data.into_bytes())).await;
    }
    let _running = tokio::spawn(consumer.run(std::future::pending()));
    rig.settled().await;
    assert_eq!(runs.len(), 100);
    most.seen().1
}

#[tokio::test(start_paused = true)]
async fn in_flight_bytes_never_exceed_their_bound() {
    let bytes = most_bytes(true).await;
    assert!((15_000..=20_000).contains(&bytes), "used, and not beyond: {bytes}");
    let bytes = most_bytes(false).await;
    let one_message = 2_500;
    assert!(bytes < 20_000 + one_message, "nor by more than one message where the broker keeps no bound: {bytes}");
}

#[tokio::test(start_paused = true)]
async fn a_message_larger_than_the_bound_is_taken_alone() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let (witness, most) = Witness::new(rig.broker.another(), false);
    let builder = Consumer::builder("billing", witness, rig.store.clone()).seed(1);
    let builder = builder.on_any(runs.take(seconds(1))).in_flight_bytes_max(2_000).body_max(10_000);
    let consumer = match builder.build().await {
        Ok(consumer) => consumer,
        // Refused at start is as good: no message can be larger than the bound then.
        Err(error) => return assert!(error.to_string().contains("in_flight_bytes_max"), "{error}"),
    };
    rig.send(event("large").with_data("application/json", format!("\"{}\"", "x".repeat(5_000)).into_bytes())).await;
    rig.send_all(["small", "smaller"]).await;
    let _running = tokio::spawn(consumer.run(std::future::pending()));
    rig.settled().await;
    assert_eq!(runs.len(), 3);
    assert!(most.seen().1 < 6_000, "alone: {:?}", most.seen());
}

#[tokio::test(start_paused = true)]
async fn handlers_that_stand_still_bound_what_is_held() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let stuck = runs.then(|_, _| std::future::pending());
    let billing = rig.start("billing", |c| c.on_any(stuck).in_flight_max(40).concurrency(10).timeout(seconds(3600)));
    let billing = billing.await;
    rig.send_all(0..1_000).await;
    sleep(seconds(60)).await;
    let standing = rig.broker.standing();
    assert_eq!((standing.unsettled, standing.ready), (40, 960), "the rest stays at the broker");
    assert_eq!(runs.len(), 10);
    let claimed = rig
        .journal
        .lines_of("store claim")
        .into_iter()
        .map(|line| line["store claim ".len()..].parse::<usize>().unwrap());
    assert_eq!(claimed.sum::<usize>(), 10, "nothing is claimed that cannot run: a crash now touches ten events");
    assert_eq!(billing.handle.health().in_flight.events, 40);
}

/// mq-bridge 1.3.0: one key in flight elsewhere stalled its whole batch.
#[tokio::test(start_paused = true)]
async fn one_in_flight_key_does_not_stall_others() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let slow = rig.start("billing", |c| c.on_any(runs.take(seconds(50))).in_flight_max(1).concurrency(1)).await;
    rig.send(event("slow")).await;
    rig.until("running", || runs.len() == 1).await;
    let fast = rig.start("billing", |c| c.on_any(runs.ok())).await;
    assert!(rig.broker.redeliver(1));
    rig.send_all(0..50).await;
    rig.quiet().await;
    assert_eq!(fast.statistics().processed, 50, "all that came with it");
    rig.settled().await;
    assert_eq!((slow.statistics().processed, runs.len()), (1, 51));
}

#[tokio::test(start_paused = true)]
async fn what_waits_beyond_half_of_in_flight_goes_back_to_the_broker() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let not_yet = runs
        .answer(|run| if run.id.starts_with("waits") { Err(Failure::not_yet("later", seconds(4))) } else { Ok(()) });
    let billing = rig.start("billing", |c| c.on_any(not_yet).in_flight_max(8).concurrency(4).not_yet_max(seconds(30)));
    let billing = billing.await;
    rig.send_all((0..20).map(|n| format!("waits {n}"))).await;
    rig.send(event("works")).await;
    sleep(seconds(1)).await;
    assert_eq!(rig.journal.lines_of("settle ack").len(), 1, "what works is not starved by what waits");
    let standing = rig.broker.standing();
    assert!(standing.unsettled <= 4, "at most half of in_flight waits here: {standing:?}");
    assert!(standing.later >= 16, "the broker keeps the rest: {standing:?}");
    rig.settled().await;
    assert_eq!(billing.statistics().dead_lettered, 20, "and each ends");
}

#[tokio::test(start_paused = true)]
async fn copies_of_a_running_event_wait_within_the_bound() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.take(seconds(20))).in_flight_max(8).concurrency(4)).await;
    rig.send_all(["same"; 30]).await;
    rig.send(event("other")).await;
    sleep(seconds(15)).await;
    assert_eq!(runs.of("other").len(), 1, "thirty copies do not keep another event out");
    assert!(rig.broker.standing().unsettled <= 8);
    rig.settled().await;
    assert_eq!((runs.of("same").len(), billing.statistics().duplicates), (1, 29));
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_that_cannot_be_placed_holds_up_no_ack() {
    let rig = Rig::of(MemoryBroker::builder("orders").dead_letters_max(1));
    let runs = Runs::default();
    let handler = runs.answer(|run| match run.id.as_str() {
        "bad" | "worse" => Err(Failure::permanent("no")),
        _ => Ok(()),
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send_all(["bad", "worse"]).await;
    sleep(seconds(1)).await;
    rig.send_all(0..10).await;
    sleep(seconds(30)).await;
    assert_eq!(rig.journal.lines_of("settle ack").len(), 10, "{:#?}", rig.journal.lines());
    assert_eq!((rig.broker.standing().dead, rig.broker.standing().unsettled), (1, 1), "never acked, never dropped");
    assert_eq!(rig.broker.take_dead_letters().len(), 1);
    rig.settled().await;
    assert_eq!(billing.statistics().dead_lettered, 2, "placed as soon as there is room");
    assert_eq!(runs.len(), 12, "and not run again meanwhile");
}
