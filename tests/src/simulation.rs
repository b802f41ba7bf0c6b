//! The simulation: the real pipeline over brokers and stores in memory, on tokio's paused clock, behind faults from a
//! seed; afterwards everything must have come to its end, and every invariant must hold over what witnesses saw.
//!
//! A seed draws the settings, the events and what their handlers do, which faults there are and how often: workers die
//! and stand still at any poll, calls are refused, hang, lose their answers and arrive late, store and broker are out of
//! reach for one worker or for all, sessions end, the store's clock steps, messages come twice, out of order and with
//! other data, and operators send dead letters back. Then all is healed. The same seed gives the same history, line by
//! line ([`Report::trace_hash`]).
//!
//! [`simulate`] runs one seed or many, against back ends of one's own too: a store that is to be trusted should
//! survive some thousand seeds.

mod chaos;
mod events;
mod network;
mod plan;
mod report;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use hapax::record::Moment;
use hapax::{Broker, EventKey, Message, ProcessedStore};
use hapax_memory::{MemoryBroker, MemoryPublisher, MemoryStore};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::checkers::{Terms, Violation, check_all};
use crate::ledger::{Ledger, What};
use network::{Network, RemoteStore, produced};
use plan::{Plan, SCOPES};
pub use report::Report;
use worker::Worker;

/// What all workers of one simulation share. Made anew for each seed, inside its runtime.
pub trait BackEnds: Send + Sync + 'static {
    /// The store.
    fn store(&self) -> Arc<dyn ProcessedStore>;

    /// Steps the store's clock.
    fn step_clock(&self, micros: i64);

    /// What a worker gets for this consumer of the topic.
    fn broker(&self, consumer: Arc<MemoryBroker>) -> Arc<dyn Broker>;
}

/// The reference: everything in memory, and right.
#[derive(Debug)]
pub struct InMemory(MemoryStore);

impl Default for InMemory {
    fn default() -> Self {
        Self(MemoryStore::builder().starts_at(START).build())
    }
}

impl BackEnds for InMemory {
    fn store(&self) -> Arc<dyn ProcessedStore> {
        Arc::new(self.0.clone())
    }

    fn step_clock(&self, micros: i64) {
        self.0.step_clock(micros);
    }

    fn broker(&self, consumer: Arc<MemoryBroker>) -> Arc<dyn Broker> {
        Arc::new(consumer)
    }
}

/// What the store's clock shows first: 2026, so that fences look as they do elsewhere.
pub const START: Moment = Moment(1_770_000_000_000_000);

/// How long after the faults everything has ended. A clock that was set back makes leases and waits longer by as much.
const QUIESCE_WITHIN: Duration = Duration::from_secs(20 * 60);

/// Longer than any drain with what it may wait for behind it.
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(30);

/// Runs one seed against the right back ends.
pub fn simulate(seed: u64) -> Report {
    simulate_on(seed, InMemory::default)
}

/// Runs one seed against these back ends.
pub fn simulate_on<B: BackEnds>(seed: u64, back_ends: impl FnOnce() -> B) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime without input and output can be built");
    runtime.block_on(async {
        let world = Arc::new(World::new(Plan::draw(seed), Box::new(back_ends())));
        run(world).await
    })
}

/// What one simulation shares.
struct World {
    plan: Plan,
    back_ends: Box<dyn BackEnds>,
    store: Arc<dyn ProcessedStore>,
    /// One handle for each consumer's group, never opened.
    topics: Vec<MemoryBroker>,
    publisher: MemoryPublisher,
    network: Arc<Network>,
    ledger: Ledger,
    starts: Arc<Mutex<BTreeMap<EventKey, u32>>>,
    /// The data that was sent under each id.
    sent: Mutex<BTreeMap<Box<str>, BTreeSet<Bytes>>>,
    healed: AtomicBool,
}

