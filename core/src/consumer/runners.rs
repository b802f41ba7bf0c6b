//! Runners: tasks that poll handlers, apart from the engine, so that a handler that blocks stops neither the claims nor the
//! renewals of others.
//!
//! Handlers are handed over in chunks, a chunk a round of the engine and to one runner at a time: a runner is woken once for
//! many handlers, and under load the runners take turns.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use futures_util::FutureExt;
use futures_util::task::AtomicWaker;
use tokio_util::task::AbortOnDropHandle;

use super::batches::Many;
use super::lives::Lives;
use crate::event::Running;
use crate::run::{Finish, Run};

/// After so many rounds a runner lets others have the thread.
const ROUNDS_MAX: usize = 4;

/// The runners of one consumer. Dropping them drops every handler, wherever it stands.
pub(super) struct Runners {
    runners: Vec<Runner>,
    next: usize,
}

struct Runner {
    inbox: Arc<Inbox>,
    running: AbortOnDropHandle<()>,
    /// The inbox' rounds when it was last looked at.
    rounds_seen: u64,
}

/// Handlers on their way to a runner.
#[derive(Default)]
struct Inbox {
    handlers: Mutex<Vec<Handler>>,
    runner: AtomicWaker,
    /// Begins and ends of rounds: odd inside one. A runner that stays there has a handler that blocks.
    rounds: AtomicU64,
}

impl Inbox {
    fn is_in_a_round(&self) -> bool {
        self.rounds.load(Ordering::Relaxed) % 2 == 1
    }
}

/// Handlers that were started in this round of the engine.
#[derive(Default)]
pub(super) struct Started(Mutex<Vec<Handler>>);

/// A handler's future and its run, or those of a batch.
pub(super) enum Handler {
    One(One),
    Many(Many),
}

/// A handler with one event.
pub(super) struct One {
    /// `None` once it was dropped.
    running: Option<Running>,
    run: Arc<Run>,
}

impl Handler {
    pub(super) fn one(running: Running, run: Arc<Run>) -> Self {
        Self::One(One { running: Some(running), run })
    }
}

/// Whose end a handler's end is.
enum Runs {
    One(Arc<Run>),
    Many(Arc<[Arc<Run>]>),
}

impl Runs {
    /// Wakes the lives that wait for it.
    fn tell(self) {
        match self {
            Self::One(run) => run.tell(),
            Self::Many(runs) => runs.iter().for_each(|run| run.tell()),
        }
    }
}

impl Started {
    /// Takes a handler; it is polled after this round.
    pub(super) fn push(&self, handler: Handler) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(handler);
    }
}

impl Runners {
    /// As many runners as the runtime has threads.
    pub(super) fn new() -> Self {
        let threads = tokio::runtime::Handle::current().metrics().num_workers();
        Self { runners: (0..threads).map(|_| Runner::new()).collect(), next: 0 }
    }

    /// Hands the chunk of this round to the next runner that is free. Answers whether there was a chunk.
    pub(super) fn hand_over(&mut self, started: &Started) -> bool {
        let mut chunk = started.0.lock().unwrap_or_else(PoisonError::into_inner);
        if chunk.is_empty() {
            return false;
        }
        let chosen = self.free().unwrap_or(self.next);
        let inbox = &self.runners[chosen].inbox;
        self.next = (chosen + 1) % self.runners.len();
        inbox.handlers.lock().unwrap_or_else(PoisonError::into_inner).append(&mut chunk);
        drop(chunk);
        inbox.runner.wake();
        true
    }

    /// The next runner that is not inside a round, where it could be held up by a handler that blocks.
    fn free(&self) -> Option<usize> {
        let mut turns = (self.next..self.runners.len()).chain(0..self.next);
        turns.find(|runner| !self.runners[*runner].inbox.is_in_a_round())
    }

    /// Takes what waits for a runner that has been inside one round since the last call, and hands it to a free one: to
    /// be called once a tick.
    pub(super) fn relieve(&mut self) {
        for index in 0..self.runners.len() {
            let free = self.free();
            let runner = &mut self.runners[index];
            let rounds = runner.inbox.rounds.load(Ordering::Relaxed);
            let is_stuck = rounds % 2 == 1 && rounds == std::mem::replace(&mut runner.rounds_seen, rounds);
            let Some(free) = free.filter(|_| is_stuck) else { continue };
            let mut waiting =
                std::mem::take(&mut *runner.inbox.handlers.lock().unwrap_or_else(PoisonError::into_inner));
            let inbox = &self.runners[free].inbox;
            inbox.handlers.lock().unwrap_or_else(PoisonError::into_inner).append(&mut waiting);
            inbox.runner.wake();
        }
    }

    /// Whether a runner has ended: it never does by itself.
    pub(super) fn is_broken(&self) -> bool {
        self.runners.iter().any(|runner| runner.running.is_finished())
    }
}

