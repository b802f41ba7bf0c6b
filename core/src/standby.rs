//! Claims that travel with a commit. Who waits for a handler's permit leaves its claim here. A handler whose transaction is
//! about to commit takes the first along: claimed at the moment at which the other ends, in the same transaction, at no round
//! trip and no write to the disk of its own. With the claim goes the handler's permit, so that no more events are claimed
//! than handlers may run; but for one whose commit failed, until that is recorded.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, timeout};

use crate::store::{ClaimRequest, Lease};

/// Those that wait for a permit, in the order in which they get one.
pub(crate) struct Standby {
    lease: Duration,
    permits: Arc<Semaphore>,
    queue: Mutex<Queue>,
}

struct Queue {
    /// By ascending numbers.
    waiting: VecDeque<(u64, Option<Next>)>,
    numbers: u64,
    is_paused: bool,
    is_closed: bool,
}

/// A claim that a commit takes along. Dropped without an answer, nobody knows whether it was made.
pub(crate) struct Next {
    pub(crate) request: ClaimRequest,
    answer: oneshot::Sender<Option<Granted>>,
}

/// What a commit claimed.
pub(crate) struct Granted {
    pub(crate) lease: Lease,
    /// When it was asked for: the lease counts from there.
    pub(crate) asked: Instant,
    /// Of the handler that committed, unless its life had given it back.
    pub(crate) permit: Option<Passed>,
}

/// A permit that went from one handler to the next.
pub(crate) struct Passed(Option<Arc<Semaphore>>);

impl Passed {
    /// It goes on to another: this one gives back nothing.
    pub(crate) fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for Passed {
    fn drop(&mut self) {
        if let Some(permits) = &self.0 {
            permits.add_permits(1);
        }
    }
}

/// One that waits; withdrawn when it is dropped.
pub(crate) struct Waiting<'a> {
    standby: &'a Standby,
    number: u64,
    answer: Option<oneshot::Receiver<Option<Granted>>>,
    is_unknown: bool,
}

/// How a wait ended.
pub(crate) enum Answer {
    /// Nobody asked for it.
    NotAsked,
    /// A commit claimed it.
    Granted(Granted),
    /// A commit may have claimed it: to be asked for again, with its token.
    Unknown,
}

impl Standby {
    pub(crate) fn new(lease: Duration, permits: Arc<Semaphore>) -> Self {
        let queue = Queue { waiting: VecDeque::new(), numbers: 0, is_paused: false, is_closed: false };
        Self { lease, permits, queue: Mutex::new(queue) }
    }

