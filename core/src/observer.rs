//! What happened, as a closed list, and who is told: metrics and tracing by default.

use std::fmt::Debug;
use std::time::Duration;

use crate::dead_letter::Reason;

/// Is told what happens in a consumer, in the middle of it: must be quick and never block.
pub trait Observer: Send + Sync + 'static {
    /// Something happened.
    fn observe(&self, what: &Observed<'_>);
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
