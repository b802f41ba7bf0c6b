//! The model: which actions are possible in a state, and which state each leads to. The happy path of a delivery reads
//! downward in [`Protocol::apply`]; what the store does is in `store.rs`, what the witness notes in `witness.rs`.

use stateright::{Model, Property};

use crate::invariant::{self, Invariant};
use crate::scenario::Scenario;
use crate::state::{Copy, Effect, Grounds, Hold, Late, Outcome, Place, State, Status, Step};
use crate::store::{self, Claim, Grant, Kind, Recorded};
use crate::variant::Variant;

#[derive(Clone, Debug)]
pub(crate) struct Protocol {
    pub(crate) scenario: Scenario,
    pub(crate) variant: Variant,
}

/// One step of the world. A number without a name is a worker's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Deliver {
        worker: usize,
        copy: usize,
    },
    Claim(usize),
    GiveBack(usize),
    TakeEffect(usize),
    Succeed(usize),
    Fail(usize, Failure),
    Record(usize),
    PlaceLetter(usize),
    Ack(usize),
    Renew(usize),
    Crash(usize),
    /// The worker stops waiting for the store; its request is still on its way.
    GiveUpWaiting(usize),
    LateRequestArrives,
    /// The letter is placed, but the worker does not learn it; or it believes in an ack that never arrives.
    LoseSettle(usize),
    LeaseExpires,
    RetryIsDue,
    Sweep,
    Redrive {
        token: u8,
    },
    StoreForgets,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Failure {
    Retryable,
    Permanent,
    Uncounted,
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::first(self.scenario.copies, self.scenario.faults)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for worker in 0..self.scenario.workers {
            self.actions_of(worker, state, actions);
        }
        if let Some(record) = &state.record {
            if let Some(fence) = record.live_fence()
                && (state.left.pauses > 0 || !state.is_held_by_a_worker(fence))
            {
                actions.push(Action::LeaseExpires);
            }
            if record.status == (Status::Waiting { due: false }) {
                actions.push(Action::RetryIsDue);
            }
            if state.left.store_losses > 0 && self.variant == Variant::StoreForgets {
                actions.push(Action::StoreForgets);
            }
            if state.left.sweeps > 0 && self.may_sweep(state) {
                actions.push(Action::Sweep);
            }
        }
        if state.late.is_some() {
            actions.push(Action::LateRequestArrives);
        }
        if state.left.redrives > 0 {
            let letters = (1..16).filter(|token| state.seen.letters >> token & 1 == 1);
            actions.extend(letters.map(|token| Action::Redrive { token }));
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = *state;
        self.apply(&mut next, action);
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        invariant::properties()
    }
}

impl Protocol {
    fn actions_of(&self, i: usize, state: &State, actions: &mut Vec<Action>) {
        let step = &state.workers[i].step;
        let waits_for_the_store = match step {
            Step::Idle => {
                let unsettled = (0..state.copies.len())
                    .filter(|&copy| matches!(state.copies[copy].place, Place::Ready | Place::Out));
                actions.extend(unsettled.map(|copy| Action::Deliver { worker: i, copy }));
                return;
            }
            Step::Claiming | Step::Asking(_) => {
                actions.extend([Action::Claim(i), Action::GiveBack(i)]);
                true
            }
            Step::Running(hold) => {
                self.endings_of_a_run(i, state, hold, actions);
                false
            }
            Step::Recording(..) => {
                actions.push(Action::Record(i));
                true
            }
            Step::Placing(_) => {
                actions.push(Action::PlaceLetter(i));
                false
            }
            Step::AckingPlaced(_) | Step::Acking(_) => {
                actions.push(Action::Ack(i));
                false
            }
        };
        if step.hold().is_some() {
            actions.push(Action::Renew(i));
        }
        if state.left.crashes > 0 {
            actions.push(Action::Crash(i));
        }
        if waits_for_the_store && state.left.timeouts > 0 && state.late.is_none() {
            actions.push(Action::GiveUpWaiting(i));
        }
        if state.left.lost_settles > 0 && matches!(step, Step::Placing(_) | Step::AckingPlaced(_) | Step::Acking(_)) {
            actions.push(Action::LoseSettle(i));
        }
    }

