//! The harness: a user's production wiring without a broker, and without waiting.
//!
//! Deliveries, crashes, disorder and outages are verbs; what became of an event is an assertion whose failure tells the
//! event's whole story.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use hapax::{Broker, ConsumerBuilder, Event, Headers, Message, Outgoing, ProcessedStore, Reason, Statistics};
use hapax_memory::{MemoryBroker, MemoryStore};

use crate::stage::{Ended, Seen, Stage, StageStore, Strike, message_of, wire};

/// Runs a consumer as it is wired for production, on a broker in memory.
///
/// The wiring is a function of broker and store that returns the builder: written once, called by `main` with the real
/// ones and by tests with those of the harness. It is called again after every crash, so it clones its state.
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use hapax::{Broker, Consumer, ConsumerBuilder, Context, Event, Failure, Otherwise, ProcessedStore};
/// use hapax_testkit::Harness;
/// # use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct OrderPlaced { cents: i64 }
/// impl Event for OrderPlaced { const TYPE: &'static str = "com.shop.order.placed"; }
///
/// #[derive(Clone, Default)]
/// struct App { charged: Arc<Mutex<Vec<i64>>> }
///
/// async fn charge(event: OrderPlaced, cx: Context<App>) -> Result<(), Failure> {
///     cx.state().charged.lock().unwrap().push(event.cents);
///     Ok(())
/// }
///
/// fn billing<T: ProcessedStore>(app: App, broker: impl Broker, store: T) -> ConsumerBuilder<App, T> {
///     Consumer::builder("billing", broker, store).state(app).on(charge).otherwise(Otherwise::Ignore)
/// }
///
/// #[tokio::main(flavor = "current_thread", start_paused = true)]   // in a test: #[tokio::test(start_paused = true)]
/// async fn main() {
///     let app = App::default();
///     let mut harness = Harness::new({
///         let app = app.clone();
///         move |broker, store| billing(app.clone(), broker, store)
///     });
///     let order = harness.deliver_event(&OrderPlaced { cents: 1_000 });
///     harness.deliver_again(&order);
///     harness.settle().await;
///
///     harness.assert_processed(&order);
///     harness.assert_duplicate(&order);
///     assert_eq!(*app.charged.lock().unwrap(), [1_000]);
/// }
/// ```
///
/// Assertions name an event by its id, by source and id with a space between where two sources use one id, or, where the
/// wiring takes ids from elsewhere, as records and dead letters name it: `header:x-order:17`.
///
/// Under tokio's paused clock retries, leases and timeouts take no time, and a run repeats exactly. With a store on a
/// disk or a server leave the clock running, since tokio would take waiting for it for idleness, and set short delays
/// and a short lease in the wiring.
///
/// What handlers publish goes to [`published`](Self::published) if the wiring has a `.publisher(..)`;
/// [`NoPublisher`](crate::NoPublisher) fills that place.
///
/// The handler's future is dropped at a crash, so its destructors run, as they would not in a process that is killed.
pub struct Harness {
    stage: Stage,
    deadline: Duration,
    sent: Vec<Message>,
    events: u32,
}

impl Harness {
    /// How much time may pass in one verb before it counts as a hang: six hours of tokio's clock. By the clock on the
    /// wall it is a minute.
    pub const DEADLINE: Duration = Duration::from_hours(6);

    /// The wiring on a broker and a store in memory.
    pub fn new<S, T>(
        wiring: impl Fn(Arc<dyn Broker>, StageStore<MemoryStore>) -> ConsumerBuilder<S, T> + 'static,
    ) -> Self
    where
        S: Send + Sync + 'static,
        T: ProcessedStore,
    {
        Self::with_store(MemoryStore::new(), wiring)
    }

    /// The wiring on a broker in memory and this store, whose clones are the same store: for transactional handlers.
    pub fn with_store<S, T, U>(
        store: T,
        wiring: impl Fn(Arc<dyn Broker>, StageStore<T>) -> ConsumerBuilder<S, U> + 'static,
    ) -> Self
    where
        S: Send + Sync + 'static,
        T: ProcessedStore + Clone,
        U: ProcessedStore,
    {
        let stage = Stage::new(wire(store, wiring));
        Self { stage, deadline: Self::DEADLINE, sent: Vec::new(), events: 0 }
    }

