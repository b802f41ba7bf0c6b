//! `MemoryBroker`: a topic in memory with groups of competing consumers.
//!
//! | contract | here |
//! |---|---|
//! | receive | what was given back first, then the topic in its order |
//! | ack | forgotten by the group |
//! | release | back to its place, before everything behind it |
//! | retry | a map by time; no task and no timer where nothing waits |
//! | dead letter | a list of the group, in one step |
//!
//! Limits: everything ends with the process; one lock a topic; a group that exists without consumers holds up
//! publishers once the topic is full; a session has at most 2^20 unsettled deliveries.

mod group;
mod levers;
mod session;
mod topic;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hapax::{
    Broker, Capabilities, DeadLetter, Delivery, Error, ErrorKind, Limits, Message, Receipt, Result, Settlement, Want,
};
use tokio::sync::Notify;
use tokio::time::Instant;

use group::{Group, Take, Wake};
pub(crate) use topic::{Prepared, Topic};

use crate::publisher::MemoryPublisher;

/// What a topic and its groups may hold, said once for all its handles.
#[derive(Clone, Debug)]
pub struct MemoryBrokerBuilder {
    topic: Box<str>,
    group: Box<str>,
    capacity: usize,
    ordered: bool,
    dead_letters_max: usize,
    redelivery_horizon: Option<Duration>,
}

impl MemoryBrokerBuilder {
    /// The name of the first group unless [`group`](Self::group) is called.
    pub const GROUP: &str = "consumers";
    /// Messages of a topic that are not done.
    pub const CAPACITY: usize = 65_536;
    /// Dead letters of a group.
    pub const DEAD_LETTERS_MAX: usize = 10_000;

    /// The name of the first handle's group.
    #[must_use]
    pub fn group(mut self, group: impl Into<Box<str>>) -> Self {
        self.group = group.into();
        self
    }

    /// How many messages may be unfinished in a group before publishers wait; at least 1.
    #[must_use]
    pub fn capacity(mut self, messages: usize) -> Self {
        self.capacity = messages.max(1);
        self
    }

    /// One partition: one consumer of a group receives at a time, in the order of the topic; the next takes over when
    /// its session ends, which it also does when a delivery is held for longer than `held_max`. Without it consumers compete, and there is no order.
    #[must_use]
    pub fn ordered(mut self) -> Self {
        self.ordered = true;
        self
    }

    /// How many dead letters a group keeps; beyond it dead-lettering is refused as [`ErrorKind::Full`].
    #[must_use]
    pub fn dead_letters_max(mut self, dead_letters: usize) -> Self {
        self.dead_letters_max = dead_letters;
        self
    }

    /// The longest time after which it is said to deliver a message again; unknown by default.
    #[must_use]
    pub fn redelivery_horizon(mut self, horizon: Duration) -> Self {
        self.redelivery_horizon = Some(horizon);
        self
    }

    /// The topic, its first group, and a consumer of it.
    pub fn build(self) -> MemoryBroker {
        let group = self.group.clone();
        MemoryBroker::in_group(Arc::new(Topic::new(self)), &group)
    }
}

/// One consumer of a group of a topic in memory. It consumes from [`open`](Broker::open) on; before, or without it, it
/// publishes, looks and redrives.
///
/// Dropping it ends its session, and what was unsettled is delivered to others: it is how a test kills a consumer. To
/// keep hold of a consumer that was given away, share it as `Arc<MemoryBroker>`, which is a [`Broker`] too; to consume
/// beside it, take [`another`](Self::another).
pub struct MemoryBroker {
    topic: Arc<Topic>,
    group: usize,
    member: u32,
    arrivals: Arc<Notify>,
}

impl MemoryBroker {
    /// A topic of its own with the defaults of [`MemoryBrokerBuilder`].
    pub fn new(topic: impl Into<Box<str>>) -> Self {
        Self::builder(topic).build()
    }

