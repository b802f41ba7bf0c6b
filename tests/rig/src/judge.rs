//! The judge: which invariants the history breaks.
//!
//! What can be seen from outside is less than what the simulation sees, so the history is completed first: [`explain`](mod@explain) adds
//! what must have happened for every effect, either that its record was written, or, where a fault came between the effect
//! and its record, that its lease was lost. Then the invariants of the test kit decide, and a few of the rig's own.

mod explain;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hapax::{EventKey, Fingerprint, Receipt};
use hapax_testkit::checkers::{self, Violation, check_all};
use hapax_testkit::ledger::{Entry, What};

pub(crate) use explain::{Excuse, claimed_before_a_pause, explain};

use crate::scribe::CONDUCTOR;

/// What was agreed upon for a run.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) lease: Duration,
    /// Whether effects commit with the record: no duplicate is excused then.
    pub(crate) transactional: bool,
    /// Whether the store may lose what it acknowledged shortly before it was killed.
    pub(crate) forgetful: bool,
    /// Whether broker and store are one server.
    pub(crate) one_server: bool,
    /// Events of each ordering key in the order of the broker, where that is to be judged.
    pub(crate) lanes: Vec<(EventKey, u64)>,
    /// Events that came with another body, too.
    pub(crate) conflicts: BTreeSet<EventKey>,
    pub(crate) quiesce_within: Duration,
}

/// What the judge says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Verdict {
    /// Duplicates by their excuse.
    pub(crate) explained: BTreeMap<&'static str, usize>,
    /// Effects beyond the first that nothing excuses.
    pub(crate) unexplained: usize,
    /// Events that have neither an effect nor a dead letter.
    pub(crate) lost: Vec<EventKey>,
    pub(crate) violations: Vec<Violation>,
}

/// Judges a history, in which whoever read the dead letters has written them down.
pub(crate) fn judge(history: &[Entry], terms: &Terms) -> Verdict {
    let (complete, excuses) = explain(history, terms);
    let complete = with_lanes(complete, terms);
    let kit = checkers::Terms {
        attempts_max: 100,
        crashes_max: 1000,
        order_per_key: !terms.lanes.is_empty(),
        transactional: terms.transactional,
        quiesce_within: terms.quiesce_within,
        ..checkers::Terms::default()
    };
    let mut verdict = Verdict { violations: check_all(&complete, &kit), ..Verdict::default() };
    let excused = claimed_before_a_pause(history, terms);
    verdict.violations.retain(|violation| {
        let start = violation.key.map(|key| (key, violation.at));
        violation.invariant != "no_start_after_terminal" || !start.is_some_and(|start| excused.contains(&start))
    });
    count_duplicates(history, &excuses, &mut verdict);
    verdict.lost = lost(history);
    conflicts(history, terms, &mut verdict.violations);
    verdict
}

/// As accepted by the broker: the kit judges order by the order of deliveries.
fn with_lanes(history: Vec<Entry>, terms: &Terms) -> Vec<Entry> {
    let delivered = terms.lanes.iter().enumerate().map(|(position, (key, lane))| {
        let receipt = Receipt { session: 0, partition: 0, position: position as u64 };
        let lane = Some(format!("lane-{lane}").into());
        let what = What::Delivered { key: *key, receipt, fingerprint: Fingerprint::ANY, lane };
        Entry::new(Duration::ZERO, CONDUCTOR, what)
    });
    delivered.chain(history).collect()
}

fn count_duplicates(history: &[Entry], excuses: &BTreeMap<(EventKey, u64), Excuse>, verdict: &mut Verdict) {
    let mut effects: BTreeMap<EventKey, Vec<u64>> = BTreeMap::new();
    for entry in history {
        if let What::Effect { key, fence, .. } = &entry.what {
            effects.entry(*key).or_default().push(*fence);
        }
    }
    for (key, runs) in effects.into_iter().filter(|(_, runs)| runs.len() > 1) {
        let mut excused: BTreeMap<u64, Excuse> =
            runs.iter().filter_map(|run| Some((*run, *excuses.get(&(key, *run))?))).collect();
        let mut left = runs.len() - 1;
        while let (Some((_, excuse)), 1..) = (excused.pop_first(), left) {
            *verdict.explained.entry(excuse.name()).or_default() += 1;
            left -= 1;
        }
        verdict.unexplained += left;
    }
}

fn lost(history: &[Entry]) -> Vec<EventKey> {
    let mut open = BTreeSet::new();
    for entry in history {
        if let What::Produced { key, .. } = &entry.what {
            open.insert(*key);
        }
    }
    for entry in history {
        match &entry.what {
            What::Effect { key, .. } => drop(open.remove(key)),
            What::DeadLetterPlaced { key, reason, .. } if &**reason != "conflict" => drop(open.remove(key)),
            _ => {}
        }
    }
    open.into_iter().collect()
}

/// Every other body is among the dead letters as a conflict, and nothing else is there as one.
fn conflicts(history: &[Entry], terms: &Terms, violations: &mut Vec<Violation>) {
    let mut open = terms.conflicts.clone();
    let mut add = |key: EventKey, at: Duration, detail: &str| {
        violations.push(Violation { invariant: "conflicts_are_set_aside", key: Some(key), at, detail: detail.into() });
    };
    for entry in history {
        if let What::DeadLetterPlaced { key, reason, .. } = &entry.what
            && &**reason == "conflict"
        {
            open.remove(key);
            if !terms.conflicts.contains(key) {
                add(*key, entry.at, "set aside as a conflict, and there was none");
            }
        }
    }
    let end = history.last().map_or(Duration::ZERO, |entry| entry.at);
    open.into_iter().for_each(|key| add(key, end, "came with another body, which is not among the dead letters"));
}
