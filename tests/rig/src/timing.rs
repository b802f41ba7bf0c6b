//! How long it took: until the events of a killed worker ran elsewhere, and until workers went on when a server was back.
//!
//! Both are measured only where nothing else came between, for the promise is about one fault at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hapax::EventKey;
use hapax_testkit::ledger::{Entry, What};

use crate::plan::Side;
use crate::scribe::{CONDUCTOR, away, back};

/// After it is over, a fault may still be felt so long.
const FELT: Duration = Duration::from_secs(2);

/// Between two lines about one thing.
const AT_ONCE: Duration = Duration::from_millis(20);

/// Times of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Times {
    pub(crate) measured: usize,
    /// Left out, since another fault came between.
    pub(crate) disturbed: usize,
    pub(crate) longest: Duration,
}

impl Times {
    fn add(&mut self, took: Duration) {
        self.measured += 1;
        self.longest = self.longest.max(took);
    }
}

#[derive(Clone, Copy, Debug)]
struct Disturbance {
    from: Duration,
    to: Duration,
    /// Whom it hits; nobody's number means all.
    worker: Option<u32>,
    what: Of,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    Death,
    Link,
    Other,
}

impl Disturbance {
    /// Whether it comes between a death and the start elsewhere. The death itself does not, nor does the link of a third
    /// worker, which has no part in it.
    fn is_between(&self, death: &Entry, start: &Entry) -> bool {
        let aside = match self.what {
            Of::Death => self.from == death.at && self.worker == Some(death.worker),
            Of::Link => self.worker.is_some_and(|worker| worker != start.worker),
            Of::Other => false,
        };
        !aside && self.from <= start.at && death.at <= self.to
    }
}

fn disturbances(history: &[Entry]) -> Vec<Disturbance> {
    let mut all = Vec::new();
    let mut open: BTreeMap<(u32, &str), Duration> = BTreeMap::new();
    for entry in history {
        let (at, who) = (entry.at, entry.worker);
        let worker = (who != CONDUCTOR).then_some(who);
        let ended = |open: &mut BTreeMap<(u32, &str), Duration>, name| open.remove(&(who, name)).unwrap_or(at);
        let from = match &entry.what {
            What::Crashed => {
                all.push(Disturbance { from: at, to: at + FELT, worker, what: Of::Death });
                continue;
            }
            What::Paused => {
                open.insert((who, "paused"), at);
                continue;
            }
            What::Fault { name } if *name == away(Side::Broker) || *name == away(Side::Store) => {
                open.insert((who, name), at);
                continue;
            }
            What::Fault { name: "terminate" | "join and leave" } => at,
            What::Resumed => ended(&mut open, "paused"),
            What::Fault { name } if *name == back(Side::Broker) => ended(&mut open, away(Side::Broker)),
            What::Fault { name } if *name == back(Side::Store) => ended(&mut open, away(Side::Store)),
            _ => continue,
        };
        let what =
            if matches!(entry.what, What::Fault { name } if name.ends_with(" back")) { Of::Link } else { Of::Other };
        all.push(Disturbance { from, to: at + FELT, worker, what });
    }
    all
}

/// From each kill until the first of the events that were under way runs again, and until the last one does: those that
/// have crashes enough in their history run one after the other.
pub(crate) fn takeover(history: &[Entry]) -> (Times, Times) {
    let disturbances = disturbances(history);
    let (mut first, mut last) = (Times::default(), Times::default());
    for (line, death) in history.iter().enumerate().filter(|(_, entry)| entry.what == What::Crashed) {
        let mut under_way: BTreeSet<EventKey> = BTreeSet::new();
        for entry in &history[..line] {
            if (entry.worker, entry.incarnation) == (death.worker, death.incarnation) {
                match &entry.what {
                    What::Started { key, .. } => drop(under_way.insert(*key)),
                    What::Effect { key, .. } => drop(under_way.remove(key)),
                    _ => {}
                }
            }
        }
        let mut is_first = true;
        for entry in &history[line..] {
            let What::Started { key, .. } = &entry.what else { continue };
            if !under_way.remove(key) {
                continue;
            }
            let is_disturbed = disturbances.iter().any(|d| d.is_between(death, entry));
            for times in [is_first.then_some(&mut first), Some(&mut last)].into_iter().flatten() {
                if is_disturbed { times.disturbed += 1 } else { times.add(entry.at - death.at) }
            }
            is_first = false;
        }
    }
    (first, last)
}

/// From each return of a server until the first worker starts a handler again, and until the last one does.
pub(crate) fn resume(history: &[Entry], side: Side) -> (Times, Times) {
    let disturbances = disturbances(history);
    let (mut first, mut last) = (Times::default(), Times::default());
    let returns =
        history.iter().filter(|entry| entry.worker == CONDUCTOR && entry.what == What::Fault { name: back(side) });
    for entry in returns {
        let up = entry.at;
        let mut starts: BTreeMap<u32, Duration> = BTreeMap::new();
        for entry in history.iter().filter(|entry| entry.at >= up) {
            if let What::Started { .. } = &entry.what {
                starts.entry(entry.worker).or_insert(entry.at);
            }
        }
        // Its own outage ends here, and is felt a little longer; where broker and store are one server, it ends twice.
        let others = |d: &&Disturbance| !(d.worker.is_none() && d.to.abs_diff(up + FELT) < AT_ONCE);
        let mut took: Vec<Duration> = Vec::new();
        for (worker, at) in starts {
            let hits = |d: &Disturbance| d.worker.is_none_or(|hit| hit == worker) && d.from <= at && up <= d.to;
            if disturbances.iter().filter(others).any(hits) {
                last.disturbed += 1;
            } else {
                last.add(at - up);
                took.push(at - up);
            }
        }
        match took.into_iter().min() {
            Some(took) => first.add(took),
            None => first.disturbed += 1,
        }
    }
    (first, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64, worker: u32, what: What) -> Entry {
        Entry::new(Duration::from_millis(ms), worker, what)
    }

    fn started(ms: u64, worker: u32, id: &str) -> Entry {
        let what =
            What::Started { key: EventKey::of("g", "rig", id), attempt: 1, fence: 1, idempotency_key: "k".into() };
        at(ms, worker, what)
    }

    fn effect(ms: u64, worker: u32, id: &str) -> Entry {
        at(ms, worker, What::Effect { key: EventKey::of("g", "rig", id), attempt: 1, fence: 1 })
    }

    #[test]
    fn a_takeover_counts_from_the_kill_for_what_had_not_ended() {
        let mut history = vec![
            started(0, 0, "a"),
            started(10, 0, "b"),
            effect(20, 0, "b"),
            at(100, 0, What::Crashed),
            started(4100, 1, "a"),
            started(9000, 1, "b"),
        ];
        assert_eq!(takeover(&history).0, Times { measured: 1, disturbed: 0, longest: Duration::from_secs(4) });
        history.insert(4, at(200, 1, What::Crashed));
        assert_eq!(takeover(&history).0.disturbed, 1);
    }

    #[test]
    fn a_resumption_counts_from_the_servers_return() {
        let fault = |ms, name| at(ms, CONDUCTOR, What::Fault { name });
        let history = [
            fault(0, "broker away"),
            fault(1000, "broker back"),
            started(1500, 0, "a"),
            started(3000, 1, "b"),
            started(9000, 0, "c"),
        ];
        let (first, last) = resume(&history, Side::Broker);
        assert_eq!(first.longest, Duration::from_millis(500));
        assert_eq!((last.measured, last.longest), (2, Duration::from_secs(2)));
    }
}
