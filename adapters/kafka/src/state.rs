//! What the polling thread and the callers of the contract share: the assignments, behind one lock that is held for a few
//! lines and never across an await.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hapax::{Delivery, Error, ErrorKind, Limits, Receipt, Result, Want};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::assignment::{Ahead, Assignment, Entry};
use crate::places::{Kind, Places};

/// Most records buffered ahead of `receive` in a partition.
const AHEAD_EVENTS_MAX: usize = 1024;
/// Fewest bytes buffered ahead in a partition, however many there are.
const AHEAD_BYTES_MIN: usize = 64 << 10;
/// What a partition of a retry topic buffers, so that one that is due passes one that is not.
const RETRY_AHEAD: Ahead = Ahead { events: 128, bytes: 1 << 20 };

/// How a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Open,
    /// Nothing more is handed out.
    Stopped,
    /// The thread is to end.
    Closing,
}

/// One run of a broker, from `open` to `close`.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) places: Arc<Places>,
    state: Mutex<State>,
    /// Something can be received, or never will be.
    pub(crate) arrivals: Notify,
    /// The numbers of sessions, never given twice.
    sessions: Arc<AtomicU32>,
    /// True when the thread has ended.
    pub(crate) ended: watch::Sender<bool>,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) phase: Phase,
    pub(crate) limits: Limits,
    pub(crate) assigned: BTreeMap<u32, Assignment>,
    by_place: HashMap<(usize, i32), u32>,
    /// In the runtime's hands.
    held_events: usize,
    held_bytes: usize,
    /// The session that was served last.
    cursor: u32,
    /// What receivers are told once.
    pub(crate) trouble: Option<Error>,
    /// The group has told this member what it has, be it nothing.
    pub(crate) joined: bool,
    /// Where partitions end and where the group stands in them, as the client last saw it.
    pub(crate) ends: HashMap<(usize, i32), (i64, i64)>,
}

/// What `receive` found.
pub(crate) enum Take {
    Some(Vec<Delivery>),
    Stopped,
    Trouble(Error),
    /// Nothing, and when to look again.
    Nothing(Option<Instant>),
}

impl Shared {
    pub(crate) fn new(places: Arc<Places>, limits: Limits, sessions: Arc<AtomicU32>) -> Self {
        let state = State {
            phase: Phase::Open,
            limits,
            assigned: BTreeMap::new(),
            by_place: HashMap::new(),
            held_events: 0,
            held_bytes: 0,
            cursor: 0,
            trouble: None,
            joined: false,
            ends: HashMap::new(),
        };
        Self { places, state: Mutex::new(state), arrivals: Notify::new(), sessions, ended: watch::Sender::new(false) }
    }

    /// A panic elsewhere leaves counts at worst, and those are not relied on for safety.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.lock().phase == Phase::Closing
    }

    /// Nothing more is handed out; with `closing` all sessions end and the thread is told to.
    pub(crate) fn stop(&self, closing: bool) {
        let mut state = self.lock();
        if closing {
            state.phase = Phase::Closing;
            // The trackers stay: the thread commits what is done.
            state.assigned.values_mut().for_each(Assignment::end);
        } else if state.phase == Phase::Open {
            state.phase = Phase::Stopped;
        }
        drop(state);
        self.arrivals.notify_waiters();
    }

    /// The group has told what this member has, or trouble that a receiver is to hear.
    pub(crate) fn is_joined(&self) -> bool {
        let state = self.lock();
        state.joined || state.trouble.is_some() || state.phase == Phase::Closing
    }

    /// Receivers are told once what is wrong.
    pub(crate) fn tell(&self, trouble: Error) {
        self.lock().trouble = Some(trouble);
        self.arrivals.notify_waiters();
    }

    /// A partition was assigned. An assignment of it that was still there is over.
    pub(crate) fn assign(&self, place: usize, partition: i32) {
        let session = self.sessions.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let mut state = self.lock();
        state.joined = true;
        let ahead = match self.places.subscribed[place].kind {
            Kind::Retry { .. } => RETRY_AHEAD,
            Kind::Main => {
                let mains = self.places.mains();
                let live = state.assigned.values().filter(|other| other.place < mains).count() + 1;
                let bytes = (state.limits.bytes / live).max(AHEAD_BYTES_MIN);
                Ahead { events: state.limits.events.clamp(1, AHEAD_EVENTS_MAX), bytes }
            }
        };
        if let Some(old) = state.by_place.insert((place, partition), session) {
            state.end(old);
        }
        let mut assignment = Assignment::new(session, place, partition, ahead);
        if state.phase == Phase::Closing {
            assignment.end();
        }
        state.assigned.insert(session, assignment);
    }

    /// Takes what was fetched; what belongs to no assignment is ignored.
    pub(crate) fn arrive(&self, entries: impl IntoIterator<Item = (usize, i32, Entry)>) {
        let mut state = self.lock();
        let mut arrived = false;
        for (place, partition, entry) in entries {
            if let Some(assignment) = state.at(place, partition) {
                arrived |= assignment.arrive(entry);
            }
        }
        drop(state);
        if arrived {
            self.arrivals.notify_waiters();
        }
    }

    pub(crate) fn take(&self, want: Want) -> Take {
        let now = Instant::now();
        self.lock().take(want, now)
    }

    /// A retry or dead letter of a delivery was placed: it is done. False where its session is over by now.
    pub(crate) fn placed(&self, receipt: Receipt) -> bool {
        self.lock().settle(receipt, Assignment::done).is_some()
    }

    /// It was not.
    pub(crate) fn not_placed(&self, receipt: Receipt) {
        if let Some(assignment) = self.lock().of(receipt) {
            assignment.not_placed(receipt.position);
        }
    }

    /// Messages that wait in the partitions of this member.
    pub(crate) fn lag(&self) -> Option<u64> {
        let state = self.lock();
        if !state.joined {
            return None;
        }
        let behind = |assignment: &Assignment| {
            let (end, stood) = *state.ends.get(&(assignment.place, assignment.partition))?;
            let position = assignment.tracker.position().unwrap_or(stood);
            u64::try_from(end.saturating_sub(position)).ok()
        };
        Some(state.assigned.values().filter_map(behind).sum())
    }
}

