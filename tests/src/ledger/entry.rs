//! One line of a history: when, who, what.

use std::fmt;
use std::time::Duration;

use hapax::{Claim, ErrorKind, EventKey, Fingerprint, Outcome, Receipt, Recorded, Renewal, Settlement};
use serde::{Serialize, Serializer};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Since the history began, by tokio's clock.
    #[serde(rename = "at_us", serialize_with = "as_micros")]
    pub at: Duration,
    /// Who.
    pub worker: u32,
    /// In which of its lives, from 0.
    pub incarnation: u32,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

impl Entry {
    /// A line, for histories made by hand.
    pub fn new(at: Duration, worker: u32, what: What) -> Self {
        Self { at, worker, incarnation: 0, what }
    }

    pub(super) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("numbers and texts have a JSON form")
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, worker, incarnation, what } = self;
        write!(f, "{:>12.6} s  worker {worker}.{incarnation}  {what:?}", at.as_secs_f64())
    }
}

/// What a line can tell. `asked` is when the call began whose answer the line is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum What {
    /// The broker accepted an event for a consumer (the scope).
    Produced {
        /// The consumer's name.
        scope: Box<str>,
        /// The event, the same word for every consumer.
        event: Box<str>,
        /// The event for this consumer.
        #[serde(serialize_with = "as_hex")]
        key: EventKey,
    },
    /// A delivery arrived.
    Delivered {
        /// Which event.
        #[serde(serialize_with = "as_hex")]
        key: EventKey,
        /// Its receipt.
        #[serde(serialize_with = "as_text")]
        receipt: Receipt,
        /// Its data.
        #[serde(serialize_with = "as_text")]
        fingerprint: Fingerprint,
        /// Its ordering key.
        lane: Option<Box<str>>,
    },
    /// A claim begins.
    ClaimAsked {
        /// Which event.
        #[serde(serialize_with = "as_hex")]
        key: EventKey,
        /// The claim's token.
        #[serde(serialize_with = "as_text")]
        token: u128,
        /// Whether it bears a reopen token.
        reopen: bool,
    },
    /// A claim was answered.
    Claimed {
        /// Which event.
        #[serde(serialize_with = "as_hex")]
        key: EventKey,
        /// When it was asked.
        #[serde(rename = "asked_us", serialize_with = "as_micros")]
        asked: Duration,
        /// The claim's token.
        #[serde(serialize_with = "as_text")]
        token: u128,
        /// The data it was asked with.
        #[serde(serialize_with = "as_text")]
        fingerprint: Fingerprint,
        /// Whether it bore a reopen token.
        reopen: bool,
        /// For how long.
        #[serde(rename = "lease_us", serialize_with = "as_micros")]
        lease: Duration,
        /// What the store said.
        answer: Answer,
    },
    /// A handler was started.
    Started {
        /// Which event.
        #[serde(serialize_with = "as_hex")]
        key: EventKey,
        /// Which attempt.
        attempt: u32,
        /// Under which fence.
        fence: u64,
        /// The key it was given for its callees.
        idempotency_key: Box<str>,
    },
    /// A handler's effect took place.
    Effect {
        /// Which event.
        #[serde(serialize_with = "as_hex")]
        key: EventKey,
        /// In which attempt.
        attempt: u32,
        /// Under which fence.
        fence: u64,
    },
    /// A handler returned.
    Returned {
        /// Which event.
        #[serde(serialize_with = "as_hex")]
        key: EventKey,
        /// Under which fence.
        fence: u64,
        /// Whether with success.
        ok: bool,
    },
    /// A record begins.
    RecordAsked {
        /// Which event.
        #[serde(serialize_with = "as_hex")]
        key: EventKey,
        /// Under which fence.
        fence: u64,
        /// The outcome.
        outcome: Ending,
    },
    /// A record was answered.
    Recorded {
        /// Which event.
        #[serde(serialize_with = "as_hex")]
        key: EventKey,
        /// When it was asked.
        #[serde(rename = "asked_us", serialize_with = "as_micros")]
        asked: Duration,
        /// Under which fence.
        fence: u64,
        /// The outcome.
        outcome: Ending,
        /// What the store said.
        answer: Recording,
    },
    /// A renewal was answered.
    Renewed {
        /// Which event.
        #[serde(serialize_with = "as_hex")]
        key: EventKey,
        /// When it was asked.
        #[serde(rename = "asked_us", serialize_with = "as_micros")]
        asked: Duration,
        /// Under which fence.
        fence: u64,
        /// For how long.
        #[serde(rename = "lease_us", serialize_with = "as_micros")]
        lease: Duration,
        /// What the store said.
        answer: Renewing,
    },
    /// A settlement begins.
    SettleAsked {
        /// Which event, where the delivery was seen.
        #[serde(serialize_with = "as_maybe_hex")]
        key: Option<EventKey>,
        /// Its receipt.
        #[serde(serialize_with = "as_text")]
        receipt: Receipt,
        /// How.
        settlement: Settling,
    },
    /// A settlement was answered.
    Settled {
        /// Which event, where the delivery was seen.
        #[serde(serialize_with = "as_maybe_hex")]
        key: Option<EventKey>,
        /// Its receipt.
        #[serde(serialize_with = "as_text")]
        receipt: Receipt,
        /// How.
        settlement: Settling,
        /// Whether it was done.
        ok: bool,
    },
    /// A dead letter was found at the broker.
    DeadLetterPlaced {
        /// Which event.
        #[serde(serialize_with = "as_hex")]
        key: EventKey,
        /// Its reason, as the header says it.
        reason: Box<str>,
        /// Its attempts, as the header says them.
        attempts: u32,
        /// Whether bytes and headers are those that were sent.
        intact: bool,
    },
    /// The store lost this record, or was made to forget it.
    Forgotten {
        /// Which event.
        #[serde(serialize_with = "as_hex")]
        key: EventKey,
    },
    /// This worker died.
    Crashed,
    /// This worker stands still while time passes.
    Paused,
    /// It goes on.
    Resumed,
    /// A clock was set.
    ClockStepped,
    /// A fault begins.
    Fault {
        /// Its name.
        name: &'static str,
    },
    /// All faults are over: from here on everything must come to an end.
    Healed,
}

