//! The helm: where the engine is driven, by its own task or by a runner whose handlers have just ended.
//!
//! The task is what store, broker and clock wake. A runner that drives what follows from its handlers' ends need not wake
//! the task, and takes what that starts without being woken: where events follow one another that is most of their cost.
//! Who drives waits for nobody: a runner that finds the wheel taken wakes lives as always, the task is woken when it is free.
//! Only a drain's beginning and the end wait, for the poll that is under way.
//! Handlers are never polled at it, so that one that blocks stops nothing else.
//!
//! Tokio keeps the task that was woken last for the thread that woke it, where no other thread can take it. So a runner
//! polls no more handlers once it has woken an engine or a runner on its thread, or asked anybody outside of the process: one
//! that blocks would hold that task up, or an adapter's. What handlers wake themselves is theirs.

use std::any::Any;
use std::cell::Cell;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;
use tokio::task::unconstrained;
use tracing::Span;

/// What is driven.
pub(super) trait Drive: Send + 'static {
    /// Drives until nothing moves. `keeper` is the runner that takes what starts.
    fn poll(&mut self, cx: &mut Context<'_>, keeper: Option<usize>) -> Driven;

    /// Nobody is woken for what lives are told from here on: a poll follows at once.
    fn expect_poll(&self);
}

/// How a poll of what is driven left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Driven {
    /// Nothing is in flight, and nothing more comes.
    Over,
    /// Others were asked for something, and may have been woken for it.
    Asked,
    /// Whoever was asked has answered, and is nobody but this process: no task of an adapter's was woken.
    Answered,
}

thread_local! {
    /// How often this thread has woken a task of a consumer's.
    static WAKES: Cell<u64> = const { Cell::new(0) };
}

/// How often this thread has woken an engine's task or a runner.
pub(super) fn wakes() -> u64 {
    WAKES.get()
}

/// Wakes a task, if it is not awake, and counts that.
pub(super) fn wake(task: &AtomicWaker) {
    if let Some(task) = task.take() {
        WAKES.set(WAKES.get() + 1);
        task.wake();
    }
}

/// The engine's place, as its task has it. Dropping it drops the engine, after the poll that is under way; not to be done
/// inside that poll, by an observer say.
pub(super) struct Helm<E: Drive>(Arc<Wheel<E>>);

/// The engine's place, as runners have it.
pub(super) struct Wheel<E> {
    seat: Mutex<Seat<E>>,
    /// The task found the wheel taken.
    was_missed: AtomicBool,
    bell: Arc<Bell>,
    waker: Waker,
    /// Of whoever runs the consumer: what the engine logs stays inside it.
    span: Span,
}

struct Seat<E> {
    /// `None` before its begin and after its end.
    engine: Option<E>,
    /// How it panicked under a runner. The task goes on with that, and nobody drives any more.
    panic: Option<Box<dyn Any + Send>>,
}

/// Wakes the engine's task, whatever it waits for.
#[derive(Default)]
pub(super) struct Bell {
    task: AtomicWaker,
    /// The task was woken, and has not driven since.
    has_rung: AtomicBool,
}

impl Bell {
    /// Runs `task` so that all who wake it ring.
    pub(super) async fn listen<T>(self: &Arc<Self>, task: impl Future<Output = T>) -> T {
        let mut task = pin!(task);
        let waker = Waker::from(Arc::clone(self));
        std::future::poll_fn(|cx| {
            self.task.register(cx.waker());
            task.as_mut().poll(&mut Context::from_waker(&waker))
        })
        .await
    }

    fn ring(&self) {
        self.has_rung.store(true, Ordering::Relaxed);
        wake(&self.task);
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ring();
    }
}

