//! What one session holds: deliveries that arrived, those that were handed out, and which of them one frame can settle.
//!
//! Plain data under the broker's lock; no waiting. Every delivery stands here from its arrival until the frame that settles
//! it is on its way, since `multiple` settles everything below a tag.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use hapax::{Message, Want};
use lapin::{Acker, BasicProperties, Channel};

/// A delivery as it came, kept until it is settled.
#[derive(Debug)]
pub(crate) struct Native {
    pub(crate) acker: Acker,
    pub(crate) properties: BasicProperties,
    pub(crate) body: Bytes,
    pub(crate) redelivered: bool,
}

/// A delivery that was not handed out yet.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) tag: u64,
    pub(crate) message: Arc<Message>,
}

/// One session's deliveries.
pub(crate) struct Table {
    /// The channel that delivered them: the only one on which their tags mean anything.
    pub(crate) channel: Channel,
    held: BTreeMap<u64, Arc<Native>>,
    arrivals: VecDeque<Arrival>,
}

/// One frame to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Done: this one, or with `multiple` everything up to it.
    Ack { tag: u64, multiple: bool },
    /// Failed: it comes again, and the server counts.
    Reject { tag: u64 },
    /// Given back: it comes again; RabbitMQ counts it before version 4.3, from then on it does not.
    GiveBack { tag: u64 },
}

/// How a delivery ends at the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Ack,
    Reject,
    GiveBack,
}

impl Table {
    pub(crate) fn new(channel: Channel) -> Self {
        Self { channel, held: BTreeMap::new(), arrivals: VecDeque::new() }
    }

    pub(crate) fn arrived(&mut self, tag: u64, native: Native, message: Message) {
        self.held.insert(tag, Arc::new(native));
        self.arrivals.push_back(Arrival { tag, message: Arc::new(message) });
    }

    /// What to hand out now: at most what is wanted, and nothing that is dead on arrival, because its channel has ended and
    /// we have not heard of it yet.
    pub(crate) fn take(&mut self, want: Want) -> Vec<(Arrival, Arc<Native>)> {
        let (mut taken, mut bytes) = (Vec::new(), 0_usize);
        while taken.len() < want.events {
            let Some(next) = self.arrivals.front() else { break };
            bytes = bytes.saturating_add(next.message.bytes());
            if !taken.is_empty() && bytes > want.bytes {
                break;
            }
            let Some(next) = self.arrivals.pop_front() else { break };
            if let Some(native) = self.held.get(&next.tag).filter(|native| native.acker.usable()) {
                taken.push((next, Arc::clone(native)));
            }
        }
        taken
    }

    /// The tags of what was not handed out, which it no longer will be.
    pub(crate) fn give_back_arrivals(&mut self) -> Vec<u64> {
        self.arrivals.drain(..).map(|arrival| arrival.tag).collect()
    }

    pub(crate) fn find(&self, tag: u64) -> Option<&Arc<Native>> {
        self.held.get(&tag)
    }

    /// The fewest frames that end these and nothing else, and removes them. Tags that are not held have no frame.
    pub(crate) fn end(&mut self, endings: &[(u64, Ending)]) -> Vec<(Frame, Vec<u64>)> {
        let held: Vec<_> = endings.iter().filter(|(tag, _)| self.held.contains_key(tag)).copied().collect();
        let acks: BTreeSet<u64> = held.iter().filter(|(_, how)| *how == Ending::Ack).map(|(tag, _)| *tag).collect();
        let prefix = done_prefix(self.held.keys().copied(), &acks);
        let mut frames = Vec::new();
        if let [_, .., last] = *prefix {
            frames.push((Frame::Ack { tag: last, multiple: true }, prefix.clone()));
        }
        let covered = |tag: u64| prefix.len() > 1 && prefix.last().is_some_and(|last| tag <= *last);
        for (tag, how) in held {
            if self.held.remove(&tag).is_none() || covered(tag) {
                continue;
            }
            let frame = match how {
                Ending::Ack => Frame::Ack { tag, multiple: false },
                Ending::Reject => Frame::Reject { tag },
                Ending::GiveBack => Frame::GiveBack { tag },
            };
            frames.push((frame, vec![tag]));
        }
        frames
    }
}

/// The tags from the lowest unsettled one on that are all done.
fn done_prefix(held: impl Iterator<Item = u64>, done: &BTreeSet<u64>) -> Vec<u64> {
    held.take_while(|tag| done.contains(tag)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(held: &[u64], done: &[u64]) -> Vec<u64> {
        done_prefix(held.iter().copied(), &done.iter().copied().collect())
    }

    /// A gap means a delivery that still runs: `multiple` beyond it would ack what is not done.
    #[test]
    fn multiple_reaches_no_further_than_the_first_delivery_that_is_not_done() {
        assert_eq!(prefix(&[3, 4, 5, 6], &[3, 4, 6]), [3, 4]);
        assert_eq!(prefix(&[3, 4, 5], &[4, 5]), [0; 0]);
        assert_eq!(prefix(&[3, 4, 5], &[3, 4, 5]), [3, 4, 5]);
    }

    #[test]
    fn tags_that_were_settled_before_leave_no_gap() {
        assert_eq!(prefix(&[2, 7, 9], &[2, 7, 9]), [2, 7, 9]);
    }
}
