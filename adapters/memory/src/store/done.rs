//! What is done, in few bytes: fixed-size entries in the order of their completion, and an index of entry numbers.
//!
//! Apart from the store because only the layout matters here. An id costs one [`Entry`] (56 bytes) and one place in the
//! index (9 bytes at a load of 44 to 88 %, so 10 to 20); growing makes no pause, since the queue grows by segments and
//! the index is split in shards that double one after the other. A sweep takes entries off the front.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU64;
use std::time::Duration;

use hapax::record::{Moment, Record, State};
use hapax::{EventKey, Fingerprint, Reason, Trouble};
use hashbrown::HashTable;

/// Entries of one segment of the queue: 224 KiB.
const SEGMENT: usize = 4_096;
/// Shards of the index: one that doubles at 10^7 entries moves some 10,000 of them.
const SHARDS: usize = 1_024;
/// Troubles kept of dead letters of one consumer, the newest.
const TROUBLES_MAX: usize = 10_000;

/// How a record ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Processed,
    DeadLettered(Reason),
    /// Reopened or forgotten: only its place is left.
    Gone,
}

/// A terminal record without what only people or an open lease would need.
#[derive(Clone, Copy, Debug)]
struct Entry {
    key: EventKey,
    fingerprint: Fingerprint,
    fence: NonZeroU64,
    at: Moment,
    attempt: u32,
    /// Saturates: only people read it once a record is terminal.
    crashes: u16,
    end: End,
}

/// Where a record is, and enough of its key that a shard doubles without a look at the entries, which are all over the
/// memory.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Modulo 2^32: never more entries than that are there at once.
    number: u32,
    hash: u32,
}

/// The terminal records of one consumer.
#[derive(Debug)]
pub(super) struct Done {
    segments: VecDeque<Vec<Entry>>,
    /// A segment that was swept, for the next that is needed.
    spare: Option<Vec<Entry>>,
    /// The number of the first entry in the first segment, a multiple of [`SEGMENT`].
    first: u64,
    /// The number of the oldest entry that is not swept, and of the next one.
    front: u64,
    next: u64,
    index: Vec<HashTable<Place>>,
    records: usize,
    /// Which entries are of dead letters, each with the fence under which it was doomed.
    dead: BTreeMap<u64, NonZeroU64>,
    troubles: BTreeMap<u64, Trouble>,
}

impl Done {
    pub(super) fn new() -> Self {
        Self {
            segments: VecDeque::new(),
            spare: None,
            first: 0,
            front: 0,
            next: 0,
            index: vec![HashTable::new(); SHARDS],
            records: 0,
            dead: BTreeMap::new(),
            troubles: BTreeMap::new(),
        }
    }

    /// Places in the queue, those of reopened and forgotten records included.
    pub(super) fn places(&self) -> usize {
        (self.next - self.front) as usize
    }

    pub(super) fn records(&self) -> usize {
        self.records
    }

    /// The record of `key` as the state machine knows it; its token and first claim are forgotten.
    pub(super) fn get(&self, key: EventKey) -> Option<Record> {
        self.find(key).and_then(|number| self.record(number))
    }

    pub(super) fn contains(&self, key: EventKey) -> bool {
        self.find(key).is_some()
    }

    /// Keeps a terminal record. The key must not be there.
    pub(super) fn push(&mut self, key: EventKey, record: Record) {
        let (at, end, doomed) = match record.state {
            State::Processed { at } => (at, End::Processed, None),
            State::DeadLettered { at, reason, since } => (at, End::DeadLettered(reason), Some(since)),
            State::Claimed { .. } | State::Waiting { .. } | State::Doomed { .. } => return,
        };
        let number = self.next;
        if self.segments.back().is_none_or(|segment| segment.len() == SEGMENT) {
            let segment = self.spare.take().unwrap_or_else(|| Vec::with_capacity(SEGMENT));
            self.segments.push_back(segment);
        }
        let crashes = u16::try_from(record.crashes).unwrap_or(u16::MAX);
        let Record { fingerprint, fence, attempt, trouble, .. } = record;
        if let Some(segment) = self.segments.back_mut() {
            segment.push(Entry { key, fingerprint, fence, at, attempt, crashes, end });
        }
        if let Some(since) = doomed {
            self.dead.insert(number, since);
            if let Some(trouble) = trouble {
                self.troubles.insert(number, *trouble);
            }
            if self.troubles.len() > TROUBLES_MAX {
                self.troubles.pop_first();
            }
        }
        self.next += 1;
        self.records += 1;
        let place = Place { number: number as u32, hash: hash(key) };
        self.index[shard(key)].insert_unique(spread(place.hash), place, |place| spread(place.hash));
    }

