//! The broker that wiring under test is given: one in memory, seen by the chronicle and out of reach for dead workers.

use std::fmt;

use async_trait::async_trait;
use hapax::{Broker, Capabilities, Delivery, Limits, Receipt, Result, Settlement, Want};
use hapax_memory::MemoryBroker;

use super::life::{Life, Strike};

/// One worker's connection.
pub(super) struct StageBroker {
    inner: MemoryBroker,
    life: Life,
}

impl StageBroker {
    pub(super) fn new(inner: MemoryBroker, life: Life) -> Self {
        Self { inner, life }
    }

    /// The connection broke: what it held is delivered again.
    pub(super) fn end_session(&self) {
        self.inner.end_session();
    }
}

#[async_trait]
impl Broker for StageBroker {
    async fn open(&self, limits: Limits) -> Result<()> {
        self.inner.open(limits).await
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        self.life.alive().await;
        let deliveries = self.inner.receive(want).await?;
        for delivery in &deliveries {
            self.life.chronicle().delivered(self.life.number(), delivery);
        }
        Ok(deliveries)
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        if batch.iter().any(|(_, settlement)| matches!(settlement, Settlement::Ack)) {
            self.life.reaches(Strike::BeforeAck).await;
        }
        self.life.alive().await;
        let answers = self.inner.settle(batch).await;
        for ((receipt, settlement), answer) in batch.iter().zip(&answers) {
            self.life.chronicle().settled(*receipt, settlement, answer.is_ok());
        }
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

    fn lag(&self) -> Option<u64> {
        self.inner.lag()
    }
}

impl fmt::Debug for StageBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StageBroker").field("inner", &self.inner).finish_non_exhaustive()
    }
}
