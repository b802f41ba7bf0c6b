//! The kill switch: when too many handlers fail, the consumer stops claiming and probes with one delivery at a time, so
//! that an outage of the handler's own dependency does not empty a topic into the dead letters.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// When it opens and how often it probes.
#[derive(Clone, Copy, Debug)]
pub(super) struct SwitchSettings {
    /// The share of failures that opens it, from 0 to 1.
    pub(super) share: f64,
    /// Not before so many handlers ended in the window.
    pub(super) events_min: u32,
    /// How long results count.
    pub(super) window: Duration,
    /// How long between probes while it is open.
    pub(super) probe: Duration,
}

/// The switch of one consumer.
pub(super) struct Switch {
    settings: SwitchSettings,
    state: Mutex<State>,
    changed: Notify,
    gated: AtomicUsize,
}

struct State {
    /// Start of the current half window, and results of it and of the one before.
    since: Instant,
    now: Tally,
    before: Tally,
    open: Option<Open>,
}

#[derive(Clone, Copy, Default)]
struct Tally {
    ended: u32,
    failed: u32,
}

struct Open {
    next_probe: Instant,
    probing: bool,
}

/// What a handler's end means to the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Result {
    /// It works.
    Good,
    /// It failed.
    Bad,
    /// Its dependency is down: no further evidence is needed.
    Down,
}

/// The right to claim; says afterwards how it went.
pub(super) struct Pass<'a> {
    switch: &'a Switch,
    probe: bool,
}

impl Switch {
    pub(super) fn new(settings: SwitchSettings) -> Self {
        let state = State { since: Instant::now(), now: Tally::default(), before: Tally::default(), open: None };
        Self { settings, state: Mutex::new(state), changed: Notify::new(), gated: AtomicUsize::new(0) }
    }

    /// Whether it is open: intake pauses.
    pub(super) fn is_open(&self) -> bool {
        self.lock().open.is_some()
    }

    /// Whether something waits at the gate, and so will be the next probe.
    pub(super) fn is_waited_for(&self) -> bool {
        self.gated.load(Ordering::Relaxed) > 0
    }

    /// The pass that everybody gets while it is closed.
    pub(super) fn try_pass(&self) -> Option<Pass<'_>> {
        self.lock().open.is_none().then_some(Pass { switch: self, probe: false })
    }

    /// Waits until a claim is allowed: at once while it is closed, as a probe when one is due. Cancel safe.
    pub(super) async fn pass(&self) -> Pass<'_> {
        let _gated = Gated::new(&self.gated);
        loop {
            let changed = self.changed.notified();
            let due = {
                let mut state = self.lock();
                match &mut state.open {
                    None => return Pass { switch: self, probe: false },
                    Some(open) if !open.probing && open.next_probe <= Instant::now() => {
                        open.probing = true;
                        return Pass { switch: self, probe: true };
                    }
                    Some(open) if !open.probing => Some(open.next_probe),
                    Some(_) => None,
                }
            };
            match due {
                Some(due) => tokio::select! { biased; () = changed => {}, () = sleep_until(due) => {} },
                None => changed.await,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts who waits at the gate.
struct Gated<'a>(&'a AtomicUsize);

impl<'a> Gated<'a> {
    fn new(gated: &'a AtomicUsize) -> Self {
        gated.fetch_add(1, Ordering::Relaxed);
        Self(gated)
    }
}

impl Drop for Gated<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pass<'_> {
    /// Whether this is the one that may run while the switch is open.
    pub(super) fn is_probe(&self) -> bool {
        self.probe
    }

    /// Says how the handler ended. Answers `Some(open)` if that changed the switch.
    pub(super) fn report(&self, result: Result) -> Option<bool> {
        let settings = &self.switch.settings;
        let now = Instant::now();
        let mut state = self.switch.lock();
        state.turn(now, settings.window / 2);
        state.now.ended += 1;
        state.now.failed += u32::from(result != Result::Good);
        let next_probe = now + settings.probe;
        // A switch that is set never to open does not open for one that is down either.
        let enough = settings.events_min < u32::MAX && (result == Result::Down || state.is_bad(settings));
        match (&mut state.open, result) {
            (Some(_), Result::Good) if self.probe => {
                state.open = None;
                (state.now, state.before) = (Tally::default(), Tally::default());
                drop(state);
                self.switch.changed.notify_waiters();
                Some(false)
            }
            (Some(open), _) if self.probe => {
                open.next_probe = next_probe;
                None
            }
            (None, Result::Bad | Result::Down) if enough => {
                state.open = Some(Open { next_probe, probing: false });
                Some(true)
            }
            _ => None,
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !self.probe {
            return;
        }
        if let Some(open) = &mut self.switch.lock().open {
            open.probing = false;
        }
        // Another may probe, now or when it is due.
        self.switch.changed.notify_waiters();
    }
}

impl State {
    /// Forgets results that are older than the window, half a window at a time.
    fn turn(&mut self, now: Instant, half: Duration) {
        let age = now.saturating_duration_since(self.since);
        if age >= half {
            self.before = if age < half * 2 { self.now } else { Tally::default() };
            self.now = Tally::default();
            self.since = now;
        }
    }

    fn is_bad(&self, settings: &SwitchSettings) -> bool {
        let (ended, failed) = (self.now.ended + self.before.ended, self.now.failed + self.before.failed);
        ended >= settings.events_min && f64::from(failed) >= settings.share * f64::from(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn switch() -> Switch {
        let seconds = Duration::from_secs;
        Switch::new(SwitchSettings { share: 0.5, events_min: 4, window: seconds(30), probe: seconds(30) })
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_at_the_share_and_closes_when_a_probe_succeeds() {
        let switch = switch();
        let pass = switch.pass().await;
        for result in [Result::Good, Result::Good, Result::Bad] {
            assert_eq!(pass.report(result), None);
        }
        assert_eq!(pass.report(Result::Bad), Some(true));
        drop(pass);
        assert!(switch.pass().now_or_never().is_none(), "nobody passes before a probe is due");
        let probe = switch.pass().await;
        assert!(switch.pass().now_or_never().is_none(), "one probe at a time");
        assert_eq!(probe.report(Result::Good), Some(false));
        assert!(switch.pass().now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn one_unavailable_dependency_is_evidence_enough_and_a_probe_without_a_result_passes_on() {
        let switch = switch();
        assert_eq!(switch.pass().await.report(Result::Down), Some(true));
        drop(switch.pass().await);
        let begun = Instant::now();
        let probe = switch.pass().await;
        assert_eq!(begun.elapsed(), Duration::ZERO, "the turn to probe was not used up");
        probe.report(Result::Bad);
        drop(probe);
        switch.pass().await;
        assert!(begun.elapsed() >= Duration::from_secs(30));
    }

    #[tokio::test(start_paused = true)]
    async fn old_results_are_forgotten() {
        let switch = switch();
        let pass = switch.pass().await;
        for _ in 0..3 {
            pass.report(Result::Bad);
        }
        tokio::time::advance(Duration::from_secs(31)).await;
        assert_eq!(pass.report(Result::Bad), None);
    }
}
