//! The store: each request changes the record in one step and is answered. The wrong variants of its rules are here.

use crate::state::{Outcome, Record, Status};
use crate::variant::Variant;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    Granted(Grant),
    /// Processed or dead-lettered.
    Ended,
    Held,
    NotYet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) fence: u8,
    pub(crate) attempt: u8,
    pub(crate) crashes: u8,
    pub(crate) kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The first claim, or one of a retry that is due.
    Fresh,
    /// A retry that was not due.
    Early,
    /// A lease had expired without an outcome.
    Takeover,
    /// The claim with this token was granted before.
    Repeat,
    /// The event is to be dead-lettered; the flag: this very claim was granted before.
    Doomed { repeat: bool },
    /// A dead letter was sent back.
    Reopened,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recorded {
    Done,
    AlreadyDone,
    Vanished,
    Fenced,
}

/// A claim by `token` for a copy that bears the reopen token `reopen` (0: none). `floor` is a fence below every one the
/// store's clock would give: fences grow over a record that is gone.
pub(crate) fn claim(slot: &mut Option<Record>, floor: u8, token: Option<u8>, reopen: u8, variant: Variant) -> Claim {
    let lease = Status::Claimed { expired: false };
    let Some(old) = *slot else {
        return grant(
            slot,
            Record { status: lease, fence: floor + 1, attempt: 0, crashes: 0, token },
            Kind::Fresh,
            variant,
        );
    };
    let last = if variant == Variant::UncountedLowersFence { old.fence } else { old.fence.max(floor) };
    let next = Record { fence: last + 1, token, ..old };
    if reopens(&old, reopen, variant) {
        return grant(slot, Record { status: lease, attempt: 0, crashes: 0, ..next }, Kind::Reopened, variant);
    }
    let repeat = token.is_some() && (old.token == token || variant == Variant::TokenOfProcess);
    match old.status {
        Status::Processed | Status::DeadLettered { .. } => Claim::Ended,
        Status::Claimed { .. } if repeat => {
            *slot = Some(Record { status: lease, ..old });
            let attempt = if variant == Variant::CountOnFailure { old.attempt + 1 } else { old.attempt };
            Claim::Granted(Grant { fence: old.fence, attempt, crashes: old.crashes, kind: Kind::Repeat })
        }
        Status::Doomed { since, .. } if repeat => {
            *slot = Some(Record { status: Status::Doomed { expired: false, since }, ..old });
            let kind = Kind::Doomed { repeat: true };
            Claim::Granted(Grant { fence: old.fence, attempt: old.attempt, crashes: old.crashes, kind })
        }
        Status::Claimed { expired: false } | Status::Doomed { expired: false, .. } => Claim::Held,
        Status::Waiting { due: false } if variant != Variant::WaitIgnored => Claim::NotYet,
        Status::Claimed { expired: true } => {
            grant(slot, Record { status: lease, crashes: old.crashes + 1, ..next }, Kind::Takeover, variant)
        }
        Status::Waiting { due } => {
            let kind = if due { Kind::Fresh } else { Kind::Early };
            grant(slot, Record { status: lease, ..next }, kind, variant)
        }
        Status::Doomed { expired: true, since } => {
            let since = if variant == Variant::LastLetterReopens { next.fence } else { since };
            *slot = Some(Record { status: Status::Doomed { expired: false, since }, ..next });
            let kind = Kind::Doomed { repeat: false };
            Claim::Granted(Grant { fence: next.fence, attempt: 0, crashes: 0, kind })
        }
    }
}

/// Grants an attempt: counts it, here and not when it fails.
fn grant(slot: &mut Option<Record>, record: Record, kind: Kind, variant: Variant) -> Claim {
    let attempt = record.attempt + 1;
    let counted = if variant == Variant::CountOnFailure { record.attempt } else { attempt };
    let status = if variant == Variant::MarkFirst { Status::Processed } else { record.status };
    *slot = Some(Record { status, attempt: counted, ..record });
    Claim::Granted(Grant { fence: record.fence, attempt, crashes: record.crashes, kind })
}

