//! Copies of one event inside this process take turns: the second waits for the first's record and is woken by it,
//! instead of asking the store again and again. So no batch of claims ever holds one key twice.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use hashbrown::HashMap;
use hashbrown::hash_map::Entry;

use crate::store::EventKey;

/// The keys that have a turn now, each with those that wait for it.
#[derive(Default)]
pub(super) struct Copies(Mutex<HashMap<EventKey, Queue>>);

/// Who waits, in order. Allocates nothing while nobody does.
#[derive(Default)]
struct Queue {
    waiting: VecDeque<(u64, Waker)>,
    /// The waiter to whom the turn was passed and that has not taken it yet.
    passed_to: Option<u64>,
    tickets: u64,
}

impl Copies {
    /// Waits for this key's turn. First come, first served; cancel safe.
    pub(super) fn turn(&self, key: EventKey) -> Waiting<'_> {
        Waiting { copies: self, key, ticket: None }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<EventKey, Queue>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass_on(&self, key: EventKey) {
        let mut keys = self.lock();
        let Entry::Occupied(mut entry) = keys.entry(key) else { return };
        let queue = entry.get_mut();
        queue.passed_to = None;
        if let Some((ticket, waker)) = queue.waiting.pop_front() {
            queue.passed_to = Some(ticket);
            drop(keys);
            waker.wake();
        } else {
            entry.remove();
        }
    }
}

/// The right to claim a key in this process; passed on when dropped.
pub(super) struct Turn<'a> {
    copies: &'a Copies,
    key: EventKey,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.copies.pass_on(self.key);
    }
}

/// Waits for a turn.
pub(super) struct Waiting<'a> {
    copies: &'a Copies,
    key: EventKey,
    ticket: Option<u64>,
}

impl<'a> Future for Waiting<'a> {
    type Output = Turn<'a>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Turn<'a>> {
        let this = &mut *self;
        let mut keys = this.copies.lock();
        let queue = match keys.entry(this.key) {
            Entry::Vacant(vacant) => {
                vacant.insert(Queue::default());
                this.ticket = None;
                return Poll::Ready(Turn { copies: this.copies, key: this.key });
            }
            Entry::Occupied(entry) => entry.into_mut(),
        };
        match this.ticket {
            Some(ticket) if queue.passed_to == Some(ticket) => {
                queue.passed_to = None;
                this.ticket = None;
                return Poll::Ready(Turn { copies: this.copies, key: this.key });
            }
            Some(ticket) => {
                if let Some((_, waker)) = queue.waiting.iter_mut().find(|(t, _)| *t == ticket) {
                    waker.clone_from(cx.waker());
                }
            }
            None => {
                queue.tickets += 1;
                this.ticket = Some(queue.tickets);
                queue.waiting.push_back((queue.tickets, cx.waker().clone()));
            }
        }
        Poll::Pending
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut keys = self.copies.lock();
        let Some(queue) = keys.get_mut(&self.key) else { return };
        queue.waiting.retain(|(t, _)| *t != ticket);
        let was_ours = queue.passed_to == Some(ticket);
        drop(keys);
        if was_ours {
            self.copies.pass_on(self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn copies_take_turns_in_order_and_a_dropped_waiter_passes_the_turn_on() {
        let copies = Copies::default();
        let key = EventKey([1; 16]);
        let first = copies.turn(key).await;
        let (mut second, mut third) = (Box::pin(copies.turn(key)), Box::pin(copies.turn(key)));
        assert!(second.as_mut().now_or_never().is_none());
        assert!(third.as_mut().now_or_never().is_none());
        assert!(copies.turn(EventKey([2; 16])).now_or_never().is_some(), "another key is not held up");
        drop(first);
        assert!(third.as_mut().now_or_never().is_none(), "the second comes first");
        drop(second);
        drop(third.await);
        assert!(copies.lock().is_empty(), "nothing is kept of keys without a turn");
    }
}