    /// A topic of its own.
    pub fn builder(topic: impl Into<Box<str>>) -> MemoryBrokerBuilder {
        MemoryBrokerBuilder {
            topic: topic.into(),
            group: MemoryBrokerBuilder::GROUP.into(),
            capacity: MemoryBrokerBuilder::CAPACITY,
            ordered: false,
            dead_letters_max: MemoryBrokerBuilder::DEAD_LETTERS_MAX,
            redelivery_horizon: None,
        }
    }

    /// Another consumer of the same group: each message goes to one of them.
    #[must_use]
    pub fn another(&self) -> Self {
        let mut state = self.topic.lock();
        state.members += 1;
        let member = state.members;
        state.groups[self.group].join(member);
        let arrivals = Arc::clone(&self.arrivals);
        Self { topic: Arc::clone(&self.topic), group: self.group, member, arrivals }
    }

    /// A consumer of the group with this name, which sees every message for itself. A new group begins with what some
    /// group has not finished; it exists as long as the topic.
    #[must_use]
    pub fn group(&self, name: &str) -> Self {
        Self::in_group(Arc::clone(&self.topic), name)
    }

    fn in_group(topic: Arc<Topic>, name: &str) -> Self {
        let mut state = topic.lock();
        let group = state.groups.iter().position(|group| &*group.name == name).unwrap_or_else(|| {
            let mut group = Group::new(name, topic.settings.ordered);
            let mut all: Vec<_> = state.groups.iter().flat_map(Group::waiting).collect();
            all.sort_by_key(|entry| entry.position);
            all.dedup_by_key(|entry| entry.position);
            all.into_iter().for_each(|entry| group.arrive(entry));
            state.groups.push(group);
            state.groups.len() - 1
        });
        state.members += 1;
        let member = state.members;
        state.groups[group].join(member);
        let arrivals = Arc::clone(&state.groups[group].arrivals);
        drop(state);
        Self { topic, group, member, arrivals }
    }

    /// The way into this topic.
    pub fn publisher(&self) -> MemoryPublisher {
        MemoryPublisher::new(Arc::clone(&self.topic))
    }

    /// The dead letters of this group, oldest first: the message with the headers of a dead letter, and what they say.
    pub fn dead_letters(&self) -> Vec<(Message, DeadLetter)> {
        self.topic.lock().groups[self.group].dead_letters().collect()
    }

    /// Takes the dead letters of this group out, oldest first, to keep them elsewhere: they make room for others and
    /// can no longer be redriven from here.
    pub fn take_dead_letters(&self) -> Vec<(Message, DeadLetter)> {
        let mut state = self.topic.lock();
        let group = &mut state.groups[self.group];
        let taken = group.dead_letters().collect();
        group.take_dead(|_, _| true);
        taken
    }

    /// Sends all dead letters of this group back to it, with their tokens; answers how many.
    pub fn redrive(&self) -> usize {
        self.redrive_where(|_, _| true)
    }

    /// Sends back those for which `which` says so. It is called under the topic's lock: it must not use the broker.
    pub fn redrive_where(&self, which: impl FnMut(&Message, &DeadLetter) -> bool) -> usize {
        self.topic.redrive(self.group, which)
    }

    /// How many messages of this group stand where.
    pub fn standing(&self) -> Standing {
        self.topic.lock().groups[self.group].standing()
    }

    /// Waits until nothing is left in this group: every message acked or dead-lettered. Cancel safe.
    pub async fn settled(&self) {
        loop {
            let done = self.topic.done.notified();
            if self.topic.lock().groups[self.group].unfinished() == 0 {
                return;
            }
            done.await;
        }
    }

    fn change(&self, change: impl FnOnce(&mut Group) -> Wake) {
        let wake = change(&mut self.topic.lock().groups[self.group]);
        self.topic.wake(&self.arrivals, wake);
    }

