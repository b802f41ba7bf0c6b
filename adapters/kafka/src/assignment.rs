//! One assignment of one partition: its session, what is buffered ahead of `receive`, what is in the runtime's hands, and
//! which offsets are done.
//!
//! An assignment is never revived: when the partition comes back it gets another, with another session. So what an earlier
//! one settles late finds nothing to settle, and no offset of it can be committed.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Duration;

use hapax::{Receipt, Session, SessionState};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::fetched::{Entry, Fetched, Given};
use crate::tracker::Tracker;

/// Most offsets of a partition between the first that is not done and the last fetched; beyond it fetching pauses.
pub(crate) const SPAN_MAX: usize = 16_384;

/// A delivery in the runtime's hands.
#[derive(Debug)]
struct Held {
    entry: Entry,
    /// A retry or a dead letter of it is on its way.
    placing: bool,
}

/// The deliveries in the runtime's hands, by the position of their receipts: numbers that count up, and nobody else's.
type Hands = HashMap<u64, Held, BuildHasherDefault<ByPosition>>;

#[derive(Debug, Default)]
struct ByPosition(u64);

impl Hasher for ByPosition {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0 ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, position: u64) {
        // An odd factor keeps consecutive numbers apart in the lower bits, which say the place, and varies the upper ones.
        self.0 = position.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// What is buffered of a partition before fetching pauses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead {
    pub(crate) events: usize,
    pub(crate) bytes: usize,
}

#[derive(Debug)]
pub(crate) struct Assignment {
    pub(crate) place: usize,
    pub(crate) partition: i32,
    pub(crate) session: Session,
    state: watch::Sender<SessionState>,
    pub(crate) tracker: Tracker,
    /// Fetched and not handed out, by offset.
    queue: VecDeque<Entry>,
    queue_bytes: usize,
    /// How many of them have a time of their own.
    waiting: usize,
    held: Hands,
    handed_out: u64,
    ahead: Ahead,
    /// What the client was told; `None` before it was told anything.
    pub(crate) paused: Option<bool>,
    /// Since when enough is buffered.
    full_since: Option<Instant>,
}

