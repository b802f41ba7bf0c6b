//! How much of the world one exploration covers: bounds on workers, copies and faults. One space with everything in
//! it would be too large, so each scenario is generous with the faults it is about and sparing with the others.

/// One bounded world.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scenario {
    pub(crate) workers: usize,
    /// How many copies the broker holds from the start.
    pub(crate) copies: usize,
    pub(crate) attempts_max: u8,
    pub(crate) crashes_max: u8,
    /// Effect and processed mark commit together.
    pub(crate) transactional: bool,
    /// A second effect in one life is a fault: where a transaction prevents it, or to show that nothing else does.
    pub(crate) once: bool,
    /// The handler may fail: retryably, or for good.
    pub(crate) retryable: bool,
    pub(crate) permanent: bool,
    pub(crate) faults: Faults,
}

/// How often each fault may still strike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Faults {
    /// A worker dies with what it is doing.
    pub(crate) crashes: u8,
    /// A lease expires under a worker that still works. (The lease of a dead worker expires anyway.)
    pub(crate) pauses: u8,
    /// A worker stops waiting for the store's answer.
    pub(crate) timeouts: u8,
    /// The broker's answer is lost, or an ack that was sent never arrives.
    pub(crate) lost_settles: u8,
    /// The handler fails in a way that does not count.
    pub(crate) uncounted: u8,
    /// An operator sends a dead letter back.
    pub(crate) redrives: u8,
    /// The store sweeps.
    pub(crate) sweeps: u8,
    /// The store forgets the record.
    pub(crate) store_losses: u8,
}

const CALM: Faults = Faults {
    crashes: 0,
    pauses: 0,
    timeouts: 0,
    lost_settles: 0,
    uncounted: 0,
    redrives: 0,
    sweeps: 0,
    store_losses: 0,
};

/// Claims, retries and dead letters of two copies, while one worker dies, one is paused and one answer is lost.
pub(crate) const CLAIMS: Scenario = Scenario {
    workers: 2,
    copies: 2,
    attempts_max: 3,
    crashes_max: 1,
    transactional: false,
    once: false,
    retryable: true,
    permanent: true,
    faults: Faults { crashes: 1, pauses: 1, timeouts: 1, ..CALM },
};

/// More takeovers than `crashes_max` allows.
pub(crate) const TAKEOVERS: Scenario =
    Scenario { attempts_max: 2, permanent: false, faults: Faults { crashes: 2, pauses: 2, ..CALM }, ..CLAIMS };

/// Every way in which the path of a dead letter can be cut.
pub(crate) const LETTERS: Scenario =
    Scenario { retryable: false, faults: Faults { crashes: 2, pauses: 1, lost_settles: 1, ..CALM }, ..CLAIMS };

/// A third worker, for what two cannot do to each other.
pub(crate) const THREE_WORKERS: Scenario = Scenario {
    workers: 3,
    attempts_max: 2,
    permanent: false,
    faults: Faults { crashes: 1, pauses: 1, ..CALM },
    ..CLAIMS
};

/// Failures that do not count, between others that do.
pub(crate) const UNCOUNTED: Scenario = Scenario {
    attempts_max: 2,
    permanent: false,
    faults: Faults { crashes: 1, pauses: 1, uncounted: 2, ..CALM },
    ..CLAIMS
};

/// An operator sends a dead letter back while another copy of the event is about; then sweep.
pub(crate) const REDRIVE: Scenario =
    Scenario { retryable: false, faults: Faults { crashes: 1, pauses: 1, redrives: 1, sweeps: 1, ..CALM }, ..CLAIMS };

/// An operator sends dead letters back twice: the same one, or two of them.
pub(crate) const REDRIVE_TWICE: Scenario =
    Scenario { copies: 1, faults: Faults { crashes: 1, pauses: 1, redrives: 2, ..CALM }, ..REDRIVE };

/// Effect and mark in one transaction, whose commit may stay unknown.
pub(crate) const TRANSACTION: Scenario =
    Scenario { attempts_max: 2, permanent: false, transactional: true, once: true, ..CLAIMS };

/// Small, for wrong variants: one copy, which the broker may deliver twice.
pub(crate) const ONE_COPY: Scenario =
    Scenario { copies: 1, attempts_max: 2, faults: Faults { crashes: 1, pauses: 1, ..CALM }, ..CLAIMS };

/// Small, for wrong variants: a holder is overtaken by a worker that has a copy of its own.
pub(crate) const TWO_COPIES: Scenario = Scenario { copies: 2, ..ONE_COPY };

/// Small, for wrong variants: records go before their time.
pub(crate) const FORGETFUL: Scenario =
    Scenario { faults: Faults { pauses: 1, sweeps: 1, store_losses: 1, ..CALM }, ..ONE_COPY };
