//! Faults by hand, for one process alone: what the next call of a verb meets, and a process that stands still.
//!
//! The rig's own faults strike every process at a rate; these strike one call, once. A frozen process is not polled, as
//! after SIGSTOP: its calls under way stand still with it, and reach the store late when it wakes. Its handlers run on
//! tasks of their own and are held by what they wait for.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::task::AtomicWaker;
use hapax::{
    Broker, Capabilities, Claim, ClaimRequest, Consumer, ConsumerBuilder, ConsumerId, Delivery, Error, ErrorKind,
    EventKey, Lease, Limits, Outcome, ProcessedStore, Receipt, Recorded, Renewal, Result, Settlement, StoreHealth,
    TransactionalStore, Want,
};
use hapax_testkit::faulty::{FaultyBroker, FaultyStore};
use tokio::sync::Semaphore;

use crate::journal::Journaled;
use crate::rig::{Process, Rig};

/// What a call meets.
#[derive(Clone)]
pub(crate) enum Fault {
    /// An error before anything was done.
    Refuse(ErrorKind),
    /// It takes place, and its answer is lost.
    LoseReply,
    /// It neither acts nor answers.
    Hang,
    /// It takes place and never answers.
    HangAfter,
    /// It takes place once the gate is open.
    Gate(Arc<Semaphore>),
    /// The same, and its answer is lost.
    GateAndLose(Arc<Semaphore>),
}

/// What the calls of one process meet, by verb.
#[derive(Clone, Default)]
pub(crate) struct Script(Arc<Scene>);

#[derive(Default)]
struct Scene {
    faults: Mutex<BTreeMap<&'static str, VecDeque<Fault>>>,
    /// Records that somebody else's transaction locks.
    locked: Mutex<Vec<EventKey>>,
    frozen: AtomicBool,
    /// Whether a commit claims the next event.
    claims_at_commit: AtomicBool,
    /// Calls of that verb.
    claims: AtomicUsize,
    waker: AtomicWaker,
}

impl Script {
    /// The next call of this verb that has no fault yet meets this one.
    pub(crate) fn next(&self, verb: &'static str, fault: Fault) {
        self.0.faults.lock().expect("nobody panics while holding the faults").entry(verb).or_default().push_back(fault);
    }

    /// The next call of this verb waits until the answer gets a permit.
    pub(crate) fn gate(&self, verb: &'static str) -> Arc<Semaphore> {
        let gate = Arc::new(Semaphore::new(0));
        self.next(verb, Fault::Gate(Arc::clone(&gate)));
        gate
    }

    /// These records cannot be written, and no batch with one of them: a store refuses those, so that they are halved.
    pub(crate) fn lock(&self, keys: impl IntoIterator<Item = EventKey>) {
        *self.0.locked.lock().expect("nobody panics while holding it") = keys.into_iter().collect();
    }

    fn check_locks(&self, batch: &[(Lease, Outcome)]) -> Result<()> {
        let locked = self.0.locked.lock().expect("nobody panics while holding it");
        match batch.iter().any(|(lease, _)| locked.contains(&lease.key)) {
            false => Ok(()),
            true if batch.len() > 1 => Err(Error::new(ErrorKind::Rejected, "record")),
            true => Err(Error::new(ErrorKind::Unavailable, "record")),
        }
    }

    /// From now on the store says that its commits claim the next event, and they do.
    pub(crate) fn claims_at_commit(&self) {
        self.0.claims_at_commit.store(true, Ordering::SeqCst);
    }

    /// How often the store was asked for events by a call of its own.
    pub(crate) fn claims(&self) -> usize {
        self.0.claims.load(Ordering::SeqCst)
    }

    /// Whether every fault was met.
    pub(crate) fn is_over(&self) -> bool {
        self.0.faults.lock().expect("nobody panics while holding the faults").values().all(VecDeque::is_empty)
    }

    /// The process stands still.
    pub(crate) fn freeze(&self) {
        self.0.frozen.store(true, Ordering::SeqCst);
    }

    /// The process goes on.
    pub(crate) fn thaw(&self) {
        self.0.frozen.store(false, Ordering::SeqCst);
        self.0.waker.wake();
    }

    fn take(&self, verb: &'static str) -> Option<Fault> {
        self.0.faults.lock().expect("nobody panics while holding the faults").get_mut(verb)?.pop_front()
    }

    async fn around<T>(&self, verb: &'static str, call: impl Future<Output = Result<T>>) -> Result<T> {
        match self.take(verb) {
            None => call.await,
            Some(Fault::Refuse(kind)) => Err(Error::new(kind, verb)),
            Some(Fault::LoseReply) => {
                call.await?;
                Err(Error::new(ErrorKind::Unknown, verb))
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::HangAfter) => {
                call.await?;
                std::future::pending().await
            }
            Some(Fault::Gate(gate)) => {
                gate.acquire().await.expect("gates are not closed").forget();
                call.await
            }
            Some(Fault::GateAndLose(gate)) => {
                gate.acquire().await.expect("gates are not closed").forget();
                call.await?;
                Err(Error::new(ErrorKind::Unknown, verb))
            }
        }
    }
}

/// A run that is polled unless its process is frozen.
struct Freezable<F> {
    run: Pin<Box<F>>,
    script: Script,
}

