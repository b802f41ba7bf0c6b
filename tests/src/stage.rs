//! The stage: production wiring on a broker in memory, with workers that can be ended or frozen at any point.
//!
//! What [`Harness`](crate::Harness) and [`explore`](crate::explore()) share. A stage starts workers, replaces those that
//! died, and waits until nothing is left; what it saw is in the [`Chronicle`].

mod broker;
mod chronicle;
mod life;
mod store;

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use hapax::{
    Broker, BuildError, Consumer, ConsumerBuilder, ConsumerHandle, Error, ErrorKind, Event, Message, Outgoing,
    ProcessedStore, Publisher, Result, Statistics,
};
use hapax_memory::MemoryBroker;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

use broker::StageBroker;
pub(crate) use chronicle::{Chronicle, Ended, Seen};
pub use life::crash_point;
pub(crate) use life::{Life, Strike, Strikes};
pub use store::StageStore;

pub(crate) type LocalBoxFuture<T> = Pin<Box<dyn Future<Output = T>>>;

/// Puts one worker's consumer together.
pub(crate) type Wire = Box<dyn Fn(Arc<dyn Broker>, Life, Published) -> LocalBoxFuture<Result<Consumer, BuildError>>>;

/// Where a message comes from that has no source of its own.
pub(crate) const SOURCE: &str = "/testkit";

/// Nothing in a test waits longer than this by the clock on the wall.
const WALL_MAX: Duration = Duration::from_secs(60);

/// The smallest step of time that lets everything run that can.
const STEP: Duration = Duration::from_millis(1);

/// So many quiet steps mean that what is left waits.
const QUIET_STEPS: u32 = 20;

/// The message of an event: JSON, the version in its type.
pub(crate) fn message_of<E: Event>(id: &str, event: &E) -> Message {
    let ty = if E::VERSION == 1 { E::TYPE.to_owned() } else { format!("{}.v{}", E::TYPE, E::VERSION) };
    let message = Message::event(SOURCE, id, ty);
    message.with_json(event).unwrap_or_else(|error| panic!("the event {} has no JSON form: {error}", E::TYPE))
}

/// The user's wiring, with this store and under the stage's control.
pub(crate) fn wire<S, T, U>(
    store: T,
    wire: impl Fn(Arc<dyn Broker>, StageStore<T>) -> ConsumerBuilder<S, U> + 'static,
) -> Wire
where
    S: Send + Sync + 'static,
    T: ProcessedStore + Clone,
    U: ProcessedStore,
{
    Box::new(move |broker, life, published| {
        let builder = wire(broker, StageStore::new(store.clone(), life.clone()));
        // Each worker has a seed of its own: two with one would take each other's claims for theirs.
        let builder = builder.seed(life.number()).under_test(Arc::new(life), Arc::new(published));
        Box::pin(builder.build())
    })
}

/// What handlers published, as it was sent: repeats included.
#[derive(Clone, Debug, Default)]
pub(crate) struct Published(Arc<Mutex<Vec<Outgoing>>>);

impl Published {
    pub(crate) fn all(&self) -> Vec<Outgoing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[async_trait]
impl Publisher for Published {
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        let answers = batch.iter().map(|_| Ok(())).collect();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(batch);
        answers
    }
}

/// A publisher for wiring under test that wants one: whatever a [`Harness`](crate::Harness) or [`explore`](crate::explore())
/// runs publishes to them. Used anywhere else it refuses.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoPublisher;

#[async_trait]
impl Publisher for NoPublisher {
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        let refused = || Error::new(ErrorKind::Rejected, "publish").because("NoPublisher is for wiring under test");
        batch.iter().map(|_| Err(refused())).collect()
    }
}

/// One run of a wiring: the broker in memory, its workers, and what was seen of them.
pub(crate) struct Stage {
    /// Never opened: it looks, publishes and redrives; workers have handles of their own.
    pub(crate) broker: MemoryBroker,
    pub(crate) chronicle: Arc<Chronicle>,
    pub(crate) strikes: Arc<Strikes>,
    pub(crate) published: Published,
    wire: Wire,
    /// Told when a worker was struck, before another takes over.
    pub(crate) on_crash: Option<Box<dyn Fn()>>,
    workers_max: usize,
    workers: Vec<Worker>,
    frozen: Vec<Worker>,
    handles: Vec<ConsumerHandle>,
}