impl World {
    fn new(plan: Plan, back_ends: Box<dyn BackEnds>) -> Self {
        let mut topic = MemoryBroker::builder("simulation").group(SCOPES[0]);
        if plan.ordered {
            topic = topic.ordered();
        }
        let topic = topic.build();
        let mut topics = vec![topic];
        if plan.others > 0 {
            topics.push(topics[0].group(SCOPES[1]));
        }
        Self {
            network: Arc::new(Network::new(Rng::with_seed(plan.seed ^ 1), &plan.chaos)),
            store: back_ends.store(),
            publisher: topics[0].publisher(),
            topics,
            ledger: Ledger::new(),
            starts: Arc::default(),
            sent: Mutex::default(),
            healed: AtomicBool::new(false),
            back_ends,
            plan,
        }
    }

    fn scopes(&self) -> usize {
        self.topics.len()
    }

    fn is_healed(&self) -> bool {
        self.healed.load(Ordering::Relaxed)
    }

    fn remote_store(&self) -> RemoteStore {
        RemoteStore { inner: Arc::clone(&self.store), network: Arc::clone(&self.network) }
    }

    /// This data was sent under this message's id.
    fn remember(&self, message: &Message, data: &Bytes) {
        let id = message.attributes.id.clone().unwrap_or_default();
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.entry(id).or_default().insert(data.clone());
    }

    /// Sends what the plan says, when it says it.
    async fn send_all(self: Arc<Self>) {
        let begun = Instant::now();
        for arrival in &self.plan.arrivals {
            sleep_until(begun + arrival.at).await;
            let message = &arrival.message;
            self.remember(message, &message.data);
            self.publisher.send(message.clone()).await;
            if message.attributes.ty.as_deref() != Some(events::IGNORED) {
                produced(&self.ledger, self.scopes(), message);
            }
        }
    }

    fn heal(&self, workers: &[Arc<Worker>]) {
        self.healed.store(true, Ordering::Relaxed);
        self.network.calm();
        workers.iter().for_each(|worker| worker.heal());
        self.topics.iter().for_each(|topic| topic.shuffle(None));
        self.ledger.write(What::Healed);
    }

    /// Messages that no group is done with.
    fn unfinished(&self) -> usize {
        let standing = self.topics.iter().map(MemoryBroker::standing);
        standing.map(|standing| standing.ready + standing.later + standing.unsettled).sum()
    }

    /// Writes down which dead letters there are, and answers the data of those without an id, for each consumer.
    fn find_dead_letters(&self) -> Vec<BTreeSet<Bytes>> {
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut nameless = Vec::new();
        for (topic, scope) in self.topics.iter().zip(SCOPES) {
            let mut without_id = BTreeSet::new();
            for (message, letter) in topic.dead_letters() {
                let attributes = &message.attributes;
                let (Some(source), Some(id)) = (&attributes.source, &attributes.id) else {
                    without_id.insert(message.data.clone());
                    continue;
                };
                let intact = sent
                    .get(id)
                    .is_none_or(|data| data.contains(&message.data) && message.headers.get_str("sent-by") == Some(id));
                self.ledger.write(What::DeadLetterPlaced {
                    key: EventKey::of(scope, source, id),
                    reason: letter.reason.as_str().into(),
                    attempts: letter.attempts,
                    intact: intact && &*letter.consumer == scope,
                });
            }
            nameless.push(without_id);
        }
        nameless
    }

    fn terms(&self) -> Terms {
        let settings = &self.plan.settings;
        let ignored = self.plan.arrivals.iter().map(|arrival| &arrival.message.attributes);
        let ignored = ignored.filter(|attributes| attributes.ty.as_deref() == Some(events::IGNORED));
        let ids = ignored.filter_map(|attributes| attributes.id.as_deref());
        Terms {
            attempts_max: settings.attempts_max,
            crashes_max: settings.crashes_max,
            starts_per_claim: if self.plan.batched { 3 } else { 1 },
            in_flight_max: settings.in_flight_max,
            order_per_key: self.plan.ordered,
            transactional: self.plan.transactional,
            quiesce_within: QUIESCE_WITHIN,
            ignored: ids.flat_map(|id| SCOPES.map(|scope| EventKey::of(scope, events::SOURCE, id))).collect(),
        }
    }
}