/// Each holder of a doomed event may have placed a letter. Any one of them reopens it, and the first that does closes the
/// door behind all. An expired `Doomed` counts as dead-lettered: the letter that came back proves that it was placed.
fn reopens(record: &Record, reopen: u8, variant: Variant) -> bool {
    let since = match record.status {
        Status::DeadLettered { .. } if variant == Variant::AnyDuplicateReopens => return true,
        Status::DeadLettered { .. } if variant == Variant::ReopenTokenKept => return reopen != 0,
        Status::Doomed { .. } if variant == Variant::DoomedStaysShut => return false,
        Status::DeadLettered { since } | Status::Doomed { expired: true, since } => since,
        _ => return false,
    };
    (since..=record.fence).contains(&reopen)
}

/// The outcome of the lease with `fence`: compare-and-set on the fence.
pub(crate) fn record(slot: &mut Option<Record>, fence: u8, outcome: Outcome, variant: Variant) -> Recorded {
    let ended = |status| Record { status, fence, attempt: 0, crashes: 0, token: None };
    let Some(old) = *slot else {
        *slot = match outcome {
            Outcome::Processed => Some(ended(Status::Processed)),
            Outcome::Failed { .. } => None,
            Outcome::Doomed => Some(ended(Status::Doomed { expired: true, since: fence })),
            Outcome::DeadLettered => Some(ended(Status::DeadLettered { since: fence })),
        };
        return Recorded::Vanished;
    };
    let held = old.fence == fence && matches!(old.status, Status::Claimed { .. });
    let written = match (old.status, outcome) {
        (_, Outcome::Processed) if variant == Variant::CompleteWithoutFence && !held => {
            Record { fence: old.fence, ..ended(Status::Processed) }
        }
        (_, Outcome::Failed { .. }) if variant == Variant::ReleaseWithoutFence && !held => {
            *slot = None;
            return Recorded::Done;
        }
        _ if old.fence != fence => return Recorded::Fenced,
        (Status::Claimed { .. }, Outcome::Processed) => ended(Status::Processed),
        (Status::Claimed { .. }, Outcome::Failed { counted }) => failed(old, counted, variant),
        (Status::Claimed { expired }, Outcome::Doomed) => {
            Record { token: old.token, ..ended(Status::Doomed { expired, since: fence }) }
        }
        (Status::Doomed { since, .. }, Outcome::DeadLettered) => ended(Status::DeadLettered { since }),
        (Status::Claimed { .. }, Outcome::DeadLettered)
            if matches!(variant, Variant::LetterFirst | Variant::LetterLast) =>
        {
            ended(Status::DeadLettered { since: fence })
        }
        (Status::Processed, Outcome::Processed)
        | (Status::Waiting { .. }, Outcome::Failed { .. })
        | (Status::Doomed { .. } | Status::DeadLettered { .. }, Outcome::Doomed)
        | (Status::DeadLettered { .. }, Outcome::DeadLettered) => return Recorded::AlreadyDone,
        _ => return Recorded::Fenced,
    };
    *slot = Some(written);
    Recorded::Done
}

fn failed(old: Record, counted: bool, variant: Variant) -> Record {
    let attempt = match variant {
        Variant::CountOnFailure => old.attempt + u8::from(counted),
        Variant::UncountedCounts => old.attempt,
        _ => old.attempt - u8::from(!counted),
    };
    let lowered = !counted && variant == Variant::UncountedLowersFence;
    let fence = if lowered { old.fence - 1 } else { old.fence };
    Record { status: Status::Waiting { due: false }, attempt, fence, token: None, ..old }
}

/// Whether the lease with `fence` is still held; if so it lives again.
pub(crate) fn renew(slot: &mut Option<Record>, fence: u8, variant: Variant) -> bool {
    let Some(record) = slot.as_mut() else { return false };
    if record.fence != fence && variant != Variant::RenewWithoutFence {
        return false;
    }
    match &mut record.status {
        Status::Claimed { expired } | Status::Doomed { expired, .. } => {
            *expired = false;
            true
        }
        Status::Waiting { .. } | Status::Processed | Status::DeadLettered { .. } => false,
    }
}
