//! What the model's world consists of: one event, its copies at the broker, the store's record, the workers, requests
//! that are still on their way, and a witness who remembers what really happened.

use crate::invariant::Broken;
use crate::scenario::Faults;

/// Room for workers; a scenario says how many work.
pub(crate) const WORKERS_MAX: usize = 3;
/// Room for copies: the ones the broker holds at first, and those an operator sends back.
pub(crate) const COPIES_MAX: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) record: Option<Record>,
    pub(crate) workers: [Worker; WORKERS_MAX],
    pub(crate) copies: [Copy; COPIES_MAX],
    pub(crate) late: Option<Late>,
    pub(crate) left: Faults,
    pub(crate) seen: Witness,
}

/// The store's record of the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Record {
    pub(crate) status: Status,
    pub(crate) fence: u8,
    pub(crate) attempt: u8,
    pub(crate) crashes: u8,
    /// The worker that may still send the token of this grant. Tokens are unique, so only that question matters.
    pub(crate) token: Option<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Status {
    Claimed {
        expired: bool,
    },
    Waiting {
        due: bool,
    },
    /// Dead letters with tokens from `since` to the record's fence reopen the event; so below.
    Doomed {
        expired: bool,
        since: u8,
    },
    Processed,
    DeadLettered {
        since: u8,
    },
}

/// One copy of the message at the broker. `reopen` is the token it bears as a dead letter sent back, 0 without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Copy {
    pub(crate) place: Place,
    pub(crate) reopen: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    Nowhere,
    /// Will be delivered.
    Ready,
    /// Delivered and not settled: comes back if its worker dies or gives it back, and may come back at any time.
    Out,
    Settled,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Worker {
    pub(crate) copy: u8,
    pub(crate) step: Step,
}

/// Where a worker stands in the life of a delivery (design.md section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    Idle,
    Claiming,
    /// Claims again with the same token, since the commit of the lease with this fence is unknown.
    Asking(u8),
    Running(Hold),
    Recording(Hold, Outcome),
    /// About to place the dead letter.
    Placing(Hold),
    /// The dead letter is placed, the delivery not yet acked.
    AckingPlaced(Hold),
    Acking(Grounds),
}

/// What a worker knows of the lease it was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Hold {
    pub(crate) fence: u8,
    pub(crate) attempt: u8,
    /// Its deadline has not passed since the last grant or renewal.
    pub(crate) live: bool,
    pub(crate) effect: Effect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Effect {
    None,
    Done,
    /// Done, and a declared window explains why it may be done again.
    Explained,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    Processed,
    Failed { counted: bool },
    Doomed,
    DeadLettered,
}

/// Why a worker acks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Grounds {
    /// The store said, or was told, that the event has ended.
    Ended,
    /// The store said that the lease is lost: only wrong variants ack then.
    Fenced,
    /// The store said that another holds the event: only wrong variants ack then.
    Held,
}

/// A request to the store whose sender stopped waiting: it takes place at any later moment, or never, and nobody gets
/// the answer. An answer that was lost is one that takes place at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Late {
    Claim { token: Option<u8>, reopen: u8 },
    Record { fence: u8, outcome: Outcome },
}

/// What an observer outside knows. A *life* of the event begins with its first claim and with each reopening by an
/// operator; counts are of the current life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Witness {
    /// The highest fence ever granted.
    pub(crate) fence: u8,
    /// The fence with which the current life began.
    pub(crate) life_since: u8,
    /// Grants to run, less those given back by uncounted failures.
    pub(crate) counted: u8,
    /// Grants over a lease that ended without an outcome.
    pub(crate) takeovers: u8,
    /// Handler starts, less those whose failure was not counted.
    pub(crate) starts: i8,
    /// Effects, less those that a declared window or a reopening explains; more than one is a fault.
    pub(crate) effects: i8,
    pub(crate) effected: bool,
    pub(crate) processed: bool,
    pub(crate) placed: bool,
    /// Bit `f`: a dead letter with reopen token `f` has been placed, in any life.
    pub(crate) letters: u16,
    /// Bit `f`: token `f` has reopened the event.
    pub(crate) spent: u16,
    /// A dead letter was sent back, and no handler has started since.
    pub(crate) redriven: bool,
    /// It was the last holder's letter, with nobody left to overtake it.
    pub(crate) redriven_by_the_book: bool,
    pub(crate) broken: Broken,
}

