//! Lanes: deliveries of one ordering key, one after the other.
//!
//! A lane is a 64-bit hash of the key; two keys that share a hash share a lane, which costs time and never order. What
//! waits in a lane counts as in flight, so lanes are bounded by it.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};

use hashbrown::HashMap;

use crate::message::Message;

/// Which lane a delivery belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Lane(u64);

impl Lane {
    /// The lane of a message by its `partitionkey`; none without one: such messages keep no order among themselves.
    pub(super) fn of(message: &Message) -> Option<Self> {
        let key = message.attributes.partition_key.as_deref().filter(|key| !key.is_empty())?;
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        Some(Self(hasher.finish()))
    }
}

/// The lanes in which something runs, each with what waits behind it.
pub(super) struct Lanes<D> {
    busy: HashMap<Lane, VecDeque<D>>,
    /// Queues of lanes that are empty now, with their room.
    spare: Vec<VecDeque<D>>,
}

/// Most queues that are kept to be used again.
const SPARE_MAX: usize = 1_024;

impl<D> Lanes<D> {
    pub(super) fn new() -> Self {
        Self { busy: HashMap::new(), spare: Vec::new() }
    }

    /// Answers the delivery if it may start now; keeps it if its lane is busy.
    pub(super) fn enter(&mut self, lane: Lane, delivery: D) -> Option<D> {
        match self.busy.entry(lane) {
            hashbrown::hash_map::Entry::Vacant(vacant) => {
                vacant.insert(self.spare.pop().unwrap_or_default());
                Some(delivery)
            }
            hashbrown::hash_map::Entry::Occupied(mut busy) => {
                busy.get_mut().push_back(delivery);
                None
            }
        }
    }

    /// What runs in this lane has ended: the next, if one waits.
    pub(super) fn leave(&mut self, lane: Lane) -> Option<D> {
        let hashbrown::hash_map::Entry::Occupied(mut busy) = self.busy.entry(lane) else { return None };
        let next = busy.get_mut().pop_front();
        if next.is_none() {
            let queue = busy.remove();
            if queue.capacity() > 0 && self.spare.len() < SPARE_MAX {
                self.spare.push(queue);
            }
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_runs_one_after_the_other_and_is_forgotten_when_empty() {
        let mut lanes = Lanes::new();
        let lane = Lane(7);
        assert_eq!(lanes.enter(lane, 1), Some(1));
        assert_eq!(lanes.enter(lane, 2), None);
        assert_eq!(lanes.enter(Lane(8), 3), Some(3), "other lanes go on");
        assert_eq!(lanes.leave(lane), Some(2));
        assert_eq!(lanes.leave(lane), None);
        assert_eq!(lanes.leave(Lane(8)), None);
        assert!(lanes.busy.is_empty());
    }

    #[test]
    fn a_missing_or_empty_key_has_no_lane() {
        assert_eq!(Lane::of(&Message::default()), None);
        assert_eq!(Lane::of(&Message::default().with_partition_key("")), None);
        let lane = Lane::of(&Message::default().with_partition_key("a"));
        assert!(lane.is_some() && lane == Lane::of(&Message::default().with_partition_key("a")));
    }
}