impl What {
    /// The event it is about, if it is about one.
    pub fn key(&self) -> Option<EventKey> {
        match self {
            Self::Produced { key, .. }
            | Self::Delivered { key, .. }
            | Self::ClaimAsked { key, .. }
            | Self::Claimed { key, .. }
            | Self::Started { key, .. }
            | Self::Effect { key, .. }
            | Self::Returned { key, .. }
            | Self::RecordAsked { key, .. }
            | Self::Recorded { key, .. }
            | Self::Renewed { key, .. }
            | Self::DeadLetterPlaced { key, .. }
            | Self::Forgotten { key } => Some(*key),
            Self::SettleAsked { key, .. } | Self::Settled { key, .. } => *key,
            Self::Crashed | Self::Paused | Self::Resumed | Self::ClockStepped | Self::Fault { .. } | Self::Healed => {
                None
            }
        }
    }

    /// Whether this line says that the event has ended for good, and how.
    pub(crate) fn terminal(&self) -> Option<Terminal> {
        match self {
            Self::Recorded { outcome, answer, .. } if answer.is_written() => match outcome {
                Ending::Processed => Some(Terminal::Processed),
                Ending::DeadLettered => Some(Terminal::DeadLettered),
                Ending::Failed { .. } | Ending::Doomed => None,
            },
            Self::Claimed { answer: Answer::Processed, .. } => Some(Terminal::Processed),
            Self::Claimed { answer: Answer::DeadLettered, .. } => Some(Terminal::DeadLettered),
            _ => None,
        }
    }

    /// Whether the event's life begins anew here, for sure or perhaps: what was known of it no longer counts.
    pub(crate) fn begins_anew(&self) -> bool {
        matches!(
            self,
            Self::Forgotten { .. }
                | Self::Claimed { reopen: true, answer: Answer::Granted { attempt: 1, .. } | Answer::Unknown, .. }
        )
    }
}

/// How an event ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Terminal {
    Processed,
    DeadLettered,
}

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

fn as_micros<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX))
}

fn as_hex<S: Serializer>(key: &EventKey, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&key.to_hex())
}

fn as_maybe_hex<S: Serializer>(key: &Option<EventKey>, to: S) -> Result<S::Ok, S::Error> {
    key.map(EventKey::to_hex).serialize(to)
}

fn as_text<T: fmt::Debug, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{value:?}"))
}
