//! One group's view of a topic: what waits, what is held by whom, what was set aside.
//!
//! No lock, no waiting and no clock of its own: every change is a plain function of the state and `now`, and says
//! through [`Wake`] who may have something to do after it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use hapax::cloudevents::{Convention, decode, encode};
use hapax::{
    DeadLetter, Delivery, Error, ErrorKind, Limits, Message, MessageLimits, Receipt, Result, Settlement, Want,
};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Standing;
use super::levers::Levers;
use super::session::{Entry, Found, Table, UNSETTLED_MAX};

/// The longest `Settlement::Retry`.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

#[derive(Debug)]
pub(super) struct Group {
    pub(super) name: Box<str>,
    /// Wakes waiting receives.
    pub(super) arrivals: Arc<Notify>,
    /// Never delivered, in the order of the topic.
    fresh: VecDeque<Entry>,
    /// To be delivered again, at their places: position, then a number that keeps copies apart.
    again: BTreeMap<(u64, u64), Entry>,
    /// Not before their time.
    later: BTreeMap<(Instant, u64), Entry>,
    dead: VecDeque<(Arc<Message>, Box<DeadLetter>)>,
    members: BTreeMap<u32, Member>,
    /// Held deliveries of all sessions.
    held: usize,
    numbered: u64,
    /// Where one consumer at a time receives: its session.
    active: Option<u32>,
    ordered: bool,
    pub(super) levers: Levers,
}

/// One consumer of the group.
#[derive(Debug, Default)]
struct Member {
    /// Set by `open`.
    limits: Option<Limits>,
    stopped: bool,
    session: Option<Table>,
}

/// Who may have something to do after a change.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wake {
    /// Receives of this group.
    pub(super) arrivals: bool,
    /// Those who wait for messages to be done: publishers and `settled`.
    pub(super) done: bool,
}

/// The answer to a receive.
#[derive(Debug)]
pub(super) enum Take {
    Some(Vec<Delivery>),
    Stopped,
    NotOpen,
    /// Nothing before this time, unless something happens.
    Nothing(Option<Instant>),
}

impl Group {
    pub(super) fn new(name: &str, ordered: bool) -> Self {
        Self {
            name: name.into(),
            arrivals: Arc::default(),
            fresh: VecDeque::new(),
            again: BTreeMap::new(),
            later: BTreeMap::new(),
            dead: VecDeque::new(),
            members: BTreeMap::new(),
            held: 0,
            numbered: 0,
            active: None,
            ordered,
            levers: Levers::default(),
        }
    }

    /// Messages that are not done.
    pub(super) fn unfinished(&self) -> usize {
        self.fresh.len() + self.again.len() + self.later.len() + self.held
    }

    pub(super) fn standing(&self) -> Standing {
        Standing {
            ready: self.fresh.len() + self.again.len(),
            later: self.later.len(),
            unsettled: self.held,
            dead: self.dead.len(),
        }
    }

    /// Everything unfinished that no consumer has in hand, by position: what a new group begins with.
    pub(super) fn waiting(&self) -> Vec<Entry> {
        let mut all: Vec<Entry> = self.again.values().chain(self.later.values()).chain(&self.fresh).cloned().collect();
        all.extend(self.members.values().filter_map(|member| member.session.as_ref()).flat_map(Table::held).cloned());
        all.sort_by_key(|entry| entry.position);
        all.dedup_by_key(|entry| entry.position);
        all.iter_mut().for_each(|entry| entry.count = 0);
        all
    }

    pub(super) fn join(&mut self, member: u32) {
        self.members.insert(member, Member::default());
    }

    pub(super) fn leave(&mut self, member: u32) -> Wake {
        let wake = self.end_session(member);
        self.members.remove(&member);
        wake
    }

    pub(super) fn open(&mut self, member: u32, limits: Limits) {
        let member = self.member(member);
        member.stopped = false;
        member.limits = Some(limits);
    }

    /// No new deliveries; with `close` the session ends too.
    pub(super) fn stop(&mut self, member: u32, close: bool) -> Wake {
        self.member(member).stopped = true;
        let wake = if close { self.end_session(member) } else { Wake::default() };
        Wake { arrivals: true, ..wake }
    }

    pub(super) fn arrive(&mut self, entry: Entry) {
        self.fresh.push_back(entry);
    }

