//! What one session has in hand: entries that wait in the buffer for a `receive`, and those that were handed out.
//!
//! Pure bookkeeping under one lock, apart from every await: which entry a receipt means, whether it is still ours, what is due
//! to be kept ours, and how much room is left.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use hapax::{Delivery, Limits, Message, Origin, Receipt, Session, SessionState, Want};
use tokio::sync::watch;
use tokio::time::Instant;

use super::entry::EntryId;

/// An entry at its stream: the number of its source, and its id there.
pub(super) type Key = (usize, EntryId);

/// An entry that has been read and decoded.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) key: Key,
    pub(super) message: Arc<Message>,
    pub(super) origin: Arc<Origin>,
    pub(super) count: u32,
    /// What it takes in flight.
    pub(super) bytes: usize,
}

/// How an entry in hand stands with the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// On our pending list, as far as we know.
    Ours,
    /// Trimmed away while in hand: nobody else can have it, and a copy of ours is all there is.
    Trimmed,
    /// Another's, or ours again under another receipt.
    Lost,
}

#[derive(Debug)]
struct Held {
    key: Key,
    message: Arc<Message>,
    origin: Arc<Origin>,
    count: u32,
    bytes: usize,
    /// In the buffer, not handed out.
    waits: bool,
    since: Instant,
    /// Until when it is kept ours; from the moment it was handed out.
    until: Option<Instant>,
    kept: Instant,
    standing: Standing,
    /// A settlement was sent and its answer lost: the entry may be ours no more, although nobody said so.
    doubtful: bool,
}

/// One session: its number, its state, and everything in hand.
#[derive(Debug)]
pub(super) struct Table {
    session: Session,
    state: watch::Sender<SessionState>,
    limits: Limits,
    next: u64,
    /// By receipt. In order, so that a run with the same arrivals repeats exactly.
    held: BTreeMap<u64, Held>,
    receipts: HashMap<Key, u64>,
    buffer: VecDeque<u64>,
    handed_out: usize,
    handed_out_bytes: usize,
}

/// What a receipt means.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) key: Key,
    pub(super) standing: Standing,
    pub(super) message: Arc<Message>,
}

impl Table {
    pub(super) fn new(session: u32, limits: Limits) -> Self {
        let (state, receiver) = watch::channel(SessionState::Live);
        Self {
            session: Session::new(session, receiver),
            state,
            limits,
            next: 1,
            held: BTreeMap::new(),
            receipts: HashMap::new(),
            buffer: VecDeque::new(),
            handed_out: 0,
            handed_out_bytes: 0,
        }
    }

    pub(super) fn session(&self) -> u32 {
        self.session.id()
    }

    /// Ends this session and begins the next, with nothing in hand. Receipts go on from where they were: late answers to calls
    /// of the old session mean nothing here.
    pub(super) fn begin_next(&mut self, session: u32) {
        self.end();
        *self = Self { next: self.next, ..Self::new(session, self.limits) };
    }

    /// From here on its receipts are stale.
    pub(super) fn end(&mut self) {
        self.state.send_replace(SessionState::Ended);
        self.held.clear();
        self.receipts.clear();
        self.buffer.clear();
    }

    /// Takes an entry in, unless it is in hand already; answers whether it did. One whose holder was given up is lost to that
    /// holder, and arrives anew.
    pub(super) fn arrive(&mut self, arrival: Arrival, now: Instant) -> bool {
        if let Some(receipt) = self.receipts.get(&arrival.key).copied() {
            let held = self.held.get_mut(&receipt).expect("every receipt in the index is in the table");
            let overdue = held.until.is_some_and(|until| until <= now);
            if !held.doubtful && !overdue && held.standing == Standing::Ours {
                held.kept = now;
                return false;
            }
            held.standing = Standing::Lost;
            if held.waits {
                self.forget(receipt);
            }
        }
        let receipt = self.next;
        self.next += 1;
        self.receipts.insert(arrival.key, receipt);
        self.held.insert(
            receipt,
            Held {
                key: arrival.key,
                message: arrival.message,
                origin: arrival.origin,
                count: arrival.count,
                bytes: arrival.bytes,
                waits: true,
                since: now,
                until: None,
                kept: now,
                standing: Standing::Ours,
                doubtful: false,
            },
        );
        self.buffer.push_back(receipt);
        true
    }

