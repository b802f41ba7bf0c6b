//! What the polling thread and the callers of the contract share: the assignments, behind one lock that is held for a few
//! lines and never across an await.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hapax::{Error, ErrorKind, Limits, Receipt, Result, Want};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::assignment::{Ahead, Assignment};
use crate::fetched::{Fetched, Given};
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
    /// Partitions whose last commit was not confirmed when the thread ended.
    left: usize,
    /// Where partitions end, and how far they are read, as the client last saw it.
    pub(crate) ends: HashMap<(usize, i32), End>,
}

/// Of one partition, as offsets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    /// Of the message that comes next.
    pub(crate) end: i64,
    /// Where the group stood when this member took it over.
    pub(crate) stood: i64,
    /// Whether all before `end` was fetched, of a partition that is being fetched.
    pub(crate) is_reached: bool,
}

/// What `receive` found.
pub(crate) enum Take {
    Some(Vec<Given>),
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
            left: 0,
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
    pub(crate) fn arrive(&self, records: impl IntoIterator<Item = Fetched>) {
        let mut state = self.lock();
        let State { by_place, assigned, .. } = &mut *state;
        let mut arrived = false;
        let mut run: Option<((usize, i32), Option<u32>)> = None;
        for Fetched { place, partition, entry } in records {
            let spot = (place, partition);
            // Records come in runs of one partition.
            let (_, session) = run.filter(|run| run.0 == spot).unwrap_or_else(|| (spot, by_place.get(&spot).copied()));
            run = Some((spot, session));
            if let Some(assignment) = session.and_then(|session| assigned.get_mut(&session)) {
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

    /// The thread gives up committing.
    pub(crate) fn leave_uncommitted(&self) {
        let mut state = self.lock();
        state.left = state.to_commit(|_| true).len();
    }

    /// In how many partitions something is done that the group is not known to have. After the sessions have ended.
    pub(crate) fn uncommitted(&self) -> usize {
        let state = self.lock();
        state.left.max(state.to_commit(|_| true).len())
    }

    /// Messages that wait in the partitions of this member.
    pub(crate) fn lag(&self) -> Option<u64> {
        let state = self.lock();
        if !state.joined {
            return None;
        }
        let behind = |assignment: &Assignment| {
            let known = state.ends.get(&(assignment.place, assignment.partition))?;
            let position = assignment.tracker.position().unwrap_or(known.stood);
            u64::try_from(known.end.saturating_sub(position)).ok()
        };
        Some(state.assigned.values().filter_map(behind).sum())
    }

    /// Whether all there was in the topics' partitions of this member has been fetched. Retry topics are read when due.
    pub(crate) fn is_caught_up(&self) -> bool {
        let state = self.lock();
        let mut mains = state.assigned.values().filter(|assignment| self.places.is_main(assignment.place));
        state.joined
            && state.phase != Phase::Closing
            && mains.all(|main| state.ends.get(&(main.place, main.partition)).is_some_and(|known| known.is_reached))
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
        how: impl FnOnce(&mut Assignment, u64) -> Option<usize>,
    ) -> Option<()> {
        let bytes = how(self.of(receipt)?, receipt.position)?;
        self.held_events = self.held_events.saturating_sub(1);
        self.held_bytes = self.held_bytes.saturating_sub(bytes);
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
                let Some(given) = assignment.hand_out(now) else { break };
                taken.push(given);
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

#[cfg(test)]
mod tests {
    use hapax::{Delivery, MessageLimits};

    use super::*;
    use crate::fetched::{Entry, Retry, deliveries};
    use crate::wire::Raw;

    fn shared() -> Shared {
        let places = Places::new(&["orders".into()], "billing", &[Duration::from_secs(15)]).expect("good names");
        let limits = Limits {
            events: 100,
            bytes: 1 << 20,
            held_max: Duration::from_secs(60),
            drain: Duration::from_secs(1),
            message: MessageLimits::DEFAULT,
        };
        Shared::new(Arc::new(places), limits, Arc::default())
    }

    fn record(place: usize, partition: i32, offset: i64, due: Option<Instant>) -> Fetched {
        let raw = Raw::of(None, Some(b"xxxxxxxxxx"), &[]);
        let retry = due.map(|due| Box::new(Retry { home: None, due }));
        Fetched { place, partition, entry: Entry { raw, offset, retry } }
    }

    fn take(shared: &Shared, events: usize) -> Vec<Delivery> {
        match shared.take(Want { events, bytes: 1 << 20 }) {
            Take::Some(given) => deliveries(given, &shared.places, &MessageLimits::DEFAULT),
            _ => Vec::new(),
        }
    }

    fn offsets(deliveries: &[Delivery]) -> Vec<i64> {
        let origin = |delivery: &Delivery| delivery.origin.as_ref().and_then(|origin| origin.position.parse().ok());
        deliveries.iter().filter_map(origin).collect()
    }

    fn to_commit(shared: &Shared) -> Vec<((usize, i32), i64)> {
        shared.lock().to_commit(|_| true)
    }

    /// Bug 60 of semantics.md section 4 (microsoft/FluidFramework#9404): such a record advanced the tracker, and left a
    /// gap that was committed past.
    #[test]
    fn record_of_unassigned_partition_ignored() {
        let shared = shared();
        shared.assign(0, 0);
        shared.arrive([record(0, 1, 7, None), record(0, 0, 3, None)]);
        assert_eq!(offsets(&take(&shared, 10)), [3]);
        shared.assign(0, 1);
        shared.arrive([record(0, 1, 5, None)]);
        let five = take(&shared, 10);
        assert_eq!(offsets(&five), [5], "what came before the assignment is not part of it");
        assert!(shared.lock().settle(five[0].receipt, Assignment::ack).is_some());
        assert_eq!(to_commit(&shared), [((0, 1), 6)]);
    }

    /// Bug 57 (confluentinc/librdkafka#2782): what an earlier assignment finished late was committed under the next.
    #[test]
    fn stale_offset_never_committed() {
        let shared = shared();
        shared.assign(0, 0);
        shared.arrive((10..13).map(|offset| record(0, 0, offset, None)));
        let old = take(&shared, 10);
        let session = old[0].session.id();
        shared.lock().end(session);
        shared.assign(0, 0);
        shared.arrive((10..13).map(|offset| record(0, 0, offset, None)));
        for delivery in &old {
            assert!(shared.lock().settle(delivery.receipt, Assignment::ack).is_none(), "stale");
        }
        assert_eq!(to_commit(&shared), []);
        assert!(!old[0].session.is_live());
        assert_eq!(offsets(&take(&shared, 10)), [10, 11, 12]);
    }

    #[test]
    fn a_retry_that_is_due_passes_one_that_is_not() {
        let shared = shared();
        shared.assign(1, 0);
        let now = Instant::now();
        let later = now + Duration::from_secs(60);
        shared.arrive([record(1, 0, 0, Some(later)), record(1, 0, 1, Some(now))]);
        let due = take(&shared, 10);
        assert_eq!(offsets(&due), [1]);
        assert!(shared.lock().settle(due[0].receipt, Assignment::ack).is_some());
        assert_eq!(to_commit(&shared), [], "but nothing is committed past the one that waits");
        match shared.take(Want { events: 1, bytes: 1 << 20 }) {
            Take::Nothing(Some(wait)) => assert_eq!(wait, later),
            _ => panic!("it waits for the other"),
        }
    }

    #[test]
    fn partitions_take_turns() {
        let shared = shared();
        for partition in 0..3 {
            shared.assign(0, partition);
            shared.arrive((0..50).map(|offset| record(0, partition, offset, None)));
        }
        let mut seen: Vec<u32> =
            (0..3).flat_map(|_| take(&shared, 2)).map(|delivery| delivery.receipt.partition).collect();
        seen.dedup();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2]);
    }

    #[test]
    fn a_full_buffer_pauses_and_a_half_empty_one_resumes() {
        let shared = shared();
        shared.assign(0, 0);
        let pauses = || {
            let mut state = shared.lock();
            let assignment = state.at(0, 0).expect("it is assigned");
            let pauses = assignment.pauses(false);
            assignment.paused = Some(pauses);
            pauses
        };
        shared.arrive((0..99).map(|offset| record(0, 0, offset, None)));
        assert!(!pauses());
        shared.arrive([record(0, 0, 99, None)]);
        assert!(pauses(), "100 may be unsettled, 100 are buffered");
        let taken = take(&shared, 40);
        assert!(pauses(), "not at once again");
        assert_eq!(taken.len() + take(&shared, 20).len(), 60);
        assert!(!pauses());
    }

    #[test]
    fn a_full_buffer_holds_up_polling_for_a_moment_and_is_paused_then() {
        let shared = shared();
        shared.assign(0, 0);
        let (begun, moment) = (Instant::now(), Duration::from_millis(500));
        let holds = |at: Instant| {
            let mut state = shared.lock();
            let assignment = state.at(0, 0).expect("it is assigned");
            let pauses = assignment.pauses(false);
            (pauses, assignment.holds(pauses, at, moment))
        };
        assert_eq!(holds(begun), (false, false));
        shared.arrive((0..100).map(|offset| record(0, 0, offset, None)));
        assert_eq!(holds(begun), (true, true));
        take(&shared, 40);
        assert_eq!(holds(begun + moment / 2), (true, true), "until it is half empty");
        assert_eq!(holds(begun + moment), (true, false), "nobody takes anything: it is paused");
        take(&shared, 11);
        assert_eq!(holds(begun + moment), (false, false));
        shared.arrive((100..200).map(|offset| record(0, 0, offset, None)));
        assert_eq!(holds(begun + moment), (true, true), "the moment begins anew");
    }

    #[test]
    fn a_delivery_that_is_being_placed_is_ended_by_nobody_else() {
        let shared = shared();
        shared.assign(0, 0);
        shared.arrive([record(0, 0, 0, None)]);
        let receipt = take(&shared, 1)[0].receipt;
        assert!(shared.lock().of(receipt).and_then(|one| one.begin_placing(receipt.position)).is_some());
        assert!(shared.lock().settle(receipt, Assignment::ack).is_none());
        assert!(shared.lock().settle(receipt, Assignment::release).is_none());
        shared.not_placed(receipt);
        assert!(shared.lock().settle(receipt, Assignment::release).is_some());
        assert_eq!(take(&shared, 1).len(), 1, "it comes again");
    }
}
