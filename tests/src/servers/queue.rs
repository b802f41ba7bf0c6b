//! What RabbitMQ does with a queue and its channels, as a model: no time, no network, one command after the other.
//!
//! The adapter is built on what is written here, and `adapters/rabbitmq` checks it against a real server with generated
//! commands. What surprises: a tag that the channel does not know closes the channel, and with it everything that it holds
//! goes back to the queue.

use std::collections::{BTreeMap, VecDeque};

/// A quorum queue without a delivery limit, read by `basic.get` on numbered channels.
#[derive(Clone, Debug, Default)]
pub struct Queue {
    /// Messages that wait, by number, and how often each came back.
    waiting: VecDeque<(u64, u64)>,
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
    /// `basic.get`.
    Get {
        /// On which.
        channel: u8,
    },
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
    /// The message with this number under this tag, and whether it was delivered before; `None` when the queue is empty.
    Got(Option<(u64, u64, bool)>),
    /// The tag is not known: the channel is closed, 406. Another is open under its number.
    Closed,
}

impl Queue {
    /// Does one command.
    pub fn apply(&mut self, command: &Command) -> Answer {
        match *command {
            Command::Publish => {
                self.published += 1;
                self.waiting.push_back((self.published, 0));
                Answer::Done
            }
            Command::Get { channel } => {
                let Some((message, returns)) = self.take() else { return Answer::Got(None) };
                let channel = self.channels.entry(channel).or_default();
                channel.tags += 1;
                channel.held.insert(channel.tags, (message, returns));
                Answer::Got(Some((message, channel.tags, returns > 0)))
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
                    self.give_back(message, returns);
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

    /// The numbers of the messages that are neither acknowledged nor held, in no order.
    pub fn waiting(&self) -> Vec<u64> {
        let mut waiting: Vec<_> = self.waiting.iter().map(|(message, _)| *message).collect();
        waiting.sort_unstable();
        waiting
    }

    fn take(&mut self) -> Option<(u64, u64)> {
        self.waiting.pop_front()
    }

    fn close(&mut self, channel: u8) {
        let held = self.channels.remove(&channel).unwrap_or_default().held;
        for (message, returns) in held.into_values() {
            self.give_back(message, returns);
        }
    }

    /// Quorum queues hand out what came back before what is new, in the order in which it came back.
    fn give_back(&mut self, message: u64, returns: u64) {
        let behind = self.waiting.iter().position(|(_, returns)| *returns == 0).unwrap_or(self.waiting.len());
        self.waiting.insert(behind, (message, returns + 1));
    }
}