    /// Hands out what waits, as much as is wanted and the limits leave room for.
    pub(super) fn take(&mut self, want: Want, now: Instant) -> Vec<Delivery> {
        let mut deliveries = Vec::new();
        let mut bytes = 0;
        while deliveries.len() < want.events.max(1) && self.handed_out < self.limits.events.max(1) {
            let Some(receipt) = self.buffer.front().copied() else { break };
            let held = self.held.get_mut(&receipt).expect("what waits is in the table");
            let beyond_want = !deliveries.is_empty() && bytes + held.bytes > want.bytes;
            let beyond_limit = self.handed_out > 0 && self.handed_out_bytes + held.bytes > self.limits.bytes;
            if beyond_want || beyond_limit {
                break;
            }
            held.waits = false;
            held.until = now.checked_add(self.limits.held_max);
            bytes += held.bytes;
            self.handed_out += 1;
            self.handed_out_bytes += held.bytes;
            deliveries.push(Delivery {
                receipt: Receipt { session: self.session.id(), partition: 0, position: receipt },
                session: self.session.clone(),
                message: Arc::clone(&held.message),
                count: Some(held.count),
                origin: Some(Arc::clone(&held.origin)),
            });
            self.buffer.pop_front();
        }
        deliveries
    }

    /// What may still be read: events, and bytes.
    pub(super) fn room(&self) -> (usize, usize) {
        let waiting: usize =
            self.buffer.iter().filter_map(|receipt| self.held.get(receipt)).map(|held| held.bytes).sum();
        let events = self.limits.events.max(1).saturating_sub(self.handed_out + self.buffer.len());
        (events, self.limits.bytes.saturating_sub(self.handed_out_bytes + waiting))
    }

    pub(super) fn waiting(&self) -> usize {
        self.buffer.len()
    }

    pub(super) fn find(&self, receipt: Receipt) -> Option<Found> {
        let held = self.held.get(&receipt.position).filter(|_| receipt.partition == 0)?;
        Some(Found { key: held.key, standing: held.standing, message: Arc::clone(&held.message) })
    }

    /// A delivery that has ended.
    pub(super) fn forget(&mut self, receipt: u64) {
        let Some(held) = self.held.remove(&receipt) else { return };
        if self.receipts.get(&held.key) == Some(&receipt) {
            self.receipts.remove(&held.key);
        }
        if held.waits {
            self.buffer.retain(|waiting| *waiting != receipt);
        } else {
            self.handed_out -= 1;
            self.handed_out_bytes -= held.bytes;
        }
    }

    /// Its settlement was sent, and no answer came.
    pub(super) fn doubt(&mut self, receipt: u64) {
        if let Some(held) = self.held.get_mut(&receipt) {
            held.doubtful = true;
        }
    }

    /// The entries to keep ours now: those not kept for `every`, in ascending order. What was held for longer than `held_max`
    /// is kept no more.
    pub(super) fn to_keep(&self, every: Duration, now: Instant) -> Vec<Key> {
        let due = |held: &&Held| {
            held.standing == Standing::Ours
                && held.until.is_none_or(|until| now < until)
                && now.saturating_duration_since(held.kept) >= every
        };
        let mut keys: Vec<_> = self.held.values().filter(due).map(|held| held.key).collect();
        keys.sort_unstable();
        keys
    }