    fn take(&self, want: Want) -> Take {
        let now = Instant::now();
        let mut state = self.topic.lock();
        let topic::TopicState { groups, sessions, .. } = &mut *state;
        let (take, wake) = groups[self.group].take(self.member, want, now, sessions);
        drop(state);
        self.topic.wake(&self.arrivals, wake);
        take
    }
}

/// How many messages of a group stand where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Can be received.
    pub ready: usize,
    /// Wait for the time of their retry.
    pub later: usize,
    /// Held by consumers.
    pub unsettled: usize,
    /// Set aside.
    pub dead: usize,
}

/// For tests and simulations: what a real broker does to its consumers when it must.
impl MemoryBroker {
    /// Ends this consumer's session, as when a connection breaks: what is unsettled comes again, old receipts are
    /// stale, and the next receive begins a new session.
    pub fn end_session(&self) {
        self.change(|group| group.end_session(self.member));
    }

    /// Takes this consumer's session away gently: it drains, receives nothing, and ends when everything is settled or
    /// `drain` has passed. The next receive after that begins a new one.
    pub fn drain_session(&self) {
        let now = Instant::now();
        self.change(|group| group.drain_session(self.member, now));
    }

    /// Delivers the message at this position (its [`Origin`](hapax::Origin)'s number) once more while a consumer of
    /// this group holds it. Answers whether one did.
    pub fn redeliver(&self, position: u64) -> bool {
        let mut found = false;
        self.change(|group| {
            found = group.redeliver(position);
            Wake { arrivals: found, done: false }
        });
        found
    }

    /// Each of the next deliveries of this group goes out twice.
    pub fn duplicate(&self, deliveries: usize) {
        self.change(|group| {
            group.levers.duplicate(deliveries);
            Wake::default()
        });
    }

    /// From here on this group's deliveries come in an order drawn from the seed; with `None` in their own again.
    pub fn shuffle(&self, seed: Option<u64>) {
        self.change(|group| {
            group.levers.shuffle(seed);
            Wake::default()
        });
    }
}

#[async_trait]
impl Broker for MemoryBroker {
    async fn open(&self, limits: Limits) -> Result<()> {
        self.change(|group| {
            group.open(self.member, limits);
            Wake { arrivals: true, done: false }
        });
        Ok(())
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        let answer = |take| match take {
            Take::Some(deliveries) => Ok(Ok(deliveries)),
            Take::Stopped => Ok(Ok(Vec::new())),
            Take::NotOpen => Ok(Err(Error::new(ErrorKind::Configuration, "receive").because("`open` comes first"))),
            Take::Nothing(until) => Err(until),
        };
        if let Ok(answer) = answer(self.take(want)) {
            return answer;
        }
        loop {
            // Listening before looking: from its creation on, `notified` misses no `notify_waiters`. What `take` hands out is returned
            // without another await, so a dropped future has taken nothing.
            let arrived = self.arrivals.notified();
            match answer(self.take(want)) {
                Ok(answer) => return answer,
                Err(None) => arrived.await,
                Err(Some(until)) => tokio::select! {
                    biased;
                    () = arrived => {}
                    () = tokio::time::sleep_until(until) => {}
                },
            }
        }
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        let now = Instant::now();
        let mut answers = Vec::with_capacity(batch.len());
        self.change(|group| {
            let mut wake = group.tidy(now);
            let dead_max = self.topic.settings.dead_letters_max;
            answers.extend(batch.iter().map(|(receipt, settlement)| {
                group.settle(self.member, *receipt, settlement, now, dead_max, &mut wake)
            }));
            wake
        });
        answers
    }

    async fn stop(&self) -> Result<()> {
        self.change(|group| group.stop(self.member, false));
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        self.change(|group| group.stop(self.member, true));
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        self.topic.capabilities()
    }
}

impl Drop for MemoryBroker {
    fn drop(&mut self) {
        self.change(|group| group.leave(self.member));
    }
}

impl fmt::Debug for MemoryBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBroker")
            .field("topic", &self.topic.name())
            .field("group", &self.group)
            .field("consumer", &self.member)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
