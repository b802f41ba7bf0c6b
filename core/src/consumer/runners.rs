//! Runners: tasks that poll handlers, apart from the engine, so that a handler that blocks stops neither the claims nor the
//! renewals of others.
//!
//! Handlers are handed over in chunks, a chunk a round of the engine and to one runner: one that drives the engine keeps it,
//! otherwise the runners take turns. Where handlers compute for longer than it takes to wake a thread, a chunk is dealt out
//! among them.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::FutureExt;
use futures_util::task::AtomicWaker;
use tokio::task::coop::has_budget_remaining;
use tokio::time::{Duration, Instant};
use tokio_util::task::AbortOnDropHandle;

use super::batches::Many;
use super::helm::{Drive, Wheel, wake, wakes};
use super::lives::Lives;
use crate::event::Running;
use crate::run::{Finish, Run};

/// What a poll of a handler may take, on average, before a chunk is dealt out: several times a wake of a thread.
const POLL_TAKES_MAX: Duration = Duration::from_micros(10);
/// So often is a handler that only gave way polled again before others are told of their ends.
const ROUNDS_MAX: usize = 4;
/// After so many turns, or so long, a runner lets others have the thread.
const TURNS_MAX: usize = 64;
const TURNS_TAKE_MAX: Duration = Duration::from_millis(1);

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
    /// Whether the handlers of its last round computed for long.
    computes: AtomicBool,
    /// Nothing of it is to run any more.
    is_over: AtomicBool,
}

impl Inbox {
    /// Takes handlers for its runner, and wakes it.
    fn take_in(&self, handlers: &mut Vec<Handler>) {
        self.lock().append(handlers);
        wake(&self.runner);
    }

    /// Hands out what has arrived. Nobody wakes the runner from here on: it is awake.
    fn begin_round(&self, arrived: &mut Vec<Handler>) {
        self.rounds.fetch_add(1, Ordering::Relaxed);
        drop(self.runner.take());
        std::mem::swap(arrived, &mut *self.lock());
    }

