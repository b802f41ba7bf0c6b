//! Invariant: per key, effects take place in the broker's order. A failing head holds up its own key and no other; nothing
//! is ever overtaken by waiting, retrying, crashing or being set aside.

use std::collections::BTreeMap;
use std::time::Duration;

use hapax::{Failure, Message, Order, Reason, RetryPolicy};

use crate::rig::{Rig, Run, Runs, event};

const SECOND: Duration = Duration::from_secs(1);

fn keyed(key: &str, id: &str) -> Message {
    event(id).with_partition_key(key)
}

fn seconds(runs: &[Run]) -> Vec<u64> {
    runs.iter().map(|run| run.at.as_secs()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_failing_head_holds_up_its_key_and_no_other() {
    let (rig, runs) = (Rig::ordered(), Runs::default());
    let handler = runs.answer(|run| match (run.id.as_str(), run.attempt) {
        ("a1", 1..4) => Err(Failure::retryable("busy")),
        _ => Ok(()),
    });
    let retry = RetryPolicy::fixed(2 * SECOND).jitter(0.0);
    let billing = rig.start("billing", |c| c.on_any(handler).retry(retry)).await;
    for (key, id) in [("a", "a1"), ("a", "a2"), ("b", "b1"), ("a", "a3"), ("b", "b2")] {
        rig.send(keyed(key, id)).await;
    }
    rig.settled().await;
    assert_eq!(runs.ids(), ["a1", "b1", "b2", "a1", "a1", "a1", "a2", "a3"]);
    assert_eq!(seconds(&runs.all()), [0, 0, 0, 2, 4, 6, 6, 6]);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn without_order_a_failing_head_holds_up_nothing() {
    let (rig, runs) = (Rig::ordered(), Runs::default());
    let handler = runs.answer(|run| match (run.id.as_str(), run.attempt) {
        ("a1", 1) => Err(Failure::retryable("busy")),
        _ => Ok(()),
    });
    let billing = rig.start("billing", |c| c.on_any(handler).order(Order::Unordered)).await;
    rig.send(keyed("a", "a1")).await;
    rig.send(keyed("a", "a2")).await;
    rig.settled().await;
    assert_eq!(runs.ids(), ["a1", "a2", "a1"]);
    billing.stop().await;
}

/// spring-projects/spring-kafka#4504: of two failures in one partition the later one's seek overwrote the earlier one's,
/// which was never delivered again.
#[tokio::test(start_paused = true)]
async fn two_failures_one_partition() {
    for order in [Order::PerKey, Order::Unordered] {
        for keys in [["a", "a"], ["a", "b"]] {
            let (rig, runs) = (Rig::ordered(), Runs::default());
            let fails = runs.answer(|run| if run.attempt < 3 { Err(Failure::retryable("busy")) } else { Ok(()) });
            let billing = rig.start("billing", |c| c.on_any(fails).order(order)).await;
            rig.send(keyed(keys[0], "1")).await;
            rig.send(keyed(keys[1], "2")).await;
            rig.send(keyed("c", "3")).await;
            rig.settled().await;
            for id in ["1", "2", "3"] {
                assert_eq!(runs.attempts(id), [1, 2, 3]);
            }
            assert_eq!(billing.statistics().processed, 3);
            billing.stop().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn effects_of_a_key_come_in_the_brokers_order_whatever_fails() {
    let (rig, runs) = (Rig::ordered(), Runs::default());
    let effects = Runs::default();
    let handler = runs.then({
        let (runs, effects) = (runs.clone(), effects.clone());
        move |run, cx| {
            // Drawn from the id and how often it ran, so that it repeats.
            let ran = runs.of(&run.id).len();
            let dice = run.id.bytes().map(usize::from).sum::<usize>() * 31 + ran * 17;
            let effects = effects.clone();
            async move {
                tokio::time::sleep(Duration::from_millis(dice as u64 % 90)).await;
                match dice % 7 {
                    0 => return Err(Failure::permanent("never")),
                    1 | 2 => return Err(Failure::retryable("busy")),
                    3 => return Err(Failure::not_yet("no order", SECOND)),
                    _ => effects.note(&cx),
                };
                Ok(())
            }
        }
    });
    let billing = rig.start("billing", |c| c.on_any(handler).switch_events_min(u32::MAX)).await;
    for number in 0..300 {
        rig.send(keyed(&format!("k{}", number % 7), &format!("{number:03}"))).await;
    }
    rig.settled().await;
    let mut by_key = BTreeMap::<u32, Vec<String>>::new();
    for id in effects.ids() {
        by_key.entry(id.parse::<u32>().unwrap() % 7).or_default().push(id);
    }
    assert!(by_key.values().all(|ids| ids.is_sorted()), "{by_key:?}");
    assert_eq!(effects.len() + rig.dead().len(), 300);
    assert!(rig.dead().len() > 5 && runs.len() > 350, "the dice were not all good: {} runs", runs.len());
    assert!(rig.journal.lines_of("settle retry").is_empty(), "a retry at the broker would be overtaken");
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_next_of_a_key_starts_when_the_one_before_is_set_aside() {
    let (rig, runs) = (Rig::ordered(), Runs::default());
    let handler = runs.answer(|run| if run.id == "a1" { Err(Failure::permanent("never")) } else { Ok(()) });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send(keyed("a", "a1")).await;
    rig.send(keyed("a", "a2")).await;
    rig.settled().await;
    assert_eq!((runs.ids(), rig.dead()), (vec!["a1".into(), "a2".to_owned()], vec![("a1".into(), Reason::Permanent)]));
    let lines = rig.journal.lines();
    let place = |line: &str| lines.iter().position(|l| l == line).unwrap_or_else(|| panic!("{line} in {lines:?}"));
    assert!(place("settle dead-letter permanent") < place("store record processed"));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn even_a_long_wait_is_waited_for_in_place() {
    let (rig, runs) = (Rig::ordered(), Runs::default());
    let handler = runs.answer(|run| match run.id.as_str() {
        "a1" if run.at < 600 * SECOND => Err(Failure::not_yet("no order", 60 * SECOND)),
        _ => Ok(()),
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    for (key, id) in [("a", "a1"), ("a", "a2"), ("b", "b1")] {
        rig.send(keyed(key, id)).await;
    }
    rig.settled().await;
    assert_eq!((runs.of("b1")[0].at.as_secs(), runs.of("a2")[0].at.as_secs()), (0, 600));
    assert_eq!(rig.journal.lines_of("settle "), ["settle ack"; 3]);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_delay_that_would_be_overtaken_is_refused_at_start() {
    let (rig, runs) = (Rig::ordered(), Runs::default());
    let (builder, _) = rig.process("billing");
    let refused = builder.on_any(runs.ok()).delay_max(60 * SECOND).build().await.unwrap_err();
    assert!(refused.to_string().contains("hold"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn messages_without_a_key_keep_no_order_and_hold_up_nobody() {
    let (rig, runs) = (Rig::ordered(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.take(SECOND))).await;
    rig.send_all(0..20).await;
    rig.send(event("empty").with_partition_key("")).await;
    rig.settled().await;
    assert!(runs.all().iter().all(|run| run.at < SECOND / 10), "all beside each other");
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn order_holds_over_a_crash() {
    let (rig, runs) = (Rig::ordered(), Runs::default());
    let first = rig.start("billing", |c| c.on_any(runs.take(10 * SECOND))).await;
    for id in ["a1", "a2", "a3"] {
        rig.send(keyed("a", id)).await;
    }
    rig.send(keyed("b", "b1")).await;
    rig.until("the second runs", || !runs.of("a2").is_empty()).await;
    first.crash().await;
    let second = rig.start("billing", |c| c.on_any(runs.take(SECOND))).await;
    rig.settled().await;
    let of_a: Vec<_> = runs.ids().into_iter().filter(|id| id.starts_with('a')).collect();
    assert_eq!(of_a, ["a1", "a2", "a2", "a3"], "what was done stays done, what waits behind it waits");
    assert_eq!((runs.of("a2")[1].crashes, runs.of("b1").len()), (1, 1));
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_copy_within_its_lane_is_a_duplicate() {
    let (rig, runs) = (Rig::ordered(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.take(SECOND))).await;
    for id in ["a1", "a2", "a1", "a3", "a2"] {
        rig.send(keyed("a", id)).await;
    }
    rig.settled().await;
    assert_eq!((runs.ids(), billing.statistics().duplicates), (vec!["a1".into(), "a2".into(), "a3".to_owned()], 2));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn one_event_of_a_key_runs_at_a_time_and_keys_beside_each_other() {
    let (rig, runs) = (Rig::ordered(), Runs::default());
    let billing = rig.start("billing", |c| c.on_any(runs.take(SECOND))).await;
    for number in 0..30 {
        rig.send(keyed(&format!("k{}", number % 3), &format!("{number:02}"))).await;
    }
    rig.settled().await;
    for key in 0..3 {
        let of_key: Vec<_> = runs.all().into_iter().filter(|run| run.id.parse::<u32>().unwrap() % 3 == key).collect();
        assert!(of_key.windows(2).all(|pair| pair[1].at >= pair[0].at + SECOND), "{of_key:?}");
        assert!(of_key.last().unwrap().at < 10 * SECOND, "three lanes beside each other");
    }
    billing.stop().await;
}
