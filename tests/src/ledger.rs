//! The ledger: an append-only history of what happened, kept by witnesses around the code under test and not by it.
//!
//! [`WitnessedStore`] and [`WitnessedBroker`] write a line when a call begins and one when its answer comes back, so that
//! an unknown outcome is visible; handlers report what they do through [`Ledger`]; whoever injects faults says so here
//! too. The [checkers](crate::checkers) read the history. Kinds and fields follow section "History format" of the
//! project's semantics: the same schema in simulation and against real brokers, one JSON object a line.

mod answer;
mod entry;
mod witness;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use hapax::EventKey;
use tokio::time::Instant;

pub use answer::{Answer, Ending, Recording, Renewing, Settling};
pub(crate) use entry::Terminal;
pub use entry::{Entry, What};
pub use witness::{WitnessedBroker, WitnessedStore};

/// A handle on one history. Clones write to the same one; [`of`](Self::of) says who writes.
#[derive(Clone)]
pub struct Ledger {
    book: Arc<Book>,
    worker: u32,
    incarnation: u32,
}

struct Book {
    start: Instant,
    entries: Mutex<Vec<Entry>>,
}

impl Default for Ledger {
    fn default() -> Self {
        Self::new()
    }
}

impl Ledger {
    /// An empty history that begins now. Until [`of`](Self::of) says otherwise, worker 0 writes.
    pub fn new() -> Self {
        let book = Book { start: Instant::now(), entries: Mutex::default() };
        Self { book: Arc::new(book), worker: 0, incarnation: 0 }
    }

    /// The same history, written by this worker in this life of its.
    #[must_use]
    pub fn of(&self, worker: u32, incarnation: u32) -> Self {
        Self { book: Arc::clone(&self.book), worker, incarnation }
    }

    /// Writes a line.
    pub fn write(&self, what: What) {
        let mut entries = self.entries();
        // Under the lock, so that lines are in the order of their times.
        let at = self.book.start.elapsed();
        entries.push(Entry { at, worker: self.worker, incarnation: self.incarnation, what });
    }

    /// The broker accepted an event for the consumer `scope`; `event` names it for people, the same for all consumers.
    pub fn produced(&self, scope: &str, event: &str, key: EventKey) {
        self.write(What::Produced { scope: scope.into(), event: event.into(), key });
    }

    /// A handler was started. `idempotency_key` is what it was given.
    pub fn started(&self, key: EventKey, attempt: u32, fence: u64, idempotency_key: &str) {
        self.write(What::Started { key, attempt, fence, idempotency_key: idempotency_key.into() });
    }

    /// A handler's effect took place. With transactional handlers: it was committed.
    pub fn effect(&self, key: EventKey, attempt: u32, fence: u64) {
        self.write(What::Effect { key, attempt, fence });
    }

    /// A handler returned, with success or without.
    pub fn returned(&self, key: EventKey, fence: u64, ok: bool) {
        self.write(What::Returned { key, fence, ok });
    }

    /// The history so far.
    pub fn history(&self) -> Vec<Entry> {
        self.entries().clone()
    }

    /// One JSON object a line.
    pub fn to_jsonl(&self) -> String {
        self.entries().iter().map(|entry| entry.to_json() + "\n").collect()
    }

    /// The same for two runs whose histories are the same, line by line.
    pub fn trace_hash(&self) -> String {
        blake3::hash(self.to_jsonl().as_bytes()).to_hex().to_string()
    }

    /// What happened to one event, and to the workers meanwhile, as a text for people.
    pub fn story(&self, key: EventKey) -> Story {
        let about = |entry: &&Entry| entry.what.key().is_none_or(|of| of == key);
        Story { key, entries: self.entries().iter().filter(about).cloned().collect() }
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.book.entries.lock().expect("nobody panics while holding the ledger")
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger").field("entries", &self.entries().len()).finish_non_exhaustive()
    }
}

/// The history of one event; [`Display`](fmt::Display) prints it one line an entry.
#[derive(Clone, Debug)]
pub struct Story {
    key: EventKey,
    entries: Vec<Entry>,
}

impl fmt::Display for Story {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "event {:?}", self.key)?;
        self.entries.iter().try_for_each(|entry| writeln!(f, "{entry}"))
    }
}
