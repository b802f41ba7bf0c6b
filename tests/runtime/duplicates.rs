//! An event that has ended is never run again, whoever delivers it: the record outlives the ack.

use std::time::Duration;

use hapax::Status;

use crate::rig::{Rig, Runs, event};

#[tokio::test(start_paused = true)]
async fn a_second_delivery_of_a_processed_event_is_acked_without_the_handler() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.send(event("1")).await;
    rig.settled().await;
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!(runs.len(), 1);
    assert_eq!(rig.status("billing", "1").await, Some(Status::Processed));
    assert_eq!(billing.statistics().duplicates, 1);
    tokio::time::sleep(Duration::from_secs(1)).await;
    billing.stop().await;
}
