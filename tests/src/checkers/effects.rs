//! Invariants of handlers: when they start, in which order, and how often they take effect.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use hapax::{EventKey, Fingerprint, Receipt};

use super::lives::{Lives, StoodStill};
use super::{Findings, Terms, Violation};
use crate::ledger::{Answer, Ending, Entry, Recording, Renewing, Settling, What};

/// No handler starts once its event has ended, but for a worker that stood still, or a clock that was set, between its
/// claim and the start.
pub fn no_start_after_terminal(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("no_start_after_terminal");
    let mut ended = BTreeSet::new();
    let mut still = StoodStill::default();
    let mut lives = Lives::default();
    for entry in history {
        still.see(entry);
        if let Some(key) = lives.see(entry) {
            ended.remove(&key);
        }
        match &entry.what {
            What::Started { key, fence, .. } if ended.contains(key) => {
                if !still.excuses(entry.worker, *key, *fence) {
                    found.add(entry, format!("started under fence {fence} although it had ended"));
                }
            }
            what => {
                if let (Some(_), Some(key), true) = (what.terminal(), what.key(), lives.is_of_now(entry)) {
                    ended.insert(key);
                }
            }
        }
    }
    found.1
}

/// Effects of one life of an event, by fence, and how many of them are explained.
#[derive(Default)]
struct Life {
    effects: BTreeMap<u64, u32>,
    excused: BTreeMap<u64, Excused>,
}

/// One effect is excused for each start that was cut off: of a batch that fails as a whole, each event starts again under
/// the same fence.
#[derive(Debug, Default)]
struct Excused {
    effects: u32,
    /// The last start is excused already.
    is_last: bool,
}

impl Life {
    fn started(&mut self, fence: u64) {
        if let Some(excused) = self.excused.get_mut(&fence) {
            excused.is_last = false;
        }
    }

    fn excuse(&mut self, fence: u64) {
        let excused = self.excused.entry(fence).or_default();
        excused.effects += u32::from(!std::mem::replace(&mut excused.is_last, true));
    }

    fn unexplained(&self) -> u32 {
        let excused = |fence| self.excused.get(fence).map_or(0, |excused| excused.effects);
        self.effects.iter().map(|(fence, times)| times.saturating_sub(excused(fence))).sum()
    }
}

/// At most one effect of an event is without an excuse. Excused is the effect of a start that a declared window cut off:
/// its worker crashed, its lease was lost, the handler failed, or its record was refused or never answered.
pub fn explained_duplicate(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("explained_duplicate");
    let mut lives: BTreeMap<EventKey, Life> = BTreeMap::new();
    let mut anew = Lives::default();
    let mut running: BTreeMap<u32, BTreeSet<(EventKey, u64)>> = BTreeMap::new();
    let close = |found: &mut Findings, key: EventKey, life: &Life, at: Duration| {
        if life.unexplained() > 1 {
            found.add_at(at, Some(key), format!("effects by fence {:?}, excused {:?}", life.effects, life.excused));
        }
    };
    for entry in history {
        if let Some(key) = anew.see(entry)
            && let Some(life) = lives.remove(&key)
        {
            close(&mut found, key, &life, entry.at);
        }
        match &entry.what {
            What::Started { key, fence, .. } => {
                running.entry(entry.worker).or_default().insert((*key, *fence));
                lives.entry(*key).or_default().started(*fence);
            }
            What::Effect { key, fence, .. } => {
                *lives.entry(*key).or_default().effects.entry(*fence).or_default() += 1;
            }
            What::Recorded { key, fence, outcome: Ending::Processed, answer, .. } if answer.is_written() => {
                running.entry(entry.worker).or_default().remove(&(*key, *fence));
            }
            What::Returned { key, fence, ok: false }
            | What::Recorded { key, fence, .. }
            | What::Renewed { key, fence, answer: Renewing::Lost, .. } => {
                lives.entry(*key).or_default().excuse(*fence);
            }
            What::Crashed => {
                for (key, fence) in running.remove(&entry.worker).unwrap_or_default() {
                    lives.entry(key).or_default().excuse(fence);
                }
            }
            _ => {}
        }
    }
    let end = history.last().map_or(Duration::ZERO, |entry| entry.at);
    for (key, life) in &lives {
        close(&mut found, *key, life, end);
    }
    found.1
}

/// In transactional mode an event has one effect, without any excuse.
pub fn effect_once_tx(history: &[Entry], terms: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("effect_once_tx");
    let mut done = BTreeSet::new();
    let mut lives = Lives::default();
    for entry in history.iter().filter(|_| terms.transactional) {
        if let Some(key) = lives.see(entry) {
            done.remove(&key);
        }
        if let What::Effect { key, .. } = &entry.what
            && !done.insert(*key)
        {
            found.add(entry, "a second effect was committed");
        }
    }
    found.1
}

