//! The invariants of semantics.md section 3.2 that one event can show, under their names there, and some of our own:
//! what a promise of design.md section 5 needs beyond them.

use stateright::Property;

use crate::protocol::Protocol;
use crate::state::State;

macro_rules! invariants {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A statement that must hold in every state.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) enum Invariant { $($(#[$doc])* $name,)* }

        impl Invariant {
            pub(crate) const ALL: &[Self] = &[$(Self::$name,)*];

            pub(crate) const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }

        pub(crate) fn properties() -> Vec<Property<Protocol>> {
            vec![$(Property::always($text, |model: &Protocol, state: &State| {
                !state.seen.broken.has(Invariant::$name) && model.holds_at_rest(state, Invariant::$name)
            }),)*]
        }
    };
}

invariants! {
    /// When nobody works and the broker has nothing left, the effect took place or the dead letter is placed.
    NoLoss = "S1 NoLoss",
    /// No event is both processed and in the dead letters, unless an operator reopened it between.
    TerminalExclusive = "S2 TerminalExclusive",
    /// No handler starts after the event is processed or its dead letter placed; a token reopens it once.
    NoStartAfterTerminal = "S3 NoStartAfterTerminal",
    /// No two workers hold leases whose deadlines have not passed.
    OneLiveLease = "S4 OneLiveLease",
    /// Every grant has a higher fence than all before it.
    FenceMonotonic = "S5 FenceMonotonic",
    /// A write with another fence than the record's changes nothing.
    FencedWriteRejected = "S6 FencedWriteRejected",
    /// No ack before the event is processed or its dead letter placed.
    SettleOnlyTerminal = "S7 SettleOnlyTerminal",
    /// No ack by a worker whose last word from the store was `Fenced`.
    NoSettleWhenFenced = "S8 NoSettleWhenFenced",
    /// At most one effect, and one more for each crash or lost lease after an effect and for each reopening.
    ExplainedDuplicate = "S12 ExplainedDuplicate",
    /// At most one effect in a life.
    EffectOnceTx = "S13 EffectOnceTx",
    /// Starts that count are at most `attempts_max`, and none after more than `crashes_max` takeovers.
    AttemptsBounded = "S15 AttemptsBounded",
    /// The attempt of a grant is not lower than what was counted.
    AttemptsSurvive = "S16 AttemptsSurvive",
    /// No start before the retry is due.
    RetryNotEarly = "S20 RetryNotEarly",
    /// What is recorded dead-lettered has its dead letter.
    DlqComplete = "S22 DlqComplete",
    /// Sweep takes terminal records whose event cannot come back, and nothing else.
    SweepSafe = "S24 SweepSafe",
    /// No state where nobody has to do anything and a delivery is not settled.
    Quiesce = "L1 Quiesce",
    /// Ours: the attempt of a grant is not higher than what was counted: no chance is taken away.
    ChancesKept = "ChancesKept",
    /// Ours: the last holder's dead letter runs if it is sent back when nobody can overtake it (the event is recorded
    /// dead-lettered, or nothing of it is under way and no other letter follows), unless the event has been processed
    /// since.
    RedriveRuns = "RedriveRuns",
    /// Ours: so does each holder's dead letter of this life, sent back at any time.
    EveryLetterRuns = "EveryLetterRuns",
}

/// The invariants that some step has broken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Broken(u32);

impl Broken {
    pub(crate) fn mark(&mut self, invariant: Invariant, broken: bool) {
        self.0 |= u32::from(broken) << invariant as u32;
    }

    fn has(self, invariant: Invariant) -> bool {
        self.0 >> invariant as u32 & 1 == 1
    }
}
