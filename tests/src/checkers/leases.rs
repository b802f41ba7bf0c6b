//! Invariants of leases: fences, holders, attempts.

use std::collections::BTreeMap;
use std::time::Duration;

use hapax::EventKey;

use super::lives::{Lives, StoodStill};
use super::{Findings, Terms, Violation};
use crate::ledger::{Answer, Ending, Entry, Recording, Renewing, What};

/// Leases of one event never overlap: from the grant until the outcome, the last renewal's end, or the lease's end.
pub fn one_live_lease(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("one_live_lease");
    // Fence, and until when it lasts for certain: the store granted no earlier than it was asked.
    let mut live: BTreeMap<EventKey, (u64, Duration)> = BTreeMap::new();
    // Answers to what was asked before a clock was set tell nothing about times.
    let mut stepped = None;
    let counts = |asked: &Duration, stepped: Option<Duration>| stepped.is_none_or(|at| *asked > at);
    for entry in history {
        match &entry.what {
            What::Claimed { key, asked, lease, answer: Answer::Granted { fence, .. }, .. } => {
                let end = if counts(asked, stepped) { *asked + *lease } else { Duration::ZERO };
                match live.get_mut(key) {
                    // A late answer: it was overtaken before it was heard.
                    Some((holder, _)) if *holder > *fence => continue,
                    Some((holder, until)) if holder == fence => {
                        *until = end.max(*until);
                        continue;
                    }
                    Some((holder, until)) if entry.at < *until => {
                        found.add(entry, format!("fence {fence} granted while {holder} holds until {until:?}"));
                    }
                    _ => {}
                }
                live.insert(*key, (*fence, end));
            }
            What::Renewed { key, asked, fence, lease, answer: Renewing::Renewed } if counts(asked, stepped) => {
                if let Some((_, until)) = live.get_mut(key).filter(|(holder, _)| holder == fence) {
                    *until = (*asked + *lease).max(*until);
                }
            }
            // It may end from here on, whatever is answered. Doomed keeps the lease.
            What::RecordAsked { key, fence, outcome }
                if *outcome != Ending::Doomed && live.get(key).is_some_and(|(holder, _)| holder == fence) =>
            {
                live.remove(key);
            }
            What::Forgotten { key } => {
                live.remove(key);
            }
            What::ClockStepped => {
                live.clear();
                stepped = Some(entry.at);
            }
            _ => {}
        }
    }
    found.1
}

/// Fences granted for an event only grow; the same token alone may be granted the same fence again.
pub fn fence_monotonic(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("fence_monotonic");
    let mut highest: BTreeMap<EventKey, u64> = BTreeMap::new();
    // What was known when the claim was asked, and what its token was granted before.
    let mut asked: BTreeMap<(EventKey, u128), (u64, Option<u64>)> = BTreeMap::new();
    let mut owner: BTreeMap<(EventKey, u64), u128> = BTreeMap::new();
    for entry in history {
        match &entry.what {
            What::ClaimAsked { key, token, .. } => {
                let known = highest.get(key).copied().unwrap_or(0);
                asked.entry((*key, *token)).or_default().0 = known;
            }
            What::Claimed { key, token, answer: Answer::Granted { fence, .. }, .. } => {
                let (known, before) = asked.entry((*key, *token)).or_default();
                if *before != Some(*fence) && *fence <= *known {
                    found.add(entry, format!("fence {fence} granted after {known}"));
                }
                *before = Some(*fence);
                if *owner.entry((*key, *fence)).or_insert(*token) != *token {
                    found.add(entry, format!("fence {fence} granted to two claims"));
                }
                let highest = highest.entry(*key).or_default();
                *highest = (*highest).max(*fence);
            }
            _ => {}
        }
    }
    found.1
}

