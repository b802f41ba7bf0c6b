//! What a consumer promises: a level for each handler, and the windows that are open, each with its reason.
//!
//! Computed by a pure function (`windows.rs`) from what broker and store can do, the settings and the handlers, printed at
//! start, and there to be asserted in tests.

use std::fmt;

use serde::Serialize;

#[cfg(test)]
mod tests;
pub(crate) mod windows;

/// What holds for one handler. Later variants promise more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum Level {
    /// L0: marked first, then run: an event can be lost. Named because others do it; hapax does not offer it.
    AtMostOnce,
    /// L1: no store that is as durable as the broker: after a crash an effect can repeat.
    AtLeastOnce,
    /// L2: an effect repeats only in the windows that are listed.
    Deduplicated,
    /// L3: L2, and every call downstream carries the key or the fence, as the handler's author declares
    /// ([`Effects::keyed`](crate::Effects::keyed)).
    EffectivelyOnce,
    /// L4: rows written through the handler's transaction commit with the processed mark, once.
    ExactlyOnceEffect,
}

impl Level {
    /// `L0` to `L4`.
    pub const fn code(self) -> &'static str {
        match self {
            Self::AtMostOnce => "L0",
            Self::AtLeastOnce => "L1",
            Self::Deduplicated => "L2",
            Self::EffectivelyOnce => "L3",
            Self::ExactlyOnceEffect => "L4",
        }
    }
}

impl fmt::Display for Level {
    /// As it is written in code, with its number: `Deduplicated (L2)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?} ({})", self.code())
    }
}

/// A circumstance in which a promise has a gap: an effect repeats, or an event ends otherwise than its record says.
///
/// Some belong to their level and are only declared. Some contradict what was asked for: they keep a consumer from being
/// built until [`.allow(..)`](crate::ConsumerBuilder::allow) names them. docs/guarantees.md has a section for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[non_exhaustive]
pub enum Window {
    /// The process dies, or the store cannot be reached, after the effect and before its record.
    CrashAfterEffect,
    /// A lease ends while its handler still runs: a paused process, a stopped virtual machine.
    LeaseLost,
    /// A handler fails half-way, and what it did before is done again.
    FailedHalfway,
    /// An event comes back after its record was swept.
    Forgotten,
    /// The store drops records to make room, or lives shorter than the broker.
    StoreLoss,
    /// A crash of the store's machine loses the last second of records.
    LastSecond,
    /// A replica takes over that has not seen the last records.
    Failover,
    /// A callee forgot a key before the event came back.
    KeyForgotten,
    /// Deliveries of one key overtake each other.
    Overtaken,
    /// A dead letter that is sent back comes after later events of its key.
    DeadLetterOvertaken,
    /// A dead letter is placed twice.
    DeadLetterTwice,
    /// The broker sets a message aside, or drops it, by a count of its own.
    BrokerLimit,
    /// A producer sends one event under two ids.
    ProducerTwice,
}

impl Window {
    /// Every window.
    pub const ALL: [Self; 13] = [
        Self::CrashAfterEffect,
        Self::LeaseLost,
        Self::FailedHalfway,
        Self::Forgotten,
        Self::StoreLoss,
        Self::LastSecond,
        Self::Failover,
        Self::KeyForgotten,
        Self::Overtaken,
        Self::DeadLetterOvertaken,
        Self::DeadLetterTwice,
        Self::BrokerLimit,
        Self::ProducerTwice,
    ];

