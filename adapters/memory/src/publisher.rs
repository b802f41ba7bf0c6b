//! `MemoryPublisher`: the way into topics in memory. A full topic makes it wait; nothing is dropped.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use hapax::{Error, ErrorKind, Headers, Message, Outgoing, Publisher, Result};

use crate::broker::{Prepared, Topic};

/// Publishes to a topic, and to others that were [joined](Self::and). Cheap to clone.
#[derive(Clone, Debug)]
pub struct MemoryPublisher {
    /// The first is the default place.
    topics: Vec<Arc<Topic>>,
}

impl MemoryPublisher {
    pub(crate) fn new(topic: Arc<Topic>) -> Self {
        Self { topics: vec![topic] }
    }

    /// Publishes to the topics of `other` too, where a message names one of them.
    #[must_use]
    pub fn and(mut self, other: &Self) -> Self {
        self.topics.extend(other.topics.iter().cloned());
        self
    }

    /// Sends one message to the default topic and answers its position there. Waits while the topic is full; dropping
    /// the future while it waits sends nothing.
    pub async fn send(&self, message: Message) -> u64 {
        append(&self.topics[0], vec![Prepared::new(&message)]).await
    }

    /// As [`send`](Self::send), with headers and body as they travel: for tests of what does not decode.
    pub async fn send_wire(&self, headers: Headers, body: impl Into<Bytes>) -> u64 {
        append(&self.topics[0], vec![Prepared::from_wire(headers, body.into())]).await
    }

    /// As [`send`](Self::send) without waiting: [`ErrorKind::Full`] where there is no room.
    pub fn try_publish(&self, message: &Message) -> Result<u64> {
        let mut messages = vec![Prepared::new(message)].into_iter();
        let position = self.topics[0].append(&mut messages);
        if messages.len() > 0 {
            return Err(Error::new(ErrorKind::Full, "publish")
                .because("the topic is full: settle messages, or build the broker with a larger `capacity`"));
        }
        Ok(position)
    }

    fn topic(&self, place: Option<&str>) -> Option<&Topic> {
        let Some(place) = place else { return self.topics.first().map(Arc::as_ref) };
        self.topics.iter().find(|topic| topic.name() == place).map(Arc::as_ref)
    }
}

fn no_topic(place: Option<&str>) -> Error {
    let place = place.unwrap_or_default();
    Error::new(ErrorKind::Rejected, "publish")
        .because(format!("no topic `{place}` in this publisher: join the publishers with `and`"))
}

/// Listening before looking, as in `receive`; what was appended stays, what was not is dropped with the future.
async fn append(topic: &Topic, messages: Vec<Prepared>) -> u64 {
    let mut messages = messages.into_iter();
    let mut position = topic.append(&mut messages);
    while messages.len() > 0 {
        let done = topic.done.notified();
        position = topic.append(&mut messages);
        if messages.len() > 0 {
            done.await;
        }
    }
    position
}

#[async_trait]
impl Publisher for MemoryPublisher {
    /// Waits while a topic is full. Dropping the future has sent a first part of the batch and nothing of the rest.
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        let mut answers = Vec::with_capacity(batch.len());
        let mut batch = batch.into_iter().peekable();
        while let Some(first) = batch.next() {
            let mut messages = vec![Prepared::new(&first.message)];
            while let Some(next) = batch.next_if(|next| next.to == first.to) {
                messages.push(Prepared::new(&next.message));
            }
            let count = messages.len();
            let place = first.to.as_deref();
            match self.topic(place) {
                Some(topic) => {
                    append(topic, messages).await;
                    answers.extend((0..count).map(|_| Ok(())));
                }
                None => answers.extend((0..count).map(|_| Err(no_topic(place)))),
            }
        }
        answers
    }
}
