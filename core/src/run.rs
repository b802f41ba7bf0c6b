//! One run of a handler: what its context shows, how the runtime stops it, and where its end is left.
//!
//! Shared by the life that waits for the run and the runner that polls it, so that an event costs one cell and no
//! channel.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

use crate::event::Ended;
use crate::message::Message;
use crate::publisher::Outgoing;
use crate::standby::{Next, Standby};
use crate::store::Lease;

/// Why a handler is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// Its lease is lost: another may run the event.
    LeaseLost,
    /// The consumer shuts down.
    Shutdown,
    /// Its timeout is over.
    Timeout,
}

const PASSED: u8 = 1;
const KEPT: u8 = 2;

/// One run of a handler: what its context shows, and how the runtime stops it.
pub(crate) struct Run {
    pub(crate) consumer: Arc<str>,
    pub(crate) message: Arc<Message>,
    pub(crate) lease: Lease,
    pub(crate) crashes: u32,
    timeout: Duration,
    /// Whether it is to run as a batch of its own.
    is_alone: bool,
    /// Whose claims its commit may take along.
    standby: Option<Arc<Standby>>,
    /// Whether its permit went along with a claim ([`PASSED`]), or cannot any more ([`KEPT`]).
    permit: AtomicU8,
    /// How many events its batch has; 0 before there is one.
    company: AtomicUsize,
    leads: AtomicBool,
    /// When the handler was entered: its time counts from there.
    begun: OnceLock<Instant>,
    is_committing: AtomicBool,
    stop: AtomicU8,
    shutdown_announced: AtomicBool,
    token: OnceLock<CancellationToken>,
    outbox: Mutex<Vec<Outgoing>>,
    ending: Mutex<Ending>,
}

impl Run {
    pub(crate) fn new(
        consumer: Arc<str>,
        message: Arc<Message>,
        lease: Lease,
        crashes: u32,
        timeout: Duration,
    ) -> Self {
        Self {
            consumer,
            message,
            lease,
            crashes,
            timeout,
            is_alone: false,
            standby: None,
            permit: AtomicU8::new(0),
            company: AtomicUsize::new(0),
            leads: AtomicBool::new(false),
            begun: OnceLock::new(),
            is_committing: AtomicBool::new(false),
            stop: AtomicU8::new(0),
            shutdown_announced: AtomicBool::new(false),
            token: OnceLock::new(),
            outbox: Mutex::default(),
            ending: Mutex::default(),
        }
    }

    /// Its batch is to have no other event, if so.
    pub(crate) fn alone(self, is_alone: bool) -> Self {
        Self { is_alone, ..self }
    }

    /// Its commit takes along the claim of who waits first.
    pub(crate) fn before(self, standby: Option<Arc<Standby>>) -> Self {
        Self { standby, ..self }
    }

    /// The claim to take along with its commit; none where its life has given it up.
    pub(crate) fn next(&self) -> Option<(&Standby, Next)> {
        let standby = self.standby.as_deref().filter(|_| self.permit.load(Ordering::SeqCst) == 0)?;
        Some((standby, standby.take()?))
    }