impl<E: Drive> Helm<E> {
    /// A place for the engine that `make` makes, in the span of the caller, whose task listens to `bell`.
    pub(super) fn new(bell: &Arc<Bell>, make: impl FnOnce(&Arc<Wheel<E>>) -> E) -> Self {
        let (bell, waker) = (Arc::clone(bell), Waker::from(Arc::clone(bell)));
        let seat = Mutex::new(Seat { engine: None, panic: None });
        let wheel = Arc::new(Wheel { seat, was_missed: AtomicBool::new(false), bell, waker, span: Span::current() });
        let engine = make(&wheel);
        wheel.lock().engine = Some(engine);
        Self(wheel)
    }

    /// Drives until nothing is in flight and nothing more comes.
    ///
    /// # Panics
    /// As the engine does, under a runner too.
    pub(super) async fn drive(&self) {
        std::future::poll_fn(|cx| self.0.poll(cx)).await;
    }

    /// Does something while nobody drives.
    pub(super) fn hold<T>(&self, then: impl FnOnce() -> T) -> T {
        let _seat = self.0.lock();
        then()
    }

    /// Takes the engine away: nobody drives it any more.
    ///
    /// # Panics
    /// As the engine did under a runner.
    pub(super) fn end(&self) -> Option<E> {
        let mut seat = self.0.lock();
        let (engine, panic) = (seat.engine.take(), seat.panic.take());
        drop(seat);
        match panic {
            Some(panic) => go_on_panicking(engine, panic),
            None => engine,
        }
    }
}

impl<E: Drive> Drop for Helm<E> {
    fn drop(&mut self) {
        let engine = self.0.lock().engine.take();
        if std::thread::panicking() {
            drop_quietly(engine);
        }
    }
}

fn go_on_panicking<E>(engine: Option<E>, panic: Box<dyn Any + Send>) -> ! {
    drop_quietly(engine);
    resume_unwind(panic)
}

/// Drops what may panic once more, which would end the process.
fn drop_quietly<E>(engine: Option<E>) {
    let _ = catch_unwind(AssertUnwindSafe(|| drop(engine)));
}

impl<E: Drive> Wheel<E> {
    /// Tells lives what they wait for, and drives what follows unless somebody else does. Answers whether all that was
    /// asked then was answered at once.
    pub(super) fn tell_and_drive(&self, keeper: Option<usize>, tell: impl FnOnce()) -> bool {
        // A task that is woken drives; one that is not polled any more is a consumer that stands still, runners and all.
        let free = if self.bell.has_rung.load(Ordering::Relaxed) { None } else { self.seat.try_lock().ok() };
        let Some(mut seat) = free else {
            tell();
            return false;
        };
        let driven = seat.poll(tell, |engine| self.poll_engine(engine, keeper));
        drop(seat);
        // Whoever misses the wheel says so first and tries again: it succeeds, or is seen here.
        if self.was_missed.swap(false, Ordering::AcqRel) || matches!(driven, None | Some(Driven::Over)) {
            self.bell.ring();
        }
        driven == Some(Driven::Answered)
    }