    /// As a lower-case word, for labels: `crash-after-effect`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CrashAfterEffect => "crash-after-effect",
            Self::LeaseLost => "lease-lost",
            Self::FailedHalfway => "failed-halfway",
            Self::Forgotten => "forgotten",
            Self::StoreLoss => "store-loss",
            Self::LastSecond => "last-second",
            Self::Failover => "failover",
            Self::KeyForgotten => "key-forgotten",
            Self::Overtaken => "overtaken",
            Self::DeadLetterOvertaken => "dead-letter-overtaken",
            Self::DeadLetterTwice => "dead-letter-twice",
            Self::BrokerLimit => "broker-limit",
            Self::ProducerTwice => "producer-twice",
        }
    }

    /// What can happen in it, in a sentence.
    pub const fn what(self) -> &'static str {
        match self {
            Self::CrashAfterEffect => "the effect repeats when the event is delivered again",
            Self::LeaseLost => "two runs of one event overlap, and the effect repeats",
            Self::FailedHalfway => "the steps before the failure repeat",
            Self::Forgotten => "the event runs again as if it were new",
            Self::StoreLoss => "what was processed runs again; two holders can believe that they hold one event",
            Self::LastSecond => {
                "what was processed in that second runs again if it comes again, and rows written by on_tx are lost"
            }
            Self::Failover => {
                "what was processed just before runs again if it comes again, and rows written by on_tx are lost"
            }
            Self::KeyForgotten => "the callee takes a repeated call for a new one",
            Self::Overtaken => "an older event takes effect after a newer one",
            Self::DeadLetterOvertaken => "it takes effect after events that it should have preceded",
            Self::DeadLetterTwice => "the dead letters hold one event twice; sent back, it runs once",
            Self::BrokerLimit => "the event leaves without effect, and its record does not know",
            Self::ProducerTwice => "they are two events, and each takes effect",
        }
    }

    /// How it is closed, in a sentence.
    pub const fn closed_by(self) -> &'static str {
        match self {
            Self::CrashAfterEffect => "on_tx, or Effects::keyed with cx.key(..) handed to every callee",
            Self::LeaseLost => "on_tx, or cx.fence() checked where the effect takes place",
            Self::FailedHalfway => "on_tx, or a key for each step: cx.key(\"charge\")",
            Self::Forgotten => "a retention longer than the time in which the broker can deliver again",
            Self::StoreLoss => "a store that is as durable as the broker and drops nothing",
            Self::LastSecond => "a store that writes through before it answers",
            Self::Failover => "a store whose replicas confirm before it answers",
            Self::KeyForgotten => "callees that keep keys for longer than the event may come back",
            Self::Overtaken => "a broker that keeps order by key or partition",
            Self::DeadLetterOvertaken => "handlers that compare a version or sequence before they write",
            Self::DeadLetterTwice => "a broker that sets aside and acks in one step",
            Self::BrokerLimit => "no limit at the broker: attempts and crashes are counted in the record",
            Self::ProducerTwice => "an id that the producer derives from the business event",
        }
    }
}

impl fmt::Display for Window {
    /// As it is written in code: `CrashAfterEffect`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A window that is open, and what opens it here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct OpenWindow {
    /// Which.
    pub window: Window,
    /// What opens it: the values that decide.
    pub why: String,
}

/// What holds for one handler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct HandlerGuarantee {
    /// The event's type, or `*`.
    pub route: &'static str,
    /// The level.
    pub level: Level,
    /// What is open for this handler alone.
    pub windows: Vec<OpenWindow>,
}

/// What a consumer promises. `Display` is what is printed at start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Guarantee {
    /// The consumer's name.
    pub consumer: String,
    /// The broker's kind: `kafka`.
    pub broker: &'static str,
    /// The store's kind: `sqlite`.
    pub store: &'static str,
    /// Each handler.
    pub handlers: Vec<HandlerGuarantee>,
    /// What is open for every handler.
    pub windows: Vec<OpenWindow>,
    /// What was decided where the settings left it open, or that is lower than they ask.
    pub notes: Vec<String>,
}

impl Guarantee {
    /// The lowest level of all handlers.
    pub fn level(&self) -> Level {
        self.handlers.iter().map(|handler| handler.level).min().unwrap_or(Level::AtLeastOnce)
    }

    /// The handler for this type (without a version), or `*`.
    pub fn handler(&self, route: &str) -> Option<&HandlerGuarantee> {
        self.handlers.iter().find(|handler| handler.route == route)
    }

    /// Whether this window is open, for every handler or for one.
    pub fn is_open(&self, window: Window) -> bool {
        let own = self.handlers.iter().flat_map(|handler| &handler.windows);
        self.windows.iter().chain(own).any(|open| open.window == window)
    }
}

impl fmt::Display for Guarantee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} over {} and {}", self.consumer, self.level(), self.broker, self.store)?;
        for handler in &self.handlers {
            write!(f, "\n  handler {}: {}", handler.route, handler.level)?;
            for open in &handler.windows {
                write!(f, "\n    window {open}")?;
            }
        }
        for open in &self.windows {
            write!(f, "\n  window {open}")?;
        }
        for note in &self.notes {
            write!(f, "\n  note: {note}")?;
        }
        Ok(())
    }
}

impl fmt::Display for OpenWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.window, self.why, self.window.what())
    }
}
