//! The crash explorer: at which await points of a handler may its process die without harm?
//!
//! A handler runs over and over. In turn, at each of its await points, the process dies: the handler's future is dropped,
//! nothing is recorded, nothing settled. The event is delivered again, as it would be, and a new process runs it to the
//! end. Before the crash there are two copies of the delivery, after it another one. Whatever the user reads in the end
//! must be what a single undisturbed run leaves behind; every point after which it is not is a window in which an effect
//! repeats or is lost.
//!
//! ```
//! use std::sync::Mutex;
//! use std::collections::BTreeMap;
//! use hapax::{Context, Event, Failure};
//! use hapax_testkit::{crash_point, explore};
//! # use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct OrderPlaced { cents: i64 }
//! impl Event for OrderPlaced { const TYPE: &'static str = "com.shop.order.placed"; }
//!
//! /// A double of the payment provider: it charges once for each idempotency key.
//! #[derive(Default)]
//! struct Provider { charges: Mutex<BTreeMap<String, i64>> }
//!
//! impl Provider {
//!     async fn charge(&self, key: String, cents: i64) {
//!         crash_point("the charge is on its way").await;
//!         self.charges.lock().unwrap().insert(key, cents);
//!         crash_point("charged, and the answer is on its way").await;
//!     }
//!
//!     fn charges(&self) -> Vec<i64> {
//!         self.charges.lock().unwrap().values().copied().collect()
//!     }
//! }
//!
//! /// Charges twice: every attempt has another key.
//! async fn careless(event: OrderPlaced, cx: Context<Provider>) -> Result<(), Failure> {
//!     let key = format!("{} {}", cx.idempotency_key(), cx.attempt());
//!     cx.state().charge(key, event.cents).await;
//!     Ok(())
//! }
//!
//! /// Charges once: the key is the event's.
//! async fn careful(event: OrderPlaced, cx: Context<Provider>) -> Result<(), Failure> {
//!     cx.state().charge(cx.key("charge"), event.cents).await;
//!     Ok(())
//! }
//!
//! #[tokio::main(flavor = "current_thread", start_paused = true)]   // in a test: #[tokio::test(start_paused = true)]
//! async fn main() {
//!     let order = OrderPlaced { cents: 1_000 };
//!     let report = explore(careless, &order).state(Provider::default).read(Provider::charges).await;
//!     let caught = &report.differences()[0];
//!     assert_eq!(caught.point.name(), Some("charged, and the answer is on its way"));
//!     assert_eq!(caught.expected, "[\n    1000,\n]");
//!     assert_eq!(caught.actual, "[\n    1000,\n    1000,\n]");
//!
//!     let report = explore(careful, &order).state(Provider::default).read(Provider::charges).await;
//!     report.assert_effects_once();
//! }
//! ```
//!
//! What it can see: a future is dropped where it waits. A double that is ready at once never waits; let it await a
//! [`crash_point`](crate::crash_point) before and after its effect. What the handler spawned goes on after the crash, and
//! destructors run, as they would not in a process that is killed.

mod report;

use std::collections::BTreeSet;
use std::fmt;
use std::fmt::Debug;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hapax::{Broker, Consumer, ConsumerBuilder, Context, Event, Handler, Message, Otherwise, ProcessedStore};
use hapax_memory::MemoryStore;

pub use report::{Difference, Point, PointKind, Report};

use crate::stage::{Ended, LocalBoxFuture, NoPublisher, Stage, StageStore, Strike, Wire, message_of, wire};

/// The id of the event that is explored.
const ID: &str = "explored";

/// Explores `handler` with `event`: say where its state comes from, then what to read in it. See the
/// [module](mod@crate::explore) for an example.
pub fn explore<E: Event, H>(handler: H, event: &E) -> ExploreHandler<E, H> {
    ExploreHandler { handler: Arc::new(handler), message: message_of(ID, event), event: std::marker::PhantomData }
}

/// A handler that is to be explored, still without its state.
#[must_use = "nothing is explored before .read(..).await"]
pub struct ExploreHandler<E, H> {
    handler: Arc<H>,
    message: Message,
    event: std::marker::PhantomData<fn(E)>,
}

