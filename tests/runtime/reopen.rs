//! Invariant: only an operator reopens an event, by a dead letter that comes back with its token: then it runs again, once
//! in all, mended or not. Everything else that resembles it is a duplicate of a dead letter.

use std::time::Duration;

use hapax::{Failure, Message, Reason, Status};

use crate::rig::{Rig, Runs, event};

const SECOND: Duration = Duration::from_secs(1);

/// A rig whose only event was set aside by its first run; later runs succeed.
async fn with_a_dead_letter(runs: &Runs) -> (Rig, crate::rig::Process) {
    let rig = Rig::new();
    let noted = runs.clone();
    let handler = runs.answer(move |_| if noted.len() == 1 { Err(Failure::permanent("no")) } else { Ok(()) });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!(rig.status("billing", "1").await, Some(Status::DeadLettered));
    (rig, billing)
}

/// MassTransit/MassTransit#3998: what was sent again was skipped, since the original was marked as consumed. And of
/// mq-bridge: what was dropped or set aside is marked as processed, so that a replay of it is swallowed.
#[tokio::test(start_paused = true)]
async fn explicit_redeliver_runs_again() {
    let runs = Runs::default();
    let (rig, billing) = with_a_dead_letter(&runs).await;
    assert_eq!(rig.broker.redrive(), 1);
    rig.settled().await;
    assert_eq!((runs.attempts("1"), rig.dead()), (vec![1, 1], vec![]));
    assert_eq!(rig.status("billing", "1").await, Some(Status::Processed));
    assert!(runs.all()[0].fence < runs.all()[1].fence);
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates), (2, 1), "and is done for good");
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_sent_back_by_other_tools_runs_again_even_mended() {
    for mended in [false, true] {
        let runs = Runs::default();
        let (rig, billing) = with_a_dead_letter(&runs).await;
        let (mut letter, _) = rig.broker.take_dead_letters().remove(0);
        if mended {
            letter = letter.with_data("application/json", r#"{"id":"1","mended":true}"#);
        }
        rig.send_back(&letter).await;
        rig.settled().await;
        assert_eq!((runs.len(), runs.all()[1].data.contains("mended"), rig.dead()), (2, mended, vec![]));
        // From here on the mended data is what the event is.
        rig.send(event("1")).await;
        rig.settled().await;
        let conflicts = if mended { vec![("1".to_owned(), Reason::Conflict)] } else { vec![] };
        assert_eq!((runs.len(), rig.dead()), (2, conflicts));
        billing.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn sent_back_twice_it_runs_once() {
    // One after the other, and both at once.
    for at_once in [false, true] {
        let runs = Runs::default();
        let (rig, billing) = with_a_dead_letter(&runs).await;
        let (letter, _) = rig.broker.take_dead_letters().remove(0);
        rig.send_back(&letter).await;
        if !at_once {
            rig.settled().await;
        }
        rig.send_back(&letter).await;
        rig.settled().await;
        assert_eq!((runs.len(), billing.statistics().duplicates, rig.dead()), (2, 1, vec![]));
        billing.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn sent_back_twice_to_two_processes_it_runs_once() {
    let runs = Runs::default();
    let (rig, billing) = with_a_dead_letter(&runs).await;
    let (letter, _) = rig.broker.take_dead_letters().remove(0);
    billing.stop().await;
    let slow = |runs: &Runs| runs.take(20 * SECOND);
    let first = rig.start("billing", |c| c.on_any(slow(&runs)).in_flight_max(1)).await;
    let second = rig.start("billing", |c| c.on_any(slow(&runs)).in_flight_max(1)).await;
    rig.send_back(&letter).await;
    rig.send_back(&letter).await;
    rig.settled().await;
    assert_eq!((runs.len(), rig.dead()), (2, vec![]));
    first.stop().await;
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_ordinary_duplicate_of_a_dead_letter_is_acked_and_not_run() {
    let runs = Runs::default();
    let (rig, billing) = with_a_dead_letter(&runs).await;
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!((runs.len(), rig.dead().len(), billing.statistics().duplicates), (1, 1, 1));
    assert_eq!(rig.journal.observed("Duplicate { of: DeadLettered"), 1);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_forged_token_opens_nothing() {
    let runs = Runs::default();
    let (rig, billing) = with_a_dead_letter(&runs).await;
    let token = rig.dead_letter().1.reopen.unwrap().get();
    for forged in [token - 1, token + 1, 1, u64::MAX] {
        rig.send_back(&event("1").with_header("hapax-reopen", forged.to_string())).await;
    }
    rig.send_back(&event("2").with_header("hapax-reopen", token.to_string())).await;
    rig.settled().await;
    assert_eq!((runs.of("1").len(), runs.of("2").len()), (1, 1), "on a new event it is a header of no meaning");
    assert_eq!(billing.statistics().duplicates, 4);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn set_aside_again_it_bears_a_new_token_and_the_old_one_is_used_up() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.answer(|_| Err(Failure::permanent("no"))))).await;
    rig.send(event("1")).await;
    rig.settled().await;
    let (old, first) = rig.broker.take_dead_letters().remove(0);
    rig.send_back(&old).await;
    rig.settled().await;
    let (new, second) = rig.broker.take_dead_letters().remove(0);
    assert!(second.reopen > first.reopen);
    let tokens = new.headers.iter().filter(|(name, _)| *name == "hapax-reopen").count();
    assert_eq!((tokens, new.headers.len()), (1, old.headers.len()), "headers do not pile up");
    rig.send_back(&old).await;
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().duplicates), (2, 1));
    rig.send_back(&new).await;
    rig.settled().await;
    assert_eq!(runs.attempts("1"), [1, 1, 1], "each reopening begins anew");
    billing.stop().await;
}

/// A holder dies after it placed its dead letter and before it recorded that: the next holder places one too. Both
/// letters are good, and together they are good once.
#[tokio::test(start_paused = true)]
async fn any_letter_of_a_taken_over_doomed_event_opens_it_once_in_all() {
    for letter in [0, 1] {
        let (rig, runs) = (Rig::new(), Runs::default());
        let broker = rig.broker_faults.clone();
        let noted = runs.clone();
        let wire = |c: crate::rig::Builder, handler| c.on_any(handler).lease(10 * SECOND).call_timeout(SECOND);
        let fatal = runs.answer(move |_| {
            broker.begin_outage();
            if noted.len() == 1 { Err(Failure::permanent("no")) } else { Ok(()) }
        });
        let first = rig.start("billing", |c| wire(c, fatal)).await;
        rig.send(event("1")).await;
        // Doomed is recorded; then the store goes, and the letter is placed.
        rig.until("it is doomed", || !rig.journal.lines_of("store record doomed").is_empty()).await;
        rig.store_faults.begin_outage();
        rig.broker_faults.end_outage();
        rig.until("it is placed", || rig.dead().len() == 1).await;
        first.crash().await;
        rig.store_faults.end_outage();
        assert_eq!(rig.status("billing", "1").await, Some(Status::Doomed));
        // A copy of the event comes when the lease is over.
        rig.send(event("1")).await;
        let second = rig.start("billing", |c| c.on_any(runs.ok()).lease(10 * SECOND)).await;
        rig.settled().await;
        assert_eq!((runs.len(), rig.dead().len()), (1, 2), "a second letter, and no second run");
        let letters = rig.broker.take_dead_letters();
        assert_ne!(letters[0].1.reopen, letters[1].1.reopen);
        rig.send_back(&letters[letter].0).await;
        rig.settled().await;
        assert_eq!((runs.len(), rig.dead()), (2, vec![]), "letter {letter}");
        rig.send_back(&letters[1 - letter].0).await;
        rig.settled().await;
        assert_eq!((runs.len(), rig.dead()), (2, vec![]), "the other one is used up");
        second.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_letter_of_a_doomed_event_whose_holder_died_opens_it_when_the_lease_is_over() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let broker = rig.broker_faults.clone();
    let fatal = runs.answer(move |_| {
        broker.begin_outage();
        Err(Failure::permanent("no"))
    });
    let first = rig.start("billing", |c| c.on_any(fatal)).await;
    rig.send(event("1")).await;
    rig.until("it is doomed", || !rig.journal.lines_of("store record doomed").is_empty()).await;
    rig.store_faults.begin_outage();
    rig.broker_faults.end_outage();
    rig.until("it is placed", || rig.dead().len() == 1).await;
    first.crash().await;
    rig.store_faults.end_outage();
    assert_eq!(rig.status("billing", "1").await, Some(Status::Doomed));
    let second = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.broker.redrive();
    rig.settled().await;
    assert_eq!((runs.len(), rig.status("billing", "1").await), (2, Some(Status::Processed)));
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_reopened_event_whose_process_dies_is_taken_over_and_done_once() {
    let runs = Runs::default();
    let (rig, billing) = with_a_dead_letter(&runs).await;
    billing.stop().await;
    let first = rig.start("billing", |c| c.on_any(runs.take(50 * SECOND))).await;
    rig.broker.redrive();
    rig.until("it runs again", || runs.len() == 2).await;
    first.crash().await;
    let second = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    let last = runs.all().pop().unwrap();
    assert_eq!((runs.len(), last.attempt, last.crashes), (3, 2, 1));
    assert_eq!(rig.status("billing", "1").await, Some(Status::Processed));
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_reopened_event_keeps_its_data_over_a_retry_at_the_broker() {
    let runs = Runs::default();
    let (rig, billing) = with_a_dead_letter(&runs).await;
    billing.stop().await;
    let handler = runs.answer(|run| match run.attempt {
        1 => Err(Failure::retryable("busy").after(60 * SECOND)),
        _ => Ok(()),
    });
    let second = rig.start("billing", |c| c.on_any(handler)).await;
    let (letter, _) = rig.broker.take_dead_letters().remove(0);
    rig.send_back(&letter.with_data("application/json", "7")).await;
    rig.settled().await;
    assert_eq!((runs.attempts("1"), runs.all()[2].data.as_str()), (vec![1, 1, 2], "7"));
    assert_eq!(rig.dead(), []);
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_was_set_aside_without_a_record_needs_no_token_to_come_back() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    let mut nameless = event("1");
    nameless.attributes.id = None;
    rig.send(nameless).await;
    rig.settled().await;
    rig.broker.redrive();
    rig.settled().await;
    let (mut letter, said) = rig.broker.take_dead_letters().remove(0);
    assert_eq!((said.reason, said.reopen, runs.len()), (Reason::MissingId, None, 0));
    letter.attributes.id = Some("1".into());
    rig.send_back(&letter).await;
    rig.settled().await;
    assert_eq!((runs.ids(), rig.dead()), (vec!["1".to_owned()], vec![]));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_of_another_consumer_opens_nothing_here() {
    let (rig, billed, shipped) = (Rig::new(), Runs::default(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(billed.answer(|_| Err(Failure::permanent("no"))))).await;
    let shipping = rig.start("shipping", |c| c.on_any(shipped.ok())).await;
    rig.send(event("1")).await;
    rig.settled().await;
    let (letter, _): (Message, _) = rig.broker.take_dead_letters().remove(0);
    // Sent back to the topic, where everybody sees it.
    rig.send_back(&letter).await;
    rig.settled().await;
    rig.until("the other group saw it", || shipping.statistics().duplicates == 1).await;
    assert_eq!((billed.len(), shipped.len()), (2, 1));
    billing.stop().await;
    shipping.stop().await;
}