    /// A handler fails before its effect or not at all; in a transaction the effect comes with the commit.
    fn endings_of_a_run(&self, i: usize, state: &State, hold: &Hold, actions: &mut Vec<Action>) {
        if hold.effect != Effect::None {
            actions.push(Action::Succeed(i));
            return;
        }
        actions.push(if self.scenario.transactional { Action::Succeed(i) } else { Action::TakeEffect(i) });
        if self.scenario.retryable {
            actions.push(Action::Fail(i, Failure::Retryable));
        }
        if self.scenario.permanent {
            actions.push(Action::Fail(i, Failure::Permanent));
        }
        if state.left.uncounted > 0 {
            actions.push(Action::Fail(i, Failure::Uncounted));
        }
    }

    fn apply(&self, state: &mut State, action: Action) {
        match action {
            Action::Deliver { worker, copy } => {
                state.copies[copy].place = Place::Out;
                state.workers[worker].copy = copy as u8;
                state.workers[worker].step = Step::Claiming;
            }
            Action::Claim(i) => self.claim(state, i),
            Action::GiveBack(i) => self.give_back(state, i),
            Action::TakeEffect(i) => {
                if let Step::Running(hold) = &mut state.workers[i].step {
                    let live = hold.live;
                    hold.effect = if live { Effect::Done } else { Effect::Explained };
                    state.seen.effect(live, &self.scenario);
                }
            }
            Action::Succeed(i) => self.finish_run(state, i, Outcome::Processed),
            Action::Fail(i, failure) => self.fail(state, i, failure),
            Action::Record(i) => self.record(state, i),
            Action::PlaceLetter(i) => self.place_letter(state, i, true),
            Action::Ack(i) => self.ack(state, i, true),
            Action::Renew(i) => self.renew(state, i),
            Action::Crash(i) => self.crash(state, i),
            Action::GiveUpWaiting(i) => self.give_up_waiting(state, i),
            Action::LateRequestArrives => match state.late.take() {
                Some(Late::Claim { token, reopen }) => {
                    self.claim_in_store(state, token, reopen, None);
                }
                Some(Late::Record { fence, outcome }) => {
                    self.record_in_store(state, fence, outcome);
                }
                None => {}
            },
            Action::LoseSettle(i) => {
                state.left.lost_settles -= 1;
                match state.workers[i].step {
                    Step::Placing(_) => self.place_letter(state, i, false),
                    _ => self.ack(state, i, false),
                }
            }
            Action::LeaseExpires => state.expire_lease(),
            Action::RetryIsDue => {
                if let Some(record) = &mut state.record {
                    record.status = Status::Waiting { due: true };
                }
            }
            Action::Sweep => {
                state.seen.broken.mark(Invariant::SweepSafe, !self.retention_is_over(state));
                state.left.sweeps -= 1;
                state.record = None;
            }
            Action::Redrive { token } => {
                if let Some(free) = state.copies.iter().position(|copy| copy.place == Place::Nowhere) {
                    state.note_redrive(token);
                    state.copies[free] = Copy { place: Place::Ready, reopen: token };
                    state.left.redrives -= 1;
                }
            }
            Action::StoreForgets => {
                state.left.store_losses -= 1;
                state.record = None;
            }
        }
    }

    fn claim(&self, state: &mut State, i: usize) {
        let reopen = state.copies[usize::from(state.workers[i].copy)].reopen;
        match self.claim_in_store(state, Some(i as u8), reopen, Some(i)) {
            Claim::Granted(grant) => self.begin(state, i, &grant),
            Claim::Ended => state.end_try(i, Step::Acking(Grounds::Ended)),
            Claim::Held if self.variant == Variant::AckWhileHeld => state.end_try(i, Step::Acking(Grounds::Held)),
            // It waits here and claims again.
            Claim::Held | Claim::NotYet => {}
        }
    }