    /// So many consumers compete for the deliveries; one by default. Goes before the first delivery.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.stage.set_workers(workers);
        self
    }

    /// The broker keeps order, as a log with one partition does. Goes before the first delivery.
    #[must_use]
    pub fn ordered(mut self) -> Self {
        self.stage.broker = MemoryBroker::builder("stage").ordered().build();
        self
    }

    /// How long one verb may take, instead of [`DEADLINE`](Self::DEADLINE).
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Delivers a message. It is received with the next verb that waits.
    pub fn deliver(&mut self, message: Message) {
        self.stage.deliver(&message);
        self.sent.push(message);
    }

    /// Delivers an event and answers its id.
    pub fn deliver_event<E: Event>(&mut self, event: &E) -> String {
        self.events += 1;
        let id = format!("event-{}", self.events);
        self.deliver(message_of(&id, event));
        id
    }

    /// Delivers an event under this id.
    pub fn deliver_event_as<E: Event>(&mut self, id: &str, event: &E) {
        self.deliver(message_of(id, event));
    }

    /// Delivers what was last delivered under this id once more.
    ///
    /// # Panics
    /// If nothing was.
    #[track_caller]
    pub fn deliver_again(&mut self, id: &str) {
        let earlier = self.sent.iter().rev().find(|message| message.attributes.id.as_deref() == Some(id));
        let Some(message) = earlier.cloned() else { panic!("nothing was delivered under the id {id}") };
        self.deliver(message);
    }

    /// Delivers several messages at once: they are received together.
    pub fn deliver_together(&mut self, messages: impl IntoIterator<Item = Message>) {
        messages.into_iter().for_each(|message| self.deliver(message));
    }

    /// Delivers headers and body as they travel: for what does not decode.
    pub async fn deliver_wire(&mut self, headers: Headers, body: impl Into<Vec<u8>>) {
        self.stage.broker.publisher().send_wire(headers, body.into()).await;
    }

    /// The next handler that succeeds does so in vain: its process dies before the record reaches the store (with a
    /// transactional handler: before the commit does). The event is delivered again and runs again when its lease is
    /// over; a new process takes over.
    ///
    /// # Panics
    /// If the wiring took the store with [`StageStore::unwatched`].
    #[track_caller]
    pub fn crash_before_record(&mut self) {
        assert!(
            self.stage.chronicle.sees_the_store(),
            "the wiring took the store unwatched: no crash can come before it"
        );
        self.stage.strikes.arm(Strike::BeforeRecord, false);
    }

    /// The next event that ends is recorded, but its process dies before the ack reaches the broker.
    pub fn crash_before_ack(&mut self) {
        self.stage.strikes.arm(Strike::BeforeAck, false);
    }

    /// From here on deliveries come in an order drawn from the seed.
    pub fn reorder(&mut self, seed: u64) {
        self.stage.broker.shuffle(Some(seed));
    }

    /// The next so many calls to the store fail.
    pub fn fail_store(&mut self, calls: usize) {
        self.stage.strikes.fail_store(calls);
    }

    /// Sends every dead letter back, with its token; answers how many.
    pub fn redrive(&mut self) -> usize {
        self.stage.broker.redrive()
    }

    /// Lets time go by, and everything happen that is due.
    ///
    /// # Panics
    /// If the wiring is refused, or the consumer ends.
    pub async fn advance(&mut self, by: Duration) {
        let result = self.stage.advance(by).await;
        result.unwrap_or_else(|why| panic!("{why}"));
    }

    /// Runs until every delivery is acked or dead-lettered: through all retries, and on to the end of leases.
    ///
    /// # Panics
    /// If the wiring is refused, the consumer ends, or something is left after the deadline; the text says what.
    pub async fn settle(&mut self) {
        let result = self.stage.settle(self.deadline).await;
        result.unwrap_or_else(|why| panic!("{why}"));
    }

    /// Runs until everything that is left waits for its time: for a retry, or for the lease of a process that died.
    ///
    /// # Panics
    /// As [`settle`](Self::settle).
    pub async fn until_waiting(&mut self) {
        let result = self.stage.until_waiting(self.deadline).await;
        result.unwrap_or_else(|why| panic!("{why}"));
    }

    /// Runs while `work` does, and answers what it answered: for tests that look at a handler while it runs.
    ///
    /// # Panics
    /// As [`settle`](Self::settle).
    pub async fn run_while<A>(&mut self, work: impl Future<Output = A>) -> A {
        let mut work = std::pin::pin!(work);
        tokio::select! {
            biased;
            answer = &mut work => answer,
            result = self.stage.advance(self.deadline) => match result {
                Ok(()) => panic!("the work did not end within {:?}", self.deadline),
                Err(why) => panic!("{why}"),
            },
        }
    }

    /// The event was processed: its effect took place, and the record says so.
    ///
    /// # Panics
    /// If not; this and all the others print what happened to the event.
    #[track_caller]
    pub fn assert_processed(&self, id: &str) {
        let seen = self.seen(id);
        let instead = match seen.ended {
            Some(Ended::Processed) => return,
            Some(Ended::DeadLettered) => "dead-lettered",
            None if seen.runs > 0 => "started, and has not ended",
            None => "never started",
        };
        panic!("event {id} was to be processed, but was {instead}:\n{}", seen.story);
    }

    /// A delivery of the event was found to be a duplicate, and acked without the handler.
    #[track_caller]
    pub fn assert_duplicate(&self, id: &str) {
        let seen = self.seen(id);
        assert!(seen.duplicates > 0, "no delivery of event {id} was found to be a duplicate:\n{}", seen.story);
    }

    /// The event is in the dead letters, for this reason.
    #[track_caller]
    pub fn assert_dead_lettered(&self, id: &str, reason: Reason) {
        let letters = self.stage.broker.dead_letters();
        let of_it = |message: &Message| message.attributes.id.as_deref() == Some(id.rsplit(' ').next().unwrap_or(id));
        let reasons: Vec<_> =
            letters.iter().filter(|(message, _)| of_it(message)).map(|(_, letter)| letter.reason).collect();
        if reasons.contains(&reason) {
            return;
        }
        let story = self.seen(id).story;
        if reasons.is_empty() {
            panic!("event {id} was to be dead-lettered as {reason}, but is not in the dead letters:\n{story}");
        }
        let found: Vec<_> = reasons.iter().map(|reason| reason.as_str()).collect();
        panic!("event {id} was to be dead-lettered as {reason}, but was as {}:\n{story}", found.join(", "));
    }

    /// No handler was started for the event.
    #[track_caller]
    pub fn assert_not_run(&self, id: &str) {
        let seen = self.seen(id);
        assert!(seen.runs == 0, "event {id} was not to run, but did {}:\n{}", times(seen.runs), seen.story);
    }

    /// Its handler was started so many times, uncounted attempts and those that crashed included.
    #[track_caller]
    pub fn assert_attempts(&self, id: &str, attempts: u32) {
        let seen = self.seen(id);
        let (wanted, ran) = (times(attempts), times(seen.runs));
        assert!(seen.runs == attempts, "event {id} was to run {wanted}, but did {ran}:\n{}", seen.story);
    }

    /// A message of this type was published for which `fits` says so.
    #[track_caller]
    pub fn assert_published(&self, ty: &str, fits: impl Fn(&Message) -> bool) {
        let published = self.published();
        let of_type: Vec<_> = published
            .iter()
            .map(|outgoing| &outgoing.message)
            .filter(|message| message.attributes.ty.as_deref() == Some(ty))
            .collect();
        if of_type.is_empty() {
            let types: Vec<_> = published.iter().filter_map(|o| o.message.attributes.ty.as_deref()).collect();
            panic!("nothing of type {ty} was published, only {types:?}");
        }
        assert!(of_type.iter().any(|m| fits(m)), "no published {ty} is as it was to be, of these: {of_type:#?}");
    }

    /// What handlers published, as it was sent: what is sent twice after a crash is here twice, under one id.
    pub fn published(&self) -> Vec<Outgoing> {
        self.stage.published.all()
    }

    /// What the consumers have done so far, all lives of them together.
    pub fn statistics(&self) -> Statistics {
        self.stage.statistics()
    }

    /// The broker in memory, for what has no verb here.
    pub fn broker(&self) -> &MemoryBroker {
        &self.stage.broker
    }

    #[track_caller]
    fn seen(&self, id: &str) -> Seen {
        self.stage.chronicle.find(id).unwrap_or_else(|why| panic!("{why}"))
    }
}

fn times(count: u32) -> String {
    match count {
        0 => "never".to_owned(),
        1 => "once".to_owned(),
        _ => format!("{count} times"),
    }
}

impl fmt::Debug for Harness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Harness").field("standing", &self.stage.broker.standing()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
