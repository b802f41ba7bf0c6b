//! The test kit of hapax: what an adapter must pass, and what breaks a consumer on purpose.
//!
//! - [`conformance`]: one named test for each clause of the contracts; [`broker_conformance!`], [`store_conformance!`] and
//!   [`transactional_conformance!`] run them all against a fixture.
//!
//! Everything that decides is seeded, and every clock is tokio's: a run repeats exactly.

pub mod conformance;
pub mod faulty;
pub mod ledger;
