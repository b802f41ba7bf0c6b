//! One worker's life, which can be ended or frozen from outside, and the strikes that do so at a chosen point.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use hapax::{Error, ErrorKind, Lease, Result, Stepper};
use tokio::sync::Notify;

use super::chronicle::Chronicle;

thread_local! {
    /// The point at which the handler that is being polled stands.
    static POINT: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// A place where a process may die, for doubles of what handlers call: waits once, as a call over the network does, and
/// names itself in the explorer's report.
///
/// A future that is ready at once never lets go, so nothing can happen between it and what follows. A double that
/// answers at once hides the crash between its effect and its answer; one that awaits a point before and after its
/// effect shows it.
///
/// ```
/// use std::sync::Mutex;
/// use hapax_testkit::crash_point;
///
/// #[derive(Default)]
/// struct FakeProvider { charges: Mutex<Vec<i64>> }
///
/// impl FakeProvider {
///     async fn charge(&self, cents: i64) {
///         crash_point("charge is on its way").await;
///         self.charges.lock().unwrap().push(cents);
///         crash_point("charged, the answer is on its way").await;
///     }
/// }
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(FakeProvider::default().charge(1));
/// ```
pub async fn crash_point(name: &'static str) {
    let mut waited = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        POINT.set(Some(name));
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Where a worker is to be struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strike {
    /// When a handler has let go so many times, over all handlers.
    Await(usize),
    /// When a handler waits at the point of this name for the so manieth time.
    Named(&'static str, usize),
    /// When a handler has returned.
    Returned,
    /// When a record or a commit of success is on its way to the store.
    BeforeRecord,
    /// When an ack is on its way to the broker.
    BeforeAck,
}

/// What is to strike, and what did. Shared by all workers of a stage.
#[derive(Debug, Default)]
pub(crate) struct Strikes {
    state: Mutex<State>,
    struck: Notify,
}

#[derive(Debug, Default)]
struct State {
    armed: Option<Strike>,
    freezes: bool,
    /// Every time that a handler let go, with the name of the point if it was one.
    awaits: Vec<Option<&'static str>>,
    /// Where it struck: after so many awaits, and the name of the point.
    struck_at: Option<(usize, Option<&'static str>)>,
    failures: usize,
}

impl Strikes {
    /// Kills the worker that gets to this point first, or freezes it.
    pub(crate) fn arm(&self, strike: Strike, freezes: bool) {
        let mut state = self.state();
        state.armed = Some(strike);
        state.freezes = freezes;
    }

    /// Whether something struck: after so many awaits, and the name of the point.
    pub(crate) fn struck_at(&self) -> Option<(usize, Option<&'static str>)> {
        self.state().struck_at
    }

    /// Every time that a handler let go, in order, with the name of the point if it was one.
    pub(crate) fn awaits(&self) -> Vec<Option<&'static str>> {
        self.state().awaits.clone()
    }

    /// The next so many calls to the store fail.
    pub(crate) fn fail_store(&self, calls: usize) {
        self.state().failures += calls;
    }

    pub(crate) fn store_failure(&self, operation: &'static str) -> Result<()> {
        let mut state = self.state();
        if state.failures == 0 {
            return Ok(());
        }
        state.failures -= 1;
        Err(Error::new(ErrorKind::Unavailable, operation).because("failed on purpose, by fail_store"))
    }

    /// Waits until something strikes.
    pub(crate) async fn struck(&self) {
        self.struck.notified().await;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a worker goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Pace {
    #[default]
    Goes,
    Frozen,
    /// Frozen but for its handlers.
    HandlersGo,
    Dead,
}

/// One worker's life. Clones are the same life.
#[derive(Clone, Debug)]
pub(crate) struct Life(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    number: u64,
    pace: Mutex<(Pace, Vec<Waker>)>,
    strikes: Arc<Strikes>,
    chronicle: Arc<Chronicle>,
}

impl Life {
    pub(super) fn new(number: u64, strikes: Arc<Strikes>, chronicle: Arc<Chronicle>) -> Self {
        Self(Arc::new(Inner { number, pace: Mutex::default(), strikes, chronicle }))
    }

    /// From 1, in the order in which workers were started.
    pub(super) fn number(&self) -> u64 {
        self.0.number
    }

    pub(super) fn chronicle(&self) -> &Chronicle {
        &self.0.chronicle
    }

    pub(super) fn strikes(&self) -> &Strikes {
        &self.0.strikes
    }

    pub(super) fn goes(&self) -> bool {
        self.pace().0 == Pace::Goes
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.pace().0 == Pace::Frozen
    }

    pub(super) fn thaw_handlers(&self) {
        self.set(Pace::HandlersGo);
    }

    pub(super) fn thaw(&self) {
        self.set(Pace::Goes);
    }

    /// Drives the consumer's run while this life goes on; `None` when it was ended.
    pub(super) async fn drive(self, run: impl Future<Output = Result<()>>) -> Option<Result<()>> {
        let mut run = std::pin::pin!(run);
        poll_fn(|cx| match self.look(cx) {
            Pace::Dead => Poll::Ready(None),
            Pace::Goes => run.as_mut().poll(cx).map(Some),
            Pace::Frozen | Pace::HandlersGo => Poll::Pending,
        })
        .await
    }

    /// A call of a dead worker neither acts nor answers.
    pub(super) async fn alive(&self) {
        if self.pace().0 == Pace::Dead {
            std::future::pending::<()>().await;
        }
    }

    /// The worker got here; what is armed for this point strikes it, and this never returns.
    pub(super) async fn reaches(&self, here: Strike) {
        self.strike_at(here, None);
        self.alive().await;
    }

    fn strike_at(&self, here: Strike, name: Option<&'static str>) {
        let mut state = self.0.strikes.state();
        if state.armed != Some(here) || !self.goes() {
            return;
        }
        state.armed = None;
        state.struck_at = Some((state.awaits.len(), name));
        let pace = if state.freezes { Pace::Frozen } else { Pace::Dead };
        drop(state);
        self.0.chronicle.struck(self.0.number, pace == Pace::Frozen);
        self.set(pace);
        self.0.strikes.struck.notify_one();
    }

    fn set(&self, pace: Pace) {
        let mut now = self.pace();
        now.0 = pace;
        let wakers = std::mem::take(&mut now.1);
        drop(now);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// How it goes on; `cx` is woken when that changes.
    fn look(&self, cx: &Context<'_>) -> Pace {
        let mut now = self.pace();
        if !now.1.iter().any(|waker| waker.will_wake(cx.waker())) {
            now.1.push(cx.waker().clone());
        }
        now.0
    }

    fn pace(&self) -> MutexGuard<'_, (Pace, Vec<Waker>)> {
        self.0.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stepper for Life {
    fn before(&self, lease: &Lease, cx: &mut Context<'_>) -> Poll<()> {
        // While it goes, nothing has to wake the handler but itself.
        let pace = self.pace().0;
        if pace != Pace::Goes && matches!(self.look(cx), Pace::Frozen | Pace::Dead) {
            return Poll::Pending;
        }
        self.0.chronicle.started(self.0.number, lease);
        POINT.set(None);
        Poll::Ready(())
    }

    fn after(&self, lease: &Lease, ended: bool) {
        let name = POINT.take();
        if ended {
            self.0.chronicle.returned(lease);
            return self.strike_at(Strike::Returned, None);
        }
        let (awaits, of_name) = {
            let mut state = self.0.strikes.state();
            state.awaits.push(name);
            (state.awaits.len(), state.awaits.iter().filter(|other| **other == name).count())
        };
        self.strike_at(Strike::Await(awaits), name);
        if let Some(name) = name {
            self.strike_at(Strike::Named(name, of_name), Some(name));
        }
    }
}
