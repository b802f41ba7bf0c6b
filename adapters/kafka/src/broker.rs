//! `KafkaBroker`: a member of a consumer group.

use std::fmt;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use hapax::{
    Broker, BrokerOrder, Capabilities, Delivery, Durability, Error, ErrorKind, Limits, Receipt, Result, SecretUrl,
    Settlement, Want,
};
use tokio::time::timeout;

use crate::assignment::Assignment;
use crate::fetched::{Fetched, deliveries};
use crate::poller::{self, Task};
use crate::producer::{Producer, Sending};
use crate::settings::{KafkaBrokerBuilder, Settings};
use crate::state::{Shared, Take, settled, stale};
use crate::topics::{self, Facts};
use crate::waiting;

/// How long `open` waits for the group to tell what this member has. A member beyond the number of partitions is told
/// nothing, and an outage of the group's coordinator is no fault of settings: `receive` waits for both.
const JOIN_MAX: Duration = Duration::from_secs(3);
/// How long `close` waits for the last commit and the goodbye, less than the runtime waits for it; beyond it they go on
/// without it.
const CLOSE_MAX: Duration = Duration::from_millis(1_200);

/// A member of a consumer group on one or several topics.
///
/// It consumes from [`open`](Broker::open) on, and can be opened again after [`close`](Broker::close). Dropping it
/// without `close` ends its sessions, commits what is done and leaves the group, on its own thread.
pub struct KafkaBroker {
    settings: Settings,
    sessions: Arc<AtomicU32>,
    run: Mutex<Option<Run>>,
}

/// From `open` to `close`.
#[derive(Clone)]
struct Run {
    shared: Arc<Shared>,
    producer: Producer,
    facts: Facts,
    thread: Thread,
}

impl KafkaBroker {
    /// A member of `group`, on `topics`. The URL is `kafka://host:port`, several servers behind commas, or `kafkas://` for
    /// TLS; `user:password@` is SASL; properties of librdkafka may stand behind `?`.
    pub fn builder<T: Into<Box<str>>>(
        url: SecretUrl,
        group: impl Into<Box<str>>,
        topics: impl IntoIterator<Item = T>,
    ) -> KafkaBrokerBuilder {
        KafkaBrokerBuilder::new(url, group.into(), topics.into_iter().map(Into::into).collect())
    }

    pub(crate) fn new(settings: Settings) -> Self {
        Self { settings, sessions: Arc::default(), run: Mutex::default() }
    }

    /// How many partitions this member has; `None` until the group has told it, and after it closed.
    ///
    /// A member beyond the number of partitions has none, and that is not told apart from one that waits for its first.
    pub fn assigned(&self) -> Option<usize> {
        let shared = self.shared()?;
        let state = shared.lock();
        (state.joined && state.phase != crate::state::Phase::Closing).then_some(state.assigned.len())
    }

    /// Whether all that waited in this member's partitions has been fetched, retries apart, as far as their leaders have
    /// told: a second ago or so, longer while one is away.
    ///
    /// False until the group has told the member what it has, and until each of those partitions was read to its end: with
    /// `false`, that nothing arrives does not mean that nothing is there.
    pub fn is_caught_up(&self) -> bool {
        self.shared().is_some_and(|shared| shared.is_caught_up())
    }

    /// Checks the topics, and creates them if that was asked for, without consuming.
    pub async fn check(&self) -> Result<()> {
        topics::check(&self.settings.properties, &self.settings.places, self.settings.declare.as_ref()).await?;
        Ok(())
    }

    /// How many messages of this group wait in its retry topics, as the servers know it.
    pub async fn waiting_for_retry(&self) -> Result<u64> {
        let settings = &self.settings;
        waiting::count(&settings.properties, &settings.group, &settings.places).await
    }

