//! Redeliveries: whatever the broker delivers again attaches to what is known already. S3 NoStartAfterTerminal,
//! S9 SettleOnce.

use std::time::Duration;

use hapax::{ErrorKind, Status};
use tokio::time::sleep;

use crate::rig::{Rig, Runs, event};
use crate::script::{self, Fault, Script};

/// MassTransit/MassTransit#4753, #5915: a local table of pending messages refused redeliveries until the broker's limit
/// moved them to the dead letters.
#[tokio::test(start_paused = true)]
async fn redelivery_while_pending_attaches_not_rejects() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.take(Duration::from_secs(20)))).await;
    rig.send(event("1")).await;
    rig.until("running", || runs.len() == 1).await;
    for _ in 0..5 {
        assert!(rig.broker.redeliver(1));
        sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(rig.journal.lines_of("settle"), [""; 0], "none is refused: they wait for the running attempt");
    assert_eq!(rig.journal.lines_of("store claim"), ["store claim 1"], "without asking the store");
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates), (1, 5));
    assert_eq!(rig.journal.lines_of("settle"), ["settle ack"; 6]);
}

/// xing/beetle#61: the record was deleted at the ack; the ack was lost in the TCP buffer, and the handler ran again.
#[tokio::test(start_paused = true)]
async fn ack_lost_after_complete_is_deduped() {
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
