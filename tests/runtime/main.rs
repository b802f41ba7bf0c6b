//! The runtime on memory broker and store, under tokio's paused clock: what a consumer does with every delivery.
//!
//! One file for each theme; each says which invariant it holds up. Tests that bear the name of a bug of another system
//! cite its issue beside them.

#![allow(clippy::unwrap_used, reason = "a test's helper that cannot go on ends the test")]

mod back_pressure;
mod batches;
mod concurrent_duplicates;
mod conflict;
mod context;
mod dead_letters;
mod duplicates;
mod failure_classes;
mod health;
mod holes;
mod journal;
mod kill_switch;
mod leases;
mod missing_id;
mod order;
mod outage;
mod panics;
mod pause_resume;
mod publishing;
mod redelivery;
mod reopen;
mod retries;
mod rig;
mod round_trips;
mod routing;
mod script;
mod settings;
mod shutdown;
mod standby;
mod transactions;
mod two_versions;
mod versions;
mod zombies;