impl Runner {
    fn new() -> Self {
        let inbox = Arc::<Inbox>::default();
        Self { running: AbortOnDropHandle::new(tokio::spawn(run(Arc::clone(&inbox)))), inbox, rounds_seen: 0 }
    }
}

/// Polls the handlers that were woken, then says which have ended.
async fn run(inbox: Arc<Inbox>) {
    let mut handlers = Lives::new();
    let mut ended: Vec<Runs> = Vec::new();
    let mut arrived = Vec::new();
    std::future::poll_fn(|cx| {
        inbox.rounds.fetch_add(1, Ordering::Relaxed);
        inbox.runner.register(cx.waker());
        std::mem::swap(&mut arrived, &mut *inbox.handlers.lock().unwrap_or_else(PoisonError::into_inner));
        for handler in arrived.drain(..) {
            let runs = match &handler {
                Handler::One(one) => Runs::One(Arc::clone(&one.run)),
                Handler::Many(many) => Runs::Many(many.runs()),
            };
            handlers.start(handler, runs);
        }
        // A handler that only gave way goes on at once, without a turn of the scheduler.
        for _ in 0..ROUNDS_MAX {
            if !handlers.poll(|runs| ended.push(runs)) {
                break;
            }
        }
        // Told at the end: a life that is woken puts the engine next in line on this thread, where a handler of this
        // round that blocks would hold it up.
        ended.drain(..).for_each(Runs::tell);
        inbox.rounds.fetch_add(1, Ordering::Relaxed);
        if !handlers.rest(cx) {
            cx.waker().wake_by_ref();
        }
        Poll::<()>::Pending
    })
    .await;
}

impl Future for Handler {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match &mut *self {
            Self::One(one) => one.poll(cx),
            Self::Many(many) => many.poll(cx),
        }
    }
}

impl One {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let this = self;
        let finish = match &mut this.running {
            Some(_) if this.run.is_cancelled(cx) => Finish::Dropped,
            Some(running) => match AssertUnwindSafe(running).catch_unwind().poll_unpin(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(ended)) => Finish::Returned(ended),
                Poll::Ready(Err(panic)) => Finish::Panicked(panic),
            },
            None => return Poll::Ready(()),
        };
        // What a handler holds may panic when it is dropped; the others of this runner are not to end with it.
        let running = this.running.take();
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(running)));
        this.run.finish(match (finish, dropped) {
            (Finish::Dropped, Err(panic)) => Finish::Panicked(panic),
            (finish, _) => finish,
        });
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Ended;
    use crate::message::Message;
    use crate::store::{ConsumerId, EventKey, Lease};
    use std::num::NonZeroU64;

    fn a_run() -> Arc<Run> {
        let lease = Lease { consumer: ConsumerId(1), key: EventKey([0; 16]), fence: NonZeroU64::MIN, attempt: 1 };
        Arc::new(Run::new("billing".into(), Arc::new(Message::default()), lease, 0, std::time::Duration::MAX))
    }

    async fn end_of(runners: &mut Runners, running: Running) -> Finish {
        let (started, run) = (Started::default(), a_run());
        started.push(Handler::one(running, Arc::clone(&run)));
        assert!(runners.hand_over(&started));
        std::future::poll_fn(|cx| run.poll_finish(cx)).await
    }

    struct PanicsWhenDropped;
    impl Drop for PanicsWhenDropped {
        fn drop(&mut self) {
            if !std::thread::panicking() {
                panic!("on drop");
            }
        }
    }

    #[tokio::test]
    async fn a_handler_that_panics_even_on_drop_leaves_its_runner_going() {
        let mut runners = Runners::new();
        let panics = Box::pin(async { panic!("in the handler") });
        assert!(matches!(end_of(&mut runners, panics).await, Finish::Panicked(_)));
        let panics_on_drop = Box::pin(async {
            let _held = PanicsWhenDropped;
            std::future::pending::<()>().await;
            Ended::Effect
        });
        let (started, run) = (Started::default(), a_run());
        started.push(Handler::one(panics_on_drop, Arc::clone(&run)));
        runners.hand_over(&started);
        tokio::task::yield_now().await;
        run.cancel();
        assert!(matches!(std::future::poll_fn(|cx| run.poll_finish(cx)).await, Finish::Panicked(_)));
        assert!(matches!(end_of(&mut runners, Box::pin(async { Ended::Effect })).await, Finish::Returned(_)));
        assert!(!runners.is_broken());
    }

    #[tokio::test]
    async fn a_cancelled_handler_is_dropped_where_it_stands() {
        let mut runners = Runners::new();
        let (started, run) = (Started::default(), a_run());
        started.push(Handler::one(Box::pin(std::future::pending()), Arc::clone(&run)));
        runners.hand_over(&started);
        tokio::task::yield_now().await;
        run.cancel();
        assert!(matches!(std::future::poll_fn(|cx| run.poll_finish(cx)).await, Finish::Dropped));
    }
}
