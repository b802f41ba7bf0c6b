//! Invariants of endings: every event has one, and one only. What must happen is judged only in histories in which the
//! faults are over ([`What::Healed`]).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hapax::{EventKey, Receipt};

use super::lives::Lives;
use super::{Findings, Terms, Violation};
use crate::ledger::Terminal;
use crate::ledger::{Answer, Ending, Entry, Settling, What};

fn healed(history: &[Entry]) -> Option<Duration> {
    history.iter().find(|entry| entry.what == What::Healed).map(|entry| entry.at)
}

fn end(history: &[Entry]) -> Duration {
    history.last().map_or(Duration::ZERO, |entry| entry.at)
}

/// The events that have ended, with the time at which that was first known: recorded, known as a duplicate, or set aside
/// without a record.
fn endings(history: &[Entry], terms: &Terms) -> BTreeMap<EventKey, Duration> {
    let mut endings = BTreeMap::new();
    for entry in history {
        let ended = match &entry.what {
            // A conflict's dead letter is another message under the same id.
            What::Settled { key, settlement: Settling::DeadLetter { reason }, ok: true, .. }
                if *reason != "conflict" =>
            {
                *key
            }
            // Its worker may have died before it heard that it was placed.
            What::DeadLetterPlaced { key, reason, .. } if &**reason != "conflict" => Some(*key),
            What::Settled { key: Some(key), settlement: Settling::Ack, ok: true, .. } => {
                terms.ignored.contains(key).then_some(*key)
            }
            what => what.terminal().and(what.key()),
        };
        if let Some(key) = ended {
            endings.entry(key).or_insert(entry.at);
        }
    }
    endings
}

fn produced(history: &[Entry]) -> BTreeSet<EventKey> {
    let key = |entry: &Entry| match &entry.what {
        What::Produced { key, .. } => Some(*key),
        _ => None,
    };
    history.iter().filter_map(key).collect()
}

/// Every event that the broker accepted ends, once the faults are over.
pub fn no_loss(history: &[Entry], terms: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("no_loss");
    if healed(history).is_some() {
        let endings = endings(history, terms);
        for key in produced(history).into_iter().filter(|key| !endings.contains_key(key)) {
            found.add_at(end(history), Some(key), "accepted, and never ended");
        }
    }
    found.1
}

/// Every event has ended within the agreed time after the faults were over.
pub fn quiesce(history: &[Entry], terms: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("quiesce");
    if let Some(healed) = healed(history) {
        let endings = endings(history, terms);
        for key in produced(history) {
            let late = endings.get(&key).is_none_or(|at| *at > healed + terms.quiesce_within);
            if late {
                found.add_at(
                    end(history),
                    Some(key),
                    format!("ended at {:?}, healed at {healed:?}", endings.get(&key)),
                );
            }
        }
    }
    found.1
}

/// No event is both processed and dead-lettered, unless it was reopened.
pub fn terminal_exclusive(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("terminal_exclusive");
    let mut ended: BTreeMap<EventKey, Terminal> = BTreeMap::new();
    let mut anew = BTreeSet::new();
    let mut lives = Lives::default();
    for entry in history {
        if let Some(key) = lives.see(entry) {
            ended.remove(&key);
            anew.insert(key);
        }
        let how = match &entry.what {
            // A conflict's dead letter is another message under the same id. A letter stays where it is when its event
            // was reopened.
            What::DeadLetterPlaced { key, reason, .. } if &**reason != "conflict" && !anew.contains(key) => {
                Some(Terminal::DeadLettered)
            }
            what => what.terminal().filter(|_| lives.is_of_now(entry)),
        };
        if let (Some(how), Some(key)) = (how, entry.what.key()) {
            let before = *ended.entry(key).or_insert(how);
            if before != how {
                found.add(entry, format!("{how:?} after {before:?}"));
            }
        }
    }
    found.1
}

