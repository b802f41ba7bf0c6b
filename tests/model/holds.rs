//! The protocol as designed: every invariant holds in every state of each scenario, with the exceptions that the tests
//! name.

use std::collections::BTreeSet;

use crate::exploration::{assert_broken, explore};
use crate::invariant::Invariant::EffectOnceTx;
use crate::scenario::{
    CLAIMS, FORGETFUL, Faults, LETTERS, ONE_COPY, REDRIVE, REDRIVE_TWICE, Scenario, TAKEOVERS, THREE_WORKERS,
    TRANSACTION, UNCOUNTED,
};
use crate::variant::Variant::Proposed;

#[test]
fn the_protocol_holds_in_every_state() {
    assert_broken(CLAIMS, Proposed, &[]);
}

#[test]
fn takeovers_are_bounded_and_the_last_one_sets_the_event_aside() {
    assert_broken(TAKEOVERS, Proposed, &[]);
}

#[test]
fn a_dead_letter_is_placed_wherever_its_path_is_cut() {
    assert_broken(LETTERS, Proposed, &[]);
}

#[test]
fn a_third_worker_changes_nothing() {
    assert_broken(THREE_WORKERS, Proposed, &[]);
    assert_broken(Scenario { retryable: false, permanent: true, ..THREE_WORKERS }, Proposed, &[]);
}

#[test]
fn an_uncounted_failure_costs_no_attempt() {
    assert_broken(UNCOUNTED, Proposed, &[]);
}

#[test]
fn with_a_transaction_the_effect_happens_once() {
    assert_broken(TRANSACTION, Proposed, &[]);
    let commits_twice_unknown = Faults { crashes: 0, timeouts: 2, ..TRANSACTION.faults };
    assert_broken(Scenario { faults: commits_twice_unknown, ..TRANSACTION }, Proposed, &[]);
}

#[test]
fn without_a_transaction_an_effect_repeats_only_where_a_window_explains_it() {
    assert_broken(Scenario { once: true, ..ONE_COPY }, Proposed, &[EffectOnceTx]);
}

#[test]
fn without_a_crash_or_a_lost_lease_no_effect_repeats() {
    let no_window = Faults { crashes: 0, pauses: 0, lost_settles: 1, uncounted: 1, ..CLAIMS.faults };
    assert_broken(Scenario { once: true, faults: no_window, ..CLAIMS }, Proposed, &[]);
}

#[test]
fn sweep_after_the_retention_forgets_nothing_that_can_come_back() {
    assert_broken(FORGETFUL, Proposed, &[]);
}

/// A letter bears the fence of the holder that placed it. If that holder dies before `DeadLettered` is recorded, the
/// next one places a second letter: whichever of them comes back first runs, the others are its duplicates.
#[test]
fn any_dead_letter_sent_back_runs_once_in_all() {
    assert_broken(REDRIVE, Proposed, &[]);
    assert_broken(REDRIVE_TWICE, Proposed, &[]);
}

#[test]
fn an_exploration_repeats_exactly() {
    let first = explore(ONE_COPY, Proposed);
    assert_eq!(first, explore(ONE_COPY, Proposed));
    assert_eq!(first.1, BTreeSet::new());
}