struct Worker {
    life: Life,
    broker: Arc<StageBroker>,
    run: Run,
}

/// A consumer's run; dropping it ends it.
struct Run(JoinHandle<Option<Result<()>>>);

impl Drop for Run {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Stage {
    pub(crate) fn new(wire: Wire) -> Self {
        Self {
            broker: MemoryBroker::new("stage"),
            chronicle: Arc::default(),
            strikes: Arc::default(),
            published: Published::default(),
            wire,
            on_crash: None,
            workers_max: 1,
            workers: Vec::new(),
            frozen: Vec::new(),
            handles: Vec::new(),
        }
    }

    pub(crate) fn set_workers(&mut self, workers: usize) {
        self.workers_max = workers.max(1);
    }

    /// The sum over all workers that ever were.
    pub(crate) fn statistics(&self) -> Statistics {
        let mut sum = Statistics::default();
        for one in self.handles.iter().map(ConsumerHandle::statistics) {
            sum.delivered += one.delivered;
            sum.processed += one.processed;
            sum.duplicates += one.duplicates;
            sum.retried += one.retried;
            sum.dead_lettered += one.dead_lettered;
            sum.ignored += one.ignored;
            sum.conflicts += one.conflicts;
            sum.leases_lost += one.leases_lost;
            sum.fenced += one.fenced;
            sum.released += one.released;
        }
        sum
    }

    pub(crate) fn deliver(&self, message: &Message) {
        self.chronicle.sent(message);
        if let Err(error) = self.broker.publisher().try_publish(message) {
            panic!("the stage's broker takes no more: {error}");
        }
    }

    /// Waits until everything is acked or dead-lettered; the error says what is not.
    pub(crate) async fn settle(&mut self, deadline: Duration) -> Result<(), String> {
        let mut over = std::pin::pin!(expiry(deadline));
        loop {
            self.revive().await?;
            tokio::select! {
                biased;
                () = self.strikes.struck() => continue,
                ended = first_end(&mut self.workers) => return Err(ended),
                () = self.broker.settled() => {}
                () = &mut over => return Err(self.unfinished(deadline)),
            }
            // What follows the last settlement is recorded too.
            tokio::select! {
                () = sleep(STEP) => {}
                () = &mut over => return Err(self.unfinished(deadline)),
            }
            let standing = self.broker.standing();
            let left = standing.ready + standing.later + standing.unsettled + self.chronicle.running();
            if left == 0 && self.workers.iter().all(|worker| worker.life.goes()) {
                return Ok(());
            }
        }
    }

    /// Waits until what is left waits for its time: nothing is ready and no handler runs.
    pub(crate) async fn until_waiting(&mut self, deadline: Duration) -> Result<(), String> {
        let mut over = std::pin::pin!(expiry(deadline));
        let (mut quiet, mut seen) = (0, 0);
        while quiet < QUIET_STEPS {
            self.revive().await?;
            tokio::select! {
                biased;
                () = self.strikes.struck() => continue,
                ended = first_end(&mut self.workers) => return Err(ended),
                () = sleep(STEP) => {}
                () = &mut over => return Err(self.unfinished(deadline)),
            }
            let lines = self.chronicle.lines();
            let still = lines == seen && self.broker.standing().ready == 0 && self.chronicle.running() == 0;
            quiet = if still { quiet + 1 } else { 0 };
            seen = lines;
        }
        Ok(())
    }

    /// Lets time go by.
    pub(crate) async fn advance(&mut self, by: Duration) -> Result<(), String> {
        let until = Instant::now() + by;
        loop {
            self.revive().await?;
            tokio::select! {
                biased;
                () = self.strikes.struck() => {}
                ended = first_end(&mut self.workers) => return Err(ended),
                () = sleep_until(until) => return Ok(()),
            }
        }
    }

