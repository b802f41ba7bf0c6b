//! The runtime on memory broker and store, under tokio's paused clock: what a consumer does with every delivery.
//!
//! One file for each theme; each says which invariant it holds up. Tests that bear the name of a bug of another system
//! cite its issue beside them.

mod duplicates;
mod journal;
mod rig;