impl State {
    pub(crate) fn at(&mut self, place: usize, partition: i32) -> Option<&mut Assignment> {
        let session = self.by_place.get(&(place, partition))?;
        self.assigned.get_mut(session)
    }

    /// The assignment that a receipt was minted by, while it is not over.
    pub(crate) fn of(&mut self, receipt: Receipt) -> Option<&mut Assignment> {
        if self.phase == Phase::Closing {
            return None;
        }
        let assignment = self.assigned.get_mut(&receipt.session)?;
        (u32::try_from(assignment.partition) == Ok(receipt.partition)).then_some(assignment)
    }

    /// Ends a delivery one way or another; `None` where it is not in hand.
    pub(crate) fn settle(
        &mut self,
        receipt: Receipt,
        how: impl FnOnce(&mut Assignment, u64) -> Option<Arc<Entry>>,
    ) -> Option<()> {
        let entry = how(self.of(receipt)?, receipt.position)?;
        self.held_events = self.held_events.saturating_sub(1);
        self.held_bytes = self.held_bytes.saturating_sub(entry.bytes);
        Some(())
    }

    /// A session is over: its deliveries are no longer counted, its partition is another's.
    pub(crate) fn end(&mut self, session: u32) {
        let Some(mut assignment) = self.assigned.remove(&session) else { return };
        let (events, bytes) = assignment.in_hand();
        self.held_events = self.held_events.saturating_sub(events);
        self.held_bytes = self.held_bytes.saturating_sub(bytes);
        assignment.end();
        let place = (assignment.place, assignment.partition);
        if self.by_place.get(&place) == Some(&session) {
            self.by_place.remove(&place);
        }
        self.ends.remove(&place);
    }

    fn take(&mut self, want: Want, now: Instant) -> Take {
        if self.phase != Phase::Open {
            return Take::Stopped;
        }
        let events_max = want.events.max(1).min(self.limits.events.saturating_sub(self.held_events));
        let mut taken = Vec::new();
        let mut taken_bytes = 0_usize;
        let (mut wait, mut full) = (None::<Instant>, events_max == 0);
        // Whoever was served last comes last.
        let later = self.cursor.wrapping_add(1);
        let order: Vec<u32> =
            self.assigned.range(later..).chain(self.assigned.range(..later)).map(|(id, _)| *id).collect();
        for session in order {
            let Some(assignment) = self.assigned.get_mut(&session) else { continue };
            while !full && let Some(bytes) = assignment.next_bytes(now) {
                let beyond_want = taken_bytes + bytes > want.bytes && !taken.is_empty();
                let beyond_limit = self.held_bytes + bytes > self.limits.bytes && self.held_events > 0;
                if beyond_want || beyond_limit {
                    full = true;
                    break;
                }
                let Some(delivery) = assignment.hand_out(now) else { break };
                taken.push(delivery);
                taken_bytes += bytes;
                self.held_events += 1;
                self.held_bytes += bytes;
                self.cursor = session;
                full = taken.len() >= events_max;
            }
            if let Some(due) = assignment.due().filter(|due| *due > now) {
                wait = Some(wait.map_or(due, |wait| wait.min(due)));
            }
            if full {
                break;
            }
        }
        if !taken.is_empty() {
            return Take::Some(taken);
        }
        match self.trouble.take() {
            Some(trouble) => Take::Trouble(trouble),
            None => Take::Nothing(wait),
        }
    }

    /// What is to be committed.
    pub(crate) fn to_commit(&self, only: impl Fn(u32) -> bool) -> Vec<((usize, i32), i64)> {
        let due = |(session, assignment): (&u32, &Assignment)| {
            let offset = assignment.tracker.to_commit().filter(|_| only(*session))?;
            Some(((assignment.place, assignment.partition), offset))
        };
        self.assigned.iter().filter_map(due).collect()
    }
}

/// The receipt's session is over, or it was settled before.
pub(crate) fn stale() -> Error {
    Error::new(ErrorKind::Stale, "settle")
        .because("the delivery was settled before, or its partition is no longer ours")
}

/// What to answer when a delivery was or was not in hand.
pub(crate) fn settled(found: Option<()>) -> Result<()> {
    found.ok_or_else(stale)
}

/// How long a revoked partition drains: what the runtime asks, but less than the group waits for us.
pub(crate) fn drain_max(limits: &Limits, poll_interval_max: Duration) -> Duration {
    limits.drain.min(poll_interval_max / 2)
}
