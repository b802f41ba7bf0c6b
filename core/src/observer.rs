//! What happened, as a closed list, and who is told: metrics and tracing by default.
//!
//! Observers compose: a pair, a vector, an `Arc` and a closure are observers too.

use std::sync::Arc;
use std::time::Duration;

use crate::dead_letter::Reason;

mod log;
mod metrics;
#[cfg(test)]
mod tests;

pub use metrics::{ROUTES_MAX, describe};

/// Is told what happens in a consumer, in the middle of it: must be quick and never block.
///
/// ```
/// use std::sync::Arc;
/// use hapax::{Observed, Observer, Telemetry};
///
/// let alarm = |what: &Observed<'_>| {
///     if let Observed::Switch { open: true } = what {
///         // ring somebody
///     }
/// };
/// let both: Arc<dyn Observer> = Arc::new((Telemetry::new("billing"), alarm));
/// ```
pub trait Observer: Send + Sync + 'static {
    /// Something happened.
    fn observe(&self, what: &Observed<'_>);
}

impl<F: Fn(&Observed<'_>) + Send + Sync + 'static> Observer for F {
    fn observe(&self, what: &Observed<'_>) {
        self(what);
    }
}

/// Tells nobody.
impl Observer for () {
    fn observe(&self, _: &Observed<'_>) {}
}

/// Tells the first, then the second.
impl<A: Observer, B: Observer> Observer for (A, B) {
    fn observe(&self, what: &Observed<'_>) {
        self.0.observe(what);
        self.1.observe(what);
    }
}

/// Tells all, in order.
impl Observer for Vec<Arc<dyn Observer>> {
    fn observe(&self, what: &Observed<'_>) {
        for observer in self {
            observer.observe(what);
        }
    }
}

impl<O: Observer + ?Sized> Observer for Arc<O> {
    fn observe(&self, what: &Observed<'_>) {
        (**self).observe(what);
    }
}

/// The observer that a consumer has by default: metrics through the `metrics` facade and a few log lines through
/// `tracing`.
///
/// A metric's handle is looked up once and then held. The recorder of the `metrics` facade must therefore be installed
/// *before* the consumer is built: handles that were made without one stay silent for ever, and cost next to nothing.
/// The names are in [`describe`] and docs/metrics.md. Labels come from closed lists, the consumer's name and the types
/// that have a handler; ids and error texts are only in logs.
///
/// Logged at target `hapax`: dead letters, conflicts, lost leases, refused and vanished records, the kill switch and lost
/// connections as warnings, a connection that is back as information. An event that succeeds logs nothing.
#[derive(Debug)]
pub struct Telemetry {
    consumer: Box<str>,
    instruments: metrics::Instruments,
}

impl Telemetry {
    /// For the consumer of this name, with the recorder that is installed now.
    pub fn new(consumer: &str) -> Self {
        Self { consumer: consumer.into(), instruments: metrics::Instruments::new(consumer) }
    }
}

impl Observer for Telemetry {
    fn observe(&self, what: &Observed<'_>) {
        self.instruments.observe(what);
        log::log(&self.consumer, what);
    }
}

/// Everything that a consumer tells.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Observed<'a> {
    /// Deliveries arrived.
    Received {
        /// How many.
        events: usize,
        /// Their bytes.
        bytes: usize,
    },
    /// A delivery without a handler was acked by rule.
    Ignored,
    /// A batched call to store or broker returned.
    Called {
        /// Which verb.
        verb: Verb,
        /// How many items.
        batch: usize,
        /// How long it took.
        took: Duration,
        /// Whether it succeeded.
        ok: bool,
    },
    /// A claim was granted after another's lease had ended.
    TakenOver,
    /// A delivery was a duplicate and was acked, or waits for another that runs.
    Duplicate {
        /// What it is a duplicate of.
        of: Duplicate,
        /// How long ago that ended.
        ago: Option<Duration>,
    },
    /// A delivery waits for an event that another holds, or whose next attempt is not due.
    Waiting {
        /// At most so long, unless the other renews its lease.
        wait: Duration,
    },
    /// A handler returned.
    Handled {
        /// The route's type, or `*`.
        route: &'static str,
        /// How it ended.
        end: HandlerEnd,
        /// How long it took.
        took: Duration,
    },
    /// An event will be tried again.
    Retried {
        /// Not before.
        after: Duration,
        /// Whether an attempt was used up.
        counted: bool,
    },
    /// An event was set aside.
    DeadLettered {
        /// Why.
        reason: Reason,
        /// The event's id, for logs, never for labels.
        id: &'a str,
        /// The error, cut.
        error: &'a str,
    },
    /// A lease could not be renewed in time, or another took it.
    LeaseLost,
    /// A write of ours was refused, since another holds the event.
    Fenced,
    /// A record had vanished when its outcome was to be written.
    Vanished,
    /// An id came with other data.
    Conflict,
    /// What is unsettled now.
    InFlight {
        /// Deliveries.
        events: usize,
        /// Bytes.
        bytes: usize,
    },
    /// Messages that wait at the broker.
    Lag {
        /// How many.
        messages: u64,
    },
    /// Store or broker became reachable or unreachable.
    Reach {
        /// Which.
        side: Side,
        /// Whether it can be reached.
        up: bool,
        /// Why not, for logs.
        error: &'a str,
    },
    /// A batch of events failed as a whole: each of them runs alone now.
    BatchFailed {
        /// The route's type.
        route: &'static str,
        /// How many events it was.
        events: usize,
        /// Why, cut and redacted.
        error: &'a str,
    },
    /// The kill switch opened (intake pauses) or closed.
    Switch {
        /// Whether intake pauses.
        open: bool,
    },
}

/// The verbs of the contracts that are called in batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Store: claim.
    Claim,
    /// Store: renew.
    Renew,
    /// Store: record.
    Record,
    /// Broker: settle.
    Settle,
    /// Publisher: publish.
    Publish,
}

