//! Every clause of a contract has its case, and every case its clause: the names in the documentation of the traits are
//! the names of the suites.

use std::collections::BTreeSet;

use hapax_testkit::conformance::{broker, store, transactions};

use crate::memory::{MemoryRecords, MemoryTopic};
use crate::wrong::store::WrongTransactions;

const BROKER: &str = include_str!("../../core/src/broker.rs");
const STORE: &str = include_str!("../../core/src/store.rs");

/// The snake-case words in backticks within parentheses of the documentation.
fn clauses(source: &str) -> BTreeSet<String> {
    let documentation: String =
        source.lines().filter_map(|line| line.trim().strip_prefix("///")).flat_map(|line| [line, "\n"]).collect();
    let (mut depth, mut names) = (0, BTreeSet::new());
    for (n, part) in documentation.split('`').enumerate() {
        if n % 2 == 1 {
            let is_name = part.contains('_') && part.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            if depth > 0 && is_name {
                names.insert(part.to_owned());
            }
            continue;
        }
        for c in part.chars() {
            match c {
                '(' => depth += 1,
                ')' => depth -= 1,
                _ => {}
            }
        }
        assert!(depth >= 0, "a parenthesis too many before {part:?}");
    }
    names
}

fn names(cases: impl IntoIterator<Item = &'static str>) -> BTreeSet<String> {
    cases.into_iter().map(str::to_owned).collect()
}

#[test]
fn every_clause_on_the_broker_has_its_case_and_every_case_its_clause() {
    let cases = names(broker::cases::<MemoryTopic>().iter().map(|case| case.name));
    assert!(cases.len() > 20);
    assert_eq!(clauses(BROKER), cases);
}

#[test]
fn every_clause_on_the_store_has_its_case_and_every_case_its_clause() {
    let mut cases = names(store::cases::<MemoryRecords>().iter().map(|case| case.name));
    cases.extend(names(transactions::cases::<WrongTransactions>().iter().map(|case| case.name)));
    assert!(cases.len() > 25);
    assert_eq!(clauses(STORE), cases);
}

#[test]
fn a_name_counts_as_a_clause_only_within_parentheses() {
    let source = "/// - One clause (`it_holds`,\n///   `it_holds_on`), not `this_one`, not ([`x`](Self::close_it)).\nfn not_this() {}";
    assert_eq!(clauses(source), names(["it_holds", "it_holds_on"]));
}
