//! The way out: what handlers publish, redriven dead letters, tests. Done when the broker has it durably.

use std::sync::Arc;

use async_trait::async_trait;

use crate::error::Result;
use crate::message::Message;

/// Sends messages to a broker.
#[async_trait]
pub trait Publisher: Send + Sync + 'static {
    /// Sends all, in order, and answers for each when the broker has it durably. An item that failed does not hold up
    /// the others. Repeating a message is allowed: its id is the same, and consumers know it as a duplicate.
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>>;
}

#[async_trait]
impl<P: Publisher + ?Sized> Publisher for Arc<P> {
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        (**self).publish(batch).await
    }
}

/// A message on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Topic, queue or stream; `None` is the publisher's own default.
    pub to: Option<Box<str>>,
    /// What to send.
    pub message: Message,
}

impl Outgoing {
    /// To the publisher's default place.
    pub fn new(message: Message) -> Self {
        Self { to: None, message }
    }

    /// To this topic, queue or stream.
    #[must_use]
    pub fn to(mut self, place: impl Into<Box<str>>) -> Self {
        self.to = Some(place.into());
        self
    }
}
