//! When a delivery was received, when its handler began, when it was settled: a broker that looks on.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use compare_kit::{Stages, now_us, percentiles_ms, sent_us};
use hapax::{Broker, Capabilities, Delivery, Limits, Message, Receipt, Result, Settlement, Want};

/// Three times for each event, by its number, in microseconds since 1970.
pub struct Clocks {
    received: Vec<AtomicU64>,
    started: Vec<AtomicU64>,
    settled: Vec<AtomicU64>,
    open: Mutex<HashMap<Receipt, usize>>,
}

impl Clocks {
    pub fn new(events: u64) -> Self {
        let clock = || (0..events).map(|_| AtomicU64::new(0)).collect();
        Self { received: clock(), started: clock(), settled: clock(), open: Mutex::default() }
    }

    /// Its number, unless it is one that is only to warm up.
    fn number(&self, event: &Message) -> Option<usize> {
        let number = event.attributes.id.as_deref()?.parse().ok()?;
        (sent_us(&event.data) != 0 && number < self.received.len()).then_some(number)
    }

    pub fn started(&self, event: &Message) {
        if let Some(number) = self.number(event) {
            self.started[number].store(now_us(), Ordering::Relaxed);
        }
    }

    /// Prints one line: from receipt to the handler's start, and from receipt to settlement.
    pub fn report(&self) {
        let waits = |until: &[AtomicU64]| {
            let pairs = self.received.iter().zip(until);
            let waits = pairs.filter_map(|(from, until)| {
                let (from, until) = (from.load(Ordering::Relaxed), until.load(Ordering::Relaxed));
                (from > 0 && until > 0).then(|| until.saturating_sub(from).min(u64::from(u32::MAX)) as u32)
            });
            percentiles_ms(waits.collect())
        };
        let stages = Stages { start: waits(&self.started), settlement: waits(&self.settled) };
        println!("{}", serde_json::to_string(&stages).expect("figures have a JSON form"));
    }
}

pub struct Clocked {
    pub inner: Arc<dyn Broker>,
    pub clocks: Arc<Clocks>,
}

#[async_trait]
impl Broker for Clocked {
    async fn open(&self, limits: Limits) -> Result<()> {
        self.inner.open(limits).await
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        let received = self.inner.receive(want).await?;
        let now = now_us();
        let mut open = self.clocks.open.lock().unwrap_or_else(PoisonError::into_inner);
        for delivery in &received {
            if let Some(number) = self.clocks.number(&delivery.message) {
                self.clocks.received[number].store(now, Ordering::Relaxed);
                open.insert(delivery.receipt, number);
            }
        }
        Ok(received)
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        let answers = self.inner.settle(batch).await;
        let now = now_us();
        let mut open = self.clocks.open.lock().unwrap_or_else(PoisonError::into_inner);
        for (receipt, _) in batch {
            if let Some(number) = open.remove(receipt) {
                self.clocks.settled[number].store(now, Ordering::Relaxed);
            }
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