    /// Takes a record out; its place in the queue stays until the sweep comes by.
    pub(super) fn remove(&mut self, key: EventKey) -> Option<Record> {
        let number = self.find(key)?;
        let record = self.record(number);
        self.unlink(key, number);
        let place = (number - self.first) as usize;
        if let Some(entry) = self.segments.get_mut(place / SEGMENT).and_then(|s| s.get_mut(place % SEGMENT)) {
            entry.end = End::Gone;
        }
        record
    }

    /// Takes at most `steps` entries off the front, as long as they are due. Answers records removed, and whether
    /// more are due. `fence` becomes the highest fence that is forgotten.
    pub(super) fn sweep(&mut self, retention: Duration, now: Moment, steps: usize, fence: &mut u64) -> (u64, bool) {
        let mut removed = 0;
        for _ in 0..steps {
            let Some(entry) = self.due(retention, now) else { return (removed, false) };
            if entry.end != End::Gone {
                *fence = entry.fence.get().max(*fence);
                self.unlink(entry.key, self.front);
                removed += 1;
            }
            self.front += 1;
            if self.front == self.first + SEGMENT as u64 {
                self.first = self.front;
                self.spare = self.segments.pop_front().map(|mut segment| {
                    segment.clear();
                    segment
                });
            }
        }
        (removed, self.due(retention, now).is_some())
    }

    /// Records from the oldest on.
    pub(super) fn processed(&self) -> impl Iterator<Item = (EventKey, Record)> {
        (self.front..self.next)
            .filter_map(|number| self.keyed(number))
            .filter(|(_, record)| matches!(record.state, State::Processed { .. }))
    }

    /// Dead letters' records from the oldest on.
    pub(super) fn dead(&self) -> impl Iterator<Item = (EventKey, Record)> {
        self.dead.keys().filter_map(|number| self.keyed(*number))
    }

    fn due(&self, retention: Duration, now: Moment) -> Option<Entry> {
        let entry = *self.segments.front()?.get((self.front - self.first) as usize)?;
        (entry.end == End::Gone || entry.at.after(retention) <= now).then_some(entry)
    }

    fn unlink(&mut self, key: EventKey, number: u64) {
        let found = self.index[shard(key)].find_entry(spread(hash(key)), |place| place.number == number as u32);
        if let Ok(place) = found {
            place.remove();
            self.records -= 1;
            self.dead.remove(&number);
            self.troubles.remove(&number);
        }
    }

    fn find(&self, key: EventKey) -> Option<u64> {
        let hash = hash(key);
        let has_key = |number| entry(&self.segments, self.first, number).is_some_and(|entry| entry.key == key);
        let same = |place: &Place| place.hash == hash && has_key(place.number);
        let place = self.index[shard(key)].find(spread(hash), same)?;
        Some(self.first + u64::from(place.number.wrapping_sub(self.first as u32)))
    }

    fn keyed(&self, number: u64) -> Option<(EventKey, Record)> {
        let key = entry(&self.segments, self.first, number as u32)?.key;
        Some((key, self.record(number)?))
    }