impl Assignment {
    pub(crate) fn new(session: u32, place: usize, partition: i32, ahead: Ahead) -> Self {
        let (state, seen) = watch::channel(SessionState::Live);
        Self {
            place,
            partition,
            session: Session::new(session, seen),
            state,
            tracker: Tracker::default(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            waiting: 0,
            held: Hands::default(),
            handed_out: 0,
            ahead,
            paused: None,
            full_since: None,
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        *self.state.borrow() == SessionState::Live
    }

    /// Takes a fetched record; false where it is in hand already, or nothing more is taken.
    pub(crate) fn arrive(&mut self, entry: Entry) -> bool {
        if !self.is_live() || !self.tracker.fetched(entry.offset) {
            return false;
        }
        self.enqueue(entry);
        true
    }

    fn enqueue(&mut self, entry: Entry) {
        self.queue_bytes += entry.raw.bytes();
        self.waiting += usize::from(entry.retry.is_some());
        if self.queue.back().is_none_or(|last| last.offset < entry.offset) {
            self.queue.push_back(entry);
            return;
        }
        let at = self.queue.partition_point(|other| other.offset < entry.offset);
        self.queue.insert(at, entry);
    }

    /// The bytes of the next record that may be handed out now.
    pub(crate) fn next_bytes(&self, now: Instant) -> Option<usize> {
        self.next(now).map(|at| self.queue[at].raw.bytes())
    }

    fn next(&self, now: Instant) -> Option<usize> {
        // In a retry topic one that is due may stand behind one that is not.
        self.queue.iter().position(|entry| entry.due().is_none_or(|due| due <= now))
    }

    /// When the next record is due, where all of them wait.
    pub(crate) fn due(&self) -> Option<Instant> {
        if self.waiting == 0 {
            return None;
        }
        self.queue.iter().filter_map(Entry::due).min()
    }

    /// Hands out the next record.
    pub(crate) fn hand_out(&mut self, now: Instant) -> Option<Given> {
        let at = self.next(now)?;
        let entry = self.queue.remove(at)?;
        self.queue_bytes -= entry.raw.bytes();
        self.waiting -= usize::from(entry.retry.is_some());
        self.handed_out += 1;
        let receipt = Receipt {
            session: self.session.id(),
            partition: u32::try_from(self.partition).unwrap_or(0),
            position: self.handed_out,
        };
        self.held.insert(self.handed_out, Held { entry: entry.clone(), placing: false });
        let fetched = Fetched { place: self.place, partition: self.partition, entry };
        Some(Given { receipt, session: self.session.clone(), fetched })
    }

    /// Ends a delivery as done; answers its bytes.
    pub(crate) fn done(&mut self, position: u64) -> Option<usize> {
        let entry = self.held.remove(&position)?.entry;
        self.tracker.done(entry.offset);
        Some(entry.raw.bytes())
    }

    /// Ends a delivery that nobody else is about to end, as done.
    pub(crate) fn ack(&mut self, position: u64) -> Option<usize> {
        if self.held.get(&position)?.placing {
            return None;
        }
        self.done(position)
    }

    /// Takes a delivery back: it is handed out again here, or where the partition goes.
    pub(crate) fn release(&mut self, position: u64) -> Option<usize> {
        if self.held.get(&position)?.placing {
            return None;
        }
        let entry = self.held.remove(&position)?.entry;
        let bytes = entry.raw.bytes();
        if self.is_live() {
            self.enqueue(entry);
        }
        Some(bytes)
    }

    /// Begins to place a copy of a delivery elsewhere. Nobody else ends it until that is over.
    pub(crate) fn begin_placing(&mut self, position: u64) -> Option<Fetched> {
        let held = self.held.get_mut(&position).filter(|held| !held.placing)?;
        held.placing = true;
        Some(Fetched { place: self.place, partition: self.partition, entry: held.entry.clone() })
    }

    /// It could not be placed: the delivery can be settled again.
    pub(crate) fn not_placed(&mut self, position: u64) {
        if let Some(held) = self.held.get_mut(&position) {
            held.placing = false;
        }
    }

    /// Whether nothing of it is in the runtime's hands.
    pub(crate) fn is_settled(&self) -> bool {
        self.held.is_empty()
    }

    /// How many deliveries are in the runtime's hands, and their bytes.
    pub(crate) fn in_hand(&self) -> (usize, usize) {
        (self.held.len(), self.held.values().map(|held| held.entry.raw.bytes()).sum())
    }

    /// Whether fetching is to pause; with a margin, so that it does not flutter.
    pub(crate) fn pauses(&self, stopped: bool) -> bool {
        let was_full = self.paused == Some(true) || self.full_since.is_some();
        let part = |most: usize| if was_full { most.div_ceil(2) } else { most };
        stopped
            || !self.is_live()
            || self.queue.len() >= part(self.ahead.events)
            || self.queue_bytes >= part(self.ahead.bytes)
            || self.tracker.span() >= part(SPAN_MAX)
    }

    /// Whether polling is to wait for room here, instead of a pause: so long after the buffer filled. To be asked whenever
    /// [`pauses`](Self::pauses) was.
    pub(crate) fn holds(&mut self, pauses: bool, now: Instant, most: Duration) -> bool {
        if !pauses {
            self.full_since = None;
            return false;
        }
        let since = *self.full_since.get_or_insert(now);
        self.paused != Some(true) && self.is_live() && now < since + most
    }

    /// Whether nothing of it is buffered while it is paused.
    pub(crate) fn wants_more(&self) -> bool {
        self.paused == Some(true) && self.is_live()
    }

    /// Starts nothing more; what was never handed out is forgotten, the next owner fetches it.
    pub(crate) fn drain(&mut self) {
        self.queue.clear();
        self.queue_bytes = 0;
        self.waiting = 0;
        self.state.send_replace(SessionState::Draining);
    }

    /// The session is over.
    pub(crate) fn end(&mut self) {
        self.drain();
        self.held.clear();
        self.state.send_replace(SessionState::Ended);
    }
}
