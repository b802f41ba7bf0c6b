//! The model's store answers as `hapax::record` does, which every store is checked against: what the model proves, it
//! proves of that machine. Compared are all records and all requests of a small world, not only what a scenario reaches.

use std::num::NonZeroU64;
use std::time::Duration;

use hapax::record::{self as machine, Moment};
use hapax::{ClaimRequest, ConsumerId, EventKey, Fingerprint, Lease, Reason, Renewal, Trouble};

use crate::state::{Outcome, Record, Status};
use crate::store::{self, Claim, Kind, Recorded};
use crate::variant::Variant::Proposed;

const NOW: Moment = Moment(10);
const PAST: Moment = Moment(5);
const FUTURE: Moment = Moment(20);
const LEASE: Duration = Duration::from_micros(30);
/// Fences of the small world; the clock's floor for an event without a record is `NOW`.
const FENCES: std::ops::Range<u8> = 10..13;
const FLOOR: u8 = 9;

fn records() -> Vec<Option<Record>> {
    let mut records = vec![None];
    for fence in FENCES {
        for token in [None, Some(0), Some(1)] {
            for (attempt, crashes) in [(1, 0), (2, 0), (2, 1), (3, 1)] {
                let held = Record { status: Status::Processed, fence, attempt, crashes, token };
                let ended = Record { attempt: 0, crashes: 0, ..held };
                records
                    .extend([true, false].map(|expired| Some(Record { status: Status::Claimed { expired }, ..held })));
                records.extend([true, false].map(|due| Some(Record { status: Status::Waiting { due }, ..held })));
                records.push(Some(ended));
                for since in FENCES.start..=fence {
                    let doomed = [true, false].map(|expired| Status::Doomed { expired, since });
                    let set_aside = doomed.into_iter().chain([Status::DeadLettered { since }]);
                    records.extend(set_aside.map(|status| Some(Record { status, ..ended })));
                }
            }
        }
    }
    records
}

#[test]
fn every_claim_is_answered_as_specified() {
    for record in records() {
        for token in [0, 1] {
            for reopen in std::iter::once(0).chain(FENCES) {
                let (mut ours, mut theirs) = (record, to_machine(record));
                let answer = store::claim(&mut ours, FLOOR, Some(token), reopen, Proposed);
                let request = ClaimRequest {
                    consumer: ConsumerId(1),
                    key: EventKey([1; 16]),
                    fingerprint: Fingerprint([2; 16]),
                    token: token_of(Some(token)),
                    reopen: NonZeroU64::new(reopen.into()),
                };
                let specified = machine::claim(&mut theirs, &request, LEASE, NOW);
                let case = format!("claim with token {token} and reopen token {reopen} of {record:?}");
                assert_eq!(in_words(&answer), machine_in_words(&specified), "{case}");
                assert_same(ours, theirs.as_ref(), &case);
            }
        }
    }
}

#[test]
fn every_outcome_is_recorded_as_specified() {
    let failed = [true, false].map(|counted| Outcome::Failed { counted });
    for record in records() {
        for outcome in [Outcome::Processed, Outcome::Doomed, Outcome::DeadLettered].into_iter().chain(failed) {
            for fence in FENCES {
                let (mut ours, mut theirs) = (record, to_machine(record));
                let answer = store::record(&mut ours, fence, outcome, Proposed);
                let specified = machine::record(&mut theirs, &lease(fence), &outcome_of(outcome), NOW);
                let case = format!("{outcome:?} with fence {fence} of {record:?}");
                let specified = match specified {
                    hapax::Recorded::Done => Recorded::Done,
                    hapax::Recorded::AlreadyDone => Recorded::AlreadyDone,
                    hapax::Recorded::Vanished => Recorded::Vanished,
                    hapax::Recorded::Fenced => Recorded::Fenced,
                };
                assert_eq!(answer, specified, "{case}");
                assert_same(ours, theirs.as_ref(), &case);
            }
        }
    }
}

#[test]
fn every_renewal_is_answered_as_specified() {
    for record in records() {
        for fence in FENCES {
            let (mut ours, mut theirs) = (record, to_machine(record));
            let renewed = store::renew(&mut ours, fence, Proposed);
            let specified = machine::renew(&mut theirs, &lease(fence), LEASE, NOW);
            let case = format!("renewal with fence {fence} of {record:?}");
            assert_eq!(renewed, matches!(specified, Renewal::Renewed), "{case}");
            assert_same(ours, theirs.as_ref(), &case);
        }
    }
}