impl<E: Event, H> ExploreHandler<E, H> {
    /// What makes a fresh state for each run; the handler sees it as [`Context::state`].
    pub fn state<S>(self, fresh: impl Fn() -> S + 'static) -> Explore<S>
    where
        S: Send + Sync + 'static,
        H: Handler<E, S>,
    {
        let handler = self.handler;
        let fresh = move || Arc::new(fresh());
        let setting = move || {
            let (state, handler) = (fresh(), Arc::clone(&handler));
            let seen = Arc::clone(&state);
            let wire = wire(MemoryStore::new(), move |broker, store| {
                Consumer::builder("explored", broker, store)
                    .shared_state(Arc::clone(&state))
                    .publisher(NoPublisher)
                    .on(Again(Arc::clone(&handler)))
                    .otherwise(Otherwise::DeadLetter)
            });
            let setting: LocalBoxFuture<_> = Box::pin(std::future::ready((seen, wire)));
            setting
        };
        Explore::new(Rc::new(setting), self.message)
    }
}

impl<E, H> Debug for ExploreHandler<E, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExploreHandler").field("message", &self.message).finish_non_exhaustive()
    }
}

/// The same handler for one consumer after the other.
struct Again<H>(Arc<H>);

impl<E: Send + 'static, S: Send + Sync + 'static, H: Handler<E, S>> Handler<E, S> for Again<H> {
    type Error = H::Error;

    fn handle(&self, event: E, cx: Context<S>) -> impl Future<Output = Result<(), H::Error>> + Send {
        self.0.handle(event, cx)
    }
}

/// A fresh world, and the wiring of its consumers.
type Setting<W> = Rc<dyn Fn() -> LocalBoxFuture<(Arc<W>, Wire)>>;

/// What is to be explored; [`read`](Self::read) does it.
#[must_use = "nothing is explored before .read(..).await"]
pub struct Explore<W> {
    setting: Setting<W>,
    message: Message,
    beside: Vec<Message>,
    on_crash: Rc<dyn Fn(&W)>,
    overlapping: bool,
    points_max: usize,
    deadline: Duration,
}