    /// Hands out what is ready. The second answer tells whether other receives must look at their time again.
    pub(super) fn take(&mut self, member: u32, want: Want, now: Instant, session: &mut u32) -> (Take, Wake) {
        let mut wake = self.tidy(now);
        let number = member;
        let member = self.members.get_mut(&member).expect("a handle is a member of its group until it is dropped");
        let Some(limits) = member.limits else { return (Take::NotOpen, wake) };
        if member.stopped {
            return (Take::Stopped, wake);
        }
        let table = member.session.get_or_insert_with(|| {
            *session += 1;
            Table::new(*session)
        });
        let idle =
            table.drain_until.is_some() || (self.ordered && *self.active.get_or_insert(table.id()) != table.id());
        let room = limits.events.clamp(1, UNSETTLED_MAX).saturating_sub(table.in_hand);
        let events = want.events.max(1).min(room);
        let ready = self.fresh.len() + self.again.len();
        if idle || events.min(ready) == 0 {
            return (Take::Nothing(self.next_time()), wake);
        }
        let until = now.checked_add(limits.held_max);
        let timed = table.check_at.is_some();
        let mut deliveries = Vec::with_capacity(events.min(ready));
        let mut bytes = 0;
        // Taken out of the map for the loop, so that the queues can be used beside it.
        let mut table = member.session.take().expect("the session was begun above");
        while deliveries.len() < events {
            let Some(next) = self.peek() else { break };
            let more = next.size.bytes;
            let beyond_want = !deliveries.is_empty() && bytes + more > want.bytes;
            let beyond_limit = table.in_hand > 0 && table.bytes + more > limits.bytes;
            if beyond_want || beyond_limit {
                break;
            }
            let Some(entry) = self.pop() else { break };
            bytes += more;
            deliveries.push(self.deliver(&mut table, entry, until, &limits.message));
        }
        self.member(number).session = Some(table);
        wake.arrivals |= !timed && until.is_some() && self.members.len() > 1;
        if deliveries.is_empty() {
            return (Take::Nothing(self.next_time()), wake);
        }
        (Take::Some(deliveries), wake)
    }

    fn deliver(
        &mut self,
        table: &mut Table,
        mut entry: Entry,
        until: Option<Instant>,
        limits: &MessageLimits,
    ) -> Delivery {
        entry.count = entry.count.saturating_add(1);
        if self.levers.take_duplicate() {
            self.give_back(entry.clone());
        }
        self.held += 1;
        let message = within(&entry, limits);
        let (origin, count) = (Some(Arc::clone(&entry.origin)), Some(entry.count));
        let receipt = table.hold(entry, until);
        Delivery { receipt, session: table.session.clone(), message, count, origin }
    }

    /// Ends one delivery.
    pub(super) fn settle(
        &mut self,
        member: u32,
        receipt: Receipt,
        settlement: &Settlement,
        now: Instant,
        dead_letters_max: usize,
        wake: &mut Wake,
    ) -> Result<()> {
        let dead_letters = self.dead.len();
        let Some(table) = self.session(member).filter(|table| table.id() == receipt.session) else {
            return Err(Error::new(ErrorKind::Stale, "settle").because("the receipt's session has ended"));
        };
        match settlement {
            Settlement::Retry { after } if *after > RETRY_MAX => {
                return Err(Error::new(ErrorKind::Rejected, "settle").because("longer than retry_max (365 days)"));
            }
            Settlement::DeadLetter(_) if dead_letters >= dead_letters_max && table.get(receipt).is_some() => {
                return Err(Error::new(ErrorKind::Full, "settle").because(
                    "as many dead letters as `dead_letters_max` allows: redrive them, or build the broker with more",
                ));
            }
            _ => {}
        }
        let mut entry = match table.take(receipt) {
            Found::Taken(entry) => entry,
            Found::Settled => return Ok(()),
            Found::Lost => {
                return Err(Error::new(ErrorKind::Stale, "settle")
                    .because("held for longer than `held_max`: the delivery is another's"));
            }
        };
        let drained = table.drain_until.is_some() && table.in_hand == 0;
        self.held -= 1;
        // A receive that waits although something is ready waits for room.
        wake.arrivals |= !self.fresh.is_empty() || !self.again.is_empty();
        match settlement {
            Settlement::Ack => wake.done = true,
            Settlement::DeadLetter(letter) => {
                self.dead.push_back((entry.message, letter.clone()));
                wake.done = true;
            }
            Settlement::Release { counted } => {
                entry.count -= u32::from(!counted);
                self.give_back(entry);
                wake.arrivals = true;
            }
            Settlement::Retry { after } => {
                self.numbered += 1;
                self.later.insert((now + *after, self.numbered), entry);
                wake.arrivals = true;
            }
        }
        if drained {
            let ended = self.end_session(member);
            wake.arrivals |= ended.arrivals;
        }
        Ok(())
    }

    pub(super) fn end_session(&mut self, member: u32) -> Wake {
        let Some(table) = self.member(member).session.take() else { return Wake::default() };
        if self.active == Some(table.id()) {
            self.active = None;
        }
        for entry in table.end() {
            self.held -= 1;
            self.give_back(entry);
        }
        Wake { arrivals: true, done: false }
    }

    pub(super) fn drain_session(&mut self, member: u32, now: Instant) -> Wake {
        let member_state = self.member(member);
        let wait = member_state.limits.map_or(Duration::ZERO, |limits| limits.drain);
        let Some(table) = &mut member_state.session else { return Wake::default() };
        table.drain(now.checked_add(wait).unwrap_or(now));
        if table.in_hand == 0 {
            return self.end_session(member);
        }
        Wake { arrivals: true, done: false }
    }