fn to_machine(record: Option<Record>) -> Option<machine::Record> {
    let record = record?;
    let end = |past: bool| if past { PAST } else { FUTURE };
    Some(machine::Record {
        state: match record.status {
            Status::Claimed { expired } => machine::State::Claimed { until: end(expired) },
            Status::Waiting { due } => machine::State::Waiting { until: end(due) },
            Status::Doomed { expired, since } => {
                machine::State::Doomed { until: end(expired), reason: Reason::Permanent, since: number(since) }
            }
            Status::Processed => machine::State::Processed { at: PAST },
            Status::DeadLettered { since } => {
                machine::State::DeadLettered { at: PAST, reason: Reason::Permanent, since: number(since) }
            }
        },
        fingerprint: Fingerprint([2; 16]),
        fence: number(record.fence),
        attempt: record.attempt.into(),
        crashes: record.crashes.into(),
        token: token_of(record.token),
        first: PAST,
        trouble: Some(Box::new(Trouble::default())),
    })
}

/// A record back from the machine. What the model does not keep of it is nobody's concern there.
fn from_machine(record: &machine::Record) -> Record {
    let fence_of = |number: NonZeroU64| u8::try_from(number.get()).expect("a small world");
    let small = |number: u32| u8::try_from(number).expect("a small world");
    let held = Record {
        status: Status::Processed,
        fence: fence_of(record.fence),
        attempt: small(record.attempt),
        crashes: small(record.crashes),
        token: [0, 1].into_iter().find(|&token| token_of(Some(token)) == record.token),
    };
    let ended = Record { attempt: 0, crashes: 0, ..held };
    match record.state {
        machine::State::Claimed { until } => Record { status: Status::Claimed { expired: until <= NOW }, ..held },
        machine::State::Waiting { until } => Record { status: Status::Waiting { due: until <= NOW }, ..held },
        machine::State::Doomed { until, since, .. } => {
            Record { status: Status::Doomed { expired: until <= NOW, since: fence_of(since) }, ..ended }
        }
        machine::State::Processed { .. } => ended,
        machine::State::DeadLettered { since, .. } => {
            Record { status: Status::DeadLettered { since: fence_of(since) }, ..ended }
        }
    }
}

/// Only the token of a lease can matter again.
#[track_caller]
fn assert_same(ours: Option<Record>, theirs: Option<&machine::Record>, case: &str) {
    let comparable = |record: Record| match record.status {
        Status::Claimed { .. } | Status::Doomed { .. } => record,
        _ => Record { token: None, ..record },
    };
    assert_eq!(ours.map(comparable), theirs.map(from_machine).map(comparable), "{case}");
}

fn in_words(claim: &Claim) -> String {
    match claim {
        Claim::Granted(grant) if matches!(grant.kind, Kind::Doomed { .. }) => format!("doomed, fence {}", grant.fence),
        Claim::Granted(grant) => {
            format!("granted, fence {}, attempt {}, crashes {}", grant.fence, grant.attempt, grant.crashes)
        }
        Claim::Ended => "ended".to_owned(),
        Claim::Held => "held".to_owned(),
        Claim::NotYet => "not yet".to_owned(),
    }
}

fn machine_in_words(claim: &hapax::Claim) -> String {
    match claim {
        hapax::Claim::Granted(lease, Some(history)) if history.doomed.is_some() => {
            format!("doomed, fence {}", lease.fence)
        }
        hapax::Claim::Granted(lease, history) => {
            let crashes = history.as_ref().map_or(0, |history| history.crashes);
            format!("granted, fence {}, attempt {}, crashes {crashes}", lease.fence, lease.attempt)
        }
        hapax::Claim::Processed { .. } | hapax::Claim::DeadLettered { .. } => "ended".to_owned(),
        hapax::Claim::Held { .. } => "held".to_owned(),
        hapax::Claim::NotYet { .. } => "not yet".to_owned(),
        hapax::Claim::Conflict => "conflict".to_owned(),
    }
}

fn outcome_of(outcome: Outcome) -> hapax::Outcome {
    let trouble = Trouble::default();
    match outcome {
        Outcome::Processed => hapax::Outcome::Processed,
        Outcome::Failed { counted } => hapax::Outcome::Failed { after: LEASE, counted, trouble },
        Outcome::Doomed => hapax::Outcome::Doomed { reason: Reason::Permanent, trouble },
        Outcome::DeadLettered => hapax::Outcome::DeadLettered,
    }
}

fn lease(fence: u8) -> Lease {
    Lease { consumer: ConsumerId(1), key: EventKey([1; 16]), fence: number(fence), attempt: 1 }
}

fn number(fence: u8) -> NonZeroU64 {
    NonZeroU64::new(fence.into()).expect("fences begin at 1")
}

/// 0 is nobody's.
fn token_of(worker: Option<u8>) -> u128 {
    worker.map_or(0, |worker| 100 + u128::from(worker))
}