/// Consumers do not share records: each event has a key of its own for each of them, and what one consumer did with it
/// leaves it to the others.
pub fn scope_isolation(history: &[Entry], terms: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("scope_isolation");
    let mut of: BTreeMap<EventKey, (&str, &str)> = BTreeMap::new();
    let mut scopes: BTreeMap<&str, BTreeMap<&str, EventKey>> = BTreeMap::new();
    for entry in history {
        if let What::Produced { scope, event, key } = &entry.what {
            let (first, _) = *of.entry(*key).or_insert((scope, event));
            if first != &**scope {
                found.add(entry, format!("{first} and {scope} share a record"));
            }
            scopes.entry(event).or_default().insert(scope, *key);
        }
    }
    if healed(history).is_some() {
        let endings = endings(history, terms);
        for (event, scopes) in scopes {
            let ended = |key: &EventKey| endings.contains_key(key);
            if scopes.values().any(ended) {
                for (scope, key) in scopes.iter().filter(|(_, key)| !ended(key)) {
                    found.add_at(end(history), Some(*key), format!("{event} ended for others and not for {scope}"));
                }
            }
        }
    }
    found.1
}

/// What failed is started again or ends, and what was given back is delivered again, once the faults are over. Answers
/// can come late: what was claimed or delivered since it was asked has gone on already.
pub fn retry_not_lost(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("retry_not_lost");
    let (mut waiting, mut away) = (BTreeSet::new(), BTreeSet::new());
    let mut granted: BTreeMap<EventKey, u64> = BTreeMap::new();
    let mut delivered: BTreeMap<EventKey, usize> = BTreeMap::new();
    let mut asked: BTreeMap<(u32, u32, Receipt), usize> = BTreeMap::new();
    for (line, entry) in history.iter().enumerate() {
        match &entry.what {
            What::Claimed { key, answer: Answer::Granted { fence, .. }, .. } => {
                let highest = granted.entry(*key).or_default();
                *highest = (*highest).max(*fence);
            }
            What::Recorded { key, fence, outcome: Ending::Failed { .. }, answer, .. } if answer.is_written() => {
                if granted.get(key).is_none_or(|highest| highest <= fence) {
                    waiting.insert(*key);
                }
            }
            What::SettleAsked { receipt, settlement: Settling::Retry { .. } | Settling::Release, .. } => {
                asked.entry((entry.worker, entry.incarnation, *receipt)).or_insert(line);
            }
            What::Settled {
                key: Some(key),
                receipt,
                settlement: Settling::Retry { .. } | Settling::Release,
                ok: true,
            } => {
                let asked = asked.get(&(entry.worker, entry.incarnation, *receipt)).copied().unwrap_or(line);
                if delivered.get(key).is_none_or(|delivered| *delivered < asked) {
                    away.insert(*key);
                }
            }
            What::Delivered { key, .. } => {
                delivered.insert(*key, line);
                away.remove(key);
            }
            What::Started { key, .. } | What::Recorded { key, outcome: Ending::Doomed, .. } => {
                waiting.remove(key);
            }
            what => {
                if let (Some(_), Some(key)) = (what.terminal(), what.key()) {
                    waiting.remove(&key);
                    away.remove(&key);
                }
            }
        }
    }
    if healed(history).is_some() {
        for key in &waiting {
            found.add_at(end(history), Some(*key), "failed, and was never started again");
        }
        for key in &away {
            found.add_at(end(history), Some(*key), "given back, and never delivered again");
        }
    }
    found.1
}

/// Every dead-lettered event is found among the dead letters, with its bytes, its headers and a reason. It is judged
/// once the faults are over; whoever reads the dead letters writes a [`What::DeadLetterPlaced`] for each before the end.
pub fn dead_letter_complete(history: &[Entry], _: &Terms) -> Vec<Violation> {
    let mut found = Findings::of("dead_letter_complete");
    let (mut recorded, mut placed, mut anew) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let mut lives = Lives::default();
    for entry in history {
        anew.extend(lives.see(entry));
        match &entry.what {
            What::DeadLetterPlaced { key, reason, attempts, intact } => {
                placed.insert(*key);
                if !intact || reason.is_empty() {
                    found.add(entry, format!("intact: {intact}, reason {reason:?}, {attempts} attempts"));
                }
            }
            what if what.terminal() == Some(Terminal::DeadLettered) => recorded.extend(what.key()),
            _ => {}
        }
    }
    if healed(history).is_some() {
        // The letter of an event that was reopened has been sent back.
        for key in recorded.difference(&placed).filter(|key| !anew.contains(key)) {
            found.add_at(end(history), Some(*key), "dead-lettered, and not among the dead letters");
        }
    }
    found.1
}
