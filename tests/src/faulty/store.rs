//! A store whose calls fail, hang, take long, or lose their answers.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hapax::{Claim, ClaimRequest, ConsumerId, Lease, Outcome, ProcessedStore, Recorded, Renewal, Result, StoreHealth};

use super::FaultSwitch;

/// Wraps a store. `open` and `probe` suffer outages only, so that a consumer can start.
pub struct FaultyStore {
    inner: Arc<dyn ProcessedStore>,
    faults: FaultSwitch,
}

impl FaultyStore {
    /// Around `inner`, struck by `faults`.
    pub fn new(inner: Arc<dyn ProcessedStore>, faults: FaultSwitch) -> Self {
        Self { inner, faults }
    }
}

#[async_trait]
impl ProcessedStore for FaultyStore {
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId> {
        self.faults.outage("open")?;
        self.inner.open(consumer, retention).await
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        self.faults.rejects("claim", batch.iter().map(|request| request.key))?;
        self.faults.around("claim", self.inner.claim(batch, lease)).await
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        self.faults.rejects("renew", leases.iter().map(|lease| lease.key))?;
        self.faults.around("renew", self.inner.renew(leases, lease)).await
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        self.faults.rejects("record", batch.iter().map(|(lease, _)| lease.key))?;
        self.faults.around("record", self.inner.record(batch)).await
    }

    async fn probe(&self) -> Result<StoreHealth> {
        self.faults.outage("probe")?;
        self.inner.probe().await
    }
}

impl fmt::Debug for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyStore").field("faults", &self.faults).finish_non_exhaustive()
    }
}
