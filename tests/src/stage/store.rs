//! The store that wiring under test is given: the real one, seen by the chronicle and out of reach for dead workers.

use std::time::Duration;

use async_trait::async_trait;
use hapax::{
    Claim, ClaimRequest, ConsumerId, Lease, Outcome, ProcessedStore, Recorded, Renewal, Result, StoreHealth,
    TransactionalStore,
};

use super::life::{Life, Strike};

/// The store of a consumer under test: `T`, watched. Transactional where `T` is, with the same transaction, so that
/// `on_tx` handlers compile as they are.
#[derive(Clone, Debug)]
pub struct StageStore<T> {
    inner: T,
    life: Life,
}

impl<T: ProcessedStore + Clone> StageStore<T> {
    pub(super) fn new(inner: T, life: Life) -> Self {
        Self { inner, life }
    }

    /// The store itself, for wiring that names its type and takes no other. Nothing is seen of it then: what tells of
    /// runs, duplicates and dead letters still holds, but no call fails on purpose, and no crash comes before a record.
    pub fn unwatched(&self) -> T {
        self.life.chronicle().is_unwatched();
        self.inner.clone()
    }

    async fn call<A>(&self, operation: &'static str, call: impl Future<Output = Result<A>>) -> Result<A> {
        self.life.alive().await;
        if let Err(error) = self.life.strikes().store_failure(operation) {
            self.life.chronicle().store_failed(operation);
            return Err(error);
        }
        let answer = call.await;
        self.life.alive().await;
        answer
    }
}

#[async_trait]
impl<T: ProcessedStore + Clone> ProcessedStore for StageStore<T> {
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId> {
        self.inner.open(consumer, retention).await
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        let claims = self.call("claim", self.inner.claim(batch, lease)).await?;
        for (request, claim) in batch.iter().zip(&claims) {
            self.life.chronicle().claimed(self.life.number(), request.key, claim);
        }
        Ok(claims)
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        self.call("renew", self.inner.renew(leases, lease)).await
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        if batch.iter().any(|(_, outcome)| *outcome == Outcome::Processed) {
            self.life.reaches(Strike::BeforeRecord).await;
        }
        let answers = self.call("record", self.inner.record(batch)).await?;
        for ((lease, outcome), answer) in batch.iter().zip(&answers) {
            self.life.chronicle().recorded(lease, outcome, *answer);
        }
        Ok(answers)
    }

    async fn probe(&self) -> Result<StoreHealth> {
        self.inner.probe().await
    }
}

/// A transaction that was lent out, and what was recorded in it.
#[derive(Debug)]
pub struct Lent<L> {
    inner: L,
    recorded: Vec<(Lease, Outcome, Recorded)>,
}

#[async_trait]
impl<T: TransactionalStore> TransactionalStore for StageStore<T> {
    type Tx = T::Tx;
    type Lent = Lent<T::Lent>;

    async fn begin(&self) -> Result<(T::Tx, Self::Lent)> {
        let (tx, inner) = self.call("begin", self.inner.begin()).await?;
        Ok((tx, Lent { inner, recorded: Vec::new() }))
    }

    async fn record_in(&self, lent: &mut Self::Lent, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let answers = self.call("record_in", self.inner.record_in(&mut lent.inner, batch)).await?;
        let recorded = batch.iter().zip(&answers).map(|((lease, outcome), answer)| (*lease, outcome.clone(), *answer));
        lent.recorded.extend(recorded);
        Ok(answers)
    }

    async fn commit(&self, lent: Self::Lent) -> Result<()> {
        self.life.reaches(Strike::BeforeRecord).await;
        self.call("commit", self.inner.commit(lent.inner)).await?;
        for (lease, outcome, answer) in &lent.recorded {
            self.life.chronicle().recorded(lease, outcome, *answer);
        }
        Ok(())
    }
}