    fn run(&self) -> MutexGuard<'_, Option<Run>> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared(&self) -> Option<Arc<Shared>> {
        self.run().as_ref().map(|run| Arc::clone(&run.shared))
    }

    fn start(&self, limits: Limits, facts: Facts) -> Result<Run> {
        let settings = &self.settings;
        let producer = Producer::new(&settings.properties, "open")?;
        let shared = Arc::new(Shared::new(Arc::clone(&settings.places), limits, Arc::clone(&self.sessions)));
        let task = Task {
            config: settings.properties.member(&settings.group, settings.session_timeout),
            commit_interval: settings.commit_interval,
            poll_interval_max: settings.poll_interval_max,
        };
        let thread = std::thread::Builder::new().name("hapax-kafka".to_owned());
        let handle = thread
            .spawn({
                let shared = Arc::clone(&shared);
                move || poller::run(&shared, &task)
            })
            .map_err(|refused| {
                Error::new(ErrorKind::Unavailable, "open").because("no thread can be started").with_source(refused)
            })?;
        Ok(Run { shared, producer, facts, thread: handle.thread().clone() })
    }
}

impl Run {
    fn is_over(&self) -> bool {
        self.shared.is_closing()
    }

    fn end(&self) {
        self.shared.stop(true);
        self.thread.unpark();
    }
}

#[async_trait]
impl Broker for KafkaBroker {
    async fn open(&self, limits: Limits) -> Result<()> {
        if let Some(run) = self.run().as_ref().filter(|run| !run.is_over()) {
            run.shared.lock().limits = limits;
            return Ok(());
        }
        let settings = &self.settings;
        let facts = topics::check(&settings.properties, &settings.places, settings.declare.as_ref()).await?;
        let run = self.start(limits, facts)?;
        let shared = Arc::clone(&run.shared);
        if let Some(other) = self.run().replace(run) {
            other.end();
        }
        let joining = async {
            loop {
                let told = shared.arrivals.notified();
                if shared.is_joined() {
                    return;
                }
                told.await;
            }
        };
        // Either way it is open.
        let _ = timeout(JOIN_MAX, joining).await;
        Ok(())
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        let Some(shared) = self.shared() else {
            return Err(Error::new(ErrorKind::Configuration, "receive").because("`open` comes first"));
        };
        loop {
            // Listening before looking: from its creation on, `notified` misses no `notify_waiters`. What `take` hands out
            // is returned without another await, so a dropped future has taken nothing.
            let arrived = shared.arrivals.notified();
            match shared.take(want) {
                Take::Some(given) => {
                    let limits = shared.lock().limits.message;
                    return Ok(deliveries(given, &shared.places, &limits));
                }
                Take::Stopped => return Ok(Vec::new()),
                Take::Trouble(trouble) => return Err(trouble),
                Take::Nothing(None) => arrived.await,
                Take::Nothing(Some(until)) => tokio::select! {
                    biased;
                    () = arrived => {}
                    () = tokio::time::sleep_until(until) => {}
                },
            }
        }
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        let Some(run) = self.run().clone() else {
            return batch.iter().map(|_| Err(stale())).collect();
        };
        let mut answers: Vec<Option<Result<()>>> = Vec::with_capacity(batch.len());
        let mut copies = Vec::new();
        {
            let mut state = run.shared.lock();
            for (receipt, settlement) in batch {
                answers.push(match settlement {
                    Settlement::Ack => Some(settled(state.settle(*receipt, Assignment::ack))),
                    Settlement::Release { .. } => Some(settled(state.settle(*receipt, Assignment::release))),
                    Settlement::Retry { .. } | Settlement::DeadLetter(_) => {
                        let position = receipt.position;
                        let found = state.of(*receipt).and_then(|assignment| assignment.begin_placing(position));
                        match found {
                            Some(fetched) => {
                                let placing = Placing { shared: &run.shared, receipt: *receipt, placed: false };
                                copies.push((answers.len(), placing, fetched, settlement));
                                None
                            }
                            None => Some(Err(stale())),
                        }
                    }
                });
            }
        }
        // Room, or something to hand out again.
        run.shared.arrivals.notify_waiters();
        if !copies.is_empty() {
            let records = copies.iter().map(|(_, _, fetched, settlement)| copy(&run, fetched, settlement)).collect();
            // Each is done as soon as it is confirmed: whoever gives up waiting for one loses no answer about another.
            let answered = |at: usize, placed: Result<()>| {
                let (slot, placing, ..) = &mut copies[at];
                answers[*slot] = Some(placed.and_then(|()| placing.placed()));
            };
            run.producer.send("settle", records, answered).await;
        }
        answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err(stale()))).collect()
    }

    async fn stop(&self) -> Result<()> {
        if let Some(shared) = self.shared() {
            shared.stop(false);
        }
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        let Some(run) = self.run().clone() else { return Ok(()) };
        run.end();
        let mut ended = run.shared.ended.subscribe();
        let waited = timeout(CLOSE_MAX, ended.wait_for(|ended| *ended)).await.is_ok();
        if !waited {
            tracing::warn!("leaving the group takes long; it goes on behind `close`");
        }
        match run.shared.uncommitted() {
            0 => Ok(()),
            partitions => Err(Error::new(ErrorKind::Unavailable, "close").because(format!(
                "the server did not confirm the last commit of {partitions} partitions: what is done in them is delivered \
                 again, and found processed"
            ))),
        }
    }

    fn capabilities(&self) -> Capabilities {
        let facts = self.run().as_ref().map(|run| run.facts);
        let mut capabilities = Capabilities::none("kafka");
        capabilities.order = BrokerOrder::Partition;
        capabilities.retry_max = self.settings.places.longest();
        capabilities.settle_fenced = true;
        capabilities.position_is_stable = true;
        capabilities.durability = facts.map_or(Durability::Lossy, |facts| facts.durability);
        capabilities.redelivery_horizon = facts.and_then(|facts| facts.kept);
        capabilities
    }

    fn lag(&self) -> Option<u64> {
        self.shared()?.lag()
    }
}

