//! Invariant: an event that cannot take effect is set aside with its bytes, its headers and a reason; once; its handler
//! does not run behind it; and nothing that is set aside takes anything else along.

use std::time::{Duration, SystemTime};

use hapax::{Event, Failure, Headers, Message, Otherwise, Reason, Status};
use hapax_memory::MemoryBroker;
use serde::{Deserialize, Serialize};

use crate::rig::{Builder, Rig, Runs, event, key};

const SECOND: Duration = Duration::from_secs(1);

#[derive(Serialize, Deserialize)]
struct Placed {
    cents: u64,
}
impl Event for Placed {
    const TYPE: &'static str = crate::rig::TYPE;
}

async fn placed(_: Placed, _: hapax::Context<()>) -> Result<(), Failure> {
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_permanent_failure_is_set_aside_at_once_with_everything_it_came_with() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.answer(|_| Err(Failure::permanent("card declined"))))).await;
    let sent = event("1").with_header("x-tenant", vec![7, 0, 255]).with_partition_key("k");
    rig.send(sent.clone()).await;
    rig.settled().await;
    assert_eq!(runs.len(), 1);
    let (mut message, letter) = rig.dead_letter();
    assert_eq!((letter.reason, &*letter.error, &*letter.consumer), (Reason::Permanent, "card declined", "billing"));
    assert_eq!((letter.attempts, letter.origin.as_ref().map(|o| &*o.position)), (1, Some("1")));
    assert!(letter.reopen.is_some() && letter.first <= letter.last && letter.last <= SystemTime::now());
    let of_ours: Vec<_> = message.headers.iter().map(|(name, _)| name.to_owned()).filter(|n| n != "x-tenant").collect();
    let names =
        ["dead-letter", "reason", "error", "consumer", "attempts", "first-unix-ms", "last-unix-ms", "origin", "reopen"];
    assert_eq!(of_ours, names.map(|name| format!("hapax-{name}")));
    assert_eq!(message.headers.get_str("hapax-reason"), Some("permanent"));
    message.headers.retain(|name| name == "x-tenant");
    assert_eq!(message, sent, "bytes, attributes and headers are as they came");
    let record = rig.record("billing", "1").await.unwrap();
    assert_eq!((record.status, record.reason), (Status::DeadLettered, Some(Reason::Permanent)));
    let trouble = record.trouble.unwrap();
    assert_eq!((&*trouble.id, &*trouble.error), ("1", "card declined"));
    billing.stop().await;
}

