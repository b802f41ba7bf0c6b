//! The conformance suites against the back ends of this repository, and the proof that every case can fail; the faulty
//! wrappers and the checkers of the kit, proved the same way.

mod checkers;
mod clauses;
mod faulty;
mod memory;
mod sqlite;
mod wrong;
