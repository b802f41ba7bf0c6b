//! The way from a worker to its back ends: calls take time both ways, so that a worker can die before a call took place,
//! between that and its answer, and behind it; some calls arrive when their caller has given up.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use fastrand::Rng;
use futures_util::future::join_all;
use hapax::{
    Broker, Capabilities, Claim, ClaimRequest, ConsumerId, Delivery, Error, ErrorKind, EventKey, Lease, Limits,
    Outcome, Outgoing, ProcessedStore, Publisher, Receipt, Recorded, Renewal, Result, Settlement, StoreHealth,
    TransactionalStore, Want,
};
use hapax_memory::MemoryPublisher;
use tokio::time::sleep;

use super::plan::{Chaos, SCOPES};
use crate::faulty::FaultSwitch;
use crate::ledger::Ledger;

/// One network for all workers.
pub(super) struct Network {
    rng: Mutex<Rng>,
    latency_max_ms: u64,
    late: f64,
    calm: AtomicBool,
    rows: Mutex<BTreeMap<(EventKey, u64), Row>>,
}

/// An effect that waits for its transaction's commit.
struct Row {
    ledger: Ledger,
    attempt: u32,
    times: u32,
}

impl Network {
    pub(super) fn new(rng: Rng, chaos: &Chaos) -> Self {
        Self {
            rng: Mutex::new(rng),
            latency_max_ms: chaos.latency_max_ms,
            late: chaos.late,
            calm: AtomicBool::new(false),
            rows: Mutex::default(),
        }
    }

    /// From here on no call goes astray.
    pub(super) fn calm(&self) {
        self.calm.store(true, Ordering::Relaxed);
    }

    fn rng(&self) -> MutexGuard<'_, Rng> {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rows(&self) -> MutexGuard<'_, BTreeMap<(EventKey, u64), Row>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn travel(&self) {
        let ms = self.rng().u64(0..=self.latency_max_ms);
        if ms == 0 {
            tokio::task::yield_now().await;
        } else {
            sleep(Duration::from_millis(ms)).await;
        }
    }

    /// After how long a call takes place that its caller does not wait for.
    fn strays(&self) -> Option<Duration> {
        let mut rng = self.rng();
        let may = self.late > 0.0 && !self.calm.load(Ordering::Relaxed);
        (may && rng.f64() < self.late).then(|| Duration::from_millis(rng.u64(1..8_000)))
    }

    /// What takes effect with a processed mark.
    fn committed(&self, batch: &[(Lease, Outcome)], answers: &[Recorded]) {
        for ((lease, outcome), answer) in batch.iter().zip(answers) {
            let is_done = matches!(answer, Recorded::Done | Recorded::Vanished) && *outcome == Outcome::Processed;
            let Some(row) = is_done.then(|| self.rows().remove(&(lease.key, lease.fence.get()))).flatten() else {
                continue;
            };
            (0..row.times).for_each(|_| row.ledger.effect(lease.key, row.attempt, lease.fence.get()));
        }
    }
}

/// A store at the other end of the network.
#[derive(Clone)]
pub(super) struct RemoteStore {
    pub(super) inner: Arc<dyn ProcessedStore>,
    pub(super) network: Arc<Network>,
}

impl RemoteStore {
    /// Calls, or goes astray: then it takes place later, and no answer comes.
    async fn call<A, F>(&self, call: impl FnOnce(Self) -> F) -> Result<A>
    where
        F: Future<Output = Result<A>> + Send + 'static,
    {
        self.network.travel().await;
        if let Some(wait) = self.network.strays() {
            let call = call(self.clone());
            tokio::spawn(async move {
                sleep(wait).await;
                drop(call.await);
            });
            return std::future::pending().await;
        }
        let answer = call(self.clone()).await;
        self.network.travel().await;
        answer
    }
}

#[async_trait]
impl ProcessedStore for RemoteStore {
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId> {
        self.inner.open(consumer, retention).await
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        let batch = batch.to_vec();
        self.call(|store| async move { store.inner.claim(&batch, lease).await }).await
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        let leases = leases.to_vec();
        self.call(|store| async move { store.inner.renew(&leases, lease).await }).await
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let batch = batch.to_vec();
        let record = |store: Self| async move {
            let answers = store.inner.record(&batch).await?;
            store.network.committed(&batch, &answers);
            Ok(answers)
        };
        self.call(record).await
    }

    async fn probe(&self) -> Result<StoreHealth> {
        self.network.travel().await;
        self.inner.probe().await
    }
}

/// The store of one worker: witnessed and faulty calls over the network, and transactions whose effects are seen with
/// their mark.
#[derive(Clone)]
pub(super) struct WorkerStore {
    /// Witness, faults, network.
    pub(super) calls: Arc<dyn ProcessedStore>,
    pub(super) remote: RemoteStore,
    pub(super) faults: FaultSwitch,
    pub(super) ledger: Ledger,
}

/// What a transactional handler writes through.
#[derive(Debug)]
pub(super) struct Tx(Arc<Mutex<BTreeMap<EventKey, u32>>>);

impl Tx {
    /// One effect of this event.
    pub(super) fn write(&self, key: EventKey) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default() += 1;
    }
}