    /// This delivery's entry was trimmed away while in hand.
    pub(super) fn trimmed(&mut self, receipt: u64) {
        if let Some(held) = self.held.get_mut(&receipt).filter(|held| held.standing == Standing::Ours) {
            held.standing = Standing::Trimmed;
        }
    }

    /// This entry was trimmed away; answers whether it is in hand.
    pub(super) fn trimmed_in_hand(&mut self, key: Key) -> bool {
        let receipt = self.receipts.get(&key).copied();
        if let Some(receipt) = receipt {
            self.trimmed(receipt);
        }
        receipt.is_some()
    }

    /// What keeping these entries told. `at` is when the question was sent: it says nothing of what arrived since.
    pub(super) fn kept(&mut self, keys: &[Key], lost: &[Key], trimmed: &[Key], at: Instant) {
        for (keys, standing) in [(keys, None), (lost, Some(Standing::Lost)), (trimmed, Some(Standing::Trimmed))] {
            for key in keys {
                let receipt = self.receipts.get(key).copied();
                let Some((receipt, held)) = receipt.and_then(|it| Some((it, self.held.get_mut(&it)?))) else {
                    continue;
                };
                if held.kept > at {
                    continue;
                }
                held.kept = at;
                let Some(standing) = standing else { continue };
                held.standing = standing;
                if standing == Standing::Lost {
                    self.receipts.remove(key);
                    if held.waits {
                        self.forget(receipt);
                    }
                }
            }
        }
    }

    /// What has waited in the buffer for so long that others should have it.
    pub(super) fn stale_waiting(&self, longest: Duration, now: Instant) -> Vec<(u64, Key)> {
        let held = self.buffer.iter().filter_map(|receipt| Some((*receipt, self.held.get(receipt)?)));
        // What was trimmed meanwhile goes back too, as a copy.
        let is_settled = |held: &Held| matches!(held.standing, Standing::Ours | Standing::Trimmed);
        held.filter(|(_, held)| is_settled(held) && now.saturating_duration_since(held.since) >= longest)
            .map(|(receipt, held)| (receipt, held.key))
            .collect()
    }

    /// Whether this entry, which is on our pending list, is in hand.
    pub(super) fn has(&self, key: Key) -> bool {
        self.receipts.contains_key(&key)
    }
}

#[cfg(test)]
mod tests {
    use hapax::MessageLimits;

    use super::*;

    fn table(events: usize, bytes: usize) -> Table {
        let second = Duration::from_secs(1);
        Table::new(7, Limits { events, bytes, held_max: second * 60, drain: second, message: MessageLimits::DEFAULT })
    }

    fn arrival(number: u64, bytes: usize) -> Arrival {
        Arrival {
            key: (0, EntryId(number, 0)),
            message: Arc::default(),
            origin: Arc::new(Origin { place: "s".into(), position: "1-0".into() }),
            count: 1,
            bytes,
        }
    }

    const ALL: Want = Want { events: 100, bytes: 1000 };

    #[tokio::test(start_paused = true)]
    async fn no_more_is_handed_out_than_is_wanted_and_allowed() {
        let now = Instant::now();
        let mut table = table(4, 100);
        (1..=6).for_each(|number| assert!(table.arrive(arrival(number, 30), now)));
        assert_eq!(table.take(Want { events: 1, bytes: 0 }, now).len(), 1, "the first comes whatever its size");
        assert_eq!(table.take(Want { events: 9, bytes: 59 }, now).len(), 1);
        assert_eq!(table.take(ALL, now).len(), 1, "four would be 120 bytes");
        assert_eq!(table.room().0, 0);
        table.forget(1);
        assert_eq!(table.take(ALL, now).len(), 1);
    }

    /// Bug 25 of semantics.md section 4, dapr/components-contrib#4599: what is in hand does not arrive a second time.
    #[tokio::test(start_paused = true)]
    async fn an_entry_in_hand_does_not_arrive_again() {
        let now = Instant::now();
        let mut table = table(10, 1000);
        assert!(table.arrive(arrival(1, 1), now));
        assert!(!table.arrive(arrival(1, 1), now), "while it waits");
        assert_eq!(table.take(ALL, now).len(), 1);
        assert!(!table.arrive(arrival(1, 1), now), "while it is handled");
    }