    /// How long a grant lasts unless it is renewed.
    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }

    /// Waits behind the others. Without a claim it only keeps its place, since permits come in this order.
    pub(crate) fn wait(&self, request: Option<ClaimRequest>) -> Waiting<'_> {
        let mut queue = self.lock();
        queue.numbers += 1;
        let number = queue.numbers;
        let (next, answer) = request.filter(|_| !queue.is_closed).map(Next::new).unzip();
        queue.waiting.push_back((number, next));
        Waiting { standby: self, number, answer, is_unknown: false }
    }

    /// The claim of the first that waits, if it has one to be taken along. If not, the permit is to be given back: then
    /// the first that waits has it.
    pub(crate) fn take(&self) -> Option<Next> {
        let mut queue = self.lock();
        if queue.is_paused { None } else { queue.waiting.pop_front()?.1 }
    }

    /// While it is paused no claim is taken along.
    pub(crate) fn pause(&self, is_paused: bool) {
        self.lock().is_paused = is_paused;
    }

    /// Answers for a claim that was taken along and committed; `passes` says that the handler's permit goes with it.
    pub(crate) fn answer(&self, next: Next, granted: Option<(Lease, Instant)>, passes: impl FnOnce() -> bool) {
        let permit = || passes().then(|| Passed(Some(Arc::clone(&self.permits))));
        let granted = granted.map(|(lease, asked)| Granted { lease, asked, permit: permit() });
        // Nobody waits where the consumer was given up; then the lease ends by itself.
        drop(next.answer.send(granted));
    }

    /// No claim is taken along any more.
    pub(crate) fn close(&self) {
        let mut queue = self.lock();
        queue.is_closed = true;
        for next in queue.waiting.iter_mut().filter_map(|(_, next)| next.take()) {
            drop(next.answer.send(None));
        }
    }

    /// Whether this one was still here.
    fn withdraw(&self, number: u64) -> bool {
        let mut queue = self.lock();
        let place = queue.waiting.binary_search_by_key(&number, |(waiting, _)| *waiting);
        place.is_ok_and(|place| queue.waiting.remove(place).is_some())
    }

    /// Back to its place, with nothing to be taken along: it waits for a permit, and one that is given back is for it.
    fn stay(&self, number: u64) {
        let mut queue = self.lock();
        if let Err(place) = queue.waiting.binary_search_by_key(&number, |(waiting, _)| *waiting) {
            queue.waiting.insert(place, (number, None));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Next {
    fn new(request: ClaimRequest) -> (Self, oneshot::Receiver<Option<Granted>>) {
        let (answer, receiver) = oneshot::channel();
        (Self { request, answer }, receiver)
    }
}

impl Waiting<'_> {
    /// What a commit claimed. Waits for ever where none does.
    pub(crate) async fn granted(&mut self) -> Granted {
        if let Some(answer) = &mut self.answer {
            let answered = answer.await;
            self.answer = None;
            match answered {
                Ok(Some(granted)) => return granted,
                Ok(None) => {}
                Err(_) => self.is_unknown = true,
            }
            self.standby.stay(self.number);
        }
        std::future::pending().await
    }

    /// Ends the wait. A commit that has taken the claim along is waited for, but not for longer than the claim would be worth.
    pub(crate) async fn end(mut self) -> Answer {
        if self.standby.withdraw(self.number) {
            return if self.is_unknown { Answer::Unknown } else { Answer::NotAsked };
        }
        let Some(answer) = self.answer.take() else { return Answer::NotAsked };
        match timeout(self.standby.lease / 3, answer).await {
            Ok(Ok(Some(granted))) => Answer::Granted(granted),
            Ok(Ok(None)) => Answer::NotAsked,
            Ok(Err(_)) | Err(_) => Answer::Unknown,
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.standby.withdraw(self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::store::{ConsumerId, EventKey, Fingerprint};

    fn request(n: u64) -> ClaimRequest {
        let key = EventKey::of("billing", "shop", &n.to_string());
        ClaimRequest { consumer: ConsumerId(1), key, fingerprint: Fingerprint::ANY, token: n.into(), reopen: None }
    }

    fn lease(n: u64) -> Lease {
        Lease { consumer: ConsumerId(1), key: request(n).key, fence: std::num::NonZeroU64::MIN, attempt: 1 }
    }

    fn standby() -> (Arc<Semaphore>, Standby) {
        let permits = Arc::new(Semaphore::new(0));
        (Arc::clone(&permits), Standby::new(Duration::from_secs(30), permits))
    }

    #[tokio::test]
    async fn the_first_is_taken_along_and_the_permit_with_it() {
        let (permits, standby) = standby();
        let (mut first, second) = (standby.wait(Some(request(1))), standby.wait(Some(request(2))));
        let next = standby.take().expect("two wait");
        assert_eq!(next.request, request(1));
        assert!(matches!(second.end().await, Answer::NotAsked), "withdrawn");
        standby.answer(next, Some((lease(1), Instant::now())), || true);
        let granted = first.granted().await;
        assert_eq!(granted.lease, lease(1));
        assert_eq!(permits.available_permits(), 0, "it has it");
        drop(granted);
        assert_eq!(permits.available_permits(), 1, "given back");
        assert!(standby.take().is_none());
    }

    #[tokio::test]
    async fn who_has_nothing_to_take_along_keeps_its_place_and_the_next_one_waits() {
        let (_, standby) = standby();
        let (_first, _second) = (standby.wait(None), standby.wait(Some(request(2))));
        assert!(standby.take().is_none(), "the permit is the first one's");
        assert_eq!(standby.take().map(|next| next.request), Some(request(2)));
    }

    #[tokio::test]
    async fn what_was_taken_and_not_answered_is_unknown_and_what_was_not_taken_was_not_asked() {
        let (_, standby) = standby();
        let (first, second, third) =
            (standby.wait(Some(request(1))), standby.wait(Some(request(2))), standby.wait(Some(request(3))));
        drop(standby.take());
        assert!(matches!(first.end().await, Answer::Unknown), "its commit came to nothing, or nobody knows");
        let next = standby.take().expect("the second waits");
        standby.answer(next, None, || unreachable!("no permit goes with no claim"));
        assert!(matches!(second.end().await, Answer::NotAsked));
        standby.close();
        assert!(standby.take().is_none());
        assert!(matches!(third.end().await, Answer::NotAsked));
        let late = standby.wait(Some(request(4)));
        assert!(standby.take().is_none(), "closed");
        drop(late);
    }

    /// The others do not go on without it, from one commit to the next.
    #[tokio::test]
    async fn who_was_taken_along_for_nothing_is_the_first_again() {
        let (_, standby) = standby();
        let (mut first, _second) = (standby.wait(Some(request(1))), standby.wait(Some(request(2))));
        let next = standby.take().expect("two wait");
        standby.answer(next, None, || true);
        assert!(first.granted().now_or_never().is_none());
        assert!(standby.take().is_none(), "the permit is the first one's");
        assert_eq!(standby.take().map(|next| next.request), Some(request(2)));
    }

    #[test]
    fn while_it_is_paused_nobody_is_taken_along() {
        let (_, standby) = standby();
        let _waiting = standby.wait(Some(request(1)));
        standby.pause(true);
        assert!(standby.take().is_none());
        standby.pause(false);
        assert!(standby.take().is_some());
    }

    /// Nobody hears of the grant any more: the permit is not lost with it.
    #[tokio::test]
    async fn a_permit_that_nobody_takes_goes_back() {
        let (permits, standby) = standby();
        let waiting = standby.wait(Some(request(1)));
        let next = standby.take().expect("one waits");
        drop(waiting);
        standby.answer(next, Some((lease(1), Instant::now())), || true);
        assert_eq!(permits.available_permits(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_commit_that_does_not_end_is_waited_for_no_longer_than_a_third_of_a_lease() {
        let (_, standby) = standby();
        let waiting = standby.wait(Some(request(1)));
        let _next = standby.take();
        let begun = Instant::now();
        assert!(matches!(waiting.end().await, Answer::Unknown));
        assert_eq!(begun.elapsed(), Duration::from_secs(10));
    }
}
