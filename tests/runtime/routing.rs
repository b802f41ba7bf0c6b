//! Invariant: which handler takes a message is decided by its type alone, before anything is claimed: what no handler takes
//! never reaches the store.

use std::sync::{Arc, Mutex};

use hapax::{Context, Event, Failure, Message, Otherwise, Reason};
use serde::{Deserialize, Serialize};

use crate::rig::{Rig, Runs, event};

#[derive(Serialize, Deserialize)]
struct Placed {
    id: String,
}
impl Event for Placed {
    const TYPE: &'static str = crate::rig::TYPE;
}

#[derive(Serialize, Deserialize)]
struct Shipped {}
impl Event for Shipped {
    const TYPE: &'static str = "order.shipped";
}

type Seen = Arc<Mutex<Vec<String>>>;

async fn placed(event: Placed, cx: Context<Seen>) -> Result<(), Failure> {
    cx.state().lock().unwrap().push(format!("placed {}", event.id));
    Ok(())
}

async fn shipped(_: Shipped, cx: Context<Seen>) -> Result<(), Failure> {
    cx.state().lock().unwrap().push("shipped".to_owned());
    Ok(())
}

async fn any(message: Arc<Message>, cx: Context<Seen>) -> Result<(), Failure> {
    cx.state().lock().unwrap().push(format!("any {}", message.attributes.ty.as_deref().unwrap_or("none")));
    Ok(())
}

fn of_type(id: &str, ty: &str) -> Message {
    Message::event("/shop", id, ty).with_data("application/json", "{}")
}

#[tokio::test(start_paused = true)]
async fn each_type_has_its_handler_and_on_any_takes_the_rest() {
    let (rig, seen) = (Rig::new(), Seen::default());
    let state = Arc::clone(&seen);
    let billing = rig.start("billing", |c| c.state(state).on(placed).on(shipped).on_any(any)).await;
    rig.send(event("1")).await;
    rig.send(of_type("2", "order.shipped")).await;
    rig.send(of_type("3", "order.returned")).await;
    // Near misses are other types: nothing is folded, and only a version is a suffix.
    for (id, ty) in [("4", "Order.shipped"), ("5", "order.shipped.v"), ("6", "order.shipped.v02"), ("7", "order")] {
        rig.send(of_type(id, ty)).await;
    }
    // A version that its handler does not know is on_any's, too.
    rig.send(of_type("8", "order.shipped.v9")).await;
    rig.settled().await;
    let mut seen = seen.lock().unwrap().clone();
    seen.sort();
    let rest = ["Order.shipped", "order", "order.returned", "order.shipped.v", "order.shipped.v02", "order.shipped.v9"];
    let expected: Vec<_> = rest.iter().map(|ty| format!("any {ty}")).collect();
    assert_eq!((&seen[..6], &seen[6..]), (&expected[..], &["placed 1".to_owned(), "shipped".to_owned()][..]));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_ignored_by_rule_never_reaches_the_store() {
    let (rig, seen) = (Rig::new(), Seen::default());
    let wire = |c: crate::rig::Builder| c.state(Arc::clone(&seen)).on(placed).otherwise(Otherwise::Ignore);
    let billing = rig.start("billing", wire).await;
    for number in 0..100 {
        rig.send(of_type(&number.to_string(), "order.returned")).await;
    }
    rig.settled().await;
    assert_eq!((rig.journal.round_trips(), rig.dead().len()), (0, 0));
    let statistics = billing.statistics();
    assert_eq!((statistics.ignored, statistics.delivered, statistics.processed), (100, 100, 0));
    assert_eq!(rig.journal.lines_of("settle ").len(), 100);
    assert_eq!(rig.record("billing", "1").await, None);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_set_aside_by_rule_never_reaches_the_store() {
    let (rig, seen) = (Rig::new(), Seen::default());
    let wire = |c: crate::rig::Builder| c.state(Arc::clone(&seen)).on(placed).otherwise(Otherwise::DeadLetter);
    let billing = rig.start("billing", wire).await;
    rig.send(of_type("1", "order.returned")).await;
    let mut untyped = event("2");
    untyped.attributes.ty = None;
    rig.send(untyped).await;
    rig.settled().await;
    assert_eq!(rig.journal.round_trips(), 0);
    assert_eq!(rig.dead(), [("1".to_owned(), Reason::UnknownType), ("2".to_owned(), Reason::UnknownType)]);
    assert!(rig.broker.dead_letters()[0].1.error.contains("order.returned"));
    billing.stop().await;
}

/// What nobody handles goes its way even while the store is out of reach, and while its id is one that conflicts.
#[tokio::test(start_paused = true)]
async fn what_is_ignored_by_rule_does_not_wait_for_the_store() {
    let (rig, runs, seen) = (Rig::new(), Runs::default(), Seen::default());
    let wire = |c: crate::rig::Builder| c.state(Arc::clone(&seen)).on(placed).otherwise(Otherwise::Ignore);
    let billing = rig.start("billing", wire).await;
    rig.store_faults.begin_outage();
    rig.send(of_type("1", "order.returned")).await;
    rig.send(of_type("1", "order.refunded").with_data("text/plain", "other")).await;
    rig.settled().await;
    assert_eq!((billing.statistics().ignored, runs.len()), (2, 0));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn on_any_sees_data_of_any_kind_as_it_came() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.send(event("1").with_data("text/csv", "a;b")).await;
    rig.send(event("2").with_data("application/json", "{not JSON")).await;
    rig.send(Message::event("/shop", "3", "x")).await;
    rig.settled().await;
    let data: Vec<_> = runs.all().into_iter().map(|run| run.data).collect();
    assert_eq!((data, rig.dead()), (vec!["a;b".into(), "{not JSON".into(), String::new()], vec![]));
    billing.stop().await;
}