    #[tokio::test(start_paused = true)]
    async fn an_entry_whose_holder_was_given_up_arrives_under_another_receipt() {
        let now = Instant::now();
        let mut table = table(10, 1000);
        table.arrive(arrival(1, 1), now);
        let old = table.take(ALL, now)[0].receipt;
        let late = now + Duration::from_secs(60);
        assert!(table.to_keep(Duration::ZERO, late).is_empty(), "held_max is over");
        assert!(table.arrive(arrival(1, 1), late));
        assert_eq!(table.find(old).unwrap().standing, Standing::Lost);
        let new = table.take(ALL, late)[0].receipt;
        assert_eq!(table.find(new).unwrap().standing, Standing::Ours);
        table.forget(old.position);
        assert!(table.has((0, EntryId(1, 0))), "the old receipt's end leaves the new delivery alone");
    }

    #[tokio::test(start_paused = true)]
    async fn what_another_took_is_lost_and_what_was_trimmed_is_kept_here() {
        let now = Instant::now();
        let mut table = table(10, 1000);
        (1..=4).for_each(|number| assert!(table.arrive(arrival(number, 1), now)));
        let receipts: Vec<_> = table.take(Want { events: 3, bytes: 1000 }, now).iter().map(|d| d.receipt).collect();
        let later = now + Duration::from_secs(10);
        let keys = table.to_keep(Duration::from_secs(10), later);
        assert_eq!(keys.len(), 4);
        table.kept(&keys, &[keys[0], keys[3]], &[keys[1]], later);
        let standings: Vec<_> = receipts.iter().map(|receipt| table.find(*receipt).unwrap().standing).collect();
        assert_eq!(standings, [Standing::Lost, Standing::Trimmed, Standing::Ours]);
        assert_eq!(table.waiting(), 0, "what waited and was lost is not handed out");
        assert!(table.to_keep(Duration::from_secs(10), later).is_empty(), "just kept");
    }

    /// Answers to calls of the old session come when the next has begun: its deliveries are none of theirs.
    #[tokio::test(start_paused = true)]
    async fn a_late_answer_of_the_old_session_touches_nothing_of_the_next() {
        let now = Instant::now();
        let mut table = table(10, 1000);
        table.arrive(arrival(1, 1), now);
        let old = table.take(ALL, now)[0].receipt;
        table.begin_next(8);
        table.arrive(arrival(1, 1), now);
        let new = table.take(ALL, now)[0].receipt;
        table.doubt(old.position);
        assert!(!table.arrive(arrival(1, 1), now), "it is in hand, without a doubt");
        table.forget(old.position);
        assert_eq!(table.find(new).unwrap().standing, Standing::Ours);
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_answer_about_an_entry_leaves_its_newer_delivery_alone() {
        let asked = Instant::now();
        let later = asked + Duration::from_secs(1);
        let mut table = table(10, 1000);
        table.arrive(arrival(1, 1), asked);
        table.arrive(arrival(2, 1), asked);
        let old = table.take(ALL, asked);
        table.forget(old[0].receipt.position);
        // Released and taken again; and taken again while it seemed ours all the time.
        assert!(table.arrive(arrival(1, 1), later));
        assert!(!table.arrive(arrival(2, 1), later));
        let new = table.take(ALL, later);
        let keys = [(0, EntryId(1, 0)), (0, EntryId(2, 0))];
        table.kept(&keys, &keys, &[], asked);
        table.kept(&keys, &[], &keys, asked);
        for receipt in [new[0].receipt, old[1].receipt] {
            assert_eq!(table.find(receipt).unwrap().standing, Standing::Ours);
        }
    }
}