/// Placed before any mark, a crash between the two would let the handler start again behind its own dead letter.
#[tokio::test(start_paused = true)]
async fn it_is_doomed_then_placed_then_recorded() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.answer(|_| Err(Failure::permanent("no"))))).await;
    rig.send(event("1")).await;
    rig.settled().await;
    let order = ["store claim 1", "store record doomed", "settle dead-letter permanent", "store record dead-lettered"];
    assert_eq!(rig.journal.lines(), order);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_error_is_cut_redacted_and_on_one_line() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|run| match run.id.as_str() {
        "url" => Err(Failure::permanent("no").with_source("amqp://app:hunter2@mq.example refused")),
        "own" => Err(Failure::permanent("no").with_source("card 4111-1111 declined")),
        "lines" => Err(Failure::permanent("no").with_source("first\r\nhapax-reason: forged")),
        _ => Err(Failure::permanent("no").with_source("ä".repeat(1_000))),
    });
    let redact: fn(&str) -> String = |text| text.replace("4111-1111", "****");
    let billing = rig.start("billing", |c| c.on_any(handler).redact(redact).error_text_max(101)).await;
    rig.send_all(["url", "own", "lines", "long"]).await;
    rig.settled().await;
    let letters = rig.broker.dead_letters();
    let error = |id: &str| {
        let of_id = letters.iter().find(|(message, _)| message.attributes.id.as_deref() == Some(id));
        of_id.map(|(_, letter)| letter.error.to_string()).unwrap()
    };
    assert!(!error("url").contains("hunter2") && error("url").contains("mq.example"), "{}", error("url"));
    assert_eq!(error("own"), "no: card **** declined");
    assert_eq!(error("lines"), "no: first  hapax-reason: forged");
    assert_eq!(error("long"), format!("no: {}", "ä".repeat(48)), "at a character");
    for (message, letter) in &letters {
        let trouble = rig.record("billing", message.attributes.id.as_deref().unwrap()).await.unwrap().trouble.unwrap();
        assert_eq!(trouble.error, letter.error, "the record keeps the same text");
    }
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn every_limit_of_a_message_is_held_before_the_store_hears_of_it() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let wire = |c: Builder| {
        c.on::<Placed, _>(placed)
            .otherwise(Otherwise::DeadLetter)
            .body_max(1_000)
            .headers_max(8)
            .header_bytes_max(500)
            .id_max(20)
            .json_depth_max(5)
    };
    let billing = rig.start("billing", wire).await;
    let fits = || event("fits").with_data("application/json", r#"{"cents":1}"#);
    rig.send(fits()).await;
    rig.send(fits().with_data("application/json", format!(r#"{{"cents":1}}{}"#, " ".repeat(1_000)))).await;
    rig.send((0..9).fold(fits(), |message, n| message.with_header(format!("x-{n}"), "1"))).await;
    rig.send(fits().with_header("x-long", "1".repeat(500))).await;
    rig.send(event(&"1".repeat(21)).with_data("application/json", r#"{"cents":1}"#)).await;
    rig.send(fits().with_data("application/json", format!(r#"{{"cents":{}1{}}}"#, "[".repeat(6), "]".repeat(6)))).await;
    rig.settled().await;
    let reasons: Vec<_> = rig.dead().into_iter().map(|(_, reason)| reason).collect();
    assert_eq!(reasons, [Reason::BeyondLimit; 5], "{:?}", rig.broker.dead_letters());
    assert_eq!((billing.statistics().processed, rig.journal.round_trips()), (1, 2), "one claim and one record");
    assert!(rig.broker.dead_letters().iter().all(|(_, letter)| letter.reopen.is_none() && letter.attempts == 0));
    billing.stop().await;
    drop(runs);
}

/// JasperFx/wolverine GH-2510: the header mapper threw, and the message was logged and acked: lost.
#[tokio::test(start_paused = true)]
async fn undecodable_envelope_reaches_dlq() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    let mut headers = Headers::new();
    headers.push("content-type", "application/cloudevents+json");
    headers.push("x-tenant", vec![255, 254]);
    rig.broker.publisher().send_wire(headers, &b"{\"specversion\":\"1.0\",\"id\":"[..]).await;
    rig.settled().await;
    assert_eq!((runs.len(), rig.journal.round_trips()), (0, 0));
    let (message, letter) = rig.dead_letter();
    assert_eq!(letter.reason, Reason::Undecodable);
    assert_eq!(&message.data[..], b"{\"specversion\":\"1.0\",\"id\":", "the bytes as they came");
    assert_eq!(message.headers.get("x-tenant").map(|value| &value[..]), Some(&[255, 254][..]));
    billing.stop().await;
}

/// JasperFx/wolverine@b031f8a38: one unreadable dead letter hid the whole list of them.
#[tokio::test(start_paused = true)]
async fn dlq_listing_tolerates_junk() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let noted = runs.clone();
    let handler = runs.answer(move |_| if noted.len() < 3 { Err(Failure::permanent("no")) } else { Ok(()) });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    let junk = || [("content-type", "application/cloudevents+json")].into_iter().collect::<Headers>();
    rig.send(event("1")).await;
    rig.broker.publisher().send_wire(junk(), vec![0, 255]).await;
    rig.send(event("2")).await;
    rig.settled().await;
    let mut ids: Vec<_> = rig.dead().into_iter().map(|(id, _)| id).collect();
    ids.sort();
    assert_eq!(ids, ["", "1", "2"]);
    assert_eq!(rig.broker.redrive(), 3);
    rig.settled().await;
    assert_eq!((runs.len(), rig.dead()), (4, vec![(String::new(), Reason::Undecodable)]), "junk alone stays");
    billing.stop().await;
}

/// riverqueue/river#1324: an undecodable job was retried for ever. Here it needs no count: no record is written, no
/// attempt is made, and the first delivery is set aside.
#[tokio::test(start_paused = true)]
async fn undecodable_counts_as_attempt() {
    let rig = Rig::new();
    let billing = rig.start("billing", |c| c.on(placed).otherwise(Otherwise::DeadLetter)).await;
    rig.send(event("1").with_data("application/json", r#"{"cents":"4111-1111"}"#)).await;
    rig.send(event("2").with_data("text/csv", "cents\n1")).await;
    rig.settled().await;
    assert_eq!(rig.dead(), [("1".to_owned(), Reason::Undecodable), ("2".to_owned(), Reason::Undecodable)]);
    assert_eq!((billing.statistics().delivered, rig.journal.round_trips()), (2, 0));
    assert_eq!(rig.record("billing", "1").await, None);
    let error = rig.broker.dead_letters()[0].1.error.to_string();
    assert!(error.contains("line 1") && !error.contains("4111"), "{error}");
    billing.stop().await;
}

/// JasperFx/wolverine@ebfa891e5 (GH-3413): one unresolvable message in a batch lost the rest of it.
#[tokio::test(start_paused = true)]
async fn poison_in_batch_spares_neighbours() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let mut headers = Headers::new();
    headers.push("content-type", "application/cloudevents+json");
    rig.send_all(0..20).await;
    rig.broker.publisher().send_wire(headers, &b"not JSON"[..]).await;
    // Refused by the store for good: a claim of it fails with its whole batch.
    rig.store_faults.reject(key("billing", "30"));
    rig.send_all(20..41).await;
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().processed), (40, 40));
    let mut dead = rig.dead();
    dead.sort_by_key(|(_, reason)| *reason);
    assert_eq!(dead, [(String::new(), Reason::Undecodable), ("30".to_owned(), Reason::Refused)]);
    billing.stop().await;
}

/// spring-projects/spring-kafka#1918: a fatal error at the dead letters was published to them again, for ever.
#[tokio::test(start_paused = true)]
async fn dlq_failure_never_loops() {
    let broker = MemoryBroker::builder("orders").group("billing").dead_letters_max(1);
    let (rig, runs) = (Rig::of(broker), Runs::default());
    let handler = runs.answer(|run| if run.id.len() == 1 { Err(Failure::permanent("no")) } else { Ok(()) });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send_all(["1", "2"]).await;
    tokio::time::sleep(3_600 * SECOND).await;
    assert_eq!(rig.dead().len(), 1, "the second has no room");
    assert_eq!((runs.len(), rig.broker.standing().unsettled), (2, 1), "kept, and not run again");
    let tries = rig.journal.lines_of("settle dead-letter permanent!").len();
    assert!((60..2_000).contains(&tries), "quietly: {tries} tries in an hour");
    assert_eq!(rig.broker.take_dead_letters().len(), 1);
    rig.settled().await;
    assert_eq!((rig.dead().len(), runs.len()), (1, 2));
    for id in ["1", "2"] {
        assert_eq!(rig.status("billing", id).await, Some(Status::DeadLettered));
    }
    billing.stop().await;
}

/// As many as there are permits for handlers: what waits for its place holds none.
#[tokio::test(start_paused = true)]
async fn dead_letters_without_room_hold_up_no_handler() {
    let (rig, runs) = (Rig::of(MemoryBroker::builder("orders").dead_letters_max(1)), Runs::default());
    let handler = runs.answer(|run| match run.id.starts_with("bad") {
        true => Err(Failure::permanent("no such order")),
        false => Ok(()),
    });
    let billing = rig.start("billing", |c| c.on_any(handler).concurrency(2).switch_events_min(u32::MAX)).await;
    rig.send_all(["bad-1", "bad-2", "bad-3", "bad-4"]).await;
    rig.until("the others wait for their places", || rig.journal.lines_of("settle dead-letter permanent!").len() >= 3)
        .await;
    rig.send_all(["good-1", "good-2"]).await;
    // Soon: after an hour the broker takes back what is not settled, and permits with it.
    let sent = tokio::time::Instant::now();
    rig.until("the good ones are processed", || billing.statistics().processed == 2).await;
    assert!(sent.elapsed() < 60 * SECOND, "{:?}", sent.elapsed());
    assert_eq!(rig.dead().len(), 1, "the others still have no room");
    billing.crash().await;
}

/// spring-projects/spring-kafka#2118: with one retry topic, fatal records were not set aside at all.
#[tokio::test(start_paused = true)]
async fn fatal_goes_to_dlq_in_every_topology() {
    for (rig, delay) in [(Rig::new(), 20 * SECOND), (Rig::new(), SECOND), (Rig::ordered(), SECOND)] {
        let runs = Runs::default();
        // Fatal at once, and fatal after it waited here or at the broker.
        let handler = runs.answer(|run| match (run.id.as_str(), run.attempt) {
            ("later", 1) => Err(Failure::retryable("busy")),
            _ => Err(Failure::permanent("fatal")),
        });
        let retry = hapax::RetryPolicy::fixed(delay).jitter(0.0);
        let billing = rig.start("billing", |c| c.on_any(handler).retry(retry)).await;
        rig.send(event("once").with_partition_key("k")).await;
        rig.send(event("later").with_partition_key("k")).await;
        rig.settled().await;
        assert_eq!(rig.dead(), [("once".to_owned(), Reason::Permanent), ("later".to_owned(), Reason::Permanent)]);
        assert_eq!(runs.len(), 3);
        billing.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_type_without_a_handler_is_set_aside_where_that_is_the_rule() {
    let rig = Rig::new();
    let billing = rig.start("billing", |c| c.on(placed).otherwise(Otherwise::DeadLetter)).await;
    rig.send(Message::event("/shop", "1", "order.shipped")).await;
    rig.settled().await;
    assert_eq!(rig.dead(), [("1".to_owned(), Reason::UnknownType)]);
    assert_eq!(rig.journal.round_trips(), 0);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_dies_between_doom_and_dead_letter_is_followed_by_one_that_places_it() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let faults = rig.broker_faults.clone();
    let fatal = runs.answer(move |_| {
        faults.begin_outage();
        Err(Failure::permanent("no"))
    });
    let first = rig.start("billing", |c| c.on_any(fatal)).await;
    rig.send(event("1")).await;
    rig.until("it cannot be placed", || !rig.journal.lines_of("settle dead-letter permanent!").is_empty()).await;
    assert_eq!(rig.status("billing", "1").await, Some(Status::Doomed));
    first.crash().await;
    rig.broker_faults.end_outage();
    let second = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    assert_eq!(
        (runs.len(), rig.dead()),
        (1, vec![("1".to_owned(), Reason::Permanent)]),
        "the handler is not started again"
    );
    let (_, letter) = rig.dead_letter();
    assert_eq!((letter.attempts, &*letter.error), (1, "no"), "as the first would have told it");
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_event_that_kills_its_process_is_set_aside_in_the_end() {
    let (rig, runs) = (Rig::new(), Runs::default());
    rig.send(event("killer")).await;
    for crash in 1..=4 {
        let process = rig.start("billing", |c| c.on_any(runs.take(3_600 * SECOND)).timeout(7_200 * SECOND)).await;
        rig.until("it runs", || runs.len() == crash).await;
        process.crash().await;
    }
    let last = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    assert_eq!((runs.len(), rig.dead()), (4, vec![("killer".to_owned(), Reason::CrashesExhausted)]));
    assert_eq!(rig.dead_letter().1.attempts, 4, "starts of the handler, not claims");
    last.stop().await;
}

#[tokio::test(start_paused = true)]
async fn first_and_last_time_span_the_attempts() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let retry = hapax::RetryPolicy::fixed(600 * SECOND).jitter(0.0).attempts_max(4);
    let billing =
        rig.start("billing", |c| c.on_any(runs.answer(|_| Err(Failure::retryable("busy")))).retry(retry)).await;
    rig.send(event("1")).await;
    rig.settled().await;
    let (_, letter) = rig.dead_letter();
    let span = letter.last.duration_since(letter.first).unwrap();
    assert!((1_800 * SECOND..1_801 * SECOND).contains(&span), "{span:?}");
    billing.stop().await;
}
