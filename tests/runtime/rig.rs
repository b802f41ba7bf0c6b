//! A broker, a store, consumers on them, and handlers that note every run: what each test here starts with.
//!
//! ```text
//! let rig = Rig::new();
//! let runs = Runs::default();
//! let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
//! rig.send(event("1")).await;
//! rig.settled().await;
//! billing.stop().await;
//! ```
//!
//! Each start is a process of its own: those of one name compete, those of another name see every message for
//! themselves. `rig.broker` looks at the group of `billing`. Everything repeats exactly: seeds are fixed, the clock is
//! tokio's.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hapax::cloudevents::{Convention, encode};
use hapax::record::Moment;
use hapax::{
    Consumer, ConsumerBuilder, ConsumerHandle, Context, DeadLetter, EventKey, Failure, Handler, Message,
    RESERVED_PREFIX, Reason, RecordView, Statistics, Status, StoreAdmin,
};
use hapax_memory::{MemoryBroker, MemoryBrokerBuilder, MemoryStore};
use hapax_testkit::faulty::{FaultSwitch, Faults, FaultyBroker, FaultyStore};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::journal::{Journal, Journaled};

/// Where events of [`event`] come from.
pub(crate) const SOURCE: &str = "/shop";
/// The type of [`event`].
pub(crate) const TYPE: &str = "order.placed";
/// How long a test waits for anything, by tokio's clock.
pub(crate) const DEADLINE: Duration = Duration::from_hours(6);

/// The store as consumers of a rig see it.
pub(crate) type Store = Journaled<FaultyStore>;

/// A builder on a rig's broker and store.
pub(crate) type Builder = ConsumerBuilder<(), Store>;

