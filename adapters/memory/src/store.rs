//! `MemoryStore`: the functions of [`hapax::record`] over tables in memory.
//!
//! | contract | here |
//! |---|---|
//! | claim, renew, record | one lock a batch, the pure function an item |
//! | terminal records | 56 bytes in the order of completion, and an index ([`done`]) |
//! | retention | each record takes at most two due ones off the front; `sweep` takes more |
//!
//! Limits: lives as long as the process; `records_max` records, beyond which new events are refused and nothing is
//! forgotten; the trouble of the newest 10,000 dead letters of a consumer.

mod done;
mod records;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use hapax::record::Moment;
use hapax::{
    Claim, ClaimRequest, ConsumerId, Durability, Error, ErrorKind, EventKey, Lease, Outcome, ProcessedStore,
    RecordView, Recorded, Renewal, Result, Status, StoreAdmin, StoreHealth, Swept,
};
use tokio::time::Instant;

use records::{Records, view};

/// Due records that one new terminal record takes along.
const SWEPT_PER_RECORD: usize = 2;

/// What a store in memory may hold.
#[derive(Clone, Debug)]
pub struct MemoryStoreBuilder {
    records_max: usize,
    starts_at: Option<Moment>,
}

impl MemoryStoreBuilder {
    /// Records of all consumers together: 70 to 80 bytes each once they are terminal.
    pub const RECORDS_MAX: usize = 10_000_000;

    /// How many records it keeps; beyond it claims of new events are refused as [`ErrorKind::Full`].
    #[must_use]
    pub fn records_max(mut self, records: usize) -> Self {
        self.records_max = records;
        self
    }

    /// What its clock shows first. Default: the time of day, so that fences grow from one process to the next; a
    /// simulation sets it to repeat exactly.
    #[must_use]
    pub fn starts_at(mut self, moment: Moment) -> Self {
        self.starts_at = Some(moment);
        self
    }

    /// An empty store.
    pub fn build(self) -> MemoryStore {
        let start = self.starts_at.unwrap_or_else(|| {
            Moment::default().after(SystemTime::UNIX_EPOCH.elapsed().unwrap_or(Duration::from_micros(1)))
        });
        MemoryStore {
            shared: Arc::new(Shared {
                anchor: Instant::now(),
                start,
                tables: Mutex::new(Tables::new(self.records_max)),
            }),
        }
    }
}

/// Remembers events as long as the process lives. Clones share what they remember.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    anchor: Instant,
    start: Moment,
    tables: Mutex<Tables>,
}

impl MemoryStore {
    /// An empty store with the defaults of [`MemoryStoreBuilder`].
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// Sets what a store may hold.
    pub fn builder() -> MemoryStoreBuilder {
        MemoryStoreBuilder { records_max: MemoryStoreBuilder::RECORDS_MAX, starts_at: None }
    }

    /// No invariant spans a panic: each item is written with its last step.
    fn lock(&self) -> (MutexGuard<'_, Tables>, Moment) {
        let tables = self.shared.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.shared.start.after(self.shared.anchor.elapsed());
        let now = Moment(now.0.saturating_add_signed(tables.step_micros));
        (tables, now)
    }
}

/// For tests and simulations.
impl MemoryStore {
    /// Steps the store's clock, as an administrator or a bad time server would; backwards too.
    pub fn step_clock(&self, micros: i64) {
        let (mut tables, _) = self.lock();
        tables.step_micros = tables.step_micros.saturating_add(micros);
    }

    /// What its clock shows.
    pub fn now(&self) -> Moment {
        self.lock().1
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Debug)]
struct Tables {
    consumers: Vec<Records>,
    records_max: usize,
    /// The highest fence that was ever forgotten: new ones are above it, even if the clock steps back.
    forgotten_fence: u64,
    step_micros: i64,
}

impl Tables {
    fn new(records_max: usize) -> Self {
        Self { consumers: Vec::new(), records_max, forgotten_fence: 0, step_micros: 0 }
    }

    fn places(&self) -> usize {
        self.consumers.iter().map(Records::places).sum()
    }

