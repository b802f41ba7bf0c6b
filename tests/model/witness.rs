//! What the witness notes at each step, and which invariants the step breaks. Nothing here influences the protocol.

use crate::invariant::Invariant;
use crate::scenario::Scenario;
use crate::state::{Grounds, Outcome, Record, State, Status, Step, Witness};
use crate::store::{Grant, Kind, Recorded};

impl State {
    /// A claim was granted; `by` is the worker that learns it.
    pub(crate) fn note_grant(&mut self, grant: &Grant, reopen: u8, by: Option<usize>) {
        let token = 1 << reopen;
        if grant.kind == Kind::Reopened && self.seen.letters & !self.seen.spent & token != 0 {
            self.seen.begin_life(grant.fence, token);
        }
        let repeat = matches!(grant.kind, Kind::Repeat | Kind::Doomed { repeat: true });
        let others_live = self.others_live(by);
        let seen = &mut self.seen;
        seen.broken.mark(Invariant::OneLiveLease, others_live && !(repeat && by.is_none()));
        seen.broken.mark(Invariant::RetryNotEarly, grant.kind == Kind::Early);
        if repeat {
            return;
        }
        seen.broken.mark(Invariant::FenceMonotonic, grant.fence <= seen.fence);
        seen.fence = seen.fence.max(grant.fence);
        if !matches!(grant.kind, Kind::Doomed { .. }) {
            seen.counted += 1;
            seen.takeovers += u8::from(grant.kind == Kind::Takeover);
            seen.broken.mark(Invariant::AttemptsSurvive, grant.attempt < seen.counted);
            seen.broken.mark(Invariant::ChancesKept, grant.attempt > seen.counted);
        }
    }

    /// A handler starts.
    pub(crate) fn note_start(&mut self, scenario: &Scenario) {
        let seen = &mut self.seen;
        seen.starts += 1;
        seen.redriven = false;
        seen.redriven_by_the_book = false;
        seen.broken.mark(Invariant::NoStartAfterTerminal, seen.processed || seen.placed);
        let too_many = seen.starts > scenario.attempts_max as i8 || seen.takeovers > scenario.crashes_max;
        seen.broken.mark(Invariant::AttemptsBounded, too_many);
    }

    /// The store answered `recorded` to the outcome of the lease with `fence`; its record was `before`.
    pub(crate) fn note_record(&mut self, before: Option<&Record>, recorded: Recorded, fence: u8, outcome: Outcome) {
        self.note_write(before, fence);
        if !matches!(recorded, Recorded::Done | Recorded::Vanished) {
            return;
        }
        if outcome != Outcome::Doomed {
            // The lease has ended, whether or not its holder knows.
            let holds = self.workers.iter_mut().filter_map(|worker| worker.step.hold_mut());
            holds.filter(|hold| hold.fence == fence).for_each(|hold| hold.live = false);
        }
        let seen = &mut self.seen;
        match outcome {
            Outcome::Processed => {
                seen.processed = true;
                seen.broken.mark(Invariant::TerminalExclusive, seen.placed);
            }
            Outcome::DeadLettered => seen.broken.mark(Invariant::DlqComplete, !seen.placed),
            Outcome::Failed { counted: false } if before.is_some_and(|record| record.fence == fence) => {
                seen.counted = seen.counted.saturating_sub(1);
                seen.starts -= 1;
            }
            Outcome::Failed { .. } | Outcome::Doomed => {}
        }
    }

    pub(crate) fn note_renewal(&mut self, i: usize, before: Option<&Record>) {
        let Some(hold) = self.workers[i].step.hold_mut() else { return };
        hold.live = true;
        let fence = hold.fence;
        self.note_write(before, fence);
        let others_live = self.others_live(Some(i));
        self.seen.broken.mark(Invariant::OneLiveLease, others_live);
    }

    /// A dead letter with token `fence` stands in the dead letters. One of an earlier life says nothing of this one.
    pub(crate) fn note_letter(&mut self, fence: u8) {
        let seen = &mut self.seen;
        seen.letters |= 1 << fence;
        if fence >= seen.life_since {
            seen.placed = true;
            seen.broken.mark(Invariant::TerminalExclusive, seen.processed);
        }
    }

    /// An operator sends the letter with this token back. One that has reopened the event already, or is left over from
    /// an earlier life, is a duplicate.
    pub(crate) fn note_redrive(&mut self, token: u8) {
        let opens = self.seen.spent >> token & 1 == 0 && token >= self.seen.life_since;
        let last = self.record.is_some_and(|record| {
            let settled = self.is_at_rest() && self.late.is_none() && self.left.redrives == 1;
            record.fence == token && (settled || matches!(record.status, Status::DeadLettered { .. }))
        });
        self.seen.redriven |= opens;
        self.seen.redriven_by_the_book |= opens && last;
    }

    pub(crate) fn note_ack(&mut self, i: usize) {
        let seen = &mut self.seen;
        let undecided = !seen.processed && seen.letters == 0;
        seen.broken.mark(Invariant::SettleOnlyTerminal, undecided);
        let fenced = self.workers[i].step == Step::Acking(Grounds::Fenced);
        seen.broken.mark(Invariant::NoSettleWhenFenced, fenced);
    }

    fn note_write(&mut self, before: Option<&Record>, fence: u8) {
        let stale = before.is_some_and(|record| record.fence != fence);
        self.seen.broken.mark(Invariant::FencedWriteRejected, stale && self.record.as_ref() != before);
    }

    fn others_live(&self, than: Option<usize>) -> bool {
        let mut others = self.workers.iter().enumerate().filter(|&(other, _)| Some(other) != than);
        others.any(|(_, worker)| worker.step.hold().is_some_and(|hold| hold.live))
    }
}

impl Witness {
    /// An effect takes place. One whose lease is lost already is explained by that.
    pub(crate) fn effect(&mut self, live: bool, scenario: &Scenario) {
        self.effects += i8::from(live);
        self.broken.mark(Invariant::ExplainedDuplicate, self.effects > 1);
        self.broken.mark(Invariant::EffectOnceTx, self.effected && scenario.once);
        self.effected = true;
    }

    fn begin_life(&mut self, fence: u8, token: u16) {
        self.spent |= token;
        self.life_since = fence;
        self.counted = 0;
        self.takeovers = 0;
        self.starts = 0;
        self.effects -= 1;
        self.effected = false;
        self.processed = false;
        self.placed = false;
    }
}
