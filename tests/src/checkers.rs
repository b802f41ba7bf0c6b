//! The checkers: one function for each invariant of the promise, named after it, over a [history](crate::ledger).
//!
//! Each folds once over the lines and answers with what it found. An answer can come late, so that a checker says
//! "violated" only where no order of what happened inside the store can explain the lines. The checkers are checked
//! themselves: `tests/conformance/checkers.rs` of this package has a bad history for each.

mod effects;
mod endings;
mod leases;
mod lives;
mod settling;

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use hapax::EventKey;

use crate::ledger::Entry;

pub use effects::{
    conflict_never_runs, effect_once_tx, explained_duplicate, key_order, no_start_after_terminal, retry_not_early,
    stable_key,
};
pub use endings::{dead_letter_complete, no_loss, quiesce, retry_not_lost, scope_isolation, terminal_exclusive};
pub use leases::{attempts_bounded, attempts_survive, fence_monotonic, fenced_write_rejected, one_live_lease};
pub use settling::{
    bounded_in_flight, no_settle_when_fenced, settle_on_own_session, settle_once, settle_only_terminal,
    unknown_is_unknown,
};

/// What was agreed upon: settings of the consumer, and what the history is about.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Most attempts that count.
    pub attempts_max: u32,
    /// Most crashes.
    pub crashes_max: u32,
    /// Most starts under one claim: 1, or 3 of a batch handler, whose events run again when a batch comes to nothing.
    pub starts_per_claim: u32,
    /// Most unsettled deliveries of one consumer.
    pub in_flight_max: usize,
    /// Whether events of one ordering key run one after the other.
    pub order_per_key: bool,
    /// Whether an effect commits with the processed mark. Effects in the history are committed ones then.
    pub transactional: bool,
    /// How long after [`Healed`](crate::ledger::What::Healed) everything has ended.
    pub quiesce_within: Duration,
    /// Events that are acked without a record, by rule.
    pub ignored: BTreeSet<EventKey>,
}

impl Default for Terms {
    /// The defaults of hapax, and ten minutes to come to rest.
    fn default() -> Self {
        Self {
            attempts_max: 10,
            crashes_max: 3,
            starts_per_claim: 1,
            in_flight_max: 1024,
            order_per_key: false,
            transactional: false,
            quiesce_within: Duration::from_secs(600),
            ignored: BTreeSet::new(),
        }
    }
}

/// An invariant that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The invariant's name.
    pub invariant: &'static str,
    /// The event, where it is about one.
    pub key: Option<EventKey>,
    /// When it showed.
    pub at: Duration,
    /// What was seen.
    pub detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:?}: {}", self.invariant, self.at, self.detail)?;
        self.key.map_or(Ok(()), |key| write!(f, " (event {key:?})"))
    }
}

/// A checker.
pub type Checker = fn(&[Entry], &Terms) -> Vec<Violation>;

/// Every checker with its name.
pub const CHECKERS: &[(&str, Checker)] = &[
    ("no_loss", no_loss),
    ("terminal_exclusive", terminal_exclusive),
    ("no_start_after_terminal", no_start_after_terminal),
    ("one_live_lease", one_live_lease),
    ("fence_monotonic", fence_monotonic),
    ("fenced_write_rejected", fenced_write_rejected),
    ("settle_only_terminal", settle_only_terminal),
    ("no_settle_when_fenced", no_settle_when_fenced),
    ("settle_once", settle_once),
    ("settle_on_own_session", settle_on_own_session),
    ("explained_duplicate", explained_duplicate),
    ("effect_once_tx", effect_once_tx),
    ("stable_key", stable_key),
    ("attempts_bounded", attempts_bounded),
    ("attempts_survive", attempts_survive),
    ("conflict_never_runs", conflict_never_runs),
    ("scope_isolation", scope_isolation),
    ("key_order", key_order),
    ("retry_not_early", retry_not_early),
    ("retry_not_lost", retry_not_lost),
    ("dead_letter_complete", dead_letter_complete),
    ("unknown_is_unknown", unknown_is_unknown),
    ("bounded_in_flight", bounded_in_flight),
    ("quiesce", quiesce),
];

/// What every checker found, in the order of [`CHECKERS`].
pub fn check_all(history: &[Entry], terms: &Terms) -> Vec<Violation> {
    CHECKERS.iter().flat_map(|(_, check)| check(history, terms)).collect()
}

/// What one checker found so far.
struct Findings(&'static str, Vec<Violation>);

impl Findings {
    fn of(invariant: &'static str) -> Self {
        Self(invariant, Vec::new())
    }

    fn add(&mut self, entry: &Entry, detail: impl Into<String>) {
        self.add_at(entry.at, entry.what.key(), detail);
    }

    fn add_at(&mut self, at: Duration, key: Option<EventKey>, detail: impl Into<String>) {
        self.1.push(Violation { invariant: self.0, key, at, detail: detail.into() });
    }
}
