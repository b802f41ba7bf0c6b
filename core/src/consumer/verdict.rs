//! The decisions in a delivery's life, pure: what a claim's answer means, and what a handler's end means.

use std::time::Duration;

use super::steps::End;
use super::switch;
use crate::dead_letter::Reason;
use crate::event::Ended;
use crate::handler::{Failure, FailureKind};
use crate::observer::HandlerEnd;
use crate::retry::{Over, RetryPolicy};
use crate::run::Stop;
use crate::store::{Claim, History, Lease, Recorded};

/// The limits that decide.
#[derive(Clone, Debug)]
pub(super) struct Bounds {
    pub(super) crashes_max: u32,
    pub(super) not_yet_max: Duration,
    /// Up to this delay a delivery waits here.
    pub(super) hold: Duration,
    /// With [`Order::PerKey`](crate::Order::PerKey) everything waits here, since a retry would be overtaken.
    pub(super) waits_in_place: bool,
    /// The longest delay that the broker takes.
    pub(super) retry_max: Duration,
}

/// What a claim's answer means.
#[derive(Debug, PartialEq)]
pub(super) enum Answer {
    /// Run the handler.
    Run(Lease, Option<Box<History>>),
    /// Do not: its dead letter is to be placed. `recorded` tells whether the record says doomed already.
    Doom { lease: Lease, reason: Reason, recorded: bool, history: Option<Box<History>> },
    /// Done before: ack.
    Duplicate { dead: bool, ago: Duration },
    /// The id is known with other data.
    Conflict,
    /// Another holds it: ask again when it may be over.
    Held(Duration),
    /// Its next attempt is not due.
    NotYet(Duration),
}

/// Reads a claim's answer. Attempts and crashes are counted by the store at the claim and judged here.
pub(super) fn after_claim(claim: Claim, attempts_max: u32, bounds: &Bounds) -> Answer {
    match claim {
        Claim::Processed { ago } => Answer::Duplicate { dead: false, ago },
        Claim::DeadLettered { ago } => Answer::Duplicate { dead: true, ago },
        Claim::Conflict => Answer::Conflict,
        Claim::Held { wait } => Answer::Held(wait),
        Claim::NotYet { wait } => Answer::NotYet(wait),
        Claim::Granted(lease, None) => Answer::Run(lease, None),
        Claim::Granted(lease, Some(history)) => {
            let (doomed, crashes) = (history.doomed, history.crashes);
            let exhausted = || {
                let by_crashes = (crashes > bounds.crashes_max).then_some(Reason::CrashesExhausted);
                by_crashes.or_else(|| (lease.attempt > attempts_max).then_some(Reason::AttemptsExhausted))
            };
            match doomed.or_else(exhausted) {
                Some(reason) => Answer::Doom { lease, reason, recorded: doomed.is_some(), history: Some(history) },
                None => Answer::Run(lease, Some(history)),
            }
        }
    }
}

/// What a failure means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Try again after this long; `counted` uses up the attempt.
    Again { after: Duration, counted: bool },
    /// Never again.
    Doom(Reason),
}

/// Judges a failure. `elapsed` is the time since the first claim, `chance` a random share from 0 to 1.
pub(super) fn after_failure(
    failure: &Failure,
    attempt: u32,
    elapsed: Duration,
    retry: &RetryPolicy,
    bounds: &Bounds,
    chance: f32,
) -> Verdict {
    match failure.kind() {
        FailureKind::Permanent => Verdict::Doom(Reason::Permanent),
        FailureKind::NotYet { after } if elapsed.saturating_add(after) > bounds.not_yet_max => {
            Verdict::Doom(Reason::NeverReady)
        }
        FailureKind::NotYet { after } => Verdict::Again { after, counted: false },
        FailureKind::Unavailable => {
            Verdict::Again { after: retry.delay(attempt, failure.reason(), chance), counted: false }
        }
        FailureKind::Retryable { after } => {
            let delay = after.unwrap_or_else(|| retry.delay(attempt, failure.reason(), chance));
            match retry.is_over(attempt, elapsed, delay) {
                Over::No => Verdict::Again { after: delay, counted: true },
                Over::Attempts => Verdict::Doom(Reason::AttemptsExhausted),
                Over::Time => Verdict::Doom(Reason::TimeExhausted),
            }
        }
    }
}

/// Whether an event with so many crashes in its history runs while no other such event does. Not from the first crash on:
/// every event that was in flight beside a killer has one, and so has every event whose lease was lost in an outage. Half of
/// the crashes that are allowed are left for when it runs alone.
pub(super) fn is_suspect(crashes: u32, bounds: &Bounds) -> bool {
    crashes > 0 && crashes > bounds.crashes_max / 2
}

/// How a run ended, for observers.
pub(super) fn handler_end(end: &End) -> HandlerEnd {
    match end {
        End::Handler(Ended::Recorded(Recorded::Fenced)) => HandlerEnd::Stopped,
        End::Handler(Ended::Effect | Ended::Recorded(_)) => HandlerEnd::Ok,
        End::Handler(Ended::Failed(failure)) => match failure.kind() {
            FailureKind::Retryable { .. } => HandlerEnd::Retryable,
            FailureKind::Permanent => HandlerEnd::Permanent,
            FailureKind::NotYet { .. } => HandlerEnd::NotYet,
            FailureKind::Unavailable => HandlerEnd::Unavailable,
        },
        End::Handler(Ended::Unknown(_) | Ended::StoreFailed(_) | Ended::Apart(_)) => HandlerEnd::Stopped,
        End::Panicked(_) => HandlerEnd::Panicked,
        End::Stopped(Stop::Timeout) => HandlerEnd::TimedOut,
        End::Stopped(_) => HandlerEnd::Stopped,
    }
}

