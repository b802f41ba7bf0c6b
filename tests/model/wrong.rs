//! Each wrong variant, and exactly the invariants it breaks: the model can fail, and each rule of the protocol is
//! needed.

use crate::exploration::assert_broken;
use crate::invariant::Invariant::{
    AttemptsBounded, AttemptsSurvive, ChancesKept, DlqComplete, EffectOnceTx, EveryLetterRuns, ExplainedDuplicate,
    FenceMonotonic, FencedWriteRejected, NoLoss, NoSettleWhenFenced, NoStartAfterTerminal, OneLiveLease, Quiesce,
    RedriveRuns, RetryNotEarly, SettleOnlyTerminal, SweepSafe, TerminalExclusive,
};
use crate::scenario::{
    FORGETFUL, Faults, ONE_COPY, REDRIVE, REDRIVE_TWICE, Scenario, TRANSACTION, TWO_COPIES, UNCOUNTED,
};
use crate::variant::Variant;

/// An operator and one crash.
const REDRIVEN: Scenario = Scenario { faults: Faults { pauses: 0, ..REDRIVE_TWICE.faults }, ..REDRIVE_TWICE };

/// The commit's answer may be lost, or the commit be late; and little else.
const UNKNOWN_COMMIT: Scenario =
    Scenario { copies: 1, faults: Faults { crashes: 0, ..TRANSACTION.faults }, ..TRANSACTION };

#[test]
fn a_completion_without_fence_ends_an_event_twice() {
    assert_broken(ONE_COPY, Variant::CompleteWithoutFence, &[TerminalExclusive, FencedWriteRejected]);
}

#[test]
fn a_release_without_fence_frees_the_lease_of_another() {
    let broken = [
        TerminalExclusive,
        NoStartAfterTerminal,
        OneLiveLease,
        FencedWriteRejected,
        ExplainedDuplicate,
        AttemptsBounded,
        AttemptsSurvive,
    ];
    assert_broken(ONE_COPY, Variant::ReleaseWithoutFence, &broken);
}

#[test]
fn attempts_counted_at_failure_miss_the_crashes() {
    assert_broken(ONE_COPY, Variant::CountOnFailure, &[AttemptsBounded, AttemptsSurvive]);
}

/// What a store that forgets does, however it came to it.
const FORGOTTEN: [crate::invariant::Invariant; 6] =
    [TerminalExclusive, NoStartAfterTerminal, OneLiveLease, ExplainedDuplicate, AttemptsBounded, AttemptsSurvive];

#[test]
fn a_record_deleted_with_the_ack_lets_the_event_run_again() {
    assert_broken(ONE_COPY, Variant::DeleteOnAck, &FORGOTTEN);
}

#[test]
fn a_store_that_loses_one_write_breaks_the_same() {
    assert_broken(FORGETFUL, Variant::StoreForgets, &FORGOTTEN);
}

#[test]
fn a_fenced_worker_that_acks_loses_the_event() {
    assert_broken(ONE_COPY, Variant::FencedAcks, &[NoLoss, SettleOnlyTerminal, NoSettleWhenFenced]);
}

#[test]
fn a_fenced_worker_that_drops_its_delivery_leaves_it_for_ever() {
    assert_broken(TWO_COPIES, Variant::FencedDrops, &[Quiesce]);
}

#[test]
fn an_ack_while_another_holds_the_event_loses_it() {
    assert_broken(ONE_COPY, Variant::AckWhileHeld, &[NoLoss, SettleOnlyTerminal]);
}

#[test]
fn a_mark_before_the_handler_loses_the_event() {
    assert_broken(ONE_COPY, Variant::MarkFirst, &[NoLoss]);
}

#[test]
fn a_dead_letter_placed_before_any_mark_lets_the_handler_start_again() {
    assert_broken(ONE_COPY, Variant::LetterFirst, &[TerminalExclusive, NoStartAfterTerminal]);
    assert_broken(TWO_COPIES, Variant::LetterFirst, &[TerminalExclusive, NoStartAfterTerminal]);
}

