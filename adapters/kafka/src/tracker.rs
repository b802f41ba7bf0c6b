//! Which offset of a partition may be committed: everything before it is done.
//!
//! Pure, one for each assignment of a partition, so that what an earlier assignment finishes late finds nothing here.
//! Offsets have holes (compaction, markers of transactions), so only fetched ones count.

use std::collections::VecDeque;

/// The fetched offsets of one assignment that are not part of the done prefix, in order.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    entries: VecDeque<(i64, bool)>,
    /// Behind the last fetched offset; `None` before the first.
    next: Option<i64>,
    /// What the group's position is known to be.
    committed: Option<i64>,
}

impl Tracker {
    /// Notes a fetched offset. False where it is in hand already.
    pub(crate) fn fetched(&mut self, offset: i64) -> bool {
        if self.next.is_none() {
            self.committed = Some(offset);
        }
        if self.next.is_none_or(|next| offset >= next) {
            self.next = Some(offset + 1);
            self.entries.push_back((offset, false));
            return true;
        }
        // A fetch that began again further back.
        match self.entries.binary_search_by_key(&offset, |entry| entry.0) {
            Ok(_) => false,
            Err(at) => {
                self.entries.insert(at, (offset, false));
                true
            }
        }
    }

    /// Notes an offset as done.
    pub(crate) fn done(&mut self, offset: i64) {
        if let Some(at) = self.find(offset) {
            self.entries[at].1 = true;
        }
        while self.entries.front().is_some_and(|entry| entry.1) {
            self.entries.pop_front();
        }
    }

    fn find(&self, offset: i64) -> Option<usize> {
        // Offsets without holes stand where they are counted to.
        let first = self.entries.front()?.0;
        if let Ok(at) = usize::try_from(offset - first)
            && self.entries.get(at).is_some_and(|entry| entry.0 == offset)
        {
            return Some(at);
        }
        self.entries.binary_search_by_key(&offset, |entry| entry.0).ok()
    }

    /// The offset behind the done prefix.
    pub(crate) fn position(&self) -> Option<i64> {
        self.entries.front().map(|entry| entry.0).or(self.next)
    }

    /// What is to be committed: the position, if the group does not have it yet. Never backwards.
    pub(crate) fn to_commit(&self) -> Option<i64> {
        self.position().filter(|position| self.committed.is_some_and(|committed| *position > committed))
    }

    /// The group has this position now.
    pub(crate) fn committed(&mut self, offset: i64) {
        self.committed = self.committed.max(Some(offset));
    }

    /// How many offsets are kept, done ones behind a gap included.
    pub(crate) fn span(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fetched(offsets: impl IntoIterator<Item = i64>) -> Tracker {
        let mut tracker = Tracker::default();
        for offset in offsets {
            assert!(tracker.fetched(offset));
        }
        tracker
    }

    #[test]
    fn only_the_contiguous_done_prefix_is_committed() {
        let mut tracker = fetched(10..15);
        assert_eq!(tracker.to_commit(), None, "nothing is done");
        tracker.done(12);
        assert_eq!(tracker.to_commit(), None, "done behind a gap");
        tracker.done(10);
        assert_eq!(tracker.to_commit(), Some(11));
        tracker.done(11);
        assert_eq!(tracker.to_commit(), Some(13));
        assert_eq!(tracker.span(), 2);
    }

    #[test]
    fn everything_done_commits_behind_the_last() {
        let mut tracker = fetched([3, 7, 9]);
        [9, 3, 7].into_iter().for_each(|offset| tracker.done(offset));
        assert_eq!(tracker.to_commit(), Some(10));
        tracker.committed(10);
        assert_eq!(tracker.to_commit(), None);
        assert_eq!(tracker.span(), 0);
    }

    /// Committed offsets can go backwards at the broker, so they must not here (clients.md 0.9).
    #[test]
    fn a_commit_never_goes_backwards() {
        let mut tracker = fetched(50..53);
        (50..53).for_each(|offset| tracker.done(offset));
        tracker.committed(53);
        assert!(tracker.fetched(10), "a fetch that began again further back");
        assert_eq!(tracker.to_commit(), None);
        tracker.done(10);
        assert_eq!(tracker.to_commit(), None);
        tracker.committed(20);
        tracker.fetched(53);
        tracker.done(53);
        assert_eq!(tracker.to_commit(), Some(54));
    }

    #[test]
    fn what_is_in_hand_is_not_taken_twice() {
        let mut tracker = fetched(0..3);
        assert!(!tracker.fetched(1));
        tracker.done(0);
        assert!(!tracker.fetched(2));
        assert!(tracker.fetched(3));
    }

    #[test]
    fn an_offset_that_was_never_fetched_changes_nothing() {
        let mut tracker = fetched(5..7);
        tracker.done(4);
        tracker.done(99);
        assert_eq!(tracker.to_commit(), None);
        assert_eq!(tracker.position(), Some(5));
    }
}