/// The idempotency key of an event is the same on every attempt, and no other event has it.
pub fn stable_key(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("stable_key");
    let mut keys: BTreeMap<EventKey, &str> = BTreeMap::new();
    let mut owners: BTreeMap<&str, EventKey> = BTreeMap::new();
    for entry in history {
        if let What::Started { key, idempotency_key, .. } = &entry.what {
            let before = *keys.entry(*key).or_insert(idempotency_key);
            if before != &**idempotency_key {
                found.add(entry, format!("was {before}, is {idempotency_key}"));
            }
            if *owners.entry(idempotency_key).or_insert(*key) != *key {
                found.add(entry, format!("{idempotency_key} belongs to another event"));
            }
        }
    }
    found.1
}

/// Other data under a known id is never granted, and never acked as if it were a duplicate.
pub fn conflict_never_runs(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("conflict_never_runs");
    let mut known: BTreeMap<EventKey, Fingerprint> = BTreeMap::new();
    let mut delivered: BTreeMap<(u32, u32, Receipt), Fingerprint> = BTreeMap::new();
    let mut lives = Lives::default();
    // A duplicate of a dead letter may be acked behind the letter's return, which may bring other data.
    let mut reopened = BTreeSet::new();
    for entry in history {
        if let Some(key) = lives.see(entry) {
            known.remove(&key);
            reopened.insert(key);
        }
        match &entry.what {
            What::Delivered { receipt, fingerprint, .. } => {
                delivered.insert((entry.worker, entry.incarnation, *receipt), *fingerprint);
            }
            What::Claimed { key, fingerprint, answer: Answer::Granted { .. }, .. }
                if lives.is_of_now(entry) && !known.entry(*key).or_insert(*fingerprint).agrees(*fingerprint) =>
            {
                found.add(entry, "other data was granted");
            }
            What::SettleAsked { key: Some(key), receipt, settlement: Settling::Ack } => {
                let fingerprint = delivered.get(&(entry.worker, entry.incarnation, *receipt));
                if let (Some(known), Some(fingerprint)) = (known.get(key), fingerprint)
                    && !known.agrees(*fingerprint)
                    && !reopened.contains(key)
                {
                    found.add(entry, "other data was acked");
                }
            }
            _ => {}
        }
    }
    found.1
}

/// With order per key: no event starts before all that were delivered before it under its ordering key have ended.
pub fn key_order(history: &[Entry], terms: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("key_order");
    let mut lanes: BTreeMap<&str, VecDeque<EventKey>> = BTreeMap::new();
    let mut lane_of: BTreeMap<EventKey, &str> = BTreeMap::new();
    let mut ended: BTreeSet<EventKey> = BTreeSet::new();
    for entry in history.iter().filter(|_| terms.order_per_key) {
        match &entry.what {
            What::Delivered { key, lane: Some(lane), .. } if !lane_of.contains_key(key) => {
                lane_of.insert(*key, lane);
                lanes.entry(lane).or_default().push_back(*key);
            }
            What::Started { key, .. } => {
                let Some(lane) = lane_of.get(key).and_then(|lane| lanes.get_mut(lane)) else { continue };
                while lane.front().is_some_and(|first| first != key && ended.contains(first)) {
                    lane.pop_front();
                }
                if lane.contains(key) && lane.front() != Some(key) {
                    found.add(entry, format!("started before {:?} had ended", lane.front()));
                }
            }
            // From here on it may have been done: whoever asked may die before the answer comes.
            What::SettleAsked { key: Some(key), settlement: Settling::Ack | Settling::DeadLetter { .. }, .. } => {
                ended.insert(*key);
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

/// Stores keep times in microseconds.
const PRECISION: Duration = Duration::from_micros(1);

/// What failed does not start again before its time.
pub fn retry_not_early(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("retry_not_early");
    let mut due: BTreeMap<EventKey, (u64, Duration)> = BTreeMap::new();
    // Answers to what was asked before a clock was set tell nothing about times.
    let mut stepped = None;
    let mut lives = Lives::default();
    for entry in history {
        if let Some(key) = lives.see(entry) {
            due.remove(&key);
        }
        match &entry.what {
            What::Recorded { key, asked, fence, outcome: Ending::Failed { after, .. }, answer: Recording::Done }
                if stepped.is_none_or(|at| *asked > at) =>
            {
                due.insert(*key, (*fence, *asked + *after));
            }
            What::Started { key, fence, .. } => {
                if let Some((_, due)) =
                    due.get(key).filter(|(failed, due)| failed < fence && entry.at + PRECISION < *due)
                {
                    found.add(entry, format!("started before {due:?}"));
                }
            }
            What::ClockStepped => {
                due.clear();
                stepped = Some(entry.at);
            }
            _ => {}
        }
    }
    found.1
}