    fn check(&self, consumer: ConsumerId, operation: &'static str) -> Result<()> {
        if (consumer.0 as usize) < self.consumers.len() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Incompatible, operation).because("a consumer that this store has not opened"))
    }

    fn by_name(&mut self, consumer: &str) -> Option<&mut Records> {
        self.consumers.iter_mut().find(|records| &*records.consumer == consumer)
    }

    /// Refuses a batch that would add more records than there is room for, before anything is changed.
    fn make_room(&mut self, batch: &[ClaimRequest], now: Moment) -> Result<()> {
        if self.places() + batch.len() <= self.records_max {
            return Ok(());
        }
        self.sweep(batch.len() * SWEPT_PER_RECORD, now);
        let new = batch.iter().filter(|request| !self.consumers[request.consumer.0 as usize].contains(request.key));
        if self.places() + new.count() <= self.records_max {
            return Ok(());
        }
        let max = self.records_max;
        Err(Error::new(ErrorKind::Full, "claim").because(format!(
            "the store holds `records_max` ({max}) records and forgets none before its time: build it with more, \
             shorten the retention, or take a store on disk"
        )))
    }

    fn sweep(&mut self, limit: usize, now: Moment) -> Swept {
        let mut swept = Swept::default();
        for records in &mut self.consumers {
            let left = limit - swept.removed as usize;
            let (removed, more) = records.sweep(left, now, &mut self.forgotten_fence);
            swept.removed += removed;
            swept.more |= more;
        }
        swept
    }
}

#[async_trait]
impl ProcessedStore for MemoryStore {
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId> {
        let (mut tables, _) = self.lock();
        let known = tables.consumers.iter().position(|records| &*records.consumer == consumer);
        let number = known.unwrap_or_else(|| {
            tables.consumers.push(Records::new(consumer, retention));
            tables.consumers.len() - 1
        });
        tables.consumers[number].retention = retention;
        u32::try_from(number)
            .map(ConsumerId)
            .map_err(|_| Error::new(ErrorKind::Full, "open").because("more than 2^32 consumers"))
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        let (mut tables, now) = self.lock();
        batch.iter().try_for_each(|request| tables.check(request.consumer, "claim"))?;
        tables.make_room(batch, now)?;
        // In a loop of its own and to its end: the places looked at are all over the memory, and so their waits overlap.
        let is_done = |request: &&ClaimRequest| tables.consumers[request.consumer.0 as usize].is_done(request.key);
        let may_be_done = batch.iter().filter(is_done).count() > 0;
        let forgotten_fence = tables.forgotten_fence;
        let claim = |request: &ClaimRequest| {
            let records = &mut tables.consumers[request.consumer.0 as usize];
            records.claim(request, lease, now, forgotten_fence, may_be_done)
        };
        Ok(batch.iter().map(claim).collect())
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        let (mut tables, now) = self.lock();
        leases.iter().try_for_each(|held| tables.check(held.consumer, "renew"))?;
        Ok(leases.iter().map(|held| tables.consumers[held.consumer.0 as usize].renew(held, lease, now)).collect())
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let (mut tables, now) = self.lock();
        batch.iter().try_for_each(|(held, _)| tables.check(held.consumer, "record"))?;
        let record = |(held, outcome): &(Lease, Outcome)| {
            let records = &mut tables.consumers[held.consumer.0 as usize];
            records.record(held, outcome, now)
        };
        let recorded = batch.iter().map(record).collect();
        let Tables { consumers, forgotten_fence, .. } = &mut *tables;
        for records in consumers {
            records.sweep_along(batch.len() * SWEPT_PER_RECORD, now, forgotten_fence);
        }
        Ok(recorded)
    }

    async fn probe(&self) -> Result<StoreHealth> {
        let (tables, _) = self.lock();
        let mut health = StoreHealth::new("memory", env!("CARGO_PKG_VERSION"), Durability::Process);
        let records: usize = tables.consumers.iter().map(Records::len).sum();
        health.records = Some(records as u64);
        health.records_max = Some(tables.records_max as u64);
        Ok(health)
    }
}

#[async_trait]
impl StoreAdmin for MemoryStore {
    async fn look_up(&self, consumer: &str, key: EventKey) -> Result<Option<RecordView>> {
        let (mut tables, now) = self.lock();
        let record = tables.by_name(consumer).and_then(|records| records.get(key));
        Ok(record.map(|record| view(key, &record, now)))
    }

    async fn list(&self, consumer: &str, status: Status, limit: usize) -> Result<Vec<RecordView>> {
        let (mut tables, now) = self.lock();
        Ok(tables.by_name(consumer).map_or_else(Vec::new, |records| records.list(status, limit, now)))
    }

    async fn sweep(&self, limit: usize) -> Result<Swept> {
        let (mut tables, now) = self.lock();
        Ok(tables.sweep(limit, now))
    }

    async fn forget(&self, consumer: &str, key: EventKey) -> Result<bool> {
        let (mut tables, _) = self.lock();
        let Some(record) = tables.by_name(consumer).and_then(|records| records.forget(key)) else { return Ok(false) };
        tables.forgotten_fence = tables.forgotten_fence.max(record.fence.get());
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
