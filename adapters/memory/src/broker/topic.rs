//! The topic behind all handles and publishers: one lock, the groups, and who waits for what.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use hapax::cloudevents::{Convention, decode, encode};
use hapax::{
    BrokerOrder, Capabilities, DeadLetter, Durability, Headers, Message, MessageLimits, Origin, RESERVED_PREFIX,
};
use tokio::sync::Notify;

use super::MemoryBrokerBuilder;
use super::group::{Group, RETRY_MAX, Wake};
use super::session::{Entry, Size};

/// What is published is decoded without limits but for the nesting: each consumer applies its own.
const UNLIMITED: MessageLimits = MessageLimits {
    body_max: usize::MAX,
    headers_max: usize::MAX,
    header_bytes_max: usize::MAX,
    id_max: usize::MAX,
    json_depth_max: MessageLimits::DEFAULT.json_depth_max,
};

#[derive(Debug)]
pub(crate) struct Topic {
    pub(crate) settings: MemoryBrokerBuilder,
    state: Mutex<TopicState>,
    /// Wakes publishers that wait for room, and `settled`.
    pub(crate) done: Notify,
}

#[derive(Debug, Default)]
pub(crate) struct TopicState {
    /// Messages published so far.
    position: u64,
    pub(super) groups: Vec<Group>,
    pub(super) members: u32,
    pub(super) sessions: u32,
}

impl Topic {
    pub(super) fn new(settings: MemoryBrokerBuilder) -> Self {
        Self { settings, state: Mutex::default(), done: Notify::new() }
    }

    /// No invariant spans a panic: nothing under the lock can panic half-way but for a caller's predicate, which runs
    /// before anything is changed for its item.
    pub(super) fn lock(&self) -> MutexGuard<'_, TopicState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn name(&self) -> &str {
        &self.settings.topic
    }

    /// Puts as many messages as there is room for into every group, in order; takes them from `messages`. Answers the
    /// position of the last.
    pub(crate) fn append(&self, messages: &mut impl ExactSizeIterator<Item = Prepared>) -> u64 {
        let mut state = self.lock();
        let unfinished = state.groups.iter().map(Group::unfinished).max().unwrap_or(0);
        let room = self.settings.capacity.saturating_sub(unfinished).min(messages.len());
        for prepared in messages.take(room) {
            let entry = state.number(self, prepared);
            let (last, others) = state.groups.split_last_mut().expect("a topic is made with its first group");
            others.iter_mut().for_each(|group| group.arrive(entry.clone()));
            last.arrive(entry);
        }
        let position = state.position;
        if room > 0 {
            state.groups.iter().for_each(|group| group.arrivals.notify_waiters());
        }
        position
    }

    /// Sends dead letters back to their group as they would come from a broker, whatever the capacity.
    pub(super) fn redrive(&self, group: usize, which: impl FnMut(&Message, &DeadLetter) -> bool) -> usize {
        let mut state = self.lock();
        let dead = state.groups[group].take_dead(which);
        for (message, letter) in &dead {
            let prepared = Prepared::sent_back(message, letter);
            let entry = state.number(self, prepared);
            state.groups[group].arrive(entry);
        }
        state.groups[group].arrivals.notify_waiters();
        dead.len()
    }

    pub(super) fn wake(&self, arrivals: &Notify, wake: Wake) {
        if wake.arrivals {
            arrivals.notify_waiters();
        }
        if wake.done {
            self.done.notify_waiters();
        }
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::none("memory");
        capabilities.order = if self.settings.ordered { BrokerOrder::Partition } else { BrokerOrder::None };
        capabilities.retry_max = RETRY_MAX;
        capabilities.dead_letter_in_one_step = true;
        capabilities.settle_fenced = true;
        capabilities.position_is_stable = true;
        capabilities.durability = Durability::Process;
        capabilities.redelivery_horizon = self.settings.redelivery_horizon;
        capabilities
    }
}

impl TopicState {
    fn number(&mut self, topic: &Topic, prepared: Prepared) -> Entry {
        self.position += 1;
        let origin = Origin { place: topic.name().into(), position: self.position.to_string().into() };
        let Prepared { message, size, wire } = prepared;
        Entry { message, origin: Arc::new(origin), position: self.position, size, wire, count: 0 }
    }
}

/// A message as it arrives: written and read as on any other broker, so that what does not travel there does not here.
#[derive(Debug)]
pub(crate) struct Prepared {
    message: Arc<Message>,
    size: Size,
    wire: Option<Arc<(Headers, Bytes)>>,
}

impl Prepared {
    pub(crate) fn new(message: &Message) -> Self {
        let (headers, body) = encode(message, &Convention::MEMORY);
        Self::from_wire(headers, body)
    }

    /// What was not written by hapax, as it travelled.
    pub(crate) fn from_wire(headers: Headers, body: Bytes) -> Self {
        let (body_bytes, count, header_bytes) = (body.len(), headers.len(), headers.bytes());
        let wire = is_structured(&headers).then(|| Arc::new((headers.clone(), body.clone())));
        let message = decode(headers, body, &Convention::MEMORY, &UNLIMITED);
        let length = |text: &Option<Box<str>>| text.as_deref().map_or(0, str::len);
        let id_bytes = length(&message.attributes.id).max(length(&message.attributes.source));
        let size = Size { body_bytes, headers: count, header_bytes, id_bytes, bytes: message.bytes() };
        Self { message: Arc::new(message), size, wire }
    }

    fn sent_back(message: &Message, letter: &DeadLetter) -> Self {
        let (mut headers, body) = encode(message, &Convention::MEMORY);
        headers.retain(|name| !name.starts_with(RESERVED_PREFIX));
        for (name, value) in letter.headers().iter() {
            headers.push(name, value.clone());
        }
        Self::from_wire(headers, body)
    }
}

/// Whether the content type announces an event format: attributes and data are both inside the body.
fn is_structured(headers: &Headers) -> bool {
    const FORMATS: &str = "application/cloudevents";
    let content_type = headers.get_str(Convention::MEMORY.content_type).unwrap_or_default();
    content_type.trim_start().get(..FORMATS.len()).is_some_and(|start| start.eq_ignore_ascii_case(FORMATS))
}
