//! Runs the checker over one scenario and says what it found.

use std::collections::BTreeSet;

use stateright::{Checker, HasDiscoveries, Model};

use crate::invariant::Invariant;
use crate::protocol::{Action, Protocol};
use crate::scenario::Scenario;
use crate::variant::Variant;

/// Explores every state and answers how many there are and which invariants are broken in some of them.
pub(crate) fn explore(scenario: Scenario, variant: Variant) -> (usize, BTreeSet<Invariant>) {
    let checker = Protocol { scenario, variant }.checker().spawn_bfs().join();
    let discoveries = checker.discoveries();
    let broken = Invariant::ALL.iter().copied().filter(|invariant| discoveries.contains_key(invariant.name()));
    (checker.unique_state_count(), broken.collect())
}

/// A shortest way to a state where `invariant` is broken.
pub(crate) fn counterexample(scenario: Scenario, variant: Variant, invariant: Invariant) -> Option<Vec<Action>> {
    let wanted = HasDiscoveries::AllOf(BTreeSet::from([invariant.name()]));
    let checker = Protocol { scenario, variant }.checker().finish_when(wanted).spawn_bfs().join();
    checker.discovery(invariant.name()).map(stateright::Path::into_actions)
}

/// Explores every state; the invariants broken in some of them must be exactly these.
#[track_caller]
pub(crate) fn assert_broken(scenario: Scenario, variant: Variant, expected: &[Invariant]) {
    let (states, broken) = explore(scenario, variant);
    println!("{variant:?}: {states} states, broken {broken:?}");
    let expected = BTreeSet::from_iter(expected.iter().copied());
    for &invariant in broken.difference(&expected) {
        println!("\n{variant:?} breaks {} after:", invariant.name());
        for action in counterexample(scenario, variant, invariant).into_iter().flatten() {
            println!("    {action:?}");
        }
    }
    assert_eq!(broken, expected, "the broken invariants of {variant:?} over {states} states");
}