/// No write of a holder that was overtaken before it asked changes the record.
pub fn fenced_write_rejected(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("fenced_write_rejected");
    let mut highest: BTreeMap<EventKey, (u64, Duration)> = BTreeMap::new();
    let mut asked: BTreeMap<(u32, EventKey, u64), u64> = BTreeMap::new();
    for entry in history {
        match &entry.what {
            What::Claimed { key, answer: Answer::Granted { fence, .. }, .. } => {
                let highest = highest.entry(*key).or_default();
                if *fence > highest.0 {
                    *highest = (*fence, entry.at);
                }
            }
            What::RecordAsked { key, fence, .. } => {
                asked.insert((entry.worker, *key, *fence), highest.get(key).map_or(0, |(fence, _)| *fence));
            }
            What::Recorded { key, fence, answer: Recording::Done | Recording::AlreadyDone, .. } => {
                let known = asked.get(&(entry.worker, *key, *fence)).copied().unwrap_or(0);
                if known > *fence {
                    found.add(entry, format!("fence {fence} wrote although {known} had been granted"));
                }
            }
            What::Renewed { key, asked, fence, answer: Renewing::Renewed, .. } => {
                let known = highest.get(key).filter(|(_, at)| at < asked).map_or(0, |(fence, _)| *fence);
                if known > *fence {
                    found.add(entry, format!("fence {fence} was renewed although {known} had been granted"));
                }
            }
            _ => {}
        }
    }
    found.1
}

/// Attempts never go back, over restarts and crashes; a reopened event begins anew.
pub fn attempts_survive(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("attempts_survive");
    let mut attempts: BTreeMap<EventKey, BTreeMap<u64, u32>> = BTreeMap::new();
    let mut lives = Lives::default();
    for entry in history {
        if let Some(key) = lives.see(entry) {
            attempts.remove(&key);
        }
        if let What::Claimed { key, answer: Answer::Granted { fence, attempt, .. }, .. } = &entry.what {
            let attempts = attempts.entry(*key).or_default();
            if let Some((_, before)) = attempts.range(..*fence).next_back().filter(|(_, before)| *before > attempt) {
                found.add(entry, format!("attempt {attempt} after {before}"));
            }
            attempts.insert(*fence, *attempt);
        }
    }
    found.1
}

/// A handler is started under at most `attempts_max + crashes_max` claims, uncounted failures aside, and never once its
/// event is doomed, but for a worker that stood still, or a clock that was set, before the start. Under one claim it is
/// started once, or as often as a batch may come to nothing.
pub fn attempts_bounded(history: &[Entry], terms: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("attempts_bounded");
    let mut bounds: BTreeMap<EventKey, (u32, u32, bool)> = BTreeMap::new();
    let mut under: BTreeMap<(EventKey, u64), u32> = BTreeMap::new();
    let mut lives = Lives::default();
    let mut still = StoodStill::default();
    for entry in history {
        still.see(entry);
        if let Some(key) = lives.see(entry) {
            bounds.remove(&key);
        }
        let Some(key) = entry.what.key() else { continue };
        let (starts, uncounted, doomed) = bounds.entry(key).or_default();
        let is_of_now = lives.is_of_now(entry);
        match &entry.what {
            What::Started { fence, .. } => {
                let under = under.entry((key, *fence)).or_default();
                *under += 1;
                *starts += u32::from(*under == 1);
                if *under > terms.starts_per_claim {
                    found.add(entry, format!("started {under} times under fence {fence}"));
                } else if *doomed && !still.excuses(entry.worker, key, *fence) {
                    found.add(entry, "started although it is doomed");
                } else if *starts > terms.attempts_max + terms.crashes_max + *uncounted {
                    found.add(entry, format!("started {starts} times, {uncounted} of them uncounted"));
                }
            }
            What::RecordAsked { outcome: Ending::Failed { counted: false, .. }, .. } => *uncounted += 1,
            What::Recorded { outcome: Ending::Doomed, answer, .. } if answer.is_written() && is_of_now => {
                *doomed = true;
            }
            What::Claimed { answer: Answer::Granted { doomed: true, .. }, .. } if is_of_now => *doomed = true,
            _ => {}
        }
    }
    found.1
}
