//! The crash explorer: at which await points may the process of a handler die without harm?
//!
//! It runs the handler over and over, ends it at each of its await points in turn, delivers the event again as a broker
//! would, with copies before and after, and compares what is left with a single undisturbed run.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use hapax::{Context, Event, Failure};
use hapax_testkit::{crash_point, explore};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct OrderPlaced {
    cents: i64,
}

impl Event for OrderPlaced {
    const TYPE: &'static str = "com.shop.order.placed";
}

/// A double of the payment provider: as the real one, it charges once for each idempotency key.
#[derive(Default)]
struct Provider(Mutex<BTreeMap<String, i64>>);

impl Provider {
    async fn charge(&self, key: String, cents: i64) {
        crash_point("the charge is on its way").await;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key, cents);
        crash_point("charged, and the answer is on its way").await;
    }

    fn charges(&self) -> Vec<i64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().copied().collect()
    }
}

/// Charges twice if it dies at the wrong moment: each attempt has a key of its own.
async fn careless(event: OrderPlaced, cx: Context<Provider>) -> Result<(), Failure> {
    let key = format!("{} attempt {}", cx.idempotency_key(), cx.attempt());
    cx.state().charge(key, event.cents).await;
    Ok(())
}

/// Charges once: the key is the same at every attempt.
async fn mended(event: OrderPlaced, cx: Context<Provider>) -> Result<(), Failure> {
    cx.state().charge(cx.key("charge"), event.cents).await;
    Ok(())
}

/// In a test: `#[tokio::test(start_paused = true)]` and `report.assert_effects_once()`.
#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() {
    let order = OrderPlaced { cents: 1_200 };
    let report = explore(careless, &order).state(Provider::default).read(Provider::charges).await;
    println!("careless: {report}");
    let report = explore(mended, &order).state(Provider::default).read(Provider::charges).await;
    println!("mended: {report}");
    report.assert_effects_once();
}