/// A body whose handler succeeds.
fn mended(n: u32) -> Vec<u8> {
    let step = events::Step { n, act: events::Act::Ok, before_ms: 0, after_ms: 0, halfway: false };
    serde_json::to_vec(&step).expect("a step has a JSON form")
}

/// First faults, then none, then the end.
async fn run(world: Arc<World>) -> Report {
    let mut rng = Rng::with_seed(world.plan.seed ^ 2);
    let mut workers = Vec::new();
    let scopes = [world.plan.workers, world.plan.others];
    for (scope, count) in scopes.into_iter().enumerate() {
        for _ in 0..count {
            workers.push(Arc::new(Worker::new(&world, &mut rng, workers.len() as u32, scope)));
        }
    }
    let running: Vec<_> =
        workers.iter().map(|worker| tokio::spawn(Arc::clone(worker).run(Arc::clone(&world)))).collect();
    let sending = tokio::spawn(Arc::clone(&world).send_all());
    chaos::rage(&world, &workers, rng.fork()).await;
    let mut violations = Vec::new();
    if sending.await.is_err() {
        violations.push(seen(&world, "harness", "the sender panicked"));
    }
    world.heal(&workers);
    let healed = Instant::now();
    while world.unfinished() > 0 && healed.elapsed() < QUIESCE_WITHIN {
        sleep(Duration::from_millis(500)).await;
    }
    let left = world.unfinished();
    let nameless = world.find_dead_letters();
    violations.extend(shut_down(&world, &workers, running).await);
    violations.extend(check_all(&world.ledger.history(), &world.terms()));
    violations.extend(nameless_kept(&world, &nameless));
    if left > 0 && violations.is_empty() {
        violations.push(seen(&world, "quiesce", &format!("every event has ended, and the broker holds {left}")));
    }
    Report::new(world.plan.seed, format!("{:#?}", world.plan), violations, world.ledger.clone())
}

/// A violation that is about no single event.
fn seen(world: &World, invariant: &'static str, detail: &str) -> Violation {
    let at = world.ledger.history().last().map_or(Duration::ZERO, |entry| entry.at);
    Violation { invariant, key: None, at, detail: detail.to_owned() }
}

/// Ends every worker gracefully, which takes no longer than it may and leaves nothing behind.
async fn shut_down(
    world: &World,
    workers: &[Arc<Worker>],
    running: Vec<JoinHandle<Vec<hapax::Error>>>,
) -> Vec<Violation> {
    workers.iter().for_each(|worker| worker.end());
    let mut violations = Vec::new();
    for (number, running) in running.into_iter().enumerate() {
        match timeout(SHUTDOWN_WITHIN, running).await {
            Ok(Ok(errors)) => violations.extend(
                errors.iter().map(|error| seen(world, "ends_well", &format!("worker {number} ended with: {error}"))),
            ),
            Ok(Err(error)) => violations.push(seen(world, "ends_well", &format!("worker {number}: {error}"))),
            Err(_) => violations.push(seen(world, "shutdown_bounded", &format!("worker {number} goes on"))),
        }
    }
    violations
}

/// What has no id is dead-lettered for every consumer.
fn nameless_kept(world: &World, found: &[BTreeSet<Bytes>]) -> Vec<Violation> {
    let nameless = world.plan.arrivals.iter().map(|arrival| &arrival.message);
    let mut violations = Vec::new();
    for message in nameless.filter(|message| message.attributes.id.is_none()) {
        // By its type alone it is acked.
        let is_ignored = message.attributes.ty.as_deref() == Some(events::IGNORED);
        if !is_ignored && found.iter().any(|found| !found.contains(&message.data)) {
            violations.push(seen(world, "no_loss", "a message without an id is not among the dead letters"));
        }
    }
    violations
}
