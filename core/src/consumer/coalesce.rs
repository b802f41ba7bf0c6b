//! Many single calls become few batched ones, without timers: while one batch is under way the next gathers, and it
//! leaves when the first returns. Idle, a call leaves at once; under load, batches grow as large as the load makes them.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Gathers calls with request `Q` and answer `A`. One batch is under way at a time, beside few that stepped aside.
pub(super) struct Coalescer<Q, A> {
    queue: Mutex<Queue<Q, A>>,
    batch_max: usize,
}

struct Queue<Q, A> {
    gathering: VecDeque<Batch<Q, A>>,
    under_way: bool,
    aside: usize,
    /// Batches that have returned, to be used again when the last of their answers was taken.
    spare: Vec<Batch<Q, A>>,
}

/// Most batches that are kept to be used again.
const SPARE_MAX: usize = 8;
/// Most batches that the next does not wait for: each may keep a connection of the store's busy.
const ASIDE_MAX: usize = 2;

/// That a batch stepped aside.
#[must_use]
pub(super) struct Aside;

/// Requests that travel together, and the places for their answers.
pub(super) struct Batch<Q, A> {
    pub(super) requests: Vec<Q>,
    answers: Arc<Answers<A>>,
}

struct Answers<A>(Mutex<Vec<Place<A>>>);

enum Place<A> {
    Empty,
    Awaited(Waker),
    Answered(A),
    Taken,
}

/// A call whose answer comes with its batch. Dropping it leaves the request in the batch.
#[must_use = "a ticket does nothing unless it is awaited"]
pub(super) struct Ticket<A> {
    answers: Arc<Answers<A>>,
    index: usize,
}

impl<Q, A> Coalescer<Q, A> {
    pub(super) fn new(batch_max: usize) -> Self {
        Self {
            queue: Mutex::new(Queue { gathering: VecDeque::new(), under_way: false, aside: 0, spare: Vec::new() }),
            batch_max,
        }
    }

    /// Puts a request into the gathering batch.
    pub(super) fn call(&self, request: Q) -> Ticket<A> {
        let mut queue = self.lock();
        if queue.gathering.back().is_none_or(|batch| batch.requests.len() >= self.batch_max) {
            let free = queue.spare.iter_mut().position(Batch::is_free);
            let batch = free.map_or_else(Batch::new, |free| queue.spare.swap_remove(free));
            queue.gathering.push_back(batch);
        }
        // There is a batch with room, by the line above.
        let batch = queue.gathering.back_mut().expect("a gathering batch");
        let index = batch.requests.len();
        batch.requests.push(request);
        batch.answers.lock().push(Place::Empty);
        Ticket { answers: Arc::clone(&batch.answers), index }
    }

    /// The next batch, if there is one and none is under way.
    pub(super) fn launch(&self) -> Option<Batch<Q, A>> {
        let mut queue = self.lock();
        if queue.under_way {
            return None;
        }
        let batch = queue.gathering.pop_front()?;
        queue.under_way = true;
        Some(batch)
    }

    /// The batch under way has returned: the next may leave.
    pub(super) fn returned(&self) {
        self.lock().under_way = false;
    }

    /// The batch under way lets the next leave before it returns, if not too many did already.
    pub(super) fn step_aside(&self) -> Option<Aside> {
        let mut queue = self.lock();
        let room = queue.aside < ASIDE_MAX;
        if room {
            queue.aside += 1;
            queue.under_way = false;
        }
        room.then_some(Aside)
    }

    /// A batch that had stepped aside has returned.
    pub(super) fn ended_aside(&self, _: Aside) {
        self.lock().aside -= 1;
    }

    /// Takes a batch back whose requests are all answered.
    pub(super) fn recycle(&self, batch: Batch<Q, A>) {
        let mut queue = self.lock();
        if queue.spare.len() < SPARE_MAX {
            queue.spare.push(batch);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue<Q, A>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Q, A> Batch<Q, A> {
    fn new() -> Self {
        Self { requests: Vec::new(), answers: Arc::new(Answers(Mutex::default())) }
    }

    /// Whether no answer is to be taken any more; empties it, then.
    fn is_free(&mut self) -> bool {
        let Some(answers) = Arc::get_mut(&mut self.answers) else { return false };
        answers.0.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        self.requests.clear();
        true
    }

    /// Hands over the answers to the requests from `first` on and wakes who waits for them.
    pub(super) fn answer(&self, first: usize, answers: impl IntoIterator<Item = A>) {
        let mut places = self.answers.lock();
        for (place, answer) in places[first..].iter_mut().zip(answers) {
            if let Place::Awaited(waker) = std::mem::replace(place, Place::Answered(answer)) {
                waker.wake();
            }
        }
    }
}

impl<A> Answers<A> {
    fn lock(&self) -> MutexGuard<'_, Vec<Place<A>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<A> Future for Ticket<A> {
    type Output = A;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<A> {
        let mut places = self.answers.lock();
        let place = &mut places[self.index];
        match std::mem::replace(place, Place::Taken) {
            Place::Answered(answer) => Poll::Ready(answer),
            Place::Empty | Place::Awaited(_) => {
                *place = Place::Awaited(cx.waker().clone());
                Poll::Pending
            }
            Place::Taken => unreachable!("a ticket is polled after it was ready"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn calls_gather_while_one_batch_is_under_way_and_each_gets_its_own_answer() {
        let calls = Coalescer::<u32, u32>::new(2);
        let first = calls.call(1);
        let batch = calls.launch().expect("the first leaves at once");
        let later: Vec<_> = (2..=4).map(|n| calls.call(n)).collect();
        assert!(calls.launch().is_none(), "one batch is under way");
        batch.answer(0, batch.requests.iter().map(|n| n * 10));
        calls.returned();
        assert_eq!(first.await, 10);
        let mut answers = Vec::new();
        while let Some(batch) = calls.launch() {
            assert!(batch.requests.len() <= 2, "a batch is bounded");
            batch.answer(0, batch.requests.iter().map(|n| n * 10));
            calls.returned();
        }
        for ticket in later {
            answers.push(ticket.await);
        }
        assert_eq!(answers, [20, 30, 40]);
    }
}
