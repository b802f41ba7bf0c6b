//! Invariant: an event is run as the version it says it is: lifted to the newest where the way is known, and set aside
//! where it is not. The version is a suffix of the type.

use std::sync::{Arc, Mutex};

use hapax::{Context, Event, Failure, Message, Otherwise, Reason};
use serde::{Deserialize, Serialize};

use crate::rig::{Builder, Rig, Runs, Store};

#[derive(Serialize, Deserialize)]
struct PaidV1 {
    cents: i64,
}
#[derive(Serialize, Deserialize)]
struct PaidV2 {
    cents: i64,
    currency: String,
}
#[derive(Serialize, Deserialize)]
struct Paid {
    amount: String,
}

impl Event for PaidV1 {
    const TYPE: &'static str = "order.paid";
}
impl Event for PaidV2 {
    const TYPE: &'static str = "order.paid";
    const VERSION: u32 = 2;
}
impl Event for Paid {
    const TYPE: &'static str = "order.paid";
    const VERSION: u32 = 3;
}

impl From<PaidV1> for PaidV2 {
    fn from(paid: PaidV1) -> Self {
        Self { cents: paid.cents, currency: "EUR".into() }
    }
}
impl From<PaidV2> for Paid {
    fn from(paid: PaidV2) -> Self {
        Self { amount: format!("{} {}", paid.cents, paid.currency) }
    }
}

type Amounts = Arc<Mutex<Vec<String>>>;

async fn paid(event: Paid, cx: Context<Amounts>) -> Result<(), Failure> {
    cx.state().lock().unwrap().push(event.amount);
    Ok(())
}

fn wire(c: Builder, amounts: &Amounts) -> hapax::ConsumerBuilder<Amounts, Store> {
    c.state(Arc::clone(amounts)).on(paid).upcast::<PaidV1, PaidV2>().upcast::<PaidV2, Paid>()
}

fn versioned(id: &str, suffix: &str, data: &'static str) -> Message {
    Message::event("/shop", id, format!("order.paid{suffix}")).with_data("application/json", data)
}

#[tokio::test(start_paused = true)]
async fn every_known_version_reaches_the_one_handler() {
    let (rig, amounts) = (Rig::new(), Amounts::default());
    let billing = rig.start("billing", |c| wire(c, &amounts).otherwise(Otherwise::DeadLetter)).await;
    rig.send(versioned("1", "", r#"{"cents":1}"#)).await;
    rig.send(versioned("2", ".v2", r#"{"cents":2,"currency":"CHF"}"#)).await;
    rig.send(versioned("3", ".v3", r#"{"amount":"3 JPY"}"#)).await;
    rig.send(versioned("4", ".v1", r#"{"cents":4}"#)).await;
    rig.settled().await;
    let mut amounts = amounts.lock().unwrap().clone();
    amounts.sort();
    assert_eq!(
        (amounts, rig.dead()),
        (vec!["1 EUR".into(), "2 CHF".into(), "3 JPY".into(), "4 EUR".to_owned()], vec![])
    );
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_newer_version_is_set_aside_without_asking_the_store_and_runs_after_the_upgrade() {
    let (rig, amounts, runs) = (Rig::new(), Amounts::default(), Runs::default());
    let old = rig.start("billing", |c| wire(c, &amounts).otherwise(Otherwise::Ignore)).await;
    rig.send(versioned("1", ".v4", r#"{"sum":4}"#)).await;
    rig.settled().await;
    assert_eq!(rig.dead(), [("1".to_owned(), Reason::UnknownVersion)], "a type that has a handler is never ignored");
    assert_eq!(rig.journal.round_trips(), 0);
    old.stop().await;
    let new = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.broker.redrive();
    rig.settled().await;
    assert_eq!((runs.ids(), rig.dead()), (vec!["1".to_owned()], vec![]));
    new.stop().await;
}

#[tokio::test(start_paused = true)]
async fn data_of_another_version_than_the_type_says_is_undecodable() {
    let (rig, amounts) = (Rig::new(), Amounts::default());
    let billing = rig.start("billing", |c| wire(c, &amounts).otherwise(Otherwise::DeadLetter)).await;
    rig.send(versioned("1", ".v3", r#"{"cents":1}"#)).await;
    rig.send(versioned("2", "", r#"{"amount":"2 EUR"}"#)).await;
    rig.settled().await;
    assert_eq!(rig.dead(), [("1".to_owned(), Reason::Undecodable), ("2".to_owned(), Reason::Undecodable)]);
    assert!(amounts.lock().unwrap().is_empty());
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn one_event_in_two_versions_is_a_conflict_and_not_a_duplicate() {
    let (rig, amounts) = (Rig::new(), Amounts::default());
    let billing = rig.start("billing", |c| wire(c, &amounts).otherwise(Otherwise::DeadLetter)).await;
    rig.send(versioned("1", "", r#"{"cents":1}"#)).await;
    rig.send(versioned("1", ".v3", r#"{"amount":"1 EUR"}"#)).await;
    rig.settled().await;
    assert_eq!((amounts.lock().unwrap().len(), rig.dead()), (1, vec![("1".to_owned(), Reason::Conflict)]));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_retry_lifts_the_same_data_again() {
    #[derive(Default)]
    struct Seen(Mutex<Vec<(u32, String)>>);
    async fn twice(event: Paid, cx: Context<Seen>) -> Result<(), Failure> {
        cx.state().0.lock().unwrap().push((cx.attempt(), event.amount));
        if cx.attempt() == 1 { Err(Failure::retryable("busy")) } else { Ok(()) }
    }
    let (rig, seen) = (Rig::new(), Arc::new(Seen::default()));
    let shared = Arc::clone(&seen);
    let wire = |c: Builder| {
        let c = c.shared_state(shared).on(twice).upcast::<PaidV1, PaidV2>().upcast::<PaidV2, Paid>();
        c.otherwise(Otherwise::DeadLetter)
    };
    let billing = rig.start("billing", wire).await;
    rig.send(versioned("1", "", r#"{"cents":1}"#)).await;
    rig.settled().await;
    assert_eq!(*seen.0.lock().unwrap(), [(1, "1 EUR".to_owned()), (2, "1 EUR".to_owned())]);
    billing.stop().await;
}