impl<F: Future> Future for Freezable<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.script.0.waker.register(cx.waker());
        if self.script.0.frozen.load(Ordering::SeqCst) {
            return Poll::Pending;
        }
        self.run.as_mut().poll(cx)
    }
}

/// The memory store of a rig, as a process with a script sees it.
pub(crate) type ScriptedStore = Journaled<Scripted<FaultyStore>>;

/// Starts a process whose calls follow `script`.
pub(crate) async fn start<S: Send + Sync + 'static>(
    rig: &Rig,
    name: &str,
    script: &Script,
    wire: impl FnOnce(ConsumerBuilder<(), ScriptedStore>) -> ConsumerBuilder<S, ScriptedStore>,
) -> Process {
    let inner = FaultyStore::new(Arc::new(rig.store.clone()), rig.store_faults.clone());
    let store = Journaled { inner: Scripted::new(inner, script), journal: rig.journal.clone() };
    start_on(rig, name, script, store, wire).await
}

/// Starts a process on this store whose calls to the broker follow `script`.
pub(crate) async fn start_on<T: ProcessedStore, S: Send + Sync + 'static>(
    rig: &Rig,
    name: &str,
    script: &Script,
    store: T,
    wire: impl FnOnce(ConsumerBuilder<(), T>) -> ConsumerBuilder<S, T>,
) -> Process {
    let connection = Arc::new(rig.broker.another());
    let faulty = FaultyBroker::new(Arc::clone(&connection) as _, rig.broker_faults.clone());
    let broker = Journaled { inner: Scripted::new(faulty, script), journal: rig.journal.clone() };
    let seed = rig.processes.fetch_add(1, Ordering::SeqCst);
    let builder = Consumer::builder(name, broker, store).seed(seed).observer(Arc::new(rig.journal.clone()));
    let consumer = match wire(builder).build().await {
        Ok(consumer) => consumer,
        Err(error) => panic!("{error}"),
    };
    let handle = consumer.handle();
    let run = Box::pin(consumer.run(std::future::pending()));
    let running = tokio::spawn(Freezable { run, script: script.clone() });
    Process { handle, connection, running }
}

/// A store or broker whose calls follow a script.
#[derive(Clone)]
pub(crate) struct Scripted<T> {
    inner: T,
    script: Script,
}

impl<T> Scripted<T> {
    pub(crate) fn new(inner: T, script: &Script) -> Self {
        Self { inner, script: script.clone() }
    }
}

#[async_trait]
impl<T: ProcessedStore> ProcessedStore for Scripted<T> {
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId> {
        self.inner.open(consumer, retention).await
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        self.script.0.claims.fetch_add(1, Ordering::SeqCst);
        self.script.around("claim", self.inner.claim(batch, lease)).await
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        self.script.around("renew", self.inner.renew(leases, lease)).await
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        self.script.check_locks(batch)?;
        self.script.around("record", self.inner.record(batch)).await
    }

    async fn probe(&self) -> Result<StoreHealth> {
        let mut health = self.script.around("probe", self.inner.probe()).await?;
        if self.script.0.claims_at_commit.load(Ordering::SeqCst) {
            health.claims_at_commit = true;
            // A file has one transaction at a time; the runtime is to behave as before a server.
            health.transactions_block_writes = false;
            health.transactions_max = None;
        }
        Ok(health)
    }
}

#[async_trait]
impl<T: TransactionalStore> TransactionalStore for Scripted<T> {
    type Tx = T::Tx;
    type Lent = T::Lent;

    async fn begin(&self) -> Result<(T::Tx, T::Lent)> {
        self.script.around("begin", self.inner.begin()).await
    }

    async fn record_in(&self, lent: &mut T::Lent, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        self.script.around("record-in", self.inner.record_in(lent, batch)).await
    }

    async fn commit(&self, lent: T::Lent) -> Result<()> {
        self.script.around("commit", self.inner.commit(lent)).await
    }

    /// Not in one transaction: nothing here dies between the two.
    async fn commit_and_claim(
        &self,
        lent: T::Lent,
        batch: &[(Lease, Outcome)],
        next: &ClaimRequest,
        lease: Duration,
    ) -> Result<(Vec<Recorded>, Option<Lease>)> {
        let both = async {
            let answers = self.inner.record_and_commit(lent, batch).await?;
            let is_committed = answers.iter().all(|answer| matches!(answer, Recorded::Done | Recorded::Vanished));
            let claim = if is_committed { self.inner.claim(&[*next], lease).await?.pop() } else { None };
            let granted = claim.and_then(|claim| match claim {
                Claim::Granted(lease, None) => Some(lease),
                _ => None,
            });
            Ok((answers, granted))
        };
        self.script.around("commit-and-claim", both).await
    }
}

#[async_trait]
impl<T: Broker> Broker for Scripted<T> {
    async fn open(&self, limits: Limits) -> Result<()> {
        self.inner.open(limits).await
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        self.script.around("receive", self.inner.receive(want)).await
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        let answers = self.script.around("settle", async { Ok(self.inner.settle(batch).await) }).await;
        answers.unwrap_or_else(|error| batch.iter().map(|_| Err(Error::new(error.kind(), "settle"))).collect())
    }

    async fn stop(&self) -> Result<()> {
        self.script.around("stop", self.inner.stop()).await
    }

    async fn close(&self) -> Result<()> {
        self.script.around("close", self.inner.close()).await
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
}

impl<T> fmt::Debug for Scripted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scripted").finish_non_exhaustive()
    }
}