/// The record that a retry or dead letter is.
fn copy(run: &Run, fetched: &Fetched, settlement: &Settlement) -> Result<Sending> {
    let places = &run.shared.places;
    let main = places.main(fetched.place);
    let raw = &fetched.entry.raw;
    let (topic, headers) = match settlement {
        Settlement::DeadLetter(letter) => (&places.dead[main], raw.dead(letter)),
        Settlement::Retry { after } => {
            let (place, step) = places.retry(main, *after).ok_or_else(no_steps)?;
            let due = SystemTime::now() + (*after).min(step);
            (&place.name, raw.retried(&fetched.home(places), due))
        }
        Settlement::Ack | Settlement::Release { .. } => {
            return Err(Error::new(ErrorKind::Internal, "settle").because("an ack is no copy"));
        }
    };
    Ok(Sending { topic: Arc::clone(topic), key: raw.key(), value: raw.value(), headers })
}

fn no_steps() -> Error {
    Error::new(ErrorKind::Rejected, "settle").because("there are no retry_steps: retries wait in this process")
}

/// A delivery of which a copy is under way. However that ends, dropped futures included, it can be settled again unless
/// the copy is there.
struct Placing<'a> {
    shared: &'a Shared,
    receipt: Receipt,
    placed: bool,
}

impl Placing<'_> {
    fn placed(&mut self) -> Result<()> {
        self.placed = true;
        let found = self.shared.placed(self.receipt).then_some(());
        self.shared.arrivals.notify_waiters();
        settled(found)
    }
}

impl Drop for Placing<'_> {
    fn drop(&mut self) {
        if !self.placed {
            self.shared.not_placed(self.receipt);
        }
    }
}

impl Drop for KafkaBroker {
    fn drop(&mut self) {
        if let Some(run) = self.run().take() {
            run.end();
        }
    }
}

impl fmt::Debug for KafkaBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaBroker").field("settings", &self.settings).finish_non_exhaustive()
    }
}