/// What the kill switch makes of it; nothing where the handler said nothing about itself.
pub(super) fn for_switch(end: &End) -> Option<switch::Result> {
    match handler_end(end) {
        HandlerEnd::Ok => Some(switch::Result::Good),
        HandlerEnd::Retryable | HandlerEnd::Permanent | HandlerEnd::Panicked | HandlerEnd::TimedOut => {
            Some(switch::Result::Bad)
        }
        HandlerEnd::Unavailable => Some(switch::Result::Down),
        HandlerEnd::NotYet | HandlerEnd::Stopped => None,
    }
}

/// Where a delay is spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delay {
    /// Here: unsettled and without a permit.
    Here(Duration),
    /// At the broker, durably.
    AtBroker(Duration),
}

/// Short delays are waited for here, long ones at the broker, unless order or the broker forbids.
pub(super) fn delay(after: Duration, crowded: bool, bounds: &Bounds) -> Delay {
    let broker_can = bounds.retry_max > Duration::ZERO && !bounds.waits_in_place;
    if broker_can && (after > bounds.hold || crowded) {
        Delay::AtBroker(after.min(bounds.retry_max))
    } else {
        Delay::Here(after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{ConsumerId, EventKey, Trouble};
    use std::num::NonZeroU64;

    const BOUNDS: Bounds = Bounds {
        crashes_max: 3,
        not_yet_max: Duration::from_secs(60),
        hold: Duration::from_secs(5),
        waits_in_place: false,
        retry_max: Duration::from_secs(600),
    };

    fn lease(attempt: u32) -> Lease {
        Lease { consumer: ConsumerId(1), key: EventKey([0; 16]), fence: NonZeroU64::MIN, attempt }
    }

    fn history(crashes: u32, doomed: Option<Reason>) -> Option<Box<History>> {
        Some(Box::new(History { crashes, first: Duration::ZERO, trouble: Trouble::default(), doomed }))
    }

    fn read(attempt: u32, crashes: u32, doomed: Option<Reason>) -> Option<(Reason, bool)> {
        match after_claim(Claim::Granted(lease(attempt), history(crashes, doomed)), 10, &BOUNDS) {
            Answer::Doom { reason, recorded, .. } => Some((reason, recorded)),
            _ => None,
        }
    }

    #[test]
    fn attempts_and_crashes_are_limits_and_the_last_of_each_still_runs() {
        assert_eq!(read(10, 3, None), None);
        assert_eq!(read(11, 0, None), Some((Reason::AttemptsExhausted, false)));
        assert_eq!(read(5, 4, None), Some((Reason::CrashesExhausted, false)));
    }

    #[test]
    fn what_was_doomed_before_stays_doomed_for_its_own_reason() {
        assert_eq!(read(1, 9, Some(Reason::Permanent)), Some((Reason::Permanent, true)));
    }

    #[test]
    fn a_failure_with_chances_left_is_counted_and_the_last_is_doomed() {
        let retry = RetryPolicy::fixed(Duration::from_secs(1)).attempts_max(2);
        let judge = |failure: &Failure, attempt| after_failure(failure, attempt, Duration::ZERO, &retry, &BOUNDS, 0.0);
        let failure = Failure::retryable("busy");
        assert_eq!(judge(&failure, 1), Verdict::Again { after: Duration::from_secs(1), counted: true });
        assert_eq!(judge(&failure, 2), Verdict::Doom(Reason::AttemptsExhausted));
        assert_eq!(judge(&Failure::permanent("no"), 1), Verdict::Doom(Reason::Permanent));
        assert_eq!(
            judge(&Failure::unavailable("down"), 2),
            Verdict::Again { after: Duration::from_secs(1), counted: false }
        );
    }

    #[test]
    fn waiting_for_a_prerequisite_is_not_counted_and_bounded_in_time() {
        let failure = Failure::not_yet("no order", Duration::from_secs(10));
        let judge =
            |elapsed| after_failure(&failure, 99, Duration::from_secs(elapsed), &RetryPolicy::default(), &BOUNDS, 0.0);
        assert_eq!(judge(50), Verdict::Again { after: Duration::from_secs(10), counted: false });
        assert_eq!(judge(51), Verdict::Doom(Reason::NeverReady));
    }

    #[test]
    fn short_delays_wait_here_and_long_ones_at_the_broker() {
        let seconds = Duration::from_secs;
        assert_eq!(delay(seconds(5), false, &BOUNDS), Delay::Here(seconds(5)));
        assert_eq!(delay(seconds(6), false, &BOUNDS), Delay::AtBroker(seconds(6)));
        assert_eq!(delay(seconds(1), true, &BOUNDS), Delay::AtBroker(seconds(1)));
        assert_eq!(delay(seconds(9_000), false, &BOUNDS), Delay::AtBroker(seconds(600)));
        let in_order = Bounds { waits_in_place: true, ..BOUNDS };
        assert_eq!(delay(seconds(9_000), true, &in_order), Delay::Here(seconds(9_000)));
    }
}
