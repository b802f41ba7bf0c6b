//! Invariants of deliveries: what must be known before one is settled, and by whom.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hapax::{EventKey, Receipt};

use super::{Findings, Terms, Violation};
use crate::ledger::{Answer, Ending, Entry, Recording, Renewing, Settling, What};

/// Reasons for which no record is written.
const WITHOUT_RECORD: [&str; 6] =
    ["missing-id", "undecodable", "beyond-limit", "unknown-type", "unknown-version", "refused"];

/// A delivery is acked only when its event has ended or is ignored by rule, and dead-lettered only when it is doomed, in
/// conflict, or no event.
pub fn settle_only_terminal(history: &[Entry], terms: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("settle_only_terminal");
    let (mut ended, mut doomed, mut in_conflict) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for entry in history {
        match &entry.what {
            What::SettleAsked { key: Some(key), settlement: Settling::Ack, .. } => {
                if !ended.contains(key) && !terms.ignored.contains(key) {
                    found.add(entry, "acked before its event had ended");
                }
            }
            What::SettleAsked { key: Some(key), settlement: Settling::DeadLetter { reason }, .. } => {
                let known = match *reason {
                    "conflict" => in_conflict.contains(key),
                    reason => WITHOUT_RECORD.contains(&reason) || doomed.contains(key),
                };
                if !known {
                    found.add(entry, format!("dead-lettered as {reason} before that was known"));
                }
            }
            What::Recorded { key, outcome: Ending::Doomed, answer, .. } if answer.is_written() => {
                doomed.insert(*key);
            }
            What::Claimed { key, answer: Answer::Granted { doomed: true, .. }, .. } => {
                doomed.insert(*key);
            }
            What::Claimed { key, answer: Answer::Conflict, .. } => {
                in_conflict.insert(*key);
            }
            what => {
                if let (Some(_), Some(key)) = (what.terminal(), what.key()) {
                    ended.insert(key);
                }
            }
        }
    }
    found.1
}

/// Counts the deliveries that a worker holds of each event. Where it holds several, a line about the event does not tell
/// which of them it is about.
#[derive(Default)]
struct Hands(BTreeMap<(u32, EventKey), BTreeSet<Receipt>>);

impl Hands {
    fn see(&mut self, entry: &Entry) {
        match &entry.what {
            What::Delivered { key, receipt, .. } => {
                self.0.entry((entry.worker, *key)).or_default().insert(*receipt);
            }
            What::Settled { key: Some(key), receipt, .. } => {
                self.0.entry((entry.worker, *key)).or_default().remove(receipt);
            }
            What::Crashed => self.0.retain(|(worker, _), _| *worker != entry.worker),
            _ => {}
        }
    }

    fn holds_one(&self, worker: u32, key: EventKey) -> bool {
        self.0.get(&(worker, key)).is_some_and(|receipts| receipts.len() == 1)
    }
}

/// A holder that was told that it lost its event does not settle the delivery before a new claim was answered; giving it
/// back is always allowed.
pub fn no_settle_when_fenced(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("no_settle_when_fenced");
    let (mut lost, mut hands) = (BTreeSet::new(), Hands::default());
    // A lease that its holder has ended by an outcome is not lost, although it is not renewed any more.
    let mut written = BTreeSet::new();
    // What is heard late about an older lease tells nothing about what was claimed since.
    let mut claimed: BTreeMap<(u32, EventKey), (Duration, u64)> = BTreeMap::new();
    for entry in history {
        let held = entry.what.key().map(|key| (entry.worker, key));
        let is_old = |asked: &Duration, fence: &u64| {
            let claimed = held.and_then(|held| claimed.get(&held));
            claimed.is_some_and(|(at, granted)| at >= asked || granted > fence)
        };
        match &entry.what {
            What::Recorded { asked, fence, answer: Recording::Fenced, .. } if !is_old(asked, fence) => {
                lost.extend(held)
            }
            What::Renewed { key, fence, asked, answer: Renewing::Lost, .. }
                if !is_old(asked, fence) && !written.contains(&(entry.worker, *key, *fence)) =>
            {
                lost.extend(held);
            }
            What::Recorded { key, fence, answer, .. } if answer.is_written() => {
                written.insert((entry.worker, *key, *fence));
                lost.remove(&(entry.worker, *key));
            }
            What::Claimed { key, answer, .. } if !matches!(answer, Answer::Unknown | Answer::Refused) => {
                // What is doomed is dead-lettered whoever places it: at worst twice.
                let mut granted = 0;
                if let Answer::Granted { fence, doomed, .. } = answer {
                    granted = *fence;
                    written.extend(doomed.then_some((entry.worker, *key, *fence)));
                }
                lost.remove(&(entry.worker, *key));
                claimed.insert((entry.worker, *key), (entry.at, granted));
            }
            What::SettleAsked { key: Some(key), settlement, .. }
                if !matches!(settlement, Settling::Release | Settling::Retry { .. })
                    && lost.contains(&(entry.worker, *key))
                    && hands.holds_one(entry.worker, *key) =>
            {
                found.add(entry, format!("{settlement:?} by a worker that had lost it"));
            }
            What::Crashed => lost.retain(|(worker, _)| *worker != entry.worker),
            _ => {}
        }
        hands.see(entry);
    }
    found.1
}

