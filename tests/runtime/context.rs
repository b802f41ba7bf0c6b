//! Invariant: keys are the same on every attempt and after a redrive, differ between events, consumers and steps; fences
//! grow with every grant; a handler can know its time, its attempt and its conversation.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hapax::{Failure, Route};

use crate::rig::{Rig, Runs, event};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn keys_stay_and_fences_grow_over_attempts_crashes_and_redrives() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let steps = Arc::new(Mutex::new(BTreeSet::new()));
    let (noted, seen) = (runs.clone(), Arc::clone(&steps));
    let handler = runs.then(move |run, cx| {
        seen.lock().unwrap().insert((run.id, cx.key("charge"), cx.key("ship")));
        let number = noted.len();
        async move {
            match number {
                1 => Err(Failure::retryable("busy")),
                2 => Err(Failure::retryable("busy").after(60 * SECOND)),
                3 => Err(Failure::not_yet("no order", SECOND)),
                4 => Err(Failure::permanent("no")),
                5 => std::future::pending().await,
                _ => Ok(()),
            }
        }
    });
    let first = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send(event("1")).await;
    rig.settled().await;
    rig.broker.redrive();
    rig.until("it runs again", || runs.len() == 5).await;
    first.crash().await;
    let second = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.settled().await;
    let all = runs.all();
    assert_eq!(runs.attempts("1"), [1, 2, 3, 3, 1, 2]);
    assert!(all.windows(2).all(|pair| pair[0].fence < pair[1].fence), "{all:?}");
    assert!(all.iter().all(|run| run.key == all[0].key && run.key.len() == 32), "{all:?}");
    let steps = steps.lock().unwrap().clone();
    assert_eq!(steps.len(), 1, "the same on each attempt: {steps:?}");
    let (_, charge, ship) = steps.first().unwrap();
    assert!(charge != ship && *charge != all[0].key && charge.len() == 32);
    assert!(all.iter().all(|run| run.fence < 1 << 53), "exact in JSON and in Lua");
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn remaining_time_is_that_of_the_handlers_timeout_in_each_attempt() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let remaining = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&remaining);
    let handler = runs.then(move |run, cx| {
        let seen = Arc::clone(&seen);
        async move {
            tokio::time::sleep(SECOND).await;
            seen.lock().unwrap().push(cx.remaining());
            if run.attempt == 1 { Err(Failure::retryable("busy")) } else { Ok(()) }
        }
    });
    let route = Route::on_any(handler).timeout(5 * SECOND);
    let billing = rig.start("billing", |c| c.add(route).timeout(20 * SECOND)).await;
    rig.send(event("1")).await;
    rig.settled().await;
    for left in remaining.lock().unwrap().iter() {
        assert!((4 * SECOND - SECOND / 10..=4 * SECOND).contains(left), "{left:?}");
    }
    assert_eq!(remaining.lock().unwrap().len(), 2);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_conversation_is_the_correlation_or_begins_with_the_event() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let handler = runs.then(move |_, cx| {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        noted.lock().unwrap().push((owned(cx.correlation_id()), owned(cx.causation_id()), cx.consumer().to_owned()));
        std::future::ready(Ok(()))
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send(event("1")).await;
    let mut answer = event("2");
    answer.attributes.correlation_id = Some("c".into());
    answer.attributes.causation_id = Some("1".into());
    rig.send(answer).await;
    rig.settled().await;
    let text = |text: &str| Some(text.to_owned());
    let mut seen = seen.lock().unwrap().clone();
    seen.sort();
    assert_eq!(seen, [(text("1"), None, "billing".to_owned()), (text("c"), text("1"), "billing".to_owned())]);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn state_is_one_for_all_handlers_and_seen_outside() {
    #[derive(Default)]
    struct App {
        runs: Mutex<usize>,
    }
    async fn count(_: Arc<hapax::Message>, cx: hapax::Context<App>) -> Result<(), Failure> {
        *cx.state().runs.lock().unwrap() += 1;
        Ok(())
    }
    let (rig, app) = (Rig::new(), Arc::new(App::default()));
    let shared = Arc::clone(&app);
    let billing = rig.start("billing", |c| c.shared_state(shared).on_any(count)).await;
    rig.send_all(0..10).await;
    rig.settled().await;
    assert_eq!(*app.runs.lock().unwrap(), 10);
    billing.stop().await;
}
