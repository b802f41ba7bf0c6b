//! Where the life of an event begins anew: its record was lost, or an operator's dead letter reopened it. What was known
//! of it before no longer counts, nor does an answer that was given before and heard behind.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hapax::EventKey;

use crate::ledger::{Answer, Entry, What};

/// Follows the lives of all events.
#[derive(Default)]
pub(super) struct Lives {
    /// Claims with a reopen token that may take place at any time: asked, and not answered for certain.
    open: BTreeMap<EventKey, BTreeSet<u128>>,
    since: BTreeMap<EventKey, Duration>,
    highest: BTreeMap<EventKey, u64>,
}

impl Lives {
    /// Reads a line. Answers the event whose life begins anew here, for sure or perhaps.
    pub(super) fn see(&mut self, entry: &Entry) -> Option<EventKey> {
        let begun = match &entry.what {
            What::Forgotten { key } => Some(*key),
            What::ClaimAsked { key, token, reopen: true } => {
                self.open.entry(*key).or_default().insert(*token);
                Some(*key)
            }
            What::Claimed { key, token, reopen, answer, .. } => {
                let mut begun = *reopen && *answer == Answer::Unknown;
                if !begun && let Some(open) = self.open.get_mut(key) {
                    open.remove(token);
                }
                if let Answer::Granted { fence, attempt, .. } = answer {
                    let highest = self.highest.entry(*key).or_default();
                    // A grant that was overtaken before it was heard begins nothing any more.
                    begun = *reopen && *attempt == 1 && *fence >= *highest;
                    *highest = (*highest).max(*fence);
                }
                begun.then_some(*key)
            }
            _ => None,
        };
        if let Some(key) = begun {
            self.since.insert(key, entry.at);
        }
        begun
    }

    /// Whether what this line answers is for certain about the event's life now.
    pub(super) fn is_of_now(&self, entry: &Entry) -> bool {
        let Some(key) = entry.what.key() else { return true };
        let asked = match &entry.what {
            What::Claimed { asked, .. } | What::Recorded { asked, .. } => *asked,
            _ => entry.at,
        };
        let is_sure = self.open.get(&key).is_none_or(BTreeSet::is_empty);
        is_sure && self.since.get(&key).is_none_or(|since| asked > *since)
    }
}

/// Knows whether a worker stood still between the answer to a claim and the start of its handler, or the store's clock was
/// set since it asked. Nothing but the resource itself can tell such a start that another holds the event by now.
#[derive(Default)]
pub(super) struct StoodStill {
    granted: BTreeMap<(u32, EventKey, u64), (usize, Duration)>,
    resumed: BTreeMap<u32, usize>,
    stepped: Option<Duration>,
    lines: usize,
}

impl StoodStill {
    pub(super) fn see(&mut self, entry: &Entry) {
        self.lines += 1;
        match &entry.what {
            What::Claimed { key, asked, answer: Answer::Granted { fence, .. }, .. } => {
                self.granted.insert((entry.worker, *key, *fence), (self.lines, *asked));
            }
            What::Resumed => drop(self.resumed.insert(entry.worker, self.lines)),
            What::ClockStepped => self.stepped = Some(entry.at),
            _ => {}
        }
    }

    pub(super) fn excuses(&self, worker: u32, key: EventKey, fence: u64) -> bool {
        let Some((granted, asked)) = self.granted.get(&(worker, key, fence)) else { return false };
        let stood = self.resumed.get(&worker).is_some_and(|resumed| resumed > granted);
        stood || self.stepped.is_some_and(|stepped| stepped >= *asked)
    }
}
