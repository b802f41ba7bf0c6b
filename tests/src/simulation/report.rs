//! What a simulation found: the invariants that did not hold, and the story of the event concerned.

use std::fmt;

use crate::checkers::Violation;
use crate::ledger::Ledger;

/// One seed's run.
#[derive(Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What does not hold; empty if all does.
    pub violations: Vec<Violation>,
    /// Everything that was seen.
    pub ledger: Ledger,
    plan: String,
}

/// Most violations that are printed.
const SHOWN_MAX: usize = 5;

impl Report {
    pub(super) fn new(seed: u64, plan: String, violations: Vec<Violation>, ledger: Ledger) -> Self {
        Self { seed, violations, ledger, plan }
    }

    /// Whether every invariant held.
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }

    /// The same for two runs whose histories are the same, line by line.
    pub fn trace_hash(&self) -> String {
        self.ledger.trace_hash()
    }

    /// What the seed drew, as a text for people.
    pub fn plan(&self) -> &str {
        &self.plan
    }

    /// The command that runs this seed again.
    pub fn command(&self) -> String {
        format!("cargo run --release -p hapax-testkit --bin simulate -- --seeds 1 --from {}", self.seed)
    }
}

/// The violations, the story of the first event concerned, and the command to repeat it.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}: {} violations", self.seed, self.violations.len())?;
        for violation in self.violations.iter().take(SHOWN_MAX) {
            writeln!(f, "  {violation}")?;
        }
        if let Some(key) = self.violations.iter().find_map(|violation| violation.key) {
            writeln!(f, "{}", self.ledger.story(key))?;
        }
        writeln!(f, "again: {}", self.command())
    }
}
