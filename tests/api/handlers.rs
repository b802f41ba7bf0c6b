//! Handlers: plain functions and structs, transactions, failures that classify themselves, versions, routes.

use std::time::Duration;

use hapax::{
    Consumer, Context, Effects, Failure, FailureExt, FailureKind, Handler, IntoFailure, Level, Otherwise, Reason,
    Route, Settings, Window,
};
use hapax_memory::{MemoryBroker, MemoryStore};
use hapax_sqlite::{SqliteTx, sqlx};

use crate::{Noted, OrderPlaced, OrderPlacedV1, Shop, deliver, message, placed, placed_by_an_older_producer};

/// What handlers see as `cx.state()`.
struct App {
    provider: Noted,
}

async fn invoice(e: OrderPlaced, mut tx: SqliteTx, _: Context<App>) -> Result<(), Failure> {
    let insert = sqlx::query("INSERT INTO invoices VALUES (?, ?, ?)");
    insert.bind(e.order).bind(e.cents).bind(e.currency).execute(&mut *tx).await?;
    Ok(())
}

/// The user's own error, which says what each failure means.
#[derive(Debug)]
enum ChargeError {
    Declined,
    Busy,
    NoAccount,
}

impl IntoFailure for ChargeError {
    fn into_failure(self) -> Failure {
        match self {
            Self::Declined => Failure::permanent("card declined"),
            Self::Busy => Failure::retryable("provider busy").after(Duration::from_millis(10)),
            Self::NoAccount => Failure::not_yet("no account yet", Duration::from_millis(10)),
        }
    }
}

impl std::fmt::Display for ChargeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}
impl std::error::Error for ChargeError {}

async fn charge(e: OrderPlaced, cx: Context<App>) -> Result<(), ChargeError> {
    match e.cents {
        ..0 => return Err(ChargeError::Declined),
        0 if cx.attempt() == 1 => return Err(ChargeError::Busy),
        _ => {}
    }
    // A header of the call to the provider.
    cx.state().provider.note(format!("{} {} {}", e.order, e.currency, cx.key("charge").len()));
    Ok(())
}

#[tokio::test]
async fn a_transactional_handler_writes_rows_once_and_old_versions_are_lifted() {
    let (shop, broker) = (Shop::open().await, MemoryBroker::new("orders"));
    let consumer = Consumer::builder("billing", broker.another(), shop.store.clone())
        .state(App { provider: Noted::default() })
        .on_tx(invoice)
        .upcast::<OrderPlacedV1, OrderPlaced>()
        .otherwise(Otherwise::Ignore)
        .require(Level::ExactlyOnceEffect)
        .build()
        .await
        .expect("it holds together");

    let foreign = message(9, "com.shop.visit", &"nobody handles it");
    let newer = message(8, "com.shop.order.placed.v3", &"from the future");
    let messages = [placed_by_an_older_producer(1, 450), placed(2, 1_200), placed(2, 1_200), foreign, newer];
    let done = deliver(consumer, &broker, messages).await.statistics();

    assert_eq!(shop.invoices().await, [(1, 450, "EUR".to_owned()), (2, 1_200, "CHF".to_owned())]);
    assert_eq!((done.processed, done.duplicates, done.ignored, done.dead_lettered), (2, 1, 1, 1));
    assert_eq!(broker.dead_letters()[0].1.reason, Reason::UnknownVersion);
    shop.store.close().await;
}

#[tokio::test(start_paused = true)]
async fn a_route_declares_effects_and_a_users_error_says_what_it_means() {
    let (broker, provider) = (MemoryBroker::new("orders"), Noted::default());
    let consumer = Consumer::builder("charging", broker.another(), MemoryStore::new())
        .state(App { provider: provider.clone() })
        .add(Route::on(charge).effects(Effects::keyed(Duration::from_hours(24))).timeout(Duration::from_secs(20)))
        .otherwise(Otherwise::Ignore)
        .require(Level::EffectivelyOnce)
        .build()
        .await
        .expect("it holds together");
    assert!(consumer.guarantee().is_open(Window::KeyForgotten), "memory delivers again without a bound");

    let handle = deliver(consumer, &broker, [placed(1, 450), placed(2, 0), placed(3, -1), placed(1, 450)]).await;
    assert_eq!(provider.all(), ["1 CHF 32", "2 CHF 32"]);
    let done = handle.statistics();
    assert_eq!((done.processed, done.duplicates, done.retried, done.dead_lettered), (2, 1, 1, 1));
    let (_, letter) = broker.dead_letters().remove(0);
    assert_eq!((letter.reason, &*letter.error), (Reason::Permanent, "card declined"));
}

/// A handler with state of its own.
struct Audit {
    threshold: i64,
    noted: Noted,
}

impl Handler<OrderPlaced, ()> for Audit {
    type Error = Failure;

    async fn handle(&self, e: OrderPlaced, cx: Context<()>) -> Result<(), Failure> {
        if e.cents > self.threshold {
            self.noted.note(format!("{} at fence {}", e.order, cx.fence() > 0));
        }
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_struct_is_a_handler() {
    let (broker, noted) = (MemoryBroker::new("orders"), Noted::default());
    let consumer = Consumer::builder("audit", broker.another(), MemoryStore::new())
        .on(Audit { threshold: 1_000, noted: noted.clone() })
        .otherwise(Otherwise::DeadLetter)
        .build()
        .await
        .expect("it holds together");
    deliver(consumer, &broker, [placed(1, 450), placed(2, 1_200)]).await;
    assert_eq!(noted.all(), ["2 at fence true"]);
}

/// In a handler that returns `Failure`, a bare `?` takes the blanket conversion for errors, and `classified` keeps the class.
#[test]
fn classified_keeps_the_class_that_a_bare_question_mark_loses() {
    fn bare() -> Result<(), Failure> {
        Ok(Err(ChargeError::Declined)?)
    }
    fn classified() -> Result<(), Failure> {
        Err(ChargeError::NoAccount).classified()
    }
    assert_eq!(bare().unwrap_err().kind(), FailureKind::Retryable { after: None });
    assert_eq!(classified().unwrap_err().kind(), FailureKind::NotYet { after: Duration::from_millis(10) });
}

#[tokio::test]
async fn a_handler_is_called_as_the_plain_function_it_is() {
    let cx = Context::test(App { provider: Noted::default() }, placed(7, 450));
    let event = OrderPlaced { order: 7, cents: 450, currency: "CHF".to_owned() };
    charge(event, cx.clone()).await.expect("charged");
    assert_eq!(cx.state().provider.all(), ["7 CHF 32"]);
}

#[tokio::test]
async fn every_fault_is_told_at_once_and_a_window_is_allowed_by_name() {
    let build = |allow: bool| async move {
        let broker = MemoryBroker::builder("orders").redelivery_horizon(Duration::from_hours(30 * 24)).build();
        let builder = Consumer::builder("billing", broker, MemoryStore::new())
            .settings(Settings { lease: Duration::from_secs(45), ..Settings::default() })
            .on(Audit { threshold: 0, noted: Noted::default() });
        let builder = if allow { builder.allow(Window::Forgotten).otherwise(Otherwise::Ignore) } else { builder };
        builder.build().await
    };
    let faults = build(false).await.expect_err("two faults");
    assert_eq!(faults.faults.len(), 2, "{faults}");
    assert!(faults.has("otherwise-missing") && faults.has("retention-lt-horizon"), "{faults}");
    let consumer = build(true).await.expect("the window is known and allowed");
    assert!(consumer.guarantee().is_open(Window::Forgotten), "it is listed all the same");
}
