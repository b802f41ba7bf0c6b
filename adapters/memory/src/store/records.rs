//! The records of one consumer: open ones in a map, terminal ones packed, each changed by the pure functions.

use std::collections::BTreeSet;
use std::hash::{BuildHasherDefault, Hasher};
use std::num::NonZeroU64;
use std::ops::Bound;
use std::time::Duration;

use hapax::record::{self, Moment, Record, State};
use hapax::{Claim, ClaimRequest, EventKey, Lease, Outcome, RecordView, Recorded, Renewal, Status};
use hashbrown::HashMap;

use super::done::Done;

/// The records of one consumer.
#[derive(Debug)]
pub(super) struct Records {
    pub(super) consumer: Box<str>,
    pub(super) retention: Duration,
    /// Claimed, waiting and doomed; always `Some` between two calls, so that the state machine works in place.
    active: HashMap<EventKey, Option<Record>, BuildHasherDefault<KeyHasher>>,
    /// Those of them that are doomed, for the sweep.
    doomed: BTreeSet<EventKey>,
    doomed_seen: EventKey,
    done: Done,
}

impl Records {
    pub(super) fn new(consumer: &str, retention: Duration) -> Self {
        Self {
            consumer: consumer.into(),
            retention,
            active: HashMap::default(),
            doomed: BTreeSet::new(),
            doomed_seen: EventKey([0; 16]),
            done: Done::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.active.len() + self.done.records()
    }

    /// Places taken: those of forgotten records count until the sweep comes by, so that memory stays bounded.
    pub(super) fn places(&self) -> usize {
        self.active.len() + self.done.places()
    }

    pub(super) fn contains(&self, key: EventKey) -> bool {
        self.active.contains_key(&key) || self.done.contains(key)
    }

    pub(super) fn is_done(&self, key: EventKey) -> bool {
        self.done.contains(key)
    }

    pub(super) fn get(&self, key: EventKey) -> Option<Record> {
        self.active.get(&key).cloned().flatten().or_else(|| self.done.get(key))
    }

    /// Unless it `may_be_done`, the key is not looked for among the terminal records.
    pub(super) fn claim(
        &mut self,
        request: &ClaimRequest,
        lease: Duration,
        now: Moment,
        forgotten_fence: u64,
        may_be_done: bool,
    ) -> Claim {
        if let Some(slot) = self.active.get_mut(&request.key) {
            let was_doomed = is_doomed(slot);
            let claim = record::claim(slot, request, lease, now);
            if was_doomed && !is_doomed(slot) {
                self.doomed.remove(&request.key);
            }
            return claim;
        }
        let mut slot = may_be_done.then(|| self.done.get(request.key)).flatten();
        let was_known = slot.is_some();
        let mut claim = record::claim(&mut slot, request, lease, now);
        if let Claim::Granted(lease, _) = &mut claim {
            if was_known {
                self.done.remove(request.key);
            } else if let Some(record) = slot.as_mut().filter(|record| record.fence.get() <= forgotten_fence) {
                record.fence = NonZeroU64::MIN.saturating_add(forgotten_fence);
                lease.fence = record.fence;
            }
            self.active.insert(request.key, slot);
        }
        claim
    }

    pub(super) fn renew(&mut self, held: &Lease, lease: Duration, now: Moment) -> Renewal {
        self.active.get_mut(&held.key).map_or(Renewal::Lost, |slot| record::renew(slot, held, lease, now))
    }

    pub(super) fn record(&mut self, held: &Lease, outcome: &Outcome, now: Moment) -> Recorded {
        let key = held.key;
        if let hashbrown::hash_map::Entry::Occupied(mut active) = self.active.entry(key) {
            let was_doomed = is_doomed(active.get());
            let recorded = record::record(active.get_mut(), held, outcome, now);
            let doomed = is_doomed(active.get());
            if doomed && !was_doomed {
                self.doomed.insert(key);
            } else if was_doomed && !doomed {
                self.doomed.remove(&key);
            }
            if active.get().as_ref().is_none_or(is_done)
                && let Some(record) = active.remove()
            {
                self.done.push(key, record);
            }
            return recorded;
        }
        let mut slot = self.done.get(key);
        let was_known = slot.is_some();
        let recorded = record::record(&mut slot, held, outcome, now);
        if let Some(record) = slot.filter(|_| !was_known) {
            if is_done(&record) {
                self.done.push(key, record);
            } else {
                self.doomed.insert(key);
                self.active.insert(key, Some(record));
            }
        }
        recorded
    }

    /// Removes at most `limit` due records, doomed ones first: they are few.
    pub(super) fn sweep(&mut self, limit: usize, now: Moment, fence: &mut u64) -> (u64, bool) {
        let due = |key: &&EventKey| self.is_due(**key, now);
        let mut doomed: Vec<EventKey> = self.doomed.iter().filter(due).take(limit.saturating_add(1)).copied().collect();
        let more_doomed = doomed.len() > limit;
        doomed.truncate(limit);
        doomed.iter().for_each(|key| self.forget_doomed(*key, fence));
        let (removed, more) = self.done.sweep(self.retention, now, limit - doomed.len(), fence);
        (removed + doomed.len() as u64, more || more_doomed)
    }

    /// What a record takes along: a bounded number of steps, and one doomed record looked at in turn.
    pub(super) fn sweep_along(&mut self, steps: usize, now: Moment, fence: &mut u64) {
        self.done.sweep(self.retention, now, steps, fence);
        let behind = (Bound::Excluded(self.doomed_seen), Bound::Unbounded);
        let next = self.doomed.range(behind).next().or_else(|| self.doomed.first()).copied();
        let Some(key) = next else { return };
        self.doomed_seen = key;
        if self.is_due(key, now) {
            self.forget_doomed(key, fence);
        }
    }

    fn is_due(&self, key: EventKey, now: Moment) -> bool {
        self.active.get(&key).and_then(Option::as_ref).is_some_and(|record| record.is_swept(self.retention, now))
    }

    fn forget_doomed(&mut self, key: EventKey, fence: &mut u64) {
        self.doomed.remove(&key);
        if let Some(record) = self.active.remove(&key).flatten() {
            *fence = record.fence.get().max(*fence);
        }
    }

    pub(super) fn forget(&mut self, key: EventKey) -> Option<Record> {
        self.doomed.remove(&key);
        self.active.remove(&key).flatten().or_else(|| self.done.remove(key))
    }

    pub(super) fn list(&self, status: Status, limit: usize, now: Moment) -> Vec<RecordView> {
        let view = |(key, record): (EventKey, Record)| view(key, &record, now);
        match status {
            Status::Processed => self.done.processed().take(limit).map(view).collect(),
            Status::DeadLettered => self.done.dead().take(limit).map(view).collect(),
            Status::Claimed | Status::Waiting | Status::Doomed => {
                // The oldest `limit` of a map without order: sorted, so that the answer is always the same.
                let mut oldest: Vec<(Moment, EventKey)> = (self.active.iter())
                    .filter_map(|(key, record)| record.as_ref().map(|record| (key, record)))
                    .filter(|(_, record)| record.status() == status)
                    .map(|(key, record)| (record.first, *key))
                    .collect();
                oldest.sort_unstable();
                oldest.truncate(limit);
                oldest.into_iter().filter_map(|(_, key)| Some(view((key, self.get(key)?)))).collect()
            }
        }
    }
}

fn is_doomed(slot: &Option<Record>) -> bool {
    matches!(slot, Some(Record { state: State::Doomed { .. }, .. }))
}

fn is_done(record: &Record) -> bool {
    matches!(record.state, State::Processed { .. } | State::DeadLettered { .. })
}

pub(super) fn view(key: EventKey, record: &Record, now: Moment) -> RecordView {
    let (since, reason) = match record.state {
        State::Claimed { until } | State::Waiting { until } => (until.since(now), None),
        State::Doomed { until, reason, .. } => (until.since(now), Some(reason)),
        State::Processed { at } => (now.since(at), None),
        State::DeadLettered { at, reason, .. } => (now.since(at), Some(reason)),
    };
    let mut view = RecordView::new(key, record.status(), record.fence.get(), record.attempt, record.crashes, since);
    view.trouble = record.trouble.as_deref().cloned();
    view.reason = reason;
    view
}

/// Takes the first eight bytes of a key, which is a digest, as its hash.
#[derive(Clone, Copy, Debug, Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_ne_bytes(*first);
        }
    }

    /// The length before the bytes of an array says nothing.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}
