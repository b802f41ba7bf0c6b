//! Invariant: a handler is never started after its event's outcome is recorded and retained, whoever delivers the event
//! again and whatever answer was lost. The record outlives the ack; forgetting it is a window, and told.

use std::time::Duration;

use hapax::{Message, Status, StoreAdmin, Window};
use hapax_memory::MemoryBroker;
use hapax_testkit::faulty::Faults;

use crate::rig::{Rig, Runs, TYPE, event};

#[tokio::test(start_paused = true)]
async fn a_second_delivery_of_a_processed_event_is_acked_without_the_handler() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    for _ in 0..3 {
        rig.send(event("1")).await;
        rig.settled().await;
    }
    assert_eq!(runs.len(), 1);
    assert_eq!(rig.status("billing", "1").await, Some(Status::Processed));
    let statistics = billing.statistics();
    assert_eq!((statistics.processed, statistics.duplicates, statistics.dead_lettered), (1, 2, 0));
    assert_eq!(rig.journal.lines_of("settle "), ["settle ack"; 3]);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn another_process_finds_what_an_earlier_one_processed() {
    let (rig, runs) = (Rig::new(), Runs::default());
    rig.send(event("1")).await;
    let first = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    first.stop().await;
    rig.send(event("1")).await;
    let second = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    assert_eq!((runs.len(), second.statistics().duplicates), (1, 1));
    second.stop().await;
}

/// xing/beetle#61: the keys were deleted at the ack, the ack was lost on its way, and the handler ran again.
#[tokio::test(start_paused = true)]
async fn ack_lost_after_complete_is_deduped() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let faults = rig.broker_faults.clone();
    let first = rig
        .start("billing", |c| {
            c.on_any(runs.then(move |_, _| {
                faults.begin_outage();
                async { Ok(()) }
            }))
        })
        .await;
    rig.send(event("1")).await;
    rig.until("the ack is lost", || !rig.journal.lines_of("settle ack!").is_empty()).await;
    assert_eq!(rig.status("billing", "1").await, Some(Status::Processed));
    first.crash().await;
    rig.broker_faults.end_outage();
    let second = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    assert_eq!((runs.len(), second.statistics().duplicates), (1, 1));
    second.stop().await;
}

/// JasperFx/wolverine GH-3886: a store chosen by the message's type alone was shared by two handlers of it. And of
/// mq-bridge: two routes that share a table collide.
#[tokio::test(start_paused = true)]
async fn same_id_two_scopes_both_run() {
    let (rig, billed, shipped) = (Rig::new(), Runs::default(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(billed.ok())).await;
    let shipping = rig.start("shipping", |c| c.on_any(shipped.ok())).await;
    rig.send_all(["1", "1", "2"]).await;
    rig.settled().await;
    rig.until("the other group is done", || shipping.statistics().duplicates == 1).await;
    assert_eq!((billed.ids(), shipped.ids()), (vec!["1".into(), "2".into()], vec!["1".to_owned(), "2".to_owned()]));
    assert_ne!(billed.all()[0].key, shipped.all()[0].key, "callees tell the two consumers apart");
    billing.stop().await;
    shipping.stop().await;
}

#[tokio::test(start_paused = true)]
async fn one_id_of_two_sources_is_two_events() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    // Joined without their lengths these would be one text.
    for (source, id) in [("/shop", "1"), ("/till", "1"), ("/shop1", "2"), ("/shop", "12")] {
        rig.send(Message::event(source, id, TYPE)).await;
    }
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates), (4, 0));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_delivers_everything_twice_has_no_effect_twice() {
    let (rig, runs) = (Rig::new(), Runs::default());
    rig.broker.duplicate(200);
    rig.broker.shuffle(Some(7));
    let billing = rig.start("billing", |c| c.on_any(runs.take(Duration::from_millis(20)))).await;
    rig.send_all(0..200).await;
    rig.settled().await;
    let mut ids = runs.ids();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!((ids.len(), runs.len()), (200, 200));
    assert_eq!(billing.statistics().duplicates, 200);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn lost_answers_of_store_and_broker_make_nothing_run_twice() {
    let lossy = |seed| Faults { lose_reply: 0.4, ..Faults::none(seed) };
    let broker = MemoryBroker::builder("orders").group("billing");
    let (rig, runs) = (Rig::with_faults(broker, lossy(11), lossy(12)), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok()).batch_max(7)).await;
    rig.send_all(0..100).await;
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().processed), (100, 100));
    assert!(runs.all().iter().all(|run| run.attempt == 1), "asking again with the same token is no new attempt");
    assert!(rig.store_faults.injected()["lose-reply"] > 10);
    billing.stop().await;
}

/// Particular/docs.particular.net#3947: the record was swept while the message still waited to be sent again.
#[tokio::test(start_paused = true)]
async fn replay_after_sweep_is_reported() {
    let day = Duration::from_hours(24);
    let broker = MemoryBroker::builder("orders").group("billing").redelivery_horizon(30 * day);
    let (rig, runs) = (Rig::of(broker), Runs::default());
    let (builder, _) = rig.process("billing");
    let refused = builder.on_any(runs.ok()).build().await.unwrap_err();
    assert!(refused.to_string().contains("Window::Forgotten"), "{refused}");
    let billing = rig.start("billing", |c| c.on_any(runs.ok()).allow(Window::Forgotten)).await;
    assert!(billing.handle.guarantee().is_open(Window::Forgotten), "said where it is allowed");
    rig.send(event("1")).await;
    rig.settled().await;
    // While the record is there, every duplicate tells how old it is: an alarm can go off before the retention is over.
    rig.store.step_clock(7 * 86_400_000_000);
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!(rig.journal.observed("Duplicate { of: Processed, ago: Some(604800"), 1, "7 days are 604,800 s");
    rig.store.step_clock(2 * 86_400_000_000);
    assert_eq!(rig.store.sweep(10).await.unwrap().removed, 1);
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!(runs.attempts("1"), [1, 1], "the declared window");
    assert!(runs.all()[0].fence < runs.all()[1].fence, "fences grow over forgotten records");
    billing.stop().await;
}
