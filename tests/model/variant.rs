//! The protocol as designed, and the ways of getting it wrong that somebody has shipped or might.

/// One thing done differently from the design.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    /// The protocol of design.md section 6.
    Proposed,
    /// A: `Processed` is written whoever holds the event.
    CompleteWithoutFence,
    /// B: a failure deletes the record whoever holds the event.
    ReleaseWithoutFence,
    /// C: an attempt counts when it fails, not when it is claimed.
    CountOnFailure,
    /// D: the record goes with the ack.
    DeleteOnAck,
    /// E: a worker that is told `Fenced` acks its delivery.
    FencedAcks,
    /// E': a worker that is told `Fenced` forgets its delivery.
    FencedDrops,
    /// F: the store forgets a record once (failover, eviction).
    StoreForgets,
    /// G: a delivery whose event another holds is acked.
    AckWhileHeld,
    /// H: the event is marked processed before the handler runs.
    MarkFirst,
    /// I: the dead letter is placed before any mark.
    LetterFirst,
    /// I': dead-lettered is recorded before the dead letter is placed.
    LetterLast,
    /// J: any duplicate of a dead letter reopens it.
    AnyDuplicateReopens,
    /// J': a reopen token works again and again.
    ReopenTokenKept,
    /// J'': a letter sent back while the event is still doomed is set aside again.
    DoomedStaysShut,
    /// J''': of the letters that several holders of a doomed event placed, only the last one reopens it.
    LastLetterReopens,
    /// K: a renewal is granted whoever holds the event.
    RenewWithoutFence,
    /// L: terminal records are swept while the event may still come back.
    SweepEarly,
    /// L': sweep takes whatever it finds.
    SweepHeld,
    /// M: an uncounted failure keeps its attempt.
    UncountedCounts,
    /// M': an uncounted failure gives its fence back with its attempt.
    UncountedLowersFence,
    /// N: a failed event is granted before its retry is due.
    WaitIgnored,
    /// O: the token of a claim is that of the process, not of the delivery and try.
    TokenOfProcess,
    /// P: an unknown commit that has not taken place is tried again within the same attempt.
    UnknownRunsAgain,
    /// P': so it is, and a transaction that finds its event processed already commits all the same.
    RepeatCommits,
}