    fn claim_in_store(&self, state: &mut State, token: Option<u8>, reopen: u8, by: Option<usize>) -> Claim {
        let claim = store::claim(&mut state.record, state.seen.fence, token, reopen, self.variant);
        if let Claim::Granted(grant) = &claim {
            state.note_grant(grant, reopen, by);
        }
        claim
    }

    /// What a granted worker does first.
    fn begin(&self, state: &mut State, i: usize, grant: &Grant) {
        let hold = Hold { fence: grant.fence, attempt: grant.attempt, live: true, effect: Effect::None };
        let exhausted = grant.attempt > self.scenario.attempts_max || grant.crashes > self.scenario.crashes_max;
        let uncommitted = state.workers[i].step == Step::Asking(grant.fence);
        state.workers[i].step =
            if uncommitted && !matches!(self.variant, Variant::UnknownRunsAgain | Variant::RepeatCommits) {
                // Granted again, nothing was committed: the attempt has failed. With its end recorded, a commit that is
                // still on its way is fenced off.
                Step::Recording(Hold { attempt: 0, ..hold }, Outcome::Failed { counted: true })
            } else if matches!(grant.kind, Kind::Doomed { .. }) {
                Step::Placing(Hold { attempt: 0, ..hold })
            } else if exhausted {
                self.doom(hold)
            } else {
                state.note_start(&self.scenario);
                state.seen.processed |= self.variant == Variant::MarkFirst;
                Step::Running(hold)
            };
        // The answer is there: unless a commit may yet be unknown, nobody sends this token again.
        if !self.scenario.transactional
            && !matches!(state.late, Some(Late::Claim { token, .. }) if token == Some(i as u8))
        {
            state.forget_token_of(i);
        }
    }

    /// First `Doomed`, then the dead letter, then `DeadLettered`.
    fn doom(&self, hold: Hold) -> Step {
        let hold = Hold { attempt: 0, ..hold };
        match self.variant {
            Variant::LetterFirst => Step::Placing(hold),
            Variant::LetterLast => Step::Recording(hold, Outcome::DeadLettered),
            _ => Step::Recording(hold, Outcome::Doomed),
        }
    }

    fn fail(&self, state: &mut State, i: usize, failure: Failure) {
        let Step::Running(hold) = state.workers[i].step else { return };
        match failure {
            Failure::Uncounted => {
                state.left.uncounted -= 1;
                self.finish_run(state, i, Outcome::Failed { counted: false });
            }
            Failure::Retryable if hold.attempt < self.scenario.attempts_max => {
                self.finish_run(state, i, Outcome::Failed { counted: true });
            }
            Failure::Retryable | Failure::Permanent => state.workers[i].step = self.doom(hold),
        }
    }

    fn finish_run(&self, state: &mut State, i: usize, outcome: Outcome) {
        if let Step::Running(hold) = state.workers[i].step {
            state.workers[i].step = Step::Recording(Hold { attempt: 0, ..hold }, outcome);
        }
    }

    fn record(&self, state: &mut State, i: usize) {
        let Step::Recording(hold, outcome) = state.workers[i].step else { return };
        let recorded = self.record_in_store(state, hold.fence, outcome);
        match (recorded, outcome) {
            (Recorded::Fenced, Outcome::DeadLettered) if self.variant != Variant::LetterLast => state.become_idle(i),
            (Recorded::Fenced, _) => self.lose_lease(state, i),
            (_, Outcome::Processed) => state.end_try(i, Step::Acking(Grounds::Ended)),
            (_, Outcome::Failed { .. }) => state.end_try(i, Step::Claiming),
            (_, Outcome::Doomed) => state.workers[i].step = Step::Placing(hold),
            (_, Outcome::DeadLettered) if self.variant == Variant::LetterLast => {
                state.workers[i].step = Step::Placing(hold);
            }
            (_, Outcome::DeadLettered) => state.become_idle(i),
        }
    }