    fn poll_engine(&self, engine: &mut E, keeper: Option<usize>) -> Driven {
        let _inside = self.span.enter();
        let poll = std::future::poll_fn(|_| Poll::Ready(engine.poll(&mut Context::from_waker(&self.waker), keeper)));
        // The budget of the runner's task is its handlers'.
        match pin!(unconstrained(poll)).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(driven) => driven,
            Poll::Pending => Driven::Asked,
        }
    }

    /// Drives from the task.
    fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        let seat = self.seat.try_lock().or_else(|_| {
            self.was_missed.swap(true, Ordering::AcqRel);
            self.seat.try_lock().inspect(|_| self.was_missed.store(false, Ordering::Relaxed))
        });
        let mut seat = match seat {
            Ok(seat) => seat,
            Err(TryLockError::Poisoned(seat)) => seat.into_inner(),
            Err(TryLockError::WouldBlock) => return Poll::Pending,
        };
        self.bell.has_rung.store(false, Ordering::Relaxed);
        if let Some(panic) = seat.panic.take() {
            let engine = seat.engine.take();
            drop(seat);
            go_on_panicking(engine, panic);
        }
        match seat.engine.as_mut().map(|engine| engine.poll(cx, None)) {
            None | Some(Driven::Over) => Poll::Ready(()),
            Some(Driven::Asked | Driven::Answered) => Poll::Pending,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seat<E>> {
        self.seat.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<E: Drive> Seat<E> {
    /// Polls under a runner. `None` if it panicked, now or before, or is gone.
    fn poll(&mut self, tell: impl FnOnce(), poll: impl FnOnce(&mut E) -> Driven) -> Option<Driven> {
        let Self { engine: Some(engine), panic: panic @ None } = self else {
            tell();
            return None;
        };
        let driven = catch_unwind(AssertUnwindSafe(|| {
            engine.expect_poll();
            tell();
            poll(engine)
        }));
        driven.map_err(|panicked| *panic = Some(panicked)).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc::sync_channel;
    use std::time::Duration;

    use super::*;

    /// Polls as the closure says.
    struct Fake<P>(P);

    impl<P: FnMut(&mut Context<'_>, Option<usize>) -> Driven + Send + 'static> Drive for Fake<P> {
        fn poll(&mut self, cx: &mut Context<'_>, keeper: Option<usize>) -> Driven {
            (self.0)(cx, keeper)
        }

        fn expect_poll(&self) {}
    }

    fn helm<P>(poll: P) -> Helm<Fake<P>>
    where
        P: FnMut(&mut Context<'_>, Option<usize>) -> Driven + Send + 'static,
    {
        Helm::new(&Arc::default(), |_| Fake(poll))
    }

    /// A helm whose engine only counts how often it is polled.
    fn counting() -> (Helm<impl Drive>, Arc<AtomicUsize>) {
        let polls = Arc::new(AtomicUsize::new(0));
        let helm = helm({
            let polls = Arc::clone(&polls);
            move |_, _| {
                polls.fetch_add(1, Ordering::SeqCst);
                Driven::Answered
            }
        });
        (helm, polls)
    }

    impl<E: Drive> Helm<E> {
        /// Runs as a task that listens to its bell.
        pub(in super::super) fn spawn(self) -> tokio::task::JoinHandle<()> {
            let bell = Arc::clone(&self.0.bell);
            tokio::spawn(async move { bell.listen(self.drive()).await })
        }
    }

    #[tokio::test]
    async fn a_panic_under_a_runner_goes_on_in_the_task() {
        let helm = helm(|_, runner| match runner {
            Some(_) => panic!("in the engine"),
            None => Driven::Answered,
        });
        let wheel = Arc::clone(&helm.0);
        let task = helm.spawn();
        tokio::task::yield_now().await;
        wheel.tell_and_drive(Some(0), || ());
        wheel.tell_and_drive(Some(1), || ());
        let panic = task.await.expect_err("the engine panicked").into_panic();
        assert_eq!(panic.downcast_ref(), Some(&"in the engine"));
        assert!(wheel.lock().engine.is_none(), "dropped with the task");
    }

    #[tokio::test]
    async fn the_end_under_a_runner_is_the_end_of_the_task() {
        let mut is_over = false;
        let helm = helm(move |_, runner| {
            is_over |= runner.is_some();
            if is_over { Driven::Over } else { Driven::Answered }
        });
        let wheel = Arc::clone(&helm.0);
        let task = helm.spawn();
        tokio::task::yield_now().await;
        wheel.tell_and_drive(Some(0), || ());
        task.await.expect("it ends");
    }

    #[test]
    fn nobody_drives_what_has_panicked() {
        let polls = Arc::new(AtomicUsize::new(0));
        let helm = helm({
            let polls = Arc::clone(&polls);
            move |_, _| {
                polls.fetch_add(1, Ordering::SeqCst);
                panic!("in the engine")
            }
        });
        helm.0.tell_and_drive(Some(0), || ());
        let mut cx = Context::from_waker(Waker::noop());
        assert!(catch_unwind(AssertUnwindSafe(|| helm.0.poll(&mut cx))).is_err());
        helm.0.tell_and_drive(Some(0), || ());
        assert_eq!(polls.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_panic_that_the_task_has_not_seen_goes_on_at_the_end() {
        for told in [true, false] {
            let helm = helm(|_, _| panic!("in the engine"));
            helm.0.tell_and_drive(Some(0), || assert!(told, "in a waker"));
            assert!(catch_unwind(AssertUnwindSafe(|| helm.end())).is_err());
        }
    }

    #[test]
    fn a_task_that_finds_the_wheel_taken_is_woken_when_it_is_free() {
        let (entered, is_entered) = sync_channel(1);
        let (go_on, may_go_on) = sync_channel(1);
        let helm = helm(move |_, runner| {
            if runner.is_some() {
                entered.send(()).expect("the test listens");
                may_go_on.recv_timeout(Duration::from_secs(30)).expect("the test says so");
            }
            Driven::Answered
        });
        let woken = Arc::<Wakes>::default();
        let waker = Waker::from(Arc::clone(&woken));
        std::thread::scope(|threads| {
            threads.spawn(|| helm.0.tell_and_drive(Some(0), || ()));
            is_entered.recv_timeout(Duration::from_secs(30)).expect("a runner drives");
            helm.0.bell.task.register(&waker);
            assert!(helm.0.poll(&mut Context::from_waker(&waker)).is_pending());
            assert_eq!(woken.0.load(Ordering::SeqCst), 0);
            go_on.send(()).expect("the runner listens");
        });
        assert_eq!(woken.0.load(Ordering::SeqCst), 1);
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn nobody_drives_what_has_ended() {
        let (helm, polls) = counting();
        let wheel = Arc::clone(&helm.0);
        let mut told = 0;
        wheel.tell_and_drive(Some(0), || told += 1);
        drop(helm);
        assert_eq!(Arc::strong_count(&polls), 1, "dropped, though runners still have the wheel");
        wheel.tell_and_drive(Some(0), || told += 1);
        assert_eq!((polls.load(Ordering::SeqCst), told), (1, 2));
    }

    /// A consumer whose future is not polled any more renews no leases: it is not to claim either.
    #[test]
    fn no_runner_drives_while_the_task_is_woken_and_not_polled() {
        let (helm, polls) = counting();
        let polls = || polls.load(Ordering::SeqCst);
        let mut cx = Context::from_waker(Waker::noop());
        assert!(helm.0.poll(&mut cx).is_pending());
        helm.0.tell_and_drive(Some(0), || ());
        assert_eq!(polls(), 2);
        helm.0.waker.wake_by_ref();
        helm.0.tell_and_drive(Some(0), || ());
        assert_eq!(polls(), 2);
        assert!(helm.0.poll(&mut cx).is_pending());
        helm.0.tell_and_drive(Some(0), || ());
        assert_eq!(polls(), 4);
    }

    /// Whatever is told by whomever, somebody drives after it.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_tell_is_lost_between_runners_and_the_task() {
        const TELLS: usize = 20_000;
        let told = Arc::new(AtomicUsize::new(0));
        let slot = Arc::<AtomicWaker>::default();
        let helm = helm({
            let (told, slot) = (Arc::clone(&told), Arc::clone(&slot));
            move |cx, _| {
                slot.register(cx.waker());
                if told.load(Ordering::SeqCst) == 2 * TELLS { Driven::Over } else { Driven::Answered }
            }
        });
        let runners: Vec<_> = (0..2)
            .map(|runner| {
                let (wheel, told, slot) = (Arc::clone(&helm.0), Arc::clone(&told), Arc::clone(&slot));
                std::thread::spawn(move || {
                    for _ in 0..TELLS {
                        wheel.tell_and_drive(Some(runner), || {
                            told.fetch_add(1, Ordering::SeqCst);
                            slot.wake();
                        });
                    }
                })
            })
            .collect();
        tokio::time::timeout(Duration::from_secs(60), helm.spawn())
            .await
            .expect("the last tell is seen")
            .expect("no panic");
        runners.into_iter().for_each(|runner| runner.join().expect("a runner"));
    }
}