impl<W: 'static> Explore<W> {
    /// Most points that are explored; beyond it the exploration panics rather than end early.
    pub const POINTS_MAX: usize = 1_000;

    fn new(setting: Setting<W>, message: Message) -> Self {
        let (points_max, deadline) = (Self::POINTS_MAX, crate::Harness::DEADLINE);
        let beside = Vec::new();
        Self { setting, message, beside, on_crash: Rc::new(|_| ()), overlapping: false, points_max, deadline }
    }

    /// Production wiring in a fresh world for each run, on a broker and a store in memory.
    ///
    /// `wiring` is called with the world for every consumer that is started in it, also after a crash.
    pub fn wiring<E, S, T>(
        world: impl Fn() -> W + 'static,
        wiring: impl Fn(&W, Arc<dyn Broker>, StageStore<MemoryStore>) -> ConsumerBuilder<S, T> + 'static,
        event: &E,
    ) -> Self
    where
        E: Event,
        S: Send + Sync + 'static,
        T: ProcessedStore,
    {
        let world = Rc::new(world);
        let world = async move || (world(), MemoryStore::new());
        Self::with_store(world, wiring, event)
    }

    /// Production wiring in a fresh world and on a fresh store for each run: for transactional handlers.
    ///
    /// With a store on a disk or a server leave tokio's clock running, since tokio would take waiting for it for idleness.
    /// The lease is waited for after each crash, then: set a short one in the wiring, or step the store's clock with
    /// [`on_crash`](Self::on_crash).
    pub fn with_store<E, S, T, U>(
        world: impl AsyncFn() -> (W, T) + 'static,
        wiring: impl Fn(&W, Arc<dyn Broker>, StageStore<T>) -> ConsumerBuilder<S, U> + 'static,
        event: &E,
    ) -> Self
    where
        E: Event,
        S: Send + Sync + 'static,
        T: ProcessedStore + Clone,
        U: ProcessedStore,
    {
        let (world, wiring) = (Rc::new(world), Rc::new(wiring));
        let setting = move || {
            let (world, wiring) = (Rc::clone(&world), Rc::clone(&wiring));
            let setting: LocalBoxFuture<_> = Box::pin(async move {
                let (world, store) = world().await;
                let world = Arc::new(world);
                let seen = Arc::clone(&world);
                (seen, wire(store, move |broker, store| wiring(&world, broker, store)))
            });
            setting
        };
        Self::new(Rc::new(setting), message_of(ID, event))
    }

    /// This message instead of the event's own: with another source, other headers or data.
    pub fn message(mut self, message: Message) -> Self {
        self.message = message;
        self
    }

    /// These messages arrive with the event: company for a batch handler.
    pub fn beside(mut self, messages: impl IntoIterator<Item = Message>) -> Self {
        self.beside = messages.into_iter().collect();
        self
    }

    /// Called when a process died or stands still, before another takes over: steps the clock of a store that has one of
    /// its own, so that the lease is not waited for.
    pub fn on_crash(mut self, crashed: impl Fn(&W) + 'static) -> Self {
        self.on_crash = Rc::new(crashed);
        self
    }

    /// Explores pauses too: at each await point the process stands still beyond its lease, another runs the event to its
    /// end, and then the first goes on. What differs is in [`Report::overlapping`]. Only what is fenced, keyed or in the
    /// store's transaction stands this. On SQLite a transaction that stands still holds the file, and nobody can take
    /// over: not for its transactional handlers.
    pub fn overlapping(mut self) -> Self {
        self.overlapping = true;
        self
    }

    /// Most points that are explored, instead of [`POINTS_MAX`](Self::POINTS_MAX).
    pub fn points_max(mut self, points: usize) -> Self {
        self.points_max = points;
        self
    }

    /// How long one run may take, instead of [`Harness::DEADLINE`](crate::Harness::DEADLINE).
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Explores, reading the world after each run.
    ///
    /// # Panics
    /// If the wiring is refused, no handler runs for the event, or the undisturbed run does not end.
    pub async fn read<R: PartialEq + Debug>(self, read: impl Fn(&W) -> R) -> Report {
        self.query(async |world: &W| read(world)).await
    }

    /// As [`read`](Self::read), where reading waits: for a database.
    ///
    /// # Panics
    /// As [`read`](Self::read).
    pub async fn query<R: PartialEq + Debug>(self, read: impl AsyncFn(&W) -> R) -> Report {
        let single = self.single(&read).await;
        let ty = self.message.attributes.ty.clone().unwrap_or_default();
        let mut report = Report::new(&ty, format!("{single:#?}"));
        let copies = self.struck(None, false, &read).await;
        report.add(Point::new(PointKind::Copies, None), single.unlike(&copies));
        for (point, run) in self.at_each_await(single.awaits.clone(), false, &read).await {
            report.add(point, single.unlike(&run));
        }
        let behind = [
            (Strike::Returned, PointKind::Returned),
            (Strike::BeforeRecord, PointKind::BeforeRecord),
            (Strike::BeforeAck, PointKind::BeforeAck),
        ];
        for (strike, kind) in behind {
            let run = self.struck(Some(strike), false, &read).await;
            if run.struck_at.is_some() {
                report.add(Point::new(kind, None), single.unlike(&run));
            }
        }
        if self.overlapping {
            for (point, run) in self.at_each_await(single.awaits.clone(), true, &read).await {
                report.add_overlapping(point, single.unlike(&run));
            }
        }
        report
    }

    /// A run for each await point. Where handlers wait for files or servers, how often they wait differs from run to run:
    /// so it goes on as long as any run did, and ends with the named points that were missed.
    async fn at_each_await<R: PartialEq + Debug>(
        &self,
        mut most: Vec<Option<&'static str>>,
        freezes: bool,
        read: &impl AsyncFn(&W) -> R,
    ) -> Vec<(Point, Outcome<R>)> {
        let mut found: Vec<(Point, Outcome<R>)> = Vec::new();
        let mut number = 0;
        while number < most.len() {
            number += 1;
            assert!(number <= self.points_max, "more than {} await points: raise .points_max(..)", self.points_max);
            let run = self.struck(Some(Strike::Await(number)), freezes, read).await;
            match run.struck_at {
                Some((at, name)) => found.push((Point::new(PointKind::Await(at), name), run)),
                None if run.awaits.len() > most.len() => most.clone_from(&run.awaits),
                None => {}
            }
        }
        let named = most.iter().enumerate().filter_map(|(index, name)| {
            let nth = most[..=index].iter().filter(|other| *other == name).count();
            Some(((*name)?, nth))
        });
        for (name, nth) in named {
            let struck = found.iter().filter(|(point, _)| point.name() == Some(name)).count();
            if struck >= nth {
                continue;
            }
            let run = self.struck(Some(Strike::Named(name, nth)), freezes, read).await;
            if let Some((at, name)) = run.struck_at {
                found.push((Point::new(PointKind::Await(at), name), run));
            }
        }
        found
    }

    /// One delivery, undisturbed.
    async fn single<R: PartialEq + Debug>(&self, read: &impl AsyncFn(&W) -> R) -> Outcome<R> {
        let (world, wire) = (self.setting)().await;
        let mut stage = Stage::new(wire);
        self.deliver(&mut stage);
        if let Err(why) = stage.settle(self.deadline).await {
            panic!("the undisturbed run: {why}");
        }
        let outcome = Outcome::of(&stage, &self.id(), read(&world).await, None);
        assert!(outcome.ran, "no handler ran for {:?}: is there a route for its type?", self.message.attributes.ty);
        outcome
    }

    /// Two copies at once, the process struck at a point, then another copy.
    async fn struck<R: PartialEq + Debug>(
        &self,
        strike: Option<Strike>,
        freezes: bool,
        read: &impl AsyncFn(&W) -> R,
    ) -> Outcome<R> {
        let (world, wire) = (self.setting)().await;
        let mut stage = Stage::new(wire);
        if let Some(strike) = strike {
            stage.strikes.arm(strike, freezes);
        }
        let (on_crash, of) = (Rc::clone(&self.on_crash), Arc::clone(&world));
        stage.on_crash = Some(Box::new(move || on_crash(&of)));
        self.deliver(&mut stage);
        self.deliver(&mut stage);
        let mut left = stage.settle(self.deadline).await.err();
        stage.thaw().await;
        self.deliver(&mut stage);
        if left.is_none() {
            left = stage.settle(self.deadline).await.err();
        }
        Outcome::of(&stage, &self.id(), read(&world).await, left)
    }

    fn deliver(&self, stage: &mut Stage) {
        std::iter::once(&self.message).chain(&self.beside).for_each(|message| stage.deliver(message));
    }

    fn id(&self) -> String {
        let attributes = &self.message.attributes;
        let text = |value: &Option<Box<str>>| value.clone().unwrap_or_default();
        format!("{} {}", text(&attributes.source), text(&attributes.id))
    }
}

