//! The test kit of hapax: what an adapter must pass, what breaks a consumer on purpose, and who watches.
//!
//! - [`conformance`]: one named test for each clause of the contracts; [`broker_conformance!`], [`store_conformance!`] and
//!   [`transactional_conformance!`] run them all against a fixture.
//! - [`faulty`]: brokers and stores that fail, hang, lose answers, deliver twice and out of order.
//! - [`ledger`]: the history of what happened, kept by witnesses.
//! - [`simulation`]: the real pipeline behind faults from a seed, any number of times.
//! - [`Harness`]: a user's production wiring, without a broker and without waiting.
//! - [`explore()`]: which await points of a handler stand a crash.
//! - [`proxy`]: a link between a client and a real server that cuts, freezes and loses replies.
//! - [`servers`]: where the real brokers and databases of a test are, and certificates for a private one.
//! - [`checkers`]: the invariants of the promise, as functions over a history.
//!
//! Everything that decides is seeded, and every clock is tokio's: a run repeats exactly.

pub mod checkers;
pub mod conformance;
pub mod explore;
pub mod faulty;
pub mod harness;
pub mod ledger;
pub mod proxy;
pub mod servers;
pub mod simulation;
mod stage;

pub use explore::{Explore, explore};
pub use harness::Harness;
pub use stage::{NoPublisher, StageStore, crash_point};
