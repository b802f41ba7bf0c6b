//! What happened between a consumer and the world, in order: each call to store, broker and publisher as a short line.
//!
//! [`Journaled`] wraps store, broker and publisher alike. A line is written when the call was answered: what failed
//! bears a `!`.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use hapax::{
    Broker, Capabilities, Claim, ClaimRequest, ConsumerId, Delivery, Lease, Limits, Observed, Observer, Outcome,
    Outgoing, ProcessedStore, Publisher, Receipt, Recorded, Renewal, Result, Settlement, StoreHealth, Want,
};

/// The lines, shared by everything that writes them.
#[derive(Clone, Default)]
pub(crate) struct Journal {
    lines: Arc<Mutex<Vec<String>>>,
    observed: Arc<Mutex<Vec<String>>>,
}

impl Journal {
    pub(crate) fn note(&self, line: impl Into<String>) {
        self.lines.lock().unwrap().push(line.into());
    }

    /// Every line so far.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// The lines that begin like this.
    pub(crate) fn lines_of(&self, beginning: &str) -> Vec<String> {
        self.lines().into_iter().filter(|line| line.starts_with(beginning)).collect()
    }

    /// How many calls the store answered: round trips of any verb.
    pub(crate) fn round_trips(&self) -> usize {
        self.lines_of("store ").len()
    }

    /// How many times the observer was told something whose `Debug` form begins like this.
    pub(crate) fn observed(&self, beginning: &str) -> usize {
        self.observed.lock().unwrap().iter().filter(|told| told.starts_with(beginning)).count()
    }

    fn ended<T>(&self, line: String, result: Result<T>) -> Result<T> {
        self.note(if result.is_ok() { line } else { format!("{line}!") });
        result
    }
}

impl Observer for Journal {
    fn observe(&self, what: &Observed<'_>) {
        // What is told at every tick, whatever happens, would fill the memory of a long wait.
        if !matches!(what, Observed::InFlight { .. } | Observed::Lag { .. } | Observed::Called { .. }) {
            self.observed.lock().unwrap().push(format!("{what:?}"));
        }
    }
}

/// A store, broker or publisher whose calls are written down.
pub(crate) struct Journaled<T> {
    pub(crate) inner: T,
    pub(crate) journal: Journal,
}

#[async_trait]
impl<T: ProcessedStore> ProcessedStore for Journaled<T> {
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId> {
        self.inner.open(consumer, retention).await
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        let claims = self.inner.claim(batch, lease).await;
        self.journal.ended(format!("store claim {}", batch.len()), claims)
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        let renewals = self.inner.renew(leases, lease).await;
        self.journal.ended(format!("store renew {}", leases.len()), renewals)
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let recorded = self.inner.record(batch).await;
        let outcomes: Vec<_> = batch.iter().map(|(_, outcome)| word(outcome)).collect();
        self.journal.ended(format!("store record {}", outcomes.join(" ")), recorded)
    }

    async fn probe(&self) -> Result<StoreHealth> {
        self.inner.probe().await
    }
}

fn word(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Processed => "processed",
        Outcome::Failed { counted: true, .. } => "failed",
        Outcome::Failed { counted: false, .. } => "failed-uncounted",
        Outcome::Doomed { .. } => "doomed",
        Outcome::DeadLettered => "dead-lettered",
    }
}

#[async_trait]
impl<T: Broker> Broker for Journaled<T> {
    async fn open(&self, limits: Limits) -> Result<()> {
        self.inner.open(limits).await
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        self.inner.receive(want).await
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        let answers = self.inner.settle(batch).await;
        for ((_, settlement), answer) in batch.iter().zip(&answers) {
            let line = match settlement {
                Settlement::Ack => "settle ack".to_owned(),
                Settlement::Release { counted: true } => "settle release".to_owned(),
                Settlement::Release { counted: false } => "settle release-uncounted".to_owned(),
                Settlement::Retry { after } => format!("settle retry {}ms", after.as_millis()),
                Settlement::DeadLetter(letter) => format!("settle dead-letter {}", letter.reason),
            };
            self.journal.note(if answer.is_ok() { line } else { format!("{line}!") });
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
}

#[async_trait]
impl<T: Publisher> Publisher for Journaled<T> {
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        let ids: Vec<_> = batch.iter().map(|o| o.message.attributes.id.clone().unwrap_or_default()).collect();
        let answers = self.inner.publish(batch).await;
        for (id, answer) in ids.iter().zip(&answers) {
            self.journal.note(if answer.is_ok() { format!("publish {id}") } else { format!("publish {id}!") });
        }
        answers
    }
}
