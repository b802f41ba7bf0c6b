//! One line of a history: when, who, what.

use std::fmt;
use std::time::Duration;

use hapax::{EventKey, Fingerprint, Receipt};
use serde::{Serialize, Serializer};

use super::answer::{Answer, Ending, Recording, Renewing, Settling};

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
}

/// How an event ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Terminal {
    Processed,
    DeadLettered,
}

pub(super) fn as_micros<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
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
