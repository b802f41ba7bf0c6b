//! States as a whole: whether something must still happen, what must hold when nothing does, and when sweep may come.

use stateright::Model;

use crate::invariant::Invariant;
use crate::protocol::{Action, Protocol};
use crate::state::{Place, State, Status, Step};
use crate::variant::Variant;

impl Protocol {
    pub(crate) fn may_sweep(&self, state: &State) -> bool {
        let Some(record) = &state.record else { return false };
        match self.variant {
            Variant::SweepHeld => true,
            Variant::SweepEarly => record.is_terminal(),
            _ => self.retention_is_over(state),
        }
    }

    /// Everything older is settled, nothing is on its way, and no operator will send the letter back: what the
    /// retention has to be long enough for. `Doomed` counts as terminal then.
    pub(crate) fn retention_is_over(&self, state: &State) -> bool {
        let ended =
            state.record.is_some_and(|record| record.is_terminal() || matches!(record.status, Status::Doomed { .. }));
        ended && state.is_at_rest() && state.late.is_none() && state.left.redrives == 0
    }

    /// The invariants that speak of a state as a whole, and not of a step.
    pub(crate) fn holds_at_rest(&self, state: &State, invariant: Invariant) -> bool {
        let seen = &state.seen;
        match invariant {
            Invariant::NoLoss => !state.is_at_rest() || seen.placed || (seen.processed && seen.effected),
            Invariant::RedriveRuns => !state.is_at_rest() || !seen.redriven_by_the_book || seen.processed,
            Invariant::EveryLetterRuns => !state.is_at_rest() || !seen.redriven || seen.processed,
            Invariant::Quiesce => self.somebody_must_act(state) || state.is_at_rest(),
            _ => true,
        }
    }

    /// Whether something is bound to happen: faults, redeliveries and operators may act, but do not have to.
    fn somebody_must_act(&self, state: &State) -> bool {
        let workers = &state.workers[..self.scenario.workers];
        let idle = workers.iter().any(|worker| worker.step == Step::Idle);
        let ready = state.copies.iter().any(|copy| copy.place == Place::Ready);
        let at_work =
            workers.iter().any(|worker| !matches!(worker.step, Step::Idle | Step::Claiming | Step::Asking(_)));
        if at_work || idle && ready {
            return true;
        }
        let time_passes = state.record.is_some_and(|record| {
            record.status == (Status::Waiting { due: false })
                || record.live_fence().is_some_and(|fence| !state.is_held_by_a_worker(fence))
        });
        time_passes
            || (0..workers.len()).any(|i| {
                matches!(workers[i].step, Step::Claiming | Step::Asking(_))
                    && self.next_state(state, Action::Claim(i)).is_some()
            })
    }
}
