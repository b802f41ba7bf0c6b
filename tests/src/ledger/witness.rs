//! Witnesses: a store and a broker that write down every call and every answer, and change nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use hapax::{
    Broker, Capabilities, Claim, ClaimRequest, ConsumerId, Delivery, EventKey, Fingerprint, Lease, Limits, Outcome,
    ProcessedStore, Receipt, Recorded, Renewal, Result, Settlement, StoreHealth, Want,
};

use super::answer::{Answer, Ending, Recording, Renewing, Settling, leaves_open};
use super::{Ledger, What};

/// A store whose calls and answers are written down. Put it outside of a faulty store to see what the worker saw.
pub struct WitnessedStore {
    inner: Arc<dyn ProcessedStore>,
    ledger: Ledger,
}

impl WitnessedStore {
    /// Around `inner`, for the worker of `ledger`.
    pub fn new(inner: Arc<dyn ProcessedStore>, ledger: Ledger) -> Self {
        Self { inner, ledger }
    }

    /// Writes these lines, unless the call is answered: a call that is dropped leaves its outcome unknown.
    fn unanswered(&self, lines: Vec<What>) -> Unanswered {
        Unanswered { ledger: self.ledger.clone(), lines }
    }

    fn now(&self) -> Duration {
        self.ledger.book.start.elapsed()
    }
}

struct Unanswered {
    ledger: Ledger,
    lines: Vec<What>,
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        for line in self.lines.drain(..) {
            self.ledger.write(line);
        }
    }
}

#[async_trait]
impl ProcessedStore for WitnessedStore {
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId> {
        self.inner.open(consumer, retention).await
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        let asked = self.now();
        let claimed = |request: &ClaimRequest, answer| {
            let &ClaimRequest { key, fingerprint, token, reopen, .. } = request;
            What::Claimed { key, asked, token, fingerprint, reopen: reopen.is_some(), lease, answer }
        };
        for &ClaimRequest { key, token, reopen, .. } in batch {
            self.ledger.write(What::ClaimAsked { key, token, reopen: reopen.is_some() });
        }
        let unknown = batch.iter().map(|request| claimed(request, Answer::Unknown)).collect();
        let mut unanswered = self.unanswered(unknown);
        let answers = self.inner.claim(batch, lease).await;
        unanswered.lines.clear();
        for (n, request) in batch.iter().enumerate() {
            let answer = match &answers {
                Ok(answers) => answers.get(n).map_or(Answer::Unknown, Answer::of),
                Err(error) if leaves_open(error.kind()) => Answer::Unknown,
                Err(_) => Answer::Refused,
            };
            self.ledger.write(claimed(request, answer));
        }
        answers
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        let asked = self.now();
        let answers = self.inner.renew(leases, lease).await;
        for (n, held) in leases.iter().enumerate() {
            let answer = answers.as_ref().ok().and_then(|answers| answers.get(n));
            let answer = answer.map_or(Renewing::Unknown, |answer| (*answer).into());
            self.ledger.write(What::Renewed { key: held.key, asked, fence: held.fence.get(), lease, answer });
        }
        answers
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let asked = self.now();
        let recorded = |(lease, outcome): &(Lease, Outcome), answer| {
            let (fence, outcome) = (lease.fence.get(), Ending::from(outcome));
            What::Recorded { key: lease.key, asked, fence, outcome, answer }
        };
        for (lease, outcome) in batch {
            let outcome = Ending::from(outcome);
            self.ledger.write(What::RecordAsked { key: lease.key, fence: lease.fence.get(), outcome });
        }
        let unknown = batch.iter().map(|item| recorded(item, Recording::Unknown)).collect();
        let mut unanswered = self.unanswered(unknown);
        let answers = self.inner.record(batch).await;
        unanswered.lines.clear();
        for (n, item) in batch.iter().enumerate() {
            let answer = match &answers {
                Ok(answers) => answers.get(n).map_or(Recording::Unknown, |answer| (*answer).into()),
                Err(error) if leaves_open(error.kind()) => Recording::Unknown,
                Err(_) => Recording::Refused,
            };
            self.ledger.write(recorded(item, answer));
        }
        answers
    }

    async fn probe(&self) -> Result<StoreHealth> {
        self.inner.probe().await
    }
}

impl fmt::Debug for WitnessedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WitnessedStore").field("ledger", &self.ledger).finish_non_exhaustive()
    }
}

/// A broker whose deliveries and settlements are written down. Deliveries without id or source are not.
pub struct WitnessedBroker {
    inner: Arc<dyn Broker>,
    consumer: Box<str>,
    ledger: Ledger,
    keys: Mutex<BTreeMap<Receipt, EventKey>>,
}

impl WitnessedBroker {
    /// Around `inner`, for this consumer and the worker of `ledger`.
    pub fn new(inner: Arc<dyn Broker>, consumer: impl Into<Box<str>>, ledger: Ledger) -> Self {
        Self { inner, consumer: consumer.into(), ledger, keys: Mutex::default() }
    }

    fn keys(&self) -> MutexGuard<'_, BTreeMap<Receipt, EventKey>> {
        self.keys.lock().expect("nobody panics while holding the keys")
    }

    fn witness(&self, delivery: &Delivery) {
        let (attributes, data) = (&delivery.message.attributes, &delivery.message.data);
        let (Some(source), Some(id)) = (&attributes.source, &attributes.id) else { return };
        let key = EventKey::of(&self.consumer, source, id);
        self.keys().insert(delivery.receipt, key);
        let fingerprint = Fingerprint::of(attributes.content_type.as_deref(), data);
        let (receipt, lane) = (delivery.receipt, attributes.partition_key.clone());
        self.ledger.write(What::Delivered { key, receipt, fingerprint, lane });
    }
}

#[async_trait]
impl Broker for WitnessedBroker {
    async fn open(&self, limits: Limits) -> Result<()> {
        self.inner.open(limits).await
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        let deliveries = self.inner.receive(want).await?;
        for delivery in &deliveries {
            self.witness(delivery);
        }
        Ok(deliveries)
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        let mut lines = Vec::with_capacity(batch.len());
        for (receipt, settlement) in batch {
            let key = self.keys().get(receipt).copied();
            lines.push((key, *receipt, Settling::from(settlement)));
        }
        for (key, receipt, settlement) in lines.clone() {
            self.ledger.write(What::SettleAsked { key, receipt, settlement });
        }
        let answers = self.inner.settle(batch).await;
        for ((key, receipt, settlement), answer) in lines.into_iter().zip(&answers) {
            self.ledger.write(What::Settled { key, receipt, settlement, ok: answer.is_ok() });
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

impl fmt::Debug for WitnessedBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WitnessedBroker").field("ledger", &self.ledger).finish_non_exhaustive()
    }
}
