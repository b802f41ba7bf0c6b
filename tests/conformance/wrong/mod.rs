//! Deliberately wrong back ends: a case that none of them breaks proves nothing.
//!
//! Each names the cases that must fail on it. The same back ends without their fault pass every case, so that a case fails
//! for its reason and not for the back end's clumsiness.

mod broker;
pub(crate) mod store;

use std::collections::BTreeSet;
use std::time::Duration;

use hapax_testkit::conformance::{Case, Clock};

/// Runs a case by itself and says whether it passed. The clock is paused: a case that hangs has failed at once.
fn passes<F: Send + Sync + 'static>(case: &Case<F>, fixture: F) -> bool {
    let case = case.run;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime can be built");
    runtime.block_on(async {
        let run = tokio::spawn(async move { case(&fixture).await });
        matches!(tokio::time::timeout(Duration::from_secs(300), run).await, Ok(Ok(())))
    })
}

/// The table of one suite: every wrong back end breaks the cases that it names, every case is broken by one, and none
/// is broken by the right one.
struct Table<W: 'static, F> {
    right: W,
    wrong: &'static [(W, &'static [&'static str])],
    cases: fn() -> Vec<Case<F>>,
    fixture: fn(W) -> F,
}

impl<W: Copy + std::fmt::Debug, F: Send + Sync + 'static> Table<W, F> {
    fn case(&self, name: &str) -> Case<F> {
        let case = (self.cases)().into_iter().find(|case| case.name == name);
        case.unwrap_or_else(|| panic!("the suite has no case {name}"))
    }

    fn every_case_passes_on_the_right_back_end(&self) {
        for case in (self.cases)() {
            assert!(passes(&case, (self.fixture)(self.right)), "{case:?} fails on the right back end");
        }
    }

    fn every_case_fails_on_its_wrong_back_end(&self) {
        let mut broken = BTreeSet::new();
        for (wrong, cases) in self.wrong {
            for name in *cases {
                assert!(!passes(&self.case(name), (self.fixture)(*wrong)), "{name} passes on {wrong:?}");
                broken.insert(*name);
            }
        }
        let all: BTreeSet<_> = (self.cases)().iter().map(|case| case.name).collect();
        let unproved: Vec<_> = all.difference(&broken).collect();
        assert!(unproved.is_empty(), "no wrong back end breaks {unproved:?}");
    }
}

const CLOCK: Clock = Clock::Paused;
const UNIT: Duration = Duration::from_millis(100);

#[test]
#[should_panic(expected = "a_case: not done after")]
fn a_case_that_hangs_fails_with_its_name() {
    hapax_testkit::conformance::run("a_case", CLOCK, std::future::pending());
}
