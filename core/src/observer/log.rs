//! The log lines of the default observer: what an operator wants to read, nothing for an event that succeeds.

use tracing::{info, warn};

use super::Observed;
use crate::secret::redact;

/// What filters name: `RUST_LOG=hapax=info`.
const TARGET: &str = "hapax";

pub(super) fn log(consumer: &str, what: &Observed<'_>) {
    match *what {
        Observed::DeadLettered { reason, id, error } => {
            warn!(target: TARGET, consumer, reason = reason.as_str(), id, error, "dead-lettered");
        }
        Observed::Conflict => warn!(target: TARGET, consumer, "an id came with other data than before"),
        Observed::LeaseLost => {
            warn!(target: TARGET, consumer, "lease lost while the handler ran: another may run the event too");
        }
        Observed::Fenced => warn!(target: TARGET, consumer, "write refused: another holds the event"),
        Observed::Vanished => {
            warn!(target: TARGET, consumer, "record vanished before its outcome was written: is the store evicting?");
        }
        Observed::BatchFailed { route, events, error } => {
            let error = &*redact(error);
            warn!(target: TARGET, consumer, route, events, error, "a batch failed as a whole: its events run one by one");
        }
        Observed::Switch { open: true } => {
            warn!(target: TARGET, consumer, "kill switch open: too many failures, intake pauses and probes");
        }
        Observed::Switch { open: false } => warn!(target: TARGET, consumer, "kill switch closed: intake goes on"),
        Observed::Reach { side, up: false, error } => {
            let error = &*redact(error);
            warn!(target: TARGET, consumer, side = side.as_str(), error, "cannot be reached: intake waits");
        }
        Observed::Reach { side, up: true, .. } => {
            info!(target: TARGET, consumer, side = side.as_str(), "reached");
        }
        Observed::Received { .. }
        | Observed::Ignored
        | Observed::Called { .. }
        | Observed::TakenOver
        | Observed::Duplicate { .. }
        | Observed::Handled { .. }
        | Observed::Retried { .. }
        | Observed::Waiting { .. }
        | Observed::InFlight { .. }
        | Observed::Lag { .. } => {}
    }
}