impl State {
    /// One event, never seen, `copies` of it at the broker.
    pub(crate) fn first(copies: usize, faults: Faults) -> Self {
        let mut places = [Copy { place: Place::Nowhere, reopen: 0 }; COPIES_MAX];
        for copy in &mut places[..copies] {
            copy.place = Place::Ready;
        }
        Self {
            record: None,
            workers: [Worker { copy: 0, step: Step::Idle }; WORKERS_MAX],
            copies: places,
            late: None,
            left: faults,
            seen: Witness {
                fence: 0,
                life_since: 0,
                counted: 0,
                takeovers: 0,
                starts: 0,
                effects: 0,
                effected: false,
                processed: false,
                placed: false,
                letters: 0,
                spent: 0,
                redriven: false,
                redriven_by_the_book: false,
                broken: Broken::default(),
            },
        }
    }

    /// Whether some worker believes that it holds the lease with this fence, or held it.
    pub(crate) fn is_held_by_a_worker(&self, fence: u8) -> bool {
        self.workers.iter().any(|worker| worker.step.hold().is_some_and(|hold| hold.fence == fence))
    }

    /// The store's clock passes the lease's deadline. Its holder, if it lives, was paused.
    pub(crate) fn expire_lease(&mut self) {
        let Some(record) = &mut self.record else { return };
        match &mut record.status {
            Status::Claimed { expired } | Status::Doomed { expired, .. } => *expired = true,
            Status::Waiting { .. } | Status::Processed | Status::DeadLettered { .. } => return,
        }
        let fence = record.fence;
        self.left.pauses -= u8::from(self.is_held_by_a_worker(fence) && self.left.pauses > 0);
        for worker in &mut self.workers {
            if let Some(hold) = worker.step.hold_mut().filter(|hold| hold.fence == fence) {
                hold.live = false;
                if hold.effect == Effect::Done {
                    hold.effect = Effect::Explained;
                    self.seen.effects -= 1;
                }
            }
        }
    }

    /// The worker ends this try: what follows has another token.
    pub(crate) fn end_try(&mut self, i: usize, step: Step) {
        self.workers[i].step = step;
        self.forget_token_of(i);
    }

    pub(crate) fn become_idle(&mut self, i: usize) {
        self.workers[i].copy = 0;
        self.end_try(i, Step::Idle);
    }

    /// Nobody will send this worker's last token again.
    pub(crate) fn forget_token_of(&mut self, i: usize) {
        let mine = Some(i as u8);
        if let Some(record) = self.record.as_mut().filter(|record| record.token == mine) {
            record.token = None;
        }
        if let Some(Late::Claim { token, .. }) = self.late.as_mut().filter(|late| late.token() == mine) {
            *token = None;
        }
    }

    /// Nobody works, and the broker has nothing left.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.workers.iter().all(|worker| worker.step == Step::Idle)
            && self.copies.iter().all(|copy| matches!(copy.place, Place::Nowhere | Place::Settled))
    }
}

impl Record {
    /// The fence of a lease that has not expired.
    pub(crate) fn live_fence(&self) -> Option<u8> {
        match self.status {
            Status::Claimed { expired: false } | Status::Doomed { expired: false, .. } => Some(self.fence),
            _ => None,
        }
    }

    pub(crate) fn is_terminal(&self) -> bool {
        matches!(self.status, Status::Processed | Status::DeadLettered { .. })
    }
}

impl Late {
    fn token(&self) -> Option<u8> {
        match *self {
            Self::Claim { token, .. } => token,
            Self::Record { .. } => None,
        }
    }
}

impl Step {
    pub(crate) fn hold(&self) -> Option<&Hold> {
        match self {
            Self::Running(hold) | Self::Recording(hold, _) | Self::Placing(hold) | Self::AckingPlaced(hold) => {
                Some(hold)
            }
            Self::Idle | Self::Claiming | Self::Asking(_) | Self::Acking(_) => None,
        }
    }

    pub(crate) fn hold_mut(&mut self) -> Option<&mut Hold> {
        match self {
            Self::Running(hold) | Self::Recording(hold, _) | Self::Placing(hold) | Self::AckingPlaced(hold) => {
                Some(hold)
            }
            Self::Idle | Self::Claiming | Self::Asking(_) | Self::Acking(_) => None,
        }
    }
}
