//! Keepalive: renews leases while handlers run, says when one is lost, and ends handlers whose time is over.
//!
//! One tick looks at all leases, so that an event costs no timer. It runs in the engine and never in a handler: a
//! handler that blocks does not stop the renewals of others.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use tokio::time::Instant;

use crate::run::{Run, Stop};
use crate::store::{Lease, Renewal};

/// The leases this consumer holds.
pub(super) struct Keepalive {
    table: Mutex<Table>,
    lease: Duration,
    renew_after: Duration,
}

#[derive(Default)]
struct Table {
    holds: Vec<Option<Hold>>,
    free: Vec<usize>,
}

struct Hold {
    lease: Lease,
    /// When the request was sent that the lease counts from: earlier than the store's own instant, so never too late.
    renewed: Instant,
    run: Option<Arc<Run>>,
    waker: Waker,
    lost: bool,
    /// Its outcome is being recorded: that it cannot be renewed any more is no loss.
    is_ending: bool,
}

/// A lease that is renewed until this is dropped.
pub(super) struct Held<'a> {
    keepalive: &'a Keepalive,
    index: usize,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut table = self.keepalive.lock();
        table.holds[self.index] = None;
        table.free.push(self.index);
    }
}

impl Held<'_> {
    /// From now on this run is told when the lease is lost or its time is over, and the life is woken.
    pub(super) fn watch(&self, run: &Arc<Run>) {
        let mut table = self.keepalive.lock();
        if let Some(hold) = &mut table.holds[self.index] {
            if hold.lost {
                run.stop(Stop::LeaseLost);
            }
            hold.run = Some(Arc::clone(run));
        }
    }

    /// From now on the outcome is being recorded.
    pub(super) fn ending(&self) {
        if let Some(hold) = &mut self.keepalive.lock().holds[self.index] {
            hold.is_ending = true;
        }
    }

    /// Whether the lease was lost.
    pub(super) fn is_lost(&self) -> bool {
        self.keepalive.lock().holds[self.index].as_ref().is_some_and(|hold| hold.lost)
    }
}

/// What one tick found.
#[derive(Default)]
pub(super) struct Due {
    /// Leases to renew.
    pub(super) renew: Vec<(usize, Lease)>,
    /// How many leases were lost since the last tick.
    pub(super) lost: usize,
}

impl Keepalive {
    /// Leases of this length. Renewed at a third; where a transaction holds up every other write for up to two thirds of
    /// a lease, so early that what is left outlasts it.
    pub(super) fn new(lease: Duration, transactions_block: bool) -> Self {
        let renew_after = if transactions_block { lease / 8 } else { lease / 3 };
        Self { table: Mutex::default(), lease, renew_after }
    }

    /// How often to look: often enough for the shortest sensible lease, and never more than four times a second for
    /// long ones.
    pub(super) fn tick(&self) -> Duration {
        (self.lease / 12).clamp(Duration::from_millis(5), Duration::from_millis(250))
    }

    /// Keeps a lease that was claimed by a request sent at `sent`. `waker` is the life's. It is lost already where the
    /// answer was heard too late: the process stood still, or its claim waited.
    pub(super) fn hold(&self, lease: Lease, sent: Instant, now: Instant, waker: Waker) -> Held<'_> {
        let mut table = self.lock();
        let lost = self.is_over(sent, now);
        let hold = Some(Hold { lease, renewed: sent, run: None, waker, lost, is_ending: false });
        let index = match table.free.pop() {
            Some(index) => {
                table.holds[index] = hold;
                index
            }
            None => {
                table.holds.push(hold);
                table.holds.len() - 1
            }
        };
        Held { keepalive: self, index }
    }

    /// Ends what is over and says which leases to renew.
    pub(super) fn due(&self, now: Instant) -> Due {
        let mut due = Due::default();
        let mut table = self.lock();
        for (index, hold) in table.holds.iter_mut().enumerate() {
            let Some(hold) = hold else { continue };
            if let Some(run) = hold.run.as_ref().filter(|run| run.is_late(now) && run.stopped().is_none()) {
                run.stop(Stop::Timeout);
                hold.waker.wake_by_ref();
            }
            if hold.lost {
                continue;
            }
            if self.is_over(hold.renewed, now) {
                due.lost += 1;
                hold.lose();
            } else if now.saturating_duration_since(hold.renewed) >= self.renew_after {
                due.renew.push((index, hold.lease));
            }
        }
        due
    }

    /// Takes the answers to renewals sent at `sent`. Answers how many leases are lost.
    pub(super) fn renewed(&self, asked: &[(usize, Lease)], answers: &[Renewal], sent: Instant) -> usize {
        let mut table = self.lock();
        let mut lost = 0;
        for ((index, lease), answer) in asked.iter().zip(answers) {
            // The slot may have been given to another lease in the meantime.
            let Some(hold) = table.holds[*index].as_mut().filter(|hold| hold.lease == *lease) else { continue };
            match answer {
                Renewal::Renewed => hold.renewed = hold.renewed.max(sent),
                Renewal::Lost if !hold.lost && !hold.is_ending() => {
                    lost += 1;
                    hold.lose();
                }
                Renewal::Lost => {}
            }
        }
        lost
    }

    /// Tells every run to stop.
    pub(super) fn stop_all(&self, why: Stop) {
        for hold in self.lock().holds.iter().flatten() {
            if let Some(run) = &hold.run {
                run.stop(why);
            }
            hold.waker.wake_by_ref();
        }
    }

    /// Tells every run that the consumer shuts down soon, without ending it.
    pub(super) fn announce_shutdown(&self) {
        for run in self.lock().holds.iter().flatten().filter_map(|hold| hold.run.as_ref()) {
            run.announce_shutdown();
        }
    }

    /// Whether a lease that was asked for or renewed at `since` may be another's by now. A tenth of it is the margin for
    /// clocks that run at different speeds.
    fn is_over(&self, since: Instant, now: Instant) -> bool {
        now.saturating_duration_since(since) >= self.lease - self.lease / 10
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hold {
    /// Its outcome is being written: that it cannot be renewed any more is no loss.
    fn is_ending(&self) -> bool {
        self.is_ending || self.run.as_ref().is_some_and(|run| run.is_committing())
    }

    fn lose(&mut self) {
        self.lost = true;
        if let Some(run) = &self.run {
            run.stop(Stop::LeaseLost);
        }
        self.waker.wake_by_ref();
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;
    use crate::store::{ConsumerId, EventKey};

    #[tokio::test(start_paused = true)]
    async fn a_lease_whose_grant_is_heard_when_it_may_be_over_is_lost_from_the_start() {
        let keepalive = Keepalive::new(Duration::from_secs(30), false);
        let lease = Lease { consumer: ConsumerId(1), key: EventKey([1; 16]), fence: NonZeroU64::MIN, attempt: 1 };
        let sent = Instant::now();
        tokio::time::advance(Duration::from_millis(26_999)).await;
        assert!(!keepalive.hold(lease, sent, Instant::now(), Waker::noop().clone()).is_lost());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(keepalive.hold(lease, sent, Instant::now(), Waker::noop().clone()).is_lost());
    }
}
