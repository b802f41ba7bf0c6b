//! The record's state machine as pure functions: the executable specification of every store.
//!
//! The memory store runs these functions; every other store is checked against them with generated histories. Policy
//! (how many attempts, which delay) is not here: the runtime decides it from what a claim answers.
//!
//! ```text
//! absent ---claim---> Claimed ---Processed--> Processed ---sweep--> absent
//!                     | ^  ^  \--Doomed--> Doomed --DeadLettered--> DeadLettered --sweep--> absent
//!              Failed | |  |                 ^ |                       |
//!                     v |  +-- claim of an expired lease (crashes+1)   | claim with its reopen token
//!                   Waiting                  | +-- claim, expired: granted as doomed
//!                                            +-----+                   +--> Claimed (attempt 1)
//! ```

use std::num::NonZeroU64;
use std::time::Duration;

use crate::dead_letter::Reason;
use crate::store::{Claim, ClaimRequest, Fingerprint, History, Lease, Outcome, Recorded, Renewal, Status, Trouble};

/// An instant of the store's own clock: microseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(pub u64);

impl Moment {
    /// This much later; saturates.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(wait.as_micros()).unwrap_or(u64::MAX)))
    }

    /// From `earlier` until this; zero if it is not earlier.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// What a store keeps of one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where it stands.
    pub state: State,
    /// The data it was claimed with.
    pub fingerprint: Fingerprint,
    /// The last fence granted.
    pub fence: NonZeroU64,
    /// Attempts that count, the current one included.
    pub attempt: u32,
    /// Claims that ended without an outcome.
    pub crashes: u32,
    /// The token of the last granted claim.
    pub token: u128,
    /// When it was first claimed, or reopened.
    pub first: Moment,
    /// The last trouble.
    pub trouble: Option<Box<Trouble>>,
}

/// Where a record stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Held until then.
    Claimed {
        /// The lease's end.
        until: Moment,
    },
    /// Failed; the next attempt is due then.
    Waiting {
        /// When it may be claimed.
        until: Moment,
    },
    /// To be dead-lettered by its holder until then, by another afterwards.
    Doomed {
        /// The lease's end.
        until: Moment,
        /// Why.
        reason: Reason,
        /// The fence under which it was doomed: each holder from then on may have placed a dead letter.
        since: NonZeroU64,
    },
    /// Done.
    Processed {
        /// When.
        at: Moment,
    },
    /// Set aside.
    DeadLettered {
        /// When.
        at: Moment,
        /// Why.
        reason: Reason,
        /// The fence under which it was doomed: the tokens from there to the last fence reopen it.
        since: NonZeroU64,
    },
}

impl Record {
    /// The status for operators.
    pub fn status(&self) -> Status {
        match self.state {
            State::Claimed { .. } => Status::Claimed,
            State::Waiting { .. } => Status::Waiting,
            State::Doomed { .. } => Status::Doomed,
            State::Processed { .. } => Status::Processed,
            State::DeadLettered { .. } => Status::DeadLettered,
        }
    }

    /// Whether a sweep may remove it: terminal (doomed counts as that) and older than `retention`.
    pub fn is_swept(&self, retention: Duration, now: Moment) -> bool {
        match self.state {
            State::Processed { at } | State::DeadLettered { at, .. } | State::Doomed { until: at, .. } => {
                at.after(retention) <= now
            }
            State::Claimed { .. } | State::Waiting { .. } => false,
        }
    }

    fn lease(&self, request: &ClaimRequest) -> Lease {
        Lease { consumer: request.consumer, key: request.key, fence: self.fence, attempt: self.attempt }
    }

    fn history(&self, now: Moment) -> Option<Box<History>> {
        let doomed = match self.state {
            State::Doomed { reason, .. } => Some(reason),
            _ => None,
        };
        let trouble = self.trouble.as_deref().cloned().unwrap_or_default();
        Some(Box::new(History { crashes: self.crashes, first: now.since(self.first), trouble, doomed }))
    }

    /// Whether this is a dead letter of this very event that came back. A holder that died after it placed its dead letter
    /// is followed by another that places one too: any of their tokens opens it, and opening uses all of them up.
    fn reopens(&self, request: &ClaimRequest, now: Moment) -> bool {
        let since = match self.state {
            State::DeadLettered { since, .. } => since,
            // Its dead letter exists, since it came back; only the last record was not written.
            State::Doomed { until, since, .. } if until <= now => since,
            _ => return false,
        };
        request.reopen.is_some_and(|token| (since..=self.fence).contains(&token))
    }
}

/// The fence after `last`: grows with every grant, and with the clock, so that it grows over forgotten records too.
pub fn next_fence(last: Option<NonZeroU64>, now: Moment) -> NonZeroU64 {
    let floor = NonZeroU64::new(now.0).unwrap_or(NonZeroU64::MIN);
    last.map_or(floor, |last| last.saturating_add(1).max(floor))
}

