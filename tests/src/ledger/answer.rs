//! What stores and brokers answered, without texts: as a history keeps it.

use std::time::Duration;

use hapax::{Claim, ErrorKind, Outcome, Recorded, Renewal, Settlement};
use serde::Serialize;

use super::entry::as_micros;

/// The answer to a claim, or that there was none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// A lease.
    Granted {
        /// Its fence.
        fence: u64,
        /// Its attempt.
        attempt: u32,
        /// Crashes so far.
        crashes: u32,
        /// Whether the event was doomed before.
        doomed: bool,
    },
    /// It was processed.
    Processed,
    /// It was dead-lettered.
    DeadLettered,
    /// Another holds it.
    Held,
    /// It is not due.
    NotYet,
    /// It is known with other data.
    Conflict,
    /// No answer: whether it took place is unknown.
    Unknown,
    /// An error that says that nothing was done.
    Refused,
}

impl Answer {
    pub(super) fn of(claim: &Claim) -> Self {
        match claim {
            Claim::Granted(lease, history) => Self::Granted {
                fence: lease.fence.get(),
                attempt: lease.attempt,
                crashes: history.as_ref().map_or(0, |history| history.crashes),
                doomed: history.as_ref().is_some_and(|history| history.doomed.is_some()),
            },
            Claim::Processed { .. } => Self::Processed,
            Claim::DeadLettered { .. } => Self::DeadLettered,
            Claim::Held { .. } => Self::Held,
            Claim::NotYet { .. } => Self::NotYet,
            Claim::Conflict => Self::Conflict,
        }
    }
}

/// Whether an error leaves it open that the call took place.
pub(super) fn leaves_open(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Unknown | ErrorKind::Unavailable)
}

/// An outcome, without its texts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The effect took place.
    Processed,
    /// It did not.
    Failed {
        /// Not before this long.
        #[serde(rename = "after_us", serialize_with = "as_micros")]
        after: Duration,
        /// Whether it uses up an attempt.
        counted: bool,
    },
    /// It never will.
    Doomed,
    /// The dead letter is placed.
    DeadLettered,
}

impl From<&Outcome> for Ending {
    fn from(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Processed => Self::Processed,
            Outcome::Failed { after, counted, .. } => Self::Failed { after: *after, counted: *counted },
            Outcome::Doomed { .. } => Self::Doomed,
            Outcome::DeadLettered => Self::DeadLettered,
        }
    }
}

/// The answer to a record, or that there was none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Recording {
    /// Written now.
    Done,
    /// Written before.
    AlreadyDone,
    /// There was no record any more.
    Vanished,
    /// Another holds it, or has ended it.
    Fenced,
    /// No answer: whether it took place is unknown.
    Unknown,
    /// An error that says that nothing was done.
    Refused,
}

impl Recording {
    /// Whether the store has the outcome.
    pub fn is_written(self) -> bool {
        matches!(self, Self::Done | Self::AlreadyDone | Self::Vanished)
    }
}

impl From<Recorded> for Recording {
    fn from(recorded: Recorded) -> Self {
        match recorded {
            Recorded::Done => Self::Done,
            Recorded::AlreadyDone => Self::AlreadyDone,
            Recorded::Vanished => Self::Vanished,
            Recorded::Fenced => Self::Fenced,
        }
    }
}

/// The answer to a renewal, or that there was none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Renewing {
    /// The lease lasts.
    Renewed,
    /// It is another's, or ended.
    Lost,
    /// No answer.
    Unknown,
}

impl From<Renewal> for Renewing {
    fn from(renewal: Renewal) -> Self {
        match renewal {
            Renewal::Renewed => Self::Renewed,
            Renewal::Lost => Self::Lost,
        }
    }
}

/// A settlement, without its texts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Settling {
    /// Done.
    Ack,
    /// Given back.
    Release,
    /// Later.
    Retry {
        /// Not before this long.
        #[serde(rename = "after_us", serialize_with = "as_micros")]
        after: Duration,
    },
    /// Set aside.
    DeadLetter {
        /// Why.
        reason: &'static str,
    },
}

impl From<&Settlement> for Settling {
    fn from(settlement: &Settlement) -> Self {
        match settlement {
            Settlement::Ack => Self::Ack,
            Settlement::Release { .. } => Self::Release,
            Settlement::Retry { after } => Self::Retry { after: *after },
            Settlement::DeadLetter(letter) => Self::DeadLetter { reason: letter.reason.as_str() },
        }
    }
}
