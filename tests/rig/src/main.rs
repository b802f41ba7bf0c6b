//! The rig: real workers, brokers and stores, broken on purpose, and the promise checked on what is left.
//!
//! Worker processes (the example `webhook_worker`) consume what `publish` sends, while a plan drawn from a seed kills and
//! pauses them, restarts servers and cuts connections. Witnesses outside of the workers write one [history] of it; when
//! the faults are over and everything has come to rest, the [judge] runs the invariants of the test kit over it.
//!
//! Exit codes: 0 when every invariant holds, 1 when one does not, 2 when the rig itself could not go on.
//!
//! [history]: hapax_testkit::ledger

mod conductor;
mod crew;
mod faults;
mod judge;
mod letters;
mod links;
mod options;
mod plan;
mod producer;
mod report;
mod scribe;
mod servers;
mod timing;
mod witness;

use std::process::ExitCode;

use clap::Parser;

use crate::options::Options;

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    match conductor::run(&options).await {
        Ok(report) => {
            println!("{}", if options.json { report.to_json() } else { report.to_string() });
            if report.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(why) => {
            eprintln!("rig: {why}");
            ExitCode::from(2)
        }
    }
}