/// The runtime's side of a transaction.
pub(super) struct Lent {
    effects: Arc<Mutex<BTreeMap<EventKey, u32>>>,
    marks: Vec<(Lease, Outcome)>,
}

#[async_trait]
impl ProcessedStore for WorkerStore {
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId> {
        self.calls.open(consumer, retention).await
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        self.calls.claim(batch, lease).await
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        self.calls.renew(leases, lease).await
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        self.calls.record(batch).await
    }

    async fn probe(&self) -> Result<StoreHealth> {
        let mut health = self.calls.probe().await?;
        health.claims_at_commit = true;
        Ok(health)
    }
}

#[async_trait]
impl TransactionalStore for WorkerStore {
    type Tx = Tx;
    type Lent = Lent;

    async fn begin(&self) -> Result<(Tx, Lent)> {
        self.faults.before("begin").await?;
        self.remote.network.travel().await;
        let effects = Arc::<Mutex<BTreeMap<EventKey, u32>>>::default();
        Ok((Tx(Arc::clone(&effects)), Lent { effects, marks: Vec::new() }))
    }

    async fn record_in(&self, lent: &mut Lent, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        self.faults.before("record").await?;
        self.remote.network.travel().await;
        // Renewed by nothing: it tells whether the lease holds.
        let leases: Vec<_> = batch.iter().map(|(lease, _)| *lease).collect();
        let holds = self.remote.inner.renew(&leases, Duration::ZERO).await?;
        lent.marks.extend_from_slice(batch);
        let answer = |renewal: &Renewal| match renewal {
            Renewal::Renewed => Recorded::Done,
            Renewal::Lost => Recorded::Fenced,
        };
        Ok(holds.iter().map(answer).collect())
    }

    async fn commit(&self, lent: Lent) -> Result<()> {
        let effects = std::mem::take(&mut *lent.effects.lock().unwrap_or_else(PoisonError::into_inner));
        for (lease, _) in &lent.marks {
            let times = effects.get(&lease.key).copied().unwrap_or_default();
            let row = Row { ledger: self.ledger.clone(), attempt: lease.attempt, times };
            self.remote.network.rows().insert((lease.key, lease.fence.get()), row);
        }
        let answers = self.calls.record(&lent.marks).await?;
        if answers.iter().all(|answer| matches!(answer, Recorded::Done | Recorded::Vanished)) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unavailable, "commit").because("could not serialise: rolled back"))
    }

    /// The claim follows the commit; what fails between the two is an answer that was lost.
    async fn commit_and_claim(
        &self,
        lent: Lent,
        batch: &[(Lease, Outcome)],
        next: &ClaimRequest,
        lease: Duration,
    ) -> Result<(Vec<Recorded>, Option<Lease>)> {
        let answers = self.record_and_commit(lent, batch).await?;
        if !answers.iter().all(|answer| matches!(answer, Recorded::Done | Recorded::Vanished)) {
            return Ok((answers, None));
        }
        let claims = self.calls.claim(&[*next], lease).await;
        let claims = claims.map_err(|error| Error::new(ErrorKind::Unknown, "commit").because(error.to_string()))?;
        let granted = claims.into_iter().find_map(|claim| match claim {
            Claim::Granted(lease, None) => Some(lease),
            _ => None,
        });
        Ok((answers, granted))
    }
}

impl fmt::Debug for WorkerStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerStore").finish_non_exhaustive()
    }
}

/// A broker at the other end of the network.
pub(super) struct RemoteBroker {
    pub(super) inner: Arc<dyn Broker>,
    pub(super) network: Arc<Network>,
}

#[async_trait]
impl Broker for RemoteBroker {
    async fn open(&self, limits: Limits) -> Result<()> {
        self.inner.open(limits).await
    }

    /// What was handed out is answered without another await, so that a dropped call loses nothing.
    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        self.network.travel().await;
        self.inner.receive(want).await
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        self.network.travel().await;
        let answers = self.inner.settle(batch).await;
        self.network.travel().await;
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

/// The way out: what it takes is an event for every consumer from then on.
pub(super) struct RemotePublisher {
    pub(super) inner: MemoryPublisher,
    pub(super) network: Arc<Network>,
    pub(super) faults: FaultSwitch,
    pub(super) ledger: Ledger,
    pub(super) scopes: usize,
}

/// Writes that this event was accepted, for each consumer.
pub(super) fn produced(ledger: &Ledger, scopes: usize, message: &hapax::Message) {
    let attributes = &message.attributes;
    let (Some(source), Some(id)) = (&attributes.source, &attributes.id) else { return };
    for scope in &SCOPES[..scopes] {
        ledger.produced(scope, id, EventKey::of(scope, source, id));
    }
}

#[async_trait]
impl Publisher for RemotePublisher {
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        let publish = |outgoing: Outgoing| {
            let sending = async move {
                self.network.travel().await;
                self.inner.send(outgoing.message.clone()).await;
                produced(&self.ledger, self.scopes, &outgoing.message);
                self.network.travel().await;
                Ok(())
            };
            self.faults.around("publish", sending)
        };
        join_all(batch.into_iter().map(publish)).await
    }
}
