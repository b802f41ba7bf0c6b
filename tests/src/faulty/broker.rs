//! A broker whose calls fail, hang or lose their answers, and that delivers twice and out of order.

use std::fmt;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use hapax::{
    Broker, Capabilities, Delivery, Error, ErrorKind, Limits, Outgoing, Publisher, Receipt, Result, Settlement, Want,
};

use super::FaultSwitch;

/// Wraps a broker. `open`, `stop` and `close` suffer outages only, so that a consumer can start and end.
pub struct FaultyBroker {
    inner: Arc<dyn Broker>,
    again: Option<Arc<dyn Publisher>>,
    copies: Mutex<Vec<Outgoing>>,
    faults: FaultSwitch,
}

impl FaultyBroker {
    /// Around `inner`, struck by `faults`; nothing is delivered twice.
    pub fn new(inner: Arc<dyn Broker>, faults: FaultSwitch) -> Self {
        Self { inner, again: None, copies: Mutex::default(), faults }
    }

    /// Messages are delivered twice by sending them once more through `publisher`, so that a copy is a delivery like
    /// any other, with a receipt of its own.
    #[must_use]
    pub fn duplicating(mut self, publisher: Arc<dyn Publisher>) -> Self {
        self.again = Some(publisher);
        self
    }

    /// A dead letter that came back bears a token that a copy would not have: it is not copied.
    fn draw_copies(&self, deliveries: &[Delivery]) {
        if self.again.is_none() {
            return;
        }
        let copies = deliveries
            .iter()
            .filter(|delivery| delivery.message.reopen().is_none() && delivery.message.defect().is_none())
            .filter(|_| self.faults.strikes("duplicate", |faults| faults.duplicate))
            .map(|delivery| Outgoing::new((*delivery.message).clone()));
        self.copies.lock().expect("nobody panics while holding the copies").extend(copies);
    }

    async fn send_copies(&self) {
        let copies = std::mem::take(&mut *self.copies.lock().expect("nobody panics while holding the copies"));
        if let Some(publisher) = self.again.as_ref().filter(|_| !copies.is_empty()) {
            // A copy that could not be sent is a copy less.
            let _ = publisher.publish(copies).await;
        }
    }
}

#[async_trait]
impl Broker for FaultyBroker {
    async fn open(&self, limits: Limits) -> Result<()> {
        self.faults.outage("open")?;
        self.inner.open(limits).await
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        self.send_copies().await;
        self.faults.outage("receive")?;
        if self.faults.strikes("refuse", |faults| faults.refuse) {
            return Err(Error::new(ErrorKind::Unavailable, "receive").because("injected: refused"));
        }
        let mut deliveries = self.inner.receive(want).await?;
        if self.faults.strikes("reorder", |faults| faults.reorder) {
            self.faults.state().rng.shuffle(&mut deliveries);
        }
        // Copies are sent with the next receive: waiting here would lose deliveries if this future were dropped.
        self.draw_copies(&deliveries);
        Ok(deliveries)
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        if let Err(error) = self.faults.before("settle").await {
            let refusal = || Error::new(error.kind(), "settle").because(error.to_string());
            return batch.iter().map(|_| Err(refusal())).collect();
        }
        let answers = self.inner.settle(batch).await;
        answers.into_iter().map(|answer| self.faults.after("settle", answer)).collect()
    }

    async fn stop(&self) -> Result<()> {
        self.faults.outage("stop")?;
        self.inner.stop().await
    }

    async fn close(&self) -> Result<()> {
        self.faults.outage("close")?;
        self.inner.close().await
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn lag(&self) -> Option<u64> {
        self.inner.lag()
    }
}

impl fmt::Debug for FaultyBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyBroker").field("faults", &self.faults).finish_non_exhaustive()
    }
}