    /// Lets frozen workers go on behind those that took over: first what their handlers still do, as after a pause in
    /// which nobody could tell them, then the workers themselves.
    pub(crate) async fn thaw(&mut self) {
        let frozen = std::mem::take(&mut self.frozen);
        if frozen.is_empty() {
            return;
        }
        for worker in &frozen {
            worker.life.thaw_handlers();
        }
        let patience = Instant::now() + WALL_MAX;
        let numbers: Vec<_> = frozen.iter().map(|worker| worker.life.number()).collect();
        while self.chronicle.running_in(&numbers) && Instant::now() < patience {
            sleep(STEP).await;
        }
        for worker in frozen {
            worker.life.thaw();
            self.workers.push(worker);
        }
        sleep(STEP * QUIET_STEPS).await;
    }

    /// Replaces workers that died, sets frozen ones aside, and starts those that are missing.
    async fn revive(&mut self) -> Result<(), String> {
        for worker in std::mem::take(&mut self.workers) {
            if worker.life.goes() {
                self.workers.push(worker);
                continue;
            }
            // To the broker both are connections that broke.
            worker.broker.end_session();
            self.on_crash.iter().for_each(|on_crash| on_crash());
            if worker.life.is_frozen() {
                self.frozen.push(worker);
            }
        }
        while self.workers.len() < self.workers_max {
            let number = self.handles.len() as u64 + 1;
            let life = Life::new(number, Arc::clone(&self.strikes), Arc::clone(&self.chronicle));
            let broker = Arc::new(StageBroker::new(self.broker.another(), life.clone()));
            let built = (self.wire)(Arc::clone(&broker) as _, life.clone(), self.published.clone()).await;
            let consumer = built.map_err(|faults| format!("the wiring is refused: {faults}"))?;
            let handle = consumer.handle();
            self.chronicle.consumer_is(handle.name());
            self.handles.push(handle);
            let run = Run(tokio::spawn(life.clone().drive(consumer.run(std::future::pending()))));
            self.workers.push(Worker { life, broker, run });
        }
        Ok(())
    }

    fn unfinished(&self, deadline: Duration) -> String {
        let standing = self.broker.standing();
        let mut text = format!("not everything ended within {deadline:?} (or {WALL_MAX:?} by the wall's clock)\n");
        text += &format!(
            "at the broker: {} ready, {} to be retried later, {} in hand\n",
            standing.ready, standing.later, standing.unsettled
        );
        for (number, handle) in (1..).zip(&self.handles) {
            let health = handle.health();
            let phase = health.phase.as_str();
            text += &format!("worker {number}: {phase}, ready: {}, switch open: {}", health.ready, health.switch_open);
            text += health.store.error.as_deref().map_or("", |_| ", the store fails");
            text += "\n";
        }
        text + &self.chronicle.unfinished()
    }
}

/// The end of a worker that nobody asked to end.
async fn first_end(workers: &mut [Worker]) -> String {
    let ends = workers.iter_mut().map(|worker| &mut worker.run.0);
    if ends.len() == 0 {
        return std::future::pending().await;
    }
    match futures_util::future::select_all(ends).await.0 {
        Ok(Some(Ok(()))) => "the consumer ended by itself".to_owned(),
        Ok(Some(Err(error))) => format!("the consumer ended with an error: {error}"),
        Ok(None) => std::future::pending().await,
        Err(error) => format!("the consumer ended: {error}"),
    }
}

/// When the time is over: by tokio's clock, or by the one on the wall where tokio's runs with it.
async fn expiry(deadline: Duration) {
    #[allow(clippy::disallowed_methods, reason = "tokio's clock may be paused; a hang must end all the same")]
    let begun = std::time::Instant::now();
    let end = Instant::now() + deadline;
    while Instant::now() < end && begun.elapsed() < WALL_MAX {
        sleep_until(end.min(Instant::now() + Duration::from_secs(1))).await;
    }
}