    /// Its permit goes to another; false where its life has given that back already.
    pub(crate) fn pass_permit(&self) -> bool {
        self.permit.compare_exchange(0, PASSED, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Whether its permit went to another; if not, it cannot any more.
    pub(crate) fn has_passed_permit(&self) -> bool {
        self.permit.swap(KEPT, Ordering::SeqCst) == PASSED
    }

    pub(crate) fn is_alone(&self) -> bool {
        self.is_alone
    }

    /// It runs now, in a batch of so many events.
    pub(crate) fn joined(&self, events: usize, leads: bool) {
        self.leads.store(leads, Ordering::SeqCst);
        self.company.store(events, Ordering::SeqCst);
    }

    /// Whether it is the one of its batch that speaks for all.
    pub(crate) fn leads(&self) -> bool {
        self.leads.load(Ordering::SeqCst)
    }

    /// How many events its batch has; 0 before there is one.
    pub(crate) fn company(&self) -> usize {
        self.company.load(Ordering::SeqCst)
    }

    /// Says that the consumer shuts down soon: the handler may finish, but should hurry.
    pub(crate) fn announce_shutdown(&self) {
        self.shutdown_announced.store(true, Ordering::SeqCst);
        if let Some(token) = self.token.get() {
            token.cancel();
        }
    }

    pub(crate) fn is_shutdown_announced(&self) -> bool {
        self.shutdown_announced.load(Ordering::SeqCst)
    }

    /// Ends the run, and says why; the first reason stays.
    pub(crate) fn stop(&self, why: Stop) {
        let code = match why {
            Stop::LeaseLost => 1,
            Stop::Shutdown => 2,
            Stop::Timeout => 3,
        };
        let _ = self.stop.compare_exchange(0, code, Ordering::SeqCst, Ordering::SeqCst);
        if let Some(token) = self.token.get() {
            token.cancel();
        }
    }

    pub(crate) fn stopped(&self) -> Option<Stop> {
        match self.stop.load(Ordering::SeqCst) {
            0 => None,
            1 => Some(Stop::LeaseLost),
            2 => Some(Stop::Shutdown),
            _ => Some(Stop::Timeout),
        }
    }

    pub(crate) fn token(&self) -> CancellationToken {
        let token = self.token.get_or_init(CancellationToken::new).clone();
        // The stop may have come before the token was there to see it.
        if self.stopped().is_some() || self.is_shutdown_announced() {
            token.cancel();
        }
        token
    }

    /// The handler is entered now: its time counts from here.
    pub(crate) fn begin(&self, now: Instant) {
        let _ = self.begun.set(now);
    }

    /// The time that the handler has taken.
    pub(crate) fn taken(&self) -> Duration {
        self.begun.get().map_or(Duration::ZERO, Instant::elapsed)
    }

    /// Time until the handler's timeout.
    pub(crate) fn remaining(&self) -> Duration {
        self.timeout.saturating_sub(self.taken())
    }

    /// Whether the handler's time is over.
    pub(crate) fn is_late(&self, now: Instant) -> bool {
        self.begun.get().is_some_and(|begun| now.saturating_duration_since(*begun) >= self.timeout)
    }

    /// The handler has returned and its transaction is being committed: a stop comes too late.
    pub(crate) fn committing(&self) {
        self.is_committing.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_committing(&self) -> bool {
        self.is_committing.load(Ordering::SeqCst)
    }

    pub(crate) fn outbox(&self) -> MutexGuard<'_, Vec<Outgoing>> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the future of a handler came to its end.
#[derive(Debug)]
pub(crate) enum Finish {
    /// It returned.
    Returned(Ended),
    /// It panicked, with this.
    Panicked(Box<dyn Any + Send>),
    /// It was dropped, as [`Run::cancel`] asked.
    Dropped,
}

/// Where a run's end is left, and who is to be woken.
#[derive(Default)]
struct Ending {
    finish: Option<Finish>,
    is_cancelled: bool,
    life: Option<Waker>,
    handler: Option<Waker>,
}

impl Run {
    /// Waits for the end, or for a reason to stop.
    pub(crate) fn poll_end(&self, cx: &Context<'_>) -> Poll<Result<Finish, Stop>> {
        if let Poll::Ready(finish) = self.poll_finish(cx) {
            return Poll::Ready(Ok(finish));
        }
        // Whoever stops the run wakes the life, so the reason is looked at after its waker is left here.
        self.stopped().map_or(Poll::Pending, |stop| Poll::Ready(Err(stop)))
    }

    /// Waits for the end alone.
    pub(crate) fn poll_finish(&self, cx: &Context<'_>) -> Poll<Finish> {
        let mut ending = self.ending();
        if let Some(finish) = ending.finish.take() {
            return Poll::Ready(finish);
        }
        match &mut ending.life {
            Some(life) => life.clone_from(cx.waker()),
            life => *life = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Asks that the handler's future be dropped, wherever it stands.
    pub(crate) fn cancel(&self) {
        let handler = {
            let mut ending = self.ending();
            ending.is_cancelled = true;
            ending.handler.take()
        };
        handler.into_iter().for_each(Waker::wake);
    }

    /// Whether the handler's future is to be dropped; if not, `cx` is woken when it is.
    pub(crate) fn is_cancelled(&self, cx: &Context<'_>) -> bool {
        let mut ending = self.ending();
        match &mut ending.handler {
            Some(handler) => handler.clone_from(cx.waker()),
            handler => *handler = Some(cx.waker().clone()),
        }
        ending.is_cancelled
    }

    /// Whether its life waits no more for what the handler does.
    pub(crate) fn is_given_up(&self) -> bool {
        self.ending().is_cancelled
    }

    /// Leaves the end. The life is not woken yet: [`tell`](Self::tell) does.
    pub(crate) fn finish(&self, finish: Finish) {
        self.ending().finish = Some(finish);
    }

    /// Wakes the life that waits for the end.
    pub(crate) fn tell(&self) {
        let life = self.ending().life.take();
        life.into_iter().for_each(Waker::wake);
    }

    fn ending(&self) -> MutexGuard<'_, Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run")
            .field("consumer", &self.consumer)
            .field("lease", &self.lease)
            .field("stopped", &self.stopped())
            .finish_non_exhaustive()
    }
}