/// After a record whose answer never came, nothing is acked before the store has answered again.
pub fn unknown_is_unknown(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("unknown_is_unknown");
    let (mut open, mut hands) = (BTreeSet::new(), Hands::default());
    for entry in history {
        match &entry.what {
            What::Recorded { key, answer: Recording::Unknown, .. } => {
                open.insert((entry.worker, *key));
            }
            What::Recorded { key, answer, .. } if *answer != Recording::Refused => {
                open.remove(&(entry.worker, *key));
            }
            What::Claimed { key, answer, .. } if !matches!(answer, Answer::Unknown | Answer::Refused) => {
                open.remove(&(entry.worker, *key));
            }
            What::SettleAsked { key: Some(key), settlement: Settling::Ack, .. }
                if open.contains(&(entry.worker, *key)) && hands.holds_one(entry.worker, *key) =>
            {
                found.add(entry, "acked although the record's outcome is unknown");
            }
            What::Crashed => open.retain(|(worker, _)| *worker != entry.worker),
            _ => {}
        }
        hands.see(entry);
    }
    found.1
}

/// A delivery whose settlement was done is not settled again.
pub fn settle_once(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("settle_once");
    let mut done = BTreeSet::new();
    for entry in history {
        match &entry.what {
            What::SettleAsked { receipt, settlement, .. }
                if done.contains(&(entry.worker, entry.incarnation, *receipt)) =>
            {
                found.add(entry, format!("{settlement:?} of a delivery that was settled"));
            }
            What::Settled { receipt, ok: true, .. } => {
                done.insert((entry.worker, entry.incarnation, *receipt));
            }
            _ => {}
        }
    }
    found.1
}

/// A settlement's receipt came with a delivery to the same worker, in the same of its lives.
pub fn settle_on_own_session(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("settle_on_own_session");
    let mut delivered = BTreeSet::new();
    for entry in history {
        match &entry.what {
            What::Delivered { receipt, .. } => {
                delivered.insert((entry.worker, entry.incarnation, *receipt));
            }
            // Deliveries without an id are not in the history.
            What::SettleAsked { key: Some(_), receipt, .. }
                if !delivered.contains(&(entry.worker, entry.incarnation, *receipt)) =>
            {
                found.add(entry, format!("{receipt:?} was not delivered to this worker"));
            }
            _ => {}
        }
    }
    found.1
}

/// No worker holds more unsettled deliveries than it may.
pub fn bounded_in_flight(history: &[Entry], terms: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("bounded_in_flight");
    let mut held: BTreeMap<(u32, u32), BTreeSet<Receipt>> = BTreeMap::new();
    for entry in history {
        let held = held.entry((entry.worker, entry.incarnation)).or_default();
        match &entry.what {
            What::Delivered { receipt, .. } => {
                held.insert(*receipt);
                if held.len() > terms.in_flight_max {
                    found.add(entry, format!("{} deliveries are unsettled", held.len()));
                }
            }
            // Also where it was refused: a stale receipt's delivery is in other hands.
            What::Settled { receipt, .. } => {
                held.remove(receipt);
            }
            What::Crashed => held.clear(),
            _ => {}
        }
    }
    found.1
}
