//! What RabbitMQ does with a queue and its channels, as a model: no time, no network, one command after the other.
//!
//! The adapter is built on what is written here, and `adapters/rabbitmq` checks it against a real server with generated
//! commands. What surprises: a tag that the channel does not know closes the channel, and with it everything that it holds
//! goes back to the queue.

use std::collections::BTreeMap;

/// A quorum queue without a delivery limit, read by `basic.get` on numbered channels. In which order it hands out is left
/// open: what comes back takes its way through the replicas.
#[derive(Clone, Debug, Default)]
pub struct Queue {
    /// Messages that wait, by number, and how often each came back.
    waiting: BTreeMap<u64, u64>,
    channels: BTreeMap<u8, Channel>,
    published: u64,
}

#[derive(Clone, Debug, Default)]
struct Channel {
    tags: u64,
    held: BTreeMap<u64, (u64, u64)>,
}

/// A command on one channel. Messages are numbered from 1 in the order of their publishing.
#[derive(Clone, Debug)]
pub enum Command {
    /// `basic.publish`.
    Publish,
    /// `basic.ack`.
    Ack {
        /// On which.
        channel: u8,
        /// The channel's number for a delivery.
        tag: u64,
        /// Whether all before it are meant too.
        multiple: bool,
    },
    /// `basic.nack` or `basic.reject` with requeue.
    GiveBack {
        /// On which.
        channel: u8,
        /// The channel's number for a delivery.
        tag: u64,
    },
    /// The channel is closed, and another opened under its number.
    Reopen {
        /// On which.
        channel: u8,
    },
}

/// What it is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was done.
    Done,
    /// The tag is not known: the channel is closed, 406. Another is open under its number.
    Closed,
}

impl Queue {
    /// Does one command.
    pub fn apply(&mut self, command: &Command) -> Answer {
        match *command {
            Command::Publish => {
                self.published += 1;
                self.waiting.insert(self.published, 0);
                Answer::Done
            }
            Command::Ack { channel, tag, multiple } => {
                let held = &mut self.channels.entry(channel).or_default().held;
                if !held.contains_key(&tag) {
                    self.close(channel);
                    return Answer::Closed;
                }
                held.retain(|other, _| if multiple { *other > tag } else { *other != tag });
                Answer::Done
            }
            Command::GiveBack { channel, tag } => match self.channels.entry(channel).or_default().held.remove(&tag) {
                Some((message, returns)) => {
                    self.waiting.insert(message, returns + 1);
                    Answer::Done
                }
                None => {
                    self.close(channel);
                    Answer::Closed
                }
            },
            Command::Reopen { channel } => {
                self.close(channel);
                Answer::Done
            }
        }
    }

    /// `basic.get` handed out this message: under which tag, and whether as one that was delivered before. `None` where it
    /// could not have.
    pub fn hand_out(&mut self, channel: u8, message: u64) -> Option<(u64, bool)> {
        let returns = self.waiting.remove(&message)?;
        let channel = self.channels.entry(channel).or_default();
        channel.tags += 1;
        channel.held.insert(channel.tags, (message, returns));
        Some((channel.tags, returns > 0))
    }

    /// Whether nothing waits: every message is acknowledged or held.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    fn close(&mut self, channel: u8) {
        let held = self.channels.remove(&channel).unwrap_or_default().held;
        for (message, returns) in held.into_values() {
            self.waiting.insert(message, returns + 1);
        }
    }
}
