//! The conformance suites: one named test for each clause of the contracts in `hapax`.
//!
//! An adapter writes a fixture (how to get a fresh back end, how to look behind it) and makes one macro call. Which cases
//! there are is decided here and nowhere else: a case is one function and one line in the list of its file, so that no
//! adapter chooses among them.
//!
//! Cases are plain async functions that panic when a clause is broken. Deliberately wrong back ends show that each of
//! them can (`tests/conformance/wrong.rs` of this package).

pub mod broker;
mod history;
pub mod store;
pub mod transactions;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

pub use broker::BrokerFixture;
pub use store::StoreFixture;
pub use transactions::TransactionalFixture;

/// How long a case may take on a real clock before it fails with its name.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// How long a case may take on a paused clock. A case that hangs reaches it at once, whatever it is; it is longer because
/// waiting is free there.
pub const PAUSED_DEADLINE: Duration = Duration::from_secs(600);

/// The clock that a back end lives by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// tokio's paused clock: waiting takes no time, and a run repeats exactly.
    Paused,
    /// The machine's or a server's clock: waiting takes its time.
    Real,
}

/// One case with its name: the name is what a clause of the contract calls it.
pub struct Case<F: ?Sized> {
    /// The name.
    pub name: &'static str,
    /// The case.
    pub run: for<'a> fn(&'a F) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>,
}

impl<F: ?Sized> fmt::Debug for Case<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Runs one case on a runtime of its own; panics with the case's name when it does not end in time.
pub fn run<F: Future<Output = ()>>(name: &str, clock: Clock, case: F) {
    let mut builder = match clock {
        Clock::Paused => tokio::runtime::Builder::new_current_thread(),
        Clock::Real => tokio::runtime::Builder::new_multi_thread(),
    };
    let deadline = match clock {
        Clock::Paused => {
            builder.start_paused(true);
            PAUSED_DEADLINE
        }
        Clock::Real => {
            builder.worker_threads(2);
            DEADLINE
        }
    };
    let runtime = builder.enable_all().build().expect("a runtime can be built");
    let ended = runtime.block_on(async { tokio::time::timeout(deadline, case).await });
    // A back end's own threads must not keep a failed case from being reported.
    runtime.shutdown_timeout(Duration::from_secs(1));
    assert!(ended.is_ok(), "{name}: not done after {deadline:?}");
}

/// The list of cases as data, from the list macro of a suite.
#[doc(hidden)]
#[macro_export]
macro_rules! conformance_list {
    ([$fixture:ident] $($name:ident)*) => {
        /// Every case of this suite, in the order of the contract.
        pub fn cases<F: $fixture>() -> Vec<$crate::conformance::Case<F>> {
            vec![$($crate::conformance::Case { name: stringify!($name), run: |fixture| Box::pin($name(fixture)) }),*]
        }
    };
}

/// One `#[test]` for each case of a suite.
#[doc(hidden)]
#[macro_export]
macro_rules! conformance_tests {
    ([$suite:ident $fixture:ident $make:expr] $($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                fn clock_of<F: $crate::conformance::$fixture, M: ::std::future::Future<Output = F>>(
                    _: impl FnOnce() -> M,
                ) -> $crate::conformance::Clock {
                    F::CLOCK
                }
                let make = || async { $make };
                let clock = clock_of(make);
                $crate::conformance::run(stringify!($name), clock, async {
                    let fixture = make().await;
                    $crate::conformance::$suite::$name(&fixture).await;
                });
            }
        )*
    };
}

/// The broker suite: one `#[test]` for each case. Takes an expression that makes a fresh [`BrokerFixture`] (it may
/// await), and a module's name before it where a file has several.
///
/// ```text
/// hapax_testkit::broker_conformance!(MemoryTopic::fresh());
/// hapax_testkit::broker_conformance!(quorum_queues, Rabbit::fresh(Queue::Quorum).await);
/// ```
#[macro_export]
macro_rules! broker_conformance {
    ($module:ident, $make:expr) => {
        mod $module {
            #[allow(unused_imports, reason = "the expression may name things of the file")]
            use super::*;
            $crate::broker_conformance!($make);
        }
    };
    ($make:expr) => {
        $crate::broker_cases! { conformance_tests [broker BrokerFixture $make] }
    };
}

/// The store suite: one `#[test]` for each case. Takes an expression that makes a fresh [`StoreFixture`] (it may await),
/// and a module's name before it where a file has several.
#[macro_export]
macro_rules! store_conformance {
    ($module:ident, $make:expr) => {
        mod $module {
            #[allow(unused_imports, reason = "the expression may name things of the file")]
            use super::*;
            $crate::store_conformance!($make);
        }
    };
    ($make:expr) => {
        $crate::store_cases! { conformance_tests [store StoreFixture $make] }
    };
}

/// The suite for stores with transactions, beside [`store_conformance!`]. Takes an expression that makes a fresh
/// [`TransactionalFixture`] (it may await), and a module's name before it where a file has several.
#[macro_export]
macro_rules! transactional_conformance {
    ($module:ident, $make:expr) => {
        mod $module {
            #[allow(unused_imports, reason = "the expression may name things of the file")]
            use super::*;
            $crate::transactional_conformance!($make);
        }
    };
    ($make:expr) => {
        $crate::transactional_cases! { conformance_tests [transactions TransactionalFixture $make] }
    };
}
