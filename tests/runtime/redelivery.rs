//! Redeliveries: whatever the broker delivers again attaches to what is known already. S3 NoStartAfterTerminal,
//! S9 SettleOnce.

use hapax::{ErrorKind, Status};

use crate::rig::{Rig, Runs, event};
use crate::script::{self, Fault, Script};

/// The process lives on; `ack_lost_after_complete_is_deduped` is the one that dies.
#[tokio::test(start_paused = true)]
async fn an_ack_that_is_lost_with_its_connection_leaves_a_duplicate_and_no_repeat() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    script.next("settle", Fault::Refuse(ErrorKind::Unknown));
    let billing = script::start(&rig, "billing", &script, |c| c.on_any(runs.ok())).await;
    rig.send(event("1")).await;
    rig.until("recorded", || !rig.journal.lines_of("store record").is_empty()).await;
    // The connection breaks with the ack in it: the broker has not seen it, and delivers again.
    billing.connection.end_session();
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates), (1, 1));
    assert_eq!(rig.status("billing", "1").await, Some(Status::Processed), "the record outlives the ack");
}

#[tokio::test(start_paused = true)]
async fn a_process_that_dies_between_record_and_ack_leaves_a_duplicate_and_no_repeat() {
    let (rig, runs, script) = (Rig::new(), Runs::default(), Script::default());
    let _never = script.gate("settle");
    let first = script::start(&rig, "billing", &script, |c| c.on_any(runs.ok())).await;
    rig.send(event("1")).await;
    rig.until("recorded", || !rig.journal.lines_of("store record").is_empty()).await;
    first.crash().await;
    let second = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    assert_eq!((runs.len(), second.statistics().duplicates), (1, 1));
}