#[test]
fn a_dead_letter_placed_after_the_last_mark_may_never_be() {
    assert_broken(ONE_COPY, Variant::LetterLast, &[NoLoss, SettleOnlyTerminal, DlqComplete]);
}

#[test]
fn a_reopening_without_a_token_runs_for_every_duplicate() {
    let broken = [TerminalExclusive, NoStartAfterTerminal, AttemptsBounded, AttemptsSurvive, EveryLetterRuns];
    assert_broken(REDRIVEN, Variant::AnyDuplicateReopens, &broken);
}

#[test]
fn a_reopen_token_that_is_not_spent_runs_twice() {
    let broken = [TerminalExclusive, NoStartAfterTerminal, AttemptsBounded, AttemptsSurvive];
    assert_broken(REDRIVEN, Variant::ReopenTokenKept, &broken);
}

#[test]
fn a_doomed_event_that_stays_shut_sends_the_operators_letter_round_in_circles() {
    assert_broken(REDRIVEN, Variant::DoomedStaysShut, &[RedriveRuns, EveryLetterRuns]);
}

#[test]
fn a_record_that_knows_its_last_letter_only_swallows_the_ones_before() {
    assert_broken(REDRIVEN, Variant::LastLetterReopens, &[EveryLetterRuns]);
    assert_broken(REDRIVE, Variant::LastLetterReopens, &[EveryLetterRuns]);
}

#[test]
fn a_renewal_without_fence_keeps_two_holders_alive() {
    let broken = [OneLiveLease, FencedWriteRejected, ExplainedDuplicate];
    assert_broken(ONE_COPY, Variant::RenewWithoutFence, &broken);
}

#[test]
fn a_sweep_before_the_retention_is_over_lets_the_event_run_again() {
    let broken =
        [TerminalExclusive, NoStartAfterTerminal, ExplainedDuplicate, AttemptsBounded, AttemptsSurvive, SweepSafe];
    assert_broken(FORGETFUL, Variant::SweepEarly, &broken);
}

#[test]
fn a_sweep_that_takes_held_records_makes_two_holders() {
    let broken = [
        TerminalExclusive,
        NoStartAfterTerminal,
        OneLiveLease,
        ExplainedDuplicate,
        AttemptsBounded,
        AttemptsSurvive,
        SweepSafe,
    ];
    assert_broken(FORGETFUL, Variant::SweepHeld, &broken);
}

#[test]
fn an_uncounted_failure_that_keeps_its_attempt_takes_a_chance_away() {
    assert_broken(UNCOUNTED, Variant::UncountedCounts, &[ChancesKept]);
}

#[test]
fn an_uncounted_failure_that_gives_its_fence_back_has_it_granted_twice() {
    assert_broken(UNCOUNTED, Variant::UncountedLowersFence, &[FenceMonotonic]);
}

#[test]
fn a_claim_that_ignores_the_wait_starts_too_early() {
    assert_broken(ONE_COPY, Variant::WaitIgnored, &[RetryNotEarly]);
}

#[test]
fn a_token_of_the_process_grants_one_lease_to_two_workers() {
    let broken = [OneLiveLease, ExplainedDuplicate, AttemptsBounded];
    assert_broken(ONE_COPY, Variant::TokenOfProcess, &broken);
}

#[test]
fn an_unknown_commit_tried_again_within_its_attempt_is_no_longer_counted() {
    assert_broken(UNKNOWN_COMMIT, Variant::UnknownRunsAgain, &[AttemptsBounded]);
}

#[test]
fn a_transaction_that_commits_on_already_done_has_its_effect_twice() {
    assert_broken(UNKNOWN_COMMIT, Variant::RepeatCommits, &[ExplainedDuplicate, EffectOnceTx, AttemptsBounded]);
}