/// Answers a claim and changes the record accordingly. `None` is an event that was never seen or is forgotten.
pub fn claim(slot: &mut Option<Record>, request: &ClaimRequest, lease: Duration, now: Moment) -> Claim {
    let until = now.after(lease);
    let Some(record) = slot.as_mut().filter(|record| !record.reopens(request, now)) else {
        let fence = next_fence(slot.as_ref().map(|record| record.fence), now);
        let record = slot.insert(Record {
            state: State::Claimed { until },
            fingerprint: request.fingerprint,
            fence,
            attempt: 1,
            crashes: 0,
            token: request.token,
            first: now,
            trouble: None,
        });
        return Claim::Granted(record.lease(request), None);
    };
    if !record.fingerprint.agrees(request.fingerprint) {
        return Claim::Conflict;
    }
    match &mut record.state {
        State::Processed { at } => Claim::Processed { ago: now.since(*at) },
        State::DeadLettered { at, .. } => Claim::DeadLettered { ago: now.since(*at) },
        // The answer to this very claim was lost: the same grant again.
        State::Claimed { until: end } | State::Doomed { until: end, .. } if record.token == request.token => {
            *end = until.max(*end);
            Claim::Granted(record.lease(request), record.history(now).filter(|_| record.had_history()))
        }
        State::Claimed { until: end } | State::Doomed { until: end, .. } if *end > now => {
            Claim::Held { wait: end.since(now) }
        }
        State::Waiting { until: due } if *due > now => Claim::NotYet { wait: due.since(now) },
        State::Claimed { until: end } => {
            *end = until;
            record.attempt += 1;
            record.crashes += 1;
            record.grant(request, now)
        }
        State::Waiting { .. } => {
            record.state = State::Claimed { until };
            record.attempt += 1;
            record.grant(request, now)
        }
        State::Doomed { until: end, .. } => {
            *end = until;
            record.grant(request, now)
        }
    }
}

impl Record {
    fn grant(&mut self, request: &ClaimRequest, now: Moment) -> Claim {
        self.fence = next_fence(Some(self.fence), now);
        self.token = request.token;
        Claim::Granted(self.lease(request), self.history(now))
    }

    fn had_history(&self) -> bool {
        self.attempt > 1 || self.crashes > 0 || self.trouble.is_some()
    }
}

/// Answers a renewal: only the fence that holds the event, and never to an earlier end.
pub fn renew(slot: &mut Option<Record>, held: &Lease, lease: Duration, now: Moment) -> Renewal {
    match slot {
        Some(record) if record.fence == held.fence => match &mut record.state {
            State::Claimed { until } | State::Doomed { until, .. } => {
                *until = now.after(lease).max(*until);
                Renewal::Renewed
            }
            _ => Renewal::Lost,
        },
        _ => Renewal::Lost,
    }
}

/// Answers a record: compare-and-set on the fence.
pub fn record(slot: &mut Option<Record>, held: &Lease, outcome: &Outcome, now: Moment) -> Recorded {
    let Some(record) = slot else {
        *slot = anew(held, outcome, now);
        return Recorded::Vanished;
    };
    if record.fence != held.fence {
        return Recorded::Fenced;
    }
    match (record.state, outcome) {
        (State::Claimed { .. }, Outcome::Processed) => {
            record.state = State::Processed { at: now };
            record.trouble = None;
            Recorded::Done
        }
        (State::Claimed { .. }, Outcome::Failed { after, counted, trouble }) => {
            record.state = State::Waiting { until: now.after(*after) };
            record.attempt -= u32::from(!*counted);
            record.trouble = Some(Box::new(trouble.clone()));
            Recorded::Done
        }
        (State::Claimed { until }, Outcome::Doomed { reason, trouble }) => {
            record.state = State::Doomed { until, reason: *reason, since: record.fence };
            record.trouble = Some(Box::new(trouble.clone()));
            Recorded::Done
        }
        (State::Doomed { reason, since, .. }, Outcome::DeadLettered) => {
            record.state = State::DeadLettered { at: now, reason, since };
            Recorded::Done
        }
        (State::Processed { .. }, Outcome::Processed)
        | (State::Waiting { .. }, Outcome::Failed { .. })
        | (State::Doomed { .. } | State::DeadLettered { .. }, Outcome::Doomed { .. })
        | (State::DeadLettered { .. }, Outcome::DeadLettered) => Recorded::AlreadyDone,
        _ => Recorded::Fenced,
    }
}

/// What is written for an outcome whose record has vanished: what ended stays ended; what failed starts afresh.
fn anew(held: &Lease, outcome: &Outcome, now: Moment) -> Option<Record> {
    let (state, trouble) = match outcome {
        Outcome::Processed => (State::Processed { at: now }, None),
        Outcome::Failed { .. } => return None,
        Outcome::Doomed { reason, trouble } => {
            (State::Doomed { until: now, reason: *reason, since: held.fence }, Some(Box::new(trouble.clone())))
        }
        Outcome::DeadLettered => (State::DeadLettered { at: now, reason: Reason::Permanent, since: held.fence }, None),
    };
    Some(Record {
        state,
        fingerprint: Fingerprint::ANY,
        fence: held.fence,
        attempt: held.attempt,
        crashes: 0,
        token: 0,
        first: now,
        trouble,
    })
}