/// An event with this id, and JSON data that tells it.
pub(crate) fn event(id: &str) -> Message {
    Message::event(SOURCE, id, TYPE).with_data("application/json", format!(r#"{{"id":"{id}"}}"#))
}

/// The key of the event with this id for the consumer of this name.
pub(crate) fn key(consumer: &str, id: &str) -> EventKey {
    EventKey::of(consumer, SOURCE, id)
}

/// One broker, one store, and everything that happens to them.
pub(crate) struct Rig {
    /// In the group of `billing`, but does not consume: publishes, looks, redrives.
    pub(crate) broker: MemoryBroker,
    pub(crate) store: MemoryStore,
    pub(crate) journal: Journal,
    /// Outages and refusals of the store.
    pub(crate) store_faults: FaultSwitch,
    /// Outages of the broker.
    pub(crate) broker_faults: FaultSwitch,
    pub(crate) processes: AtomicU64,
}

impl Rig {
    /// A broker without order.
    pub(crate) fn new() -> Self {
        Self::of(MemoryBroker::builder("orders"))
    }

    /// A broker that keeps order, as one partition does.
    pub(crate) fn ordered() -> Self {
        Self::of(MemoryBroker::builder("orders").ordered())
    }

    pub(crate) fn of(broker: MemoryBrokerBuilder) -> Self {
        Self::with_faults(broker, Faults::none(1), Faults::none(2))
    }

    pub(crate) fn with_faults(broker: MemoryBrokerBuilder, of_store: Faults, of_broker: Faults) -> Self {
        Self {
            broker: broker.group("billing").build(),
            store: MemoryStore::builder().starts_at(Moment(1_000_000_000)).build(),
            journal: Journal::default(),
            store_faults: of_store.switch(),
            broker_faults: of_broker.switch(),
            processes: AtomicU64::new(0),
        }
    }

    /// A builder for another process, and the process' connection to the broker.
    pub(crate) fn process(&self, name: &str) -> (ConsumerBuilder<(), Store>, Arc<MemoryBroker>) {
        let connection = Arc::new(self.broker.group(name));
        let faulty = FaultyBroker::new(Arc::clone(&connection) as _, self.broker_faults.clone());
        let broker = Journaled { inner: faulty, journal: self.journal.clone() };
        let seed = self.processes.fetch_add(1, Ordering::SeqCst);
        let builder = Consumer::builder(name, broker, self.journaled_store()).seed(seed);
        (builder.observer(Arc::new(self.journal.clone())), connection)
    }

    /// The store, through faults and journal.
    pub(crate) fn journaled_store(&self) -> Store {
        let inner = FaultyStore::new(Arc::new(self.store.clone()), self.store_faults.clone());
        Journaled { inner, journal: self.journal.clone() }
    }

    /// Starts a process: a consumer called `name`, wired by `wire`.
    pub(crate) async fn start<S: Send + Sync + 'static>(
        &self,
        name: &str,
        wire: impl FnOnce(ConsumerBuilder<(), Store>) -> ConsumerBuilder<S, Store>,
    ) -> Process {
        let (builder, connection) = self.process(name);
        let consumer = match wire(builder).build().await {
            Ok(consumer) => consumer,
            Err(error) => panic!("{error}"),
        };
        let handle = consumer.handle();
        let running = tokio::spawn(consumer.run(std::future::pending()));
        Process { handle, connection, running }
    }

    /// Publishes.
    pub(crate) async fn send(&self, message: Message) {
        self.broker.publisher().send(message).await;
    }

    /// Sends a dead letter back as the broker's own tools do: with every header it bears.
    pub(crate) async fn send_back(&self, letter: &Message) {
        let (mut headers, body) = encode(letter, &Convention::MEMORY);
        headers.retain(|name| !name.starts_with(RESERVED_PREFIX));
        let of_ours = letter.headers.iter().filter(|(name, _)| name.starts_with(RESERVED_PREFIX));
        of_ours.for_each(|(name, value)| headers.push(name, value.clone()));
        self.broker.publisher().send_wire(headers, body).await;
    }

    /// Publishes events with these ids, in this order.
    pub(crate) async fn send_all(&self, ids: impl IntoIterator<Item = impl fmt::Display>) {
        for id in ids {
            self.send(event(&id.to_string())).await;
        }
    }

    /// Waits until every message is acked or dead-lettered, and what follows of it is done.
    pub(crate) async fn settled(&self) {
        let settled = timeout(DEADLINE, self.broker.settled()).await;
        assert!(settled.is_ok(), "not settled: {:?}\n{}", self.broker.standing(), self.journal.lines().join("\n"));
        self.quiet().await;
    }

    /// Lets everything run that is due now.
    pub(crate) async fn quiet(&self) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    /// Waits until `is` says so.
    pub(crate) async fn until(&self, what: &str, mut is: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !is() {
            assert!(begun.elapsed() < DEADLINE, "never {what}:\n{}", self.journal.lines().join("\n"));
            // Ever less often, so that a wait in vain ends soon.
            tokio::time::sleep(Duration::from_millis(10) + begun.elapsed() / 50).await;
        }
    }

    /// The record of an event of [`event`].
    pub(crate) async fn record(&self, consumer: &str, id: &str) -> Option<RecordView> {
        self.store.look_up(consumer, key(consumer, id)).await.unwrap()
    }

    /// Where its record stands.
    pub(crate) async fn status(&self, consumer: &str, id: &str) -> Option<Status> {
        self.record(consumer, id).await.map(|record| record.status)
    }

    /// The only dead letter.
    #[track_caller]
    pub(crate) fn dead_letter(&self) -> (Message, DeadLetter) {
        let mut letters = self.broker.dead_letters();
        assert_eq!(letters.len(), 1, "one dead letter: {letters:?}");
        letters.remove(0)
    }

    /// Ids and reasons of the dead letters.
    pub(crate) fn dead(&self) -> Vec<(String, Reason)> {
        let id = |message: &Message| message.attributes.id.as_deref().unwrap_or_default().to_owned();
        self.broker.dead_letters().iter().map(|(message, letter)| (id(message), letter.reason)).collect()
    }
}

/// A running consumer. Dropping it is a crash that nobody waits for.
pub(crate) struct Process {
    pub(crate) handle: ConsumerHandle,
    /// Its own connection to the broker: to end or drain its session.
    pub(crate) connection: Arc<MemoryBroker>,
    pub(crate) running: JoinHandle<hapax::Result<()>>,
}

impl Process {
    pub(crate) fn statistics(&self) -> Statistics {
        self.handle.statistics()
    }

    /// Stops gracefully and answers how it ended.
    pub(crate) async fn ended(self) -> hapax::Result<()> {
        self.handle.stop();
        timeout(DEADLINE, self.running).await.expect("it ends").expect("it does not panic")
    }

    /// Stops gracefully.
    pub(crate) async fn stop(self) {
        self.ended().await.expect("it ends well");
    }

    /// Dies: nothing is settled, handlers end where they wait, the connection breaks.
    pub(crate) async fn crash(self) {
        self.running.abort();
        assert!(self.running.await.is_err_and(|error| error.is_cancelled()), "it was running");
    }
}

/// One run of a handler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) id: String,
    pub(crate) attempt: u32,
    pub(crate) crashes: u32,
    pub(crate) fence: u64,
    pub(crate) key: String,
    pub(crate) data: String,
    /// Since the first run.
    pub(crate) at: Duration,
}

