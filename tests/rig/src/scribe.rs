//! Writes the history: what the witnesses saw, in the ledger's words.
//!
//! From outside of a worker neither claims nor fences can be seen. A run of a handler is numbered instead, for each event
//! from 1 in the order in which runs began; that number stands where the fence stands in the simulation's histories.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard};

use hapax::EventKey;
use hapax_testkit::ledger::{Entry, Ledger, What};
use serde::Deserialize;

use crate::plan::{Fault, Side};

/// Writes what concerns no single worker.
pub(crate) const CONDUCTOR: u32 = 1000;

/// The source of every event of the rig.
pub(crate) const SOURCE: &str = "rig";

/// A link or a server can no longer be relied on from here on.
pub(crate) const fn away(side: Side) -> &'static str {
    match side {
        Side::Broker => "broker away",
        Side::Store => "store away",
    }
}

/// It is back.
pub(crate) const fn back(side: Side) -> &'static str {
    match side {
        Side::Broker => "broker back",
        Side::Store => "store back",
    }
}

/// A worker in one of its lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Life {
    pub(crate) worker: u32,
    pub(crate) number: u32,
}

/// An effect as the worker writes it down.
#[derive(Debug, Deserialize)]
pub(crate) struct EffectLine {
    pub(crate) source: String,
    pub(crate) id: String,
    #[serde(rename = "type")]
    pub(crate) ty: String,
    #[serde(default)]
    pub(crate) key: Option<String>,
}

/// The history of one run, and what was seen that has no line in it.
#[derive(Debug)]
pub(crate) struct Scribe {
    ledger: Ledger,
    pub(crate) group: String,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    runs: HashMap<EventKey, u64>,
    of_life: HashMap<(EventKey, Life), (u64, u32)>,
    /// Runs whose effect was found before the line about their begin: a log may lag behind a file.
    unannounced: HashSet<(EventKey, Life)>,
    effects: u64,
    /// Which bodies took effect, by id.
    types: BTreeMap<String, BTreeSet<String>>,
    /// Effects whose idempotency key is not the event's.
    strange_keys: Vec<String>,
}

impl Scribe {
    pub(crate) fn new(group: &str) -> Self {
        Self { ledger: Ledger::new(), group: group.to_owned(), seen: Mutex::default() }
    }

    pub(crate) fn key(&self, id: &str) -> EventKey {
        EventKey::of(&self.group, SOURCE, id)
    }

    pub(crate) fn produced(&self, id: &str) {
        self.ledger.of(CONDUCTOR, 0).produced(&self.group, id, self.key(id));
    }

    /// A handler began.
    pub(crate) fn started(&self, life: Life, id: &str, attempt: u32) {
        let key = self.key(id);
        let mut seen = self.seen();
        if seen.unannounced.remove(&(key, life)) {
            return;
        }
        let run = seen.begin(key, life, attempt);
        drop(seen);
        self.ledger.of(life.worker, life.number).started(key, attempt, run, &key.to_hex());
    }

    /// An effect was found.
    pub(crate) fn effect(&self, life: Life, line: &EffectLine) {
        let key = EventKey::of(&self.group, &line.source, &line.id);
        let mut seen = self.seen();
        let known = seen.of_life.get(&(key, life)).copied();
        // Its start was not heard of yet.
        let (run, attempt) = known.unwrap_or_else(|| {
            seen.unannounced.insert((key, life));
            (seen.begin(key, life, 0), 0)
        });
        seen.effects += 1;
        seen.types.entry(line.id.clone()).or_default().insert(line.ty.clone());
        if line.key.as_ref().is_some_and(|told| *told != key.to_hex()) {
            seen.strange_keys.push(line.id.clone());
        }
        drop(seen);
        self.ledger.of(life.worker, life.number).effect(key, attempt, run);
    }

    pub(crate) fn died(&self, life: Life) {
        self.of(life, What::Crashed);
    }