    fn end_round(&self, polls: usize, took: Duration) {
        if polls > 0 {
            self.computes.store(took > POLL_TAKES_MAX * u32::try_from(polls).unwrap_or(u32::MAX), Ordering::Relaxed);
        }
        self.rounds.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the runner may wait: `cx` is woken with the next handler. If not, one has arrived.
    fn rest(&self, cx: &Context<'_>) -> bool {
        // Registered before it is looked at: a handler that comes between the two is seen by one of them.
        self.runner.register(cx.waker());
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Handler>> {
        self.handlers.lock().unwrap_or_else(PoisonError::into_inner)
    }

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
    pub(super) fn new<E: Drive>(wheel: &Arc<Wheel<E>>) -> Self {
        let threads = tokio::runtime::Handle::current().metrics().num_workers();
        Self { runners: (0..threads).map(|index| Runner::new(index, wheel)).collect(), next: 0 }
    }

    /// Hands the chunk of this round to `keeper`, or to the next runner that is free. Answers whether there was a chunk.
    pub(super) fn hand_over(&mut self, started: &Started, keeper: Option<usize>) -> bool {
        let mut chunk = started.0.lock().unwrap_or_else(PoisonError::into_inner);
        if chunk.is_empty() {
            return false;
        }
        // Each round is asked about once: what its handlers do now is known after the next.
        let computed = |runner: &&Runner| runner.inbox.computes.swap(false, Ordering::Relaxed);
        if chunk.len() > 1 && self.runners.iter().filter(computed).count() > 0 {
            self.deal(&mut chunk);
        } else {
            let chosen = keeper.or_else(|| self.free()).unwrap_or(self.next);
            self.next = (chosen + 1) % self.runners.len();
            self.runners[chosen].inbox.take_in(&mut chunk);
        }
        true
    }

    /// Deals a chunk out among the free runners, or among all.
    fn deal(&self, chunk: &mut Vec<Handler>) {
        let (free, busy): (Vec<_>, Vec<_>) = self.runners.iter().partition(|runner| !runner.inbox.is_in_a_round());
        let among = if free.is_empty() { busy } else { free };
        let share = chunk.len().div_ceil(among.len());
        for runner in among.into_iter().take(chunk.len()) {
            let rest = chunk.len().saturating_sub(share);
            runner.inbox.take_in(&mut chunk.split_off(rest));
        }
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
            let mut waiting = std::mem::take(&mut *runner.inbox.lock());
            if !waiting.is_empty() {
                self.runners[free].inbox.take_in(&mut waiting);
            }
        }
    }

    /// Whether a runner has ended: it never does by itself.
    pub(super) fn is_broken(&self) -> bool {
        self.runners.iter().any(|runner| runner.running.is_finished())
    }
}

impl Drop for Runners {
    fn drop(&mut self) {
        // One that is awake now polls no more handlers than the one it is at.
        for runner in &self.runners {
            runner.inbox.is_over.store(true, Ordering::Release);
        }
    }
}

impl Runner {
    fn new<E: Drive>(index: usize, wheel: &Arc<Wheel<E>>) -> Self {
        let inbox = Arc::<Inbox>::default();
        let running = tokio::spawn(run(index, Arc::clone(&inbox), Arc::clone(wheel)));
        Self { running: AbortOnDropHandle::new(running), inbox, rounds_seen: 0 }
    }
}

/// Polls the handlers that were woken, then says which have ended, and drives what follows from it if nobody else does.
async fn run<E: Drive>(index: usize, inbox: Arc<Inbox>, wheel: Arc<Wheel<E>>) {
    let mut handlers = Lives::new();
    let mut ended: Vec<Runs> = Vec::new();
    let mut arrived = Vec::new();
    std::future::poll_fn(|cx| {
        let woken = wakes();
        let mut since = None;
        for _ in 0..TURNS_MAX {
            inbox.begin_round(&mut arrived);
            for handler in arrived.drain(..) {
                let runs = match &handler {
                    Handler::One(one) => Runs::One(Arc::clone(&one.run)),
                    Handler::Many(many) => Runs::Many(many.runs()),
                };
                handlers.start(handler, runs);
            }
            let begun = Instant::now();
            // A handler that only gave way goes on at once, without a turn of the scheduler.
            let stops = || wakes() != woken || inbox.is_over.load(Ordering::Acquire);
            let mut round = |_| handlers.poll_until(stops, |runs| ended.push(runs));
            let polls = (0..ROUNDS_MAX).map(&mut round).take_while(|polls| *polls > 0).sum();
            let ended_at = Instant::now();
            inbox.end_round(polls, ended_at - begun);
            // Told outside the round: nothing that follows is to wait for a handler that blocks.
            let have_all_ended = handlers.is_empty();
            let is_all_done = !ended.is_empty() && {
                let tell = || ended.drain(..).for_each(Runs::tell);
                // What handlers wait for would pile up on a runner that takes more.
                wheel.tell_and_drive(have_all_ended.then_some(index), tell) && have_all_ended
            };
            if inbox.rest(cx) && handlers.rest(cx) {
                return Poll::<()>::Pending;
            }
            // Whoever may have been woken on this thread goes first: see `helm.rs`.
            let is_long = ended_at - *since.get_or_insert(begun) >= TURNS_TAKE_MAX;
            if !is_all_done || wakes() != woken || is_long || !has_budget_remaining() {
                break;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
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
    use std::num::NonZeroU64;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::task::Waker;

    use tokio::sync::Notify;

    use super::super::helm::{Driven, Helm};
    use super::*;
    use crate::event::Ended;
    use crate::message::Message;
    use crate::store::{ConsumerId, EventKey, Lease};

    fn a_run() -> Arc<Run> {
        let lease = Lease { consumer: ConsumerId(1), key: EventKey([0; 16]), fence: NonZeroU64::MIN, attempt: 1 };
        Arc::new(Run::new("billing".into(), Arc::new(Message::default()), lease, 0, std::time::Duration::MAX))
    }

    /// An engine that only has runners, and does `when_polled`.
    struct Engine<P> {
        runners: Runners,
        when_polled: P,
    }

    impl<P: FnMut(&mut Runners, &Context<'_>, Option<usize>) -> Driven + Send + 'static> Drive for Engine<P> {
        fn poll(&mut self, cx: &mut Context<'_>, keeper: Option<usize>) -> Driven {
            (self.when_polled)(&mut self.runners, cx, keeper)
        }

        fn expect_poll(&self) {}
    }

    fn helm<P>(when_polled: P) -> Helm<Engine<P>>
    where
        P: FnMut(&mut Runners, &Context<'_>, Option<usize>) -> Driven + Send + 'static,
    {
        Helm::new(&Arc::default(), |wheel| Engine { runners: Runners::new(wheel), when_polled })
    }

    /// Runners that nobody drives with.
    fn runners() -> Runners {
        helm(|_, _, _| Driven::Answered).end().expect("it has begun").runners
    }

    /// Waits until each has had so many rounds, and is outside of one.
    async fn rounds(runners: &[Runner], rounds: u64) {
        let rest = |runner: &Runner| {
            let counted = runner.inbox.rounds.load(Ordering::Relaxed);
            counted >= 2 * rounds && counted.is_multiple_of(2)
        };
        while !runners.iter().all(rest) {
            tokio::task::yield_now().await;
        }
    }

    async fn end_of(runners: &mut Runners, running: Running) -> Finish {
        let (started, run) = (Started::default(), a_run());
        started.push(Handler::one(running, Arc::clone(&run)));
        assert!(runners.hand_over(&started, None));
        std::future::poll_fn(|cx| run.poll_finish(cx)).await
    }

    /// A handler that blocks its thread until `until` says something, and says whether it did.
    fn blocks(until: Receiver<()>) -> (Handler, Arc<Run>) {
        let run = a_run();
        let running = Box::pin(async move {
            assert!(until.recv_timeout(Duration::from_secs(30)).is_ok(), "nothing was said");
            Ended::Effect
        });
        (Handler::one(running, Arc::clone(&run)), run)
    }

    /// Handlers that each wait for the other's thread come to their end only when they have a thread each.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn handlers_that_compute_are_dealt_out() {
        let mut runners = runners();
        rounds(&runners.runners, 1).await;
        runners.runners[0].inbox.computes.store(true, Ordering::Relaxed);
        let started = Started::default();
        // One alone cannot be dealt out, and uses up nobody's vote.
        started.push(Handler::one(Box::pin(std::future::pending()), a_run()));
        assert!(runners.hand_over(&started, Some(1)));
        rounds(&runners.runners[1..2], 2).await;
        let ((to_a, by_a), (to_b, by_b)) = (sync_channel(1), sync_channel(1));
        let runs = [(by_a, to_b), (by_b, to_a)].map(|(mine, other)| {
            let run = a_run();
            let running = Box::pin(async move {
                let _ = other.send(());
                assert!(mine.recv_timeout(Duration::from_secs(30)).is_ok(), "the other did not run beside it");
                Ended::Effect
            });
            started.push(Handler::one(running, Arc::clone(&run)));
            run
        });
        assert!(runners.hand_over(&started, Some(0)));
        for run in runs {
            assert!(matches!(std::future::poll_fn(|cx| run.poll_finish(cx)).await, Finish::Returned(_)));
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_small_chunk_wakes_no_more_runners_than_it_has_handlers() {
        let runners = runners();
        rounds(&runners.runners, 1).await;
        let votes = |runners: &Runners| runners.runners.iter().any(|r| r.inbox.computes.load(Ordering::Relaxed));
        assert!(!votes(&runners), "an empty round says nothing of handlers");
        let runs = [a_run(), a_run()];
        let mut chunk: Vec<_> =
            runs.iter().map(|run| Handler::one(Box::pin(async { Ended::Effect }), Arc::clone(run))).collect();
        let counted = |runners: &Runners| -> Vec<u64> {
            runners.runners.iter().map(|runner| runner.inbox.rounds.load(Ordering::Relaxed)).collect()
        };
        let before = counted(&runners);
        runners.deal(&mut chunk);
        for run in &runs {
            std::future::poll_fn(|cx| run.poll_finish(cx)).await;
        }
        let idle = before.iter().zip(counted(&runners)).filter(|(before, after)| **before == *after).count();
        assert_eq!(idle, 2);
    }

    /// Drives from a task, since what wakes the test itself is no task and has no place in line.
    async fn until_it_returns(helm: Helm<impl Drive>, run: &Run) {
        let task = helm.spawn();
        let finish = std::future::poll_fn(|cx| run.poll_finish(cx)).await;
        assert!(matches!(finish, Finish::Returned(_)), "{finish:?}");
        task.abort();
    }

    /// The first handler of a runner ends; the drive that follows does `drive` and hands over one that blocks. It ends only
    /// if whoever was woken by that came to run: it is next in line on the runner's thread, where nobody else can take it.
    async fn blocks_behind(
        mut drive: impl FnMut(&Context<'_>) -> Driven + Send + 'static,
        heard: Receiver<()>,
        say: SyncSender<()>,
    ) {
        let (handler, run) = blocks(heard);
        let (first, started) = (Started::default(), Started::default());
        first.push(Handler::one(Box::pin(async { Ended::Effect }), a_run()));
        started.push(handler);
        let helm = helm(move |runners, cx, keeper| {
            if keeper.is_some() && runners.hand_over(&started, keeper) {
                return drive(cx);
            }
            if !runners.hand_over(&first, None) {
                let _ = say.try_send(());
            }
            Driven::Answered
        });
        until_it_returns(helm, &run).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_handler_that_blocks_behind_a_drive_does_not_hold_up_the_task() {
        let (say, heard) = sync_channel(1);
        let wake = |cx: &Context<'_>| {
            cx.waker().wake_by_ref();
            Driven::Answered
        };
        blocks_behind(wake, heard, say).await;
    }

    /// The same inside one round: the first handler wakes the task, the second blocks.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_handler_that_blocks_beside_one_that_woke_the_task_does_not_hold_it_up() {
        let (say, heard) = sync_channel(1);
        let (handler, run) = blocks(heard);
        let started = Started::default();
        let bell = Arc::<Mutex<Option<Waker>>>::default();
        started.push(Handler::one(
            Box::pin({
                let bell = Arc::clone(&bell);
                async move {
                    bell.lock().unwrap_or_else(PoisonError::into_inner).take().into_iter().for_each(Waker::wake);
                    Ended::Effect
                }
            }),
            a_run(),
        ));
        started.push(handler);
        let helm = helm(move |runners, cx, _| {
            bell.lock().unwrap_or_else(PoisonError::into_inner).replace(cx.waker().clone());
            if !runners.hand_over(&started, None) {
                let _ = say.try_send(());
            }
            Driven::Answered
        });
        until_it_returns(helm, &run).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_handler_begins_after_the_runners_are_gone() {
        let (go_on, heard) = sync_channel(1);
        let (is_blocked, blocked) = sync_channel(1);
        let (mut runners, started) = (runners(), Started::default());
        let (begun, run) = (Arc::new(AtomicBool::new(false)), a_run());
        started.push(Handler::one(
            Box::pin(async move {
                let _ = is_blocked.try_send(());
                assert!(heard.recv_timeout(Duration::from_secs(30)).is_ok());
                Ended::Effect
            }),
            Arc::clone(&run),
        ));
        started.push(Handler::one(
            Box::pin({
                let begun = Arc::clone(&begun);
                async move {
                    begun.store(true, Ordering::SeqCst);
                    Ended::Effect
                }
            }),
            a_run(),
        ));
        rounds(&runners.runners, 1).await;
        runners.hand_over(&started, Some(0));
        blocked.recv_timeout(Duration::from_secs(30)).expect("it runs");
        drop(runners);
        go_on.send(()).expect("it waits");
        std::future::poll_fn(|cx| run.poll_finish(cx)).await;
        // The runner's task is gone when nobody else has what it holds.
        while Arc::strong_count(&begun) > 1 {
            tokio::task::yield_now().await;
        }
        assert!(!begun.load(Ordering::SeqCst));
    }

    /// An adapter's task, a store's writer say.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_handler_that_blocks_behind_a_drive_does_not_hold_up_whom_it_asked() {
        let (say, heard) = sync_channel(1);
        let (asked, waits) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let store = tokio::spawn({
            let (asked, waits, say) = (Arc::clone(&asked), Arc::clone(&waits), say.clone());
            async move {
                let mut question = std::pin::pin!(asked.notified());
                question.as_mut().enable();
                std::future::poll_fn(|cx| {
                    let polled = question.as_mut().poll(cx);
                    waits.notify_one();
                    polled
                })
                .await;
                let _ = say.try_send(());
            }
        });
        waits.notified().await;
        let (unheard, _) = sync_channel(1);
        let ask = move |_: &Context<'_>| {
            asked.notify_one();
            Driven::Asked
        };
        blocks_behind(ask, heard, unheard).await;
        store.await.expect("the store");
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
        let mut runners = runners();
        let panics = Box::pin(async { panic!("in the handler") });
        assert!(matches!(end_of(&mut runners, panics).await, Finish::Panicked(_)));
        let panics_on_drop = Box::pin(async {
            let _held = PanicsWhenDropped;
            std::future::pending::<()>().await;
            Ended::Effect
        });
        let (started, run) = (Started::default(), a_run());
        started.push(Handler::one(panics_on_drop, Arc::clone(&run)));
        runners.hand_over(&started, None);
        tokio::task::yield_now().await;
        run.cancel();
        assert!(matches!(std::future::poll_fn(|cx| run.poll_finish(cx)).await, Finish::Panicked(_)));
        assert!(matches!(end_of(&mut runners, Box::pin(async { Ended::Effect })).await, Finish::Returned(_)));
        assert!(!runners.is_broken());
    }

    #[tokio::test]
    async fn a_cancelled_handler_is_dropped_where_it_stands() {
        let mut runners = runners();
        let (started, run) = (Started::default(), a_run());
        started.push(Handler::one(Box::pin(std::future::pending()), Arc::clone(&run)));
        runners.hand_over(&started, None);
        tokio::task::yield_now().await;
        run.cancel();
        assert!(matches!(std::future::poll_fn(|cx| run.poll_finish(cx)).await, Finish::Dropped));
    }
}