    fn record(&self, number: u64) -> Option<Record> {
        let entry = entry(&self.segments, self.first, number as u32)?;
        let at = entry.at;
        let state = match entry.end {
            End::Processed => State::Processed { at },
            End::DeadLettered(reason) => {
                let since = self.dead.get(&number).copied().unwrap_or(entry.fence);
                State::DeadLettered { at, reason, since }
            }
            End::Gone => return None,
        };
        Some(Record {
            state,
            fingerprint: entry.fingerprint,
            fence: entry.fence,
            attempt: entry.attempt,
            crashes: u32::from(entry.crashes),
            token: 0,
            first: at,
            trouble: self.trouble(number),
        })
    }

    fn trouble(&self, number: u64) -> Option<Box<Trouble>> {
        if self.troubles.is_empty() {
            return None;
        }
        self.troubles.get(&number).map(|trouble| Box::new(trouble.clone()))
    }
}

fn entry(segments: &VecDeque<Vec<Entry>>, first: u64, number: u32) -> Option<&Entry> {
    let place = number.wrapping_sub(first as u32) as usize;
    segments.get(place / SEGMENT)?.get(place % SEGMENT)
}

/// The key is a digest already: its first bytes are as good a hash as any. The shard comes from other bytes.
fn hash(key: EventKey) -> u32 {
    let [a, b, c, d, ..] = key.0;
    u32::from_le_bytes([a, b, c, d])
}

/// What a table of a shard wants: it takes the place from the lower bits and a tag from the upper ones.
fn spread(hash: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(hash)
}