    pub(crate) fn of(&self, life: Life, what: What) {
        self.ledger.of(life.worker, life.number).write(what);
    }

    /// A fault that hits one worker, or with `None` all.
    pub(crate) fn fault(&self, worker: Option<u32>, fault: Fault) {
        self.mark(worker, fault.name());
    }

    pub(crate) fn mark(&self, worker: Option<u32>, name: &'static str) {
        self.ledger.of(worker.unwrap_or(CONDUCTOR), 0).write(What::Fault { name });
    }

    pub(crate) fn healed(&self) {
        self.ledger.of(CONDUCTOR, 0).write(What::Healed);
    }

    pub(crate) fn letter(&self, id: &str, reason: &str, attempts: u32, intact: bool) {
        let what = What::DeadLetterPlaced { key: self.key(id), reason: reason.into(), attempts, intact };
        self.ledger.of(CONDUCTOR, 0).write(what);
    }

    pub(crate) fn effects(&self) -> u64 {
        self.seen().effects
    }

    /// How many events have an effect.
    pub(crate) fn events_with_effect(&self) -> usize {
        self.seen().types.len()
    }

    /// Ids under which more than one body took effect.
    pub(crate) fn ran_with_two_bodies(&self) -> Vec<String> {
        let seen = self.seen();
        seen.types.iter().filter(|(_, types)| types.len() > 1).map(|(id, _)| id.clone()).collect()
    }

    pub(crate) fn strange_keys(&self) -> Vec<String> {
        self.seen().strange_keys.clone()
    }

    pub(crate) fn history(&self) -> Vec<Entry> {
        self.ledger.history()
    }

    pub(crate) fn to_jsonl(&self) -> String {
        self.ledger.to_jsonl()
    }

    pub(crate) fn story(&self, key: EventKey) -> String {
        self.ledger.story(key).to_string()
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("nobody panics while holding it")
    }
}

impl Seen {
    fn begin(&mut self, key: EventKey, life: Life, attempt: u32) -> u64 {
        let run = self.runs.entry(key).or_default();
        *run += 1;
        self.of_life.insert((key, life), (*run, attempt));
        *run
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Life = Life { worker: 1, number: 0 };

    fn effect(id: &str) -> EffectLine {
        EffectLine { source: SOURCE.into(), id: id.into(), ty: "t".into(), key: None }
    }

    fn kinds(scribe: &Scribe) -> Vec<(&'static str, u64)> {
        let kind = |entry: &Entry| match &entry.what {
            What::Started { fence, .. } => ("started", *fence),
            What::Effect { fence, .. } => ("effect", *fence),
            _ => ("other", 0),
        };
        scribe.history().iter().map(kind).collect()
    }

    #[tokio::test]
    async fn runs_of_an_event_are_numbered_in_the_order_of_their_begins() {
        let scribe = Scribe::new("g");
        scribe.started(LIFE, "a", 1);
        scribe.started(Life { worker: 2, number: 0 }, "a", 2);
        scribe.effect(LIFE, &effect("a"));
        assert_eq!(kinds(&scribe), [("started", 1), ("started", 2), ("effect", 1)]);
    }

    #[tokio::test]
    async fn a_begin_that_is_told_behind_its_effect_is_no_second_run() {
        let scribe = Scribe::new("g");
        scribe.effect(LIFE, &effect("a"));
        scribe.started(LIFE, "a", 1);
        scribe.started(LIFE, "a", 2);
        assert_eq!(kinds(&scribe), [("effect", 1), ("started", 2)]);
    }

    #[tokio::test]
    async fn two_bodies_and_strange_keys_are_seen() {
        let scribe = Scribe::new("g");
        scribe.effect(LIFE, &effect("a"));
        scribe.effect(LIFE, &EffectLine { ty: "other".into(), key: Some("k".into()), ..effect("a") });
        assert_eq!((scribe.ran_with_two_bodies(), scribe.strange_keys()), (vec!["a".to_owned()], vec!["a".to_owned()]));
    }
}