    fn record_in_store(&self, state: &mut State, fence: u8, outcome: Outcome) -> Recorded {
        let before = state.record;
        let recorded = store::record(&mut state.record, fence, outcome, self.variant);
        state.note_record(before.as_ref(), recorded, fence, outcome);
        let commits = match recorded {
            Recorded::Done | Recorded::Vanished => true,
            Recorded::AlreadyDone => self.variant == Variant::RepeatCommits,
            Recorded::Fenced => false,
        };
        if self.scenario.transactional && outcome == Outcome::Processed && commits {
            state.seen.effect(true, &self.scenario);
        }
        recorded
    }

    /// Fenced, or a renewal said lost: claim again, as if held by another.
    fn lose_lease(&self, state: &mut State, i: usize) {
        let step = match (self.variant, state.workers[i].step) {
            (Variant::FencedAcks, _) => Step::Acking(Grounds::Fenced),
            // Its delivery is settled already.
            (_, Step::Recording(_, Outcome::DeadLettered)) if self.variant != Variant::LetterLast => Step::Idle,
            (Variant::FencedDrops, _) => Step::Idle,
            _ => Step::Claiming,
        };
        if step == Step::Idle { state.become_idle(i) } else { state.end_try(i, step) }
    }

    fn place_letter(&self, state: &mut State, i: usize, answered: bool) {
        let Step::Placing(hold) = state.workers[i].step else { return };
        state.note_letter(hold.fence);
        if answered {
            state.workers[i].step = Step::AckingPlaced(hold);
        }
    }

    fn ack(&self, state: &mut State, i: usize, arrives: bool) {
        let copy = usize::from(state.workers[i].copy);
        if arrives {
            state.note_ack(i);
            state.copies[copy] = Copy { place: Place::Settled, reopen: 0 };
            if self.variant == Variant::DeleteOnAck {
                state.record = None;
            }
        } else if state.copies[copy].place == Place::Out {
            // The session ends some time, and the broker delivers again.
            state.copies[copy].place = Place::Ready;
        }
        match state.workers[i].step {
            Step::AckingPlaced(hold) if self.variant != Variant::LetterLast => {
                state.workers[i].step = Step::Recording(hold, Outcome::DeadLettered);
            }
            _ => state.become_idle(i),
        }
    }

    fn give_back(&self, state: &mut State, i: usize) {
        let copy = &mut state.copies[usize::from(state.workers[i].copy)];
        if copy.place == Place::Out {
            copy.place = Place::Ready;
        }
        state.become_idle(i);
    }

    fn renew(&self, state: &mut State, i: usize) {
        let Some(hold) = state.workers[i].step.hold() else { return };
        let before = state.record;
        if store::renew(&mut state.record, hold.fence, self.variant) {
            state.note_renewal(i, before.as_ref());
        } else {
            self.lose_lease(state, i);
        }
    }

    fn crash(&self, state: &mut State, i: usize) {
        state.left.crashes -= 1;
        if let Some(Hold { effect: Effect::Done, .. }) = state.workers[i].step.hold() {
            state.seen.effects -= 1;
        }
        self.give_back(state, i);
    }

    fn give_up_waiting(&self, state: &mut State, i: usize) {
        state.left.timeouts -= 1;
        match state.workers[i].step {
            Step::Claiming | Step::Asking(_) => {
                let reopen = state.copies[usize::from(state.workers[i].copy)].reopen;
                state.late = Some(Late::Claim { token: Some(i as u8), reopen });
            }
            Step::Recording(hold, outcome) => {
                state.late = Some(Late::Record { fence: hold.fence, outcome });
                if self.scenario.transactional && outcome == Outcome::Processed {
                    // The commit is unknown: claim again with the same token and see.
                    state.workers[i].step = Step::Asking(hold.fence);
                }
            }
            _ => {}
        }
    }
}
