//! The conformance suites against the back ends of this repository, and the proof that every case can fail.

mod clauses;
mod memory;
mod wrong;