impl<W> Debug for Explore<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Explore").field("message", &self.message).finish_non_exhaustive()
    }
}

/// What a run left behind.
struct Outcome<R> {
    state: R,
    /// Without repeats of the same message: consumers know those as duplicates.
    published: BTreeSet<String>,
    end: String,
    ran: bool,
    awaits: Vec<Option<&'static str>>,
    struck_at: Option<(usize, Option<&'static str>)>,
}

impl<R: Debug> Debug for Outcome<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state.fmt(f)
    }
}

impl<R: PartialEq + Debug> Outcome<R> {
    fn of(stage: &Stage, id: &str, state: R, left: Option<String>) -> Self {
        let seen = stage.chronicle.find(id);
        let published = stage.published.all().into_iter().map(|outgoing| {
            let attributes = &outgoing.message.attributes;
            let text = |value: &Option<Box<str>>| value.as_deref().unwrap_or_default().to_owned();
            let data = String::from_utf8_lossy(&outgoing.message.data).into_owned();
            format!("{} {} {} {data}", text(&attributes.ty), text(&attributes.id), text(&outgoing.to))
        });
        let reason = stage.broker.dead_letters().last().map(|(_, letter)| letter.reason);
        let end = match (left, seen.as_ref().ok().and_then(|seen| seen.ended)) {
            (Some(left), _) => left,
            (None, Some(Ended::Processed)) => "processed".to_owned(),
            (None, Some(Ended::DeadLettered)) => {
                reason.map_or_else(String::new, |why| format!("dead-lettered as {why}"))
            }
            (None, None) => "neither processed nor dead-lettered".to_owned(),
        };
        Self {
            state,
            published: published.collect(),
            end,
            ran: seen.is_ok_and(|seen| seen.runs > 0),
            awaits: stage.strikes.awaits(),
            struck_at: stage.strikes.struck_at(),
        }
    }

    /// Expected and actual, where they differ.
    fn unlike(&self, other: &Self) -> Vec<(&'static str, String, String)> {
        let mut unlike = Vec::new();
        if self.state != other.state {
            unlike.push(("state", format!("{:#?}", self.state), format!("{:#?}", other.state)));
        }
        if self.published != other.published {
            unlike.push(("published", format!("{:#?}", self.published), format!("{:#?}", other.published)));
        }
        if self.end != other.end {
            unlike.push(("end", self.end.clone(), other.end.clone()));
        }
        unlike
    }
}

#[cfg(test)]
mod tests;
