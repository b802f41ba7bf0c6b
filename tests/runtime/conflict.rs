//! Invariant: one id with other data is never run, never acked as a duplicate, and never changes what was recorded: it is
//! set aside as a conflict, whatever state the event is in.

use std::time::Duration;

use hapax::{Failure, Message, Reason, Status};

use crate::rig::{Rig, Runs, event};

const SECOND: Duration = Duration::from_secs(1);

fn other(id: &str) -> Message {
    event(id).with_data("application/json", r#"{"id":"another"}"#)
}

fn conflicts(rig: &Rig) -> usize {
    rig.dead().iter().filter(|(_, reason)| *reason == Reason::Conflict).count()
}

#[tokio::test(start_paused = true)]
async fn other_data_under_a_known_id_is_set_aside_and_not_run() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.send(event("1")).await;
    rig.send(other("1")).await;
    rig.settled().await;
    assert_eq!((runs.len(), rig.dead()), (1, vec![("1".to_owned(), Reason::Conflict)]));
    let statistics = billing.statistics();
    assert_eq!((statistics.conflicts, statistics.duplicates, statistics.processed), (1, 0, 1));
    assert_eq!(rig.journal.observed("Conflict"), 1);
    let (message, letter) = rig.dead_letter();
    assert_eq!((&message.data[..], letter.reopen), (&br#"{"id":"another"}"#[..], None));
    assert!(letter.error.contains("new id"), "{}", letter.error);
    assert_eq!(rig.status("billing", "1").await, Some(Status::Processed), "what was recorded stays");
    billing.stop().await;
}

/// aws-powertools/powertools-lambda-python#3821, powertools-lambda-java#2261: a record was cached or served before the
/// payload was compared.
#[tokio::test(start_paused = true)]
async fn conflict_checked_before_any_shortcut() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.then(|run, _| async move {
        match run.id.as_str() {
            "dead" => Err(Failure::permanent("no")),
            "waiting" if run.attempt == 1 => Err(Failure::retryable("busy").after(600 * SECOND)),
            "running" => {
                tokio::time::sleep(50 * SECOND).await;
                Ok(())
            }
            _ => Ok(()),
        }
    });
    let first = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send_all(["dead", "waiting", "running", "processed"]).await;
    rig.until("they stand where they should", || runs.len() == 4).await;
    rig.quiet().await;
    // In the same process the copies of what runs take turns; in another they are answered at once.
    for id in ["dead", "waiting", "processed"] {
        rig.send(other(id)).await;
    }
    rig.until("three are set aside", || conflicts(&rig) == 3).await;
    assert_eq!(runs.len(), 4);
    first.connection.drain_session();
    let second = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.send(other("running")).await;
    rig.until("the fourth is, too", || conflicts(&rig) == 4).await;
    rig.settled().await;
    assert_eq!(runs.all().iter().filter(|run| run.data.contains("another")).count(), 0);
    assert_eq!(rig.status("billing", "waiting").await, Some(Status::Processed));
    first.stop().await;
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_counts_are_the_bytes_of_the_data_and_their_type() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    let send = |id: &str, media: &str, data: &'static str| rig.send(event(id).with_data(media, data));
    send("1", "application/json", r#"{"a":1,"b":2}"#).await;
    send("1", "application/json", r#"{"b":2,"a":1}"#).await;
    send("2", "application/json", "1").await;
    send("2", "text/plain", "1").await;
    rig.settled().await;
    assert_eq!((runs.len(), conflicts(&rig)), (2, 2));
    // Headers and other attributes do not count: brokers and tracing change them on the way.
    let mut traced = event("3").with_header("x-hop", "1");
    rig.send(traced.clone()).await;
    traced.headers.set("x-hop", "2");
    traced.attributes.traceparent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into());
    traced.attributes.time = Some("2026-01-01T00:00:00Z".into());
    rig.send(traced).await;
    rig.settled().await;
    assert_eq!((runs.len(), conflicts(&rig), billing.statistics().duplicates), (3, 2, 1));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_conflict_comes_back_only_under_a_new_id() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.send(event("1")).await;
    rig.send(other("1")).await;
    rig.settled().await;
    rig.broker.redrive();
    rig.settled().await;
    assert_eq!((runs.len(), conflicts(&rig)), (1, 1), "sent back as it is, it is a conflict again");
    let (mut letter, _) = rig.broker.take_dead_letters().remove(0);
    letter.attributes.id = Some("2".into());
    rig.send(letter).await;
    rig.settled().await;
    assert_eq!((runs.ids(), rig.dead()), (vec!["1".into(), "2".to_owned()], vec![]));
    billing.stop().await;
}