/// Every run, in the order of their starts.
#[derive(Clone, Default)]
pub(crate) struct Runs(Arc<Mutex<Noted>>);

#[derive(Default)]
struct Noted {
    runs: Vec<Run>,
    first: Option<Instant>,
}

/// What a handler of [`Runs`] answers.
pub(crate) type Act = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;

impl Runs {
    /// Notes a run.
    pub(crate) fn note<S>(&self, cx: &Context<S>) -> Run {
        let mut noted = self.0.lock().unwrap();
        let first = *noted.first.get_or_insert_with(Instant::now);
        let run = Run {
            id: cx.message().attributes.id.as_deref().unwrap_or_default().to_owned(),
            attempt: cx.attempt(),
            crashes: cx.crashes(),
            fence: cx.fence(),
            key: cx.idempotency_key(),
            data: String::from_utf8_lossy(&cx.message().data).into_owned(),
            at: first.elapsed(),
        };
        noted.runs.push(run.clone());
        run
    }

    /// A handler that notes the run, then does this.
    pub(crate) fn then<F, A>(&self, act: F) -> impl Handler<Arc<Message>, ()> + use<F, A>
    where
        F: Fn(Run, Context<()>) -> A + Send + Sync + 'static,
        A: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        let runs = self.clone();
        move |_: Arc<Message>, cx: Context<()>| -> Act { Box::pin(act(runs.note(&cx), cx)) }
    }

    /// A handler that succeeds.
    pub(crate) fn ok(&self) -> impl Handler<Arc<Message>, ()> + use<> {
        self.then(|_, _| async { Ok(()) })
    }

    /// A handler whose answer depends on the run alone.
    pub(crate) fn answer<F>(&self, answer: F) -> impl Handler<Arc<Message>, ()> + use<F>
    where
        F: Fn(&Run) -> Result<(), Failure> + Send + Sync + 'static,
    {
        self.then(move |run, _| std::future::ready(answer(&run)))
    }

    /// A handler that takes so long and then succeeds.
    pub(crate) fn take(&self, time: Duration) -> impl Handler<Arc<Message>, ()> + use<> {
        self.then(move |_, _| async move {
            tokio::time::sleep(time).await;
            Ok(())
        })
    }

    pub(crate) fn all(&self) -> Vec<Run> {
        self.0.lock().unwrap().runs.clone()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.lock().unwrap().runs.len()
    }

    /// Ids in the order of their runs.
    pub(crate) fn ids(&self) -> Vec<String> {
        self.all().into_iter().map(|run| run.id).collect()
    }

    /// Runs of this event.
    pub(crate) fn of(&self, id: &str) -> Vec<Run> {
        self.all().into_iter().filter(|run| run.id == id).collect()
    }

    /// Attempts of this event, in order.
    pub(crate) fn attempts(&self, id: &str) -> Vec<u32> {
        self.of(id).into_iter().map(|run| run.attempt).collect()
    }
}