    /// Hands out another copy of a message that is held.
    pub(super) fn redeliver(&mut self, position: u64) -> bool {
        let mut tables = self.members.values().filter_map(|member| member.session.as_ref());
        let copy = tables.find_map(|table| table.held().find(|entry| entry.position == position).cloned());
        copy.map(|entry| self.give_back(entry)).is_some()
    }

    pub(super) fn dead_letters(&self) -> impl Iterator<Item = (Message, DeadLetter)> {
        self.dead.iter().map(|(message, letter)| {
            let mut message = (**message).clone();
            for (name, value) in letter.headers().iter() {
                message.headers.push(name, value.clone());
            }
            (message, (**letter).clone())
        })
    }

    /// Takes the dead letters for which `which` says so, oldest first.
    pub(super) fn take_dead(
        &mut self,
        mut which: impl FnMut(&Message, &DeadLetter) -> bool,
    ) -> Vec<(Arc<Message>, Box<DeadLetter>)> {
        let (taken, kept) =
            std::mem::take(&mut self.dead).into_iter().partition(|(message, letter)| which(message, letter));
        self.dead = kept;
        Vec::from(taken as VecDeque<_>)
    }

    /// Brings up to date what depends on the time: due retries, overdue deliveries, ended drains.
    pub(super) fn tidy(&mut self, now: Instant) -> Wake {
        while let Some(due) = self.later.first_entry().filter(|due| due.key().0 <= now) {
            let entry = due.remove();
            self.give_back(entry);
        }
        let mut overdue = Vec::new();
        let mut ended = Vec::new();
        for (member, state) in &mut self.members {
            let Some(table) = &mut state.session else { continue };
            let late = table.overdue(now);
            // The only consumer that receives is stuck: the next one takes over.
            if self.ordered && !late.is_empty() {
                ended.push(*member);
            }
            overdue.extend(late);
            if table.drain_until.is_some_and(|until| until <= now) {
                ended.push(*member);
            }
        }
        let mut wake = Wake { arrivals: !overdue.is_empty(), done: false };
        self.held -= overdue.len();
        for entry in overdue {
            self.give_back(entry);
        }
        for member in ended {
            wake.arrivals |= self.end_session(member).arrivals;
        }
        wake
    }

    /// When something becomes ready by itself.
    fn next_time(&self) -> Option<Instant> {
        let tables = self.members.values().filter_map(|member| member.session.as_ref());
        let sessions = tables.flat_map(|table| [table.check_at, table.drain_until]).flatten();
        self.later.keys().next().map(|(due, _)| *due).into_iter().chain(sessions).min()
    }

    /// Back to its place, before everything behind it.
    fn give_back(&mut self, entry: Entry) {
        if self.levers.shuffles() {
            self.fresh.push_back(entry);
            return;
        }
        self.numbered += 1;
        self.again.insert((entry.position, self.numbered), entry);
    }

    fn again_is_next(&self) -> bool {
        match (self.again.keys().next(), self.fresh.front()) {
            (Some((again, _)), Some(fresh)) => *again <= fresh.position,
            (again, _) => again.is_some(),
        }
    }

    fn peek(&mut self) -> Option<&Entry> {
        if let Some(chosen) = self.levers.choose(self.fresh.len()) {
            self.fresh.swap(0, chosen);
        }
        if self.again_is_next() { self.again.values().next() } else { self.fresh.front() }
    }

    fn pop(&mut self) -> Option<Entry> {
        if self.again_is_next() { self.again.pop_first().map(|(_, entry)| entry) } else { self.fresh.pop_front() }
    }

    fn member(&mut self, member: u32) -> &mut Member {
        self.members.entry(member).or_default()
    }

    fn session(&mut self, member: u32) -> Option<&mut Table> {
        self.members.get_mut(&member)?.session.as_mut()
    }
}

/// The message as a consumer with these limits reads it.
fn within(entry: &Entry, limits: &MessageLimits) -> Arc<Message> {
    // Its attributes and its nesting are inside the body, so only reading it again tells.
    if let Some((headers, body)) = entry.wire.as_deref() {
        return Arc::new(decode(headers.clone(), body.clone(), &Convention::MEMORY, limits));
    }
    let (size, message) = (entry.size, &entry.message);
    let fits = size.body_bytes <= limits.body_max
        && size.headers <= limits.headers_max
        && size.header_bytes <= limits.header_bytes_max
        && size.id_bytes <= limits.id_max;
    if fits || message.defect().is_some() {
        return Arc::clone(message);
    }
    let (headers, body) = encode(message, &Convention::MEMORY);
    Arc::new(decode(headers, body, &Convention::MEMORY, limits))
}