impl Verb {
    pub(crate) const ALL: [Self; 5] = [Self::Claim, Self::Renew, Self::Record, Self::Settle, Self::Publish];

    /// As a lower-case word: the value of metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Renew => "renew",
            Self::Record => "record",
            Self::Settle => "settle",
            Self::Publish => "publish",
        }
    }
}

/// What a duplicate is a duplicate of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Duplicate {
    /// Of a processed event.
    Processed,
    /// Of a dead letter.
    DeadLettered,
    /// Of an event that is held.
    Held,
}

impl Duplicate {
    pub(crate) const ALL: [Self; 3] = [Self::Processed, Self::DeadLettered, Self::Held];

    /// As a lower-case word: the value of metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Processed => "processed",
            Self::DeadLettered => "dead-lettered",
            Self::Held => "held",
        }
    }
}

/// How a run of a handler ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandlerEnd {
    /// It succeeded.
    Ok,
    /// It may succeed later.
    Retryable,
    /// It never will.
    Permanent,
    /// A prerequisite is missing.
    NotYet,
    /// Its dependency is down.
    Unavailable,
    /// It panicked.
    Panicked,
    /// Its timeout was over.
    TimedOut,
    /// It was stopped: lease lost or shutdown.
    Stopped,
}

impl HandlerEnd {
    pub(crate) const ALL: [Self; 8] = [
        Self::Ok,
        Self::Retryable,
        Self::Permanent,
        Self::NotYet,
        Self::Unavailable,
        Self::Panicked,
        Self::TimedOut,
        Self::Stopped,
    ];

    /// As a lower-case word: the value of metric labels.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Retryable => "retryable",
            Self::Permanent => "permanent",
            Self::NotYet => "not-yet",
            Self::Unavailable => "unavailable",
            Self::Panicked => "panicked",
            Self::TimedOut => "timed-out",
            Self::Stopped => "stopped",
        }
    }
}

/// Store or broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The processed-events store.
    Store,
    /// The broker.
    Broker,
    /// Where handlers publish to.
    Publisher,
}

impl Side {
    /// As a lower-case word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::Broker => "broker",
            Self::Publisher => "publisher",
        }
    }
}