/// From other bytes than the hash. With `x` even over `0..1`, the shard `(x² + 2x) / 3` gives the first shards twice as
/// many keys as the last, so that they double at different times; even shards would all double at once.
fn shard(key: EventKey) -> usize {
    let x = u64::from(u16::from_le_bytes([key.0[8], key.0[9]]));
    ((x * (x + (2 << 16)) * SHARDS as u64) / (3 << 32)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u64) -> EventKey {
        EventKey::of("billing", "test", &number.to_string())
    }

    fn ended(number: u64, state: State) -> Record {
        Record {
            state,
            fingerprint: Fingerprint([1; 16]),
            fence: NonZeroU64::MIN.saturating_add(number),
            attempt: 1,
            crashes: 0,
            token: 0,
            first: Moment(0),
            trouble: None,
        }
    }

    fn dead_lettered(at: u64) -> State {
        State::DeadLettered { at: Moment(at), reason: Reason::Permanent, since: NonZeroU64::MIN }
    }

    fn processed(done: &mut Done, numbers: std::ops::Range<u64>) {
        for number in numbers {
            done.push(key(number), ended(number, State::Processed { at: Moment(number) }));
        }
    }

    /// Allocated bytes, from the capacities; the two maps of dead letters are empty here.
    fn bytes(done: &Done) -> usize {
        let entries: usize = done.segments.iter().chain(&done.spare).map(Vec::capacity).sum();
        let index: usize = done.index.iter().map(HashTable::allocation_size).sum();
        entries * size_of::<Entry>() + index + SHARDS * size_of::<HashTable<u32>>()
    }

    /// Looked at as it grows, so that a moment after a doubling is among them.
    #[test]
    fn a_remembered_id_takes_at_most_80_bytes_from_half_a_million_on() {
        let mut done = Done::new();
        processed(&mut done, 0..400_000);
        for step in 0..20 {
            let from = 400_000 + step * 10_000;
            processed(&mut done, from..from + 10_000);
            let per_id = bytes(&done) / done.records();
            assert!((56..=80).contains(&per_id), "{per_id} bytes at {} ids", done.records());
        }
    }

    #[test]
    fn the_shards_fill_at_different_speeds_and_all_are_used() {
        let mut keys = vec![0_u32; SHARDS];
        for x in 0..=u16::MAX {
            let mut key = EventKey([0; 16]);
            key.0[8..10].copy_from_slice(&x.to_le_bytes());
            keys[shard(key)] += 1;
        }
        assert!((95..=97).contains(&keys[0]) && (47..=49).contains(&keys[SHARDS - 1]), "{keys:?}");
        assert!(keys.iter().all(|keys| *keys > 40));
    }

    #[test]
    fn a_sweep_is_bounded_and_gives_its_memory_back() {
        let mut done = Done::new();
        let ids = 10 * SEGMENT as u64;
        processed(&mut done, 0..ids);
        let (mut fence, all) = (0, bytes(&done));
        assert_eq!(done.sweep(Duration::ZERO, Moment(ids), 3, &mut fence), (3, true));
        assert_eq!((done.records() as u64, fence), (ids - 3, 3));
        assert!(done.get(key(2)).is_none() && done.get(key(3)).is_some());
        assert_eq!(
            done.sweep(Duration::from_micros(10), Moment(ids - 1), usize::MAX, &mut fence),
            (ids - 3 - 10, false)
        );
        assert!(done.get(key(ids - 10)).is_some());
        assert_eq!(done.segments.len(), 1);
        assert!(bytes(&done) < all / 2);
    }

    #[test]
    fn what_was_taken_out_leaves_a_place_that_no_look_up_finds_and_no_sweep_counts() {
        let mut done = Done::new();
        processed(&mut done, 0..3);
        assert_eq!(done.remove(key(1)), done_record(1));
        assert_eq!((done.remove(key(1)), done.records(), done.places()), (None, 2, 3));
        done.push(key(1), ended(7, dead_lettered(9)));
        assert_eq!(done.get(key(1)).map(|record| record.fence.get()), Some(8));
        let mut fence = 0;
        assert_eq!(done.sweep(Duration::ZERO, Moment(5), usize::MAX, &mut fence), (2, false));
        assert_eq!((done.records(), done.places(), done.dead().count()), (1, 1, 1));
    }

    fn done_record(number: u64) -> Option<Record> {
        let at = Moment(number);
        Some(Record { first: at, ..ended(number, State::Processed { at }) })
    }

    /// The index keeps four bytes of a key and takes the shard from two more: whose those agree are still two events.
    #[test]
    fn keys_that_the_index_cannot_tell_apart_are_two_events() {
        let [one, other] = [1, 2].map(|last| {
            let mut key = key(0);
            key.0[15] = last;
            key
        });
        let mut done = Done::new();
        done.push(one, ended(1, State::Processed { at: Moment(1) }));
        assert_eq!(done.get(other), None);
        done.push(other, ended(2, State::Processed { at: Moment(2) }));
        assert_eq!((done.get(one), done.get(other)), (done_record(1), done_record(2)));
        assert_eq!(done.remove(one), done_record(1));
        assert_eq!((done.get(one), done.get(other)), (None, done_record(2)));
    }

    #[test]
    fn numbers_go_on_behind_two_to_the_32() {
        let start = (1u64 << 32) - SEGMENT as u64;
        let mut done = Done { first: start, front: start, next: start, ..Done::new() };
        processed(&mut done, 0..3 * SEGMENT as u64);
        assert!((0..3 * SEGMENT as u64).all(|number| done.get(key(number)) == done_record(number)));
        let mut fence = 0;
        done.sweep(Duration::ZERO, Moment(2 * SEGMENT as u64), usize::MAX, &mut fence);
        assert_eq!(done.records(), SEGMENT - 1);
        assert!((2 * SEGMENT as u64 + 1..3 * SEGMENT as u64).all(|number| done.get(key(number)).is_some()));
    }

    #[test]
    fn troubles_are_kept_of_the_newest_dead_letters_only() {
        let mut done = Done::new();
        let trouble = |number: u64| Some(Box::new(Trouble { id: number.to_string().into(), error: "".into() }));
        for number in 0..=TROUBLES_MAX as u64 {
            done.push(key(number), Record { trouble: trouble(number), ..ended(number, dead_lettered(0)) });
        }
        assert_eq!(done.get(key(0)).and_then(|record| record.trouble), None);
        assert_eq!(done.get(key(1)).and_then(|record| record.trouble), trouble(1));
    }
}
