//! Invariant: what failed is tried again when the policy says, as often as it says, and never as a duplicate of itself;
//! what waits for others is not counted, and bounded in time. Nothing is lost on the way.

use std::time::Duration;

use hapax::{Backoff, Event, Failure, Reason, RetryPolicy, Route, Status};
use serde::{Deserialize, Serialize};

use crate::rig::{Builder, Rig, Run, Runs, event};

const SECOND: Duration = Duration::from_secs(1);

fn seconds(runs: &[Run]) -> Vec<u64> {
    runs.iter().map(|run| run.at.as_millis().div_euclid(1_000) as u64).collect()
}

/// riverqueue/river#619: a retryable unique job conflicted with itself and was discarded.
#[tokio::test(start_paused = true)]
async fn retry_is_not_a_duplicate_of_itself() {
    // Waited for here, and kept by the broker.
    for (delay, settled) in [(SECOND, "settle ack"), (20 * SECOND, "settle retry 20000ms")] {
        let (rig, runs) = (Rig::new(), Runs::default());
        let handler = runs.answer(|run| if run.attempt < 3 { Err(Failure::retryable("busy")) } else { Ok(()) });
        let retry = RetryPolicy::fixed(delay).jitter(0.0);
        let billing = rig.start("billing", |c| c.on_any(handler).retry(retry)).await;
        rig.send(event("1")).await;
        rig.settled().await;
        assert_eq!(runs.attempts("1"), [1, 2, 3]);
        let statistics = billing.statistics();
        assert_eq!((statistics.processed, statistics.retried, statistics.duplicates), (1, 2, 0));
        assert_eq!(rig.journal.lines_of("settle")[0], settled);
        assert_eq!(rig.status("billing", "1").await, Some(Status::Processed));
        billing.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn delays_are_those_of_the_policy() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|_| Err(Failure::retryable("busy")));
    let backoff = Backoff::Exponential { first: SECOND, factor: 3.0, max: 20 * SECOND };
    let retry = RetryPolicy::with(backoff).jitter(0.0).attempts_max(6);
    let billing = rig.start("billing", |c| c.on_any(handler).retry(retry)).await;
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!(seconds(&runs.all()), [0, 1, 4, 13, 33, 53], "1, 3, 9, then 20 s");
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_settings_of_the_builder_are_the_policy_where_none_is_given() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|_| Err(Failure::retryable("busy")));
    let wire = rig.start("billing", |c| {
        c.on_any(handler).attempts_max(4).delay(2 * SECOND).delay_factor(2.0).delay_max(4 * SECOND).jitter(0.0)
    });
    let billing = wire.await;
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!(seconds(&runs.all()), [0, 2, 6, 10]);
    assert_eq!(rig.dead(), [("1".to_owned(), Reason::AttemptsExhausted)]);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn jitter_lengthens_and_spreads_delays_and_never_shortens_them() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|run| if run.attempt == 1 { Err(Failure::retryable("busy")) } else { Ok(()) });
    let retry = RetryPolicy::fixed(4 * SECOND).jitter(0.25);
    let billing = rig.start("billing", |c| c.on_any(handler).retry(retry).switch_events_min(u32::MAX)).await;
    rig.send_all(0..40).await;
    rig.settled().await;
    let second: Vec<_> = runs.all().into_iter().filter(|run| run.attempt == 2).map(|run| run.at).collect();
    assert!(second.iter().all(|at| (4 * SECOND..=5 * SECOND + SECOND / 10).contains(at)), "{second:?}");
    let spread = *second.iter().max().unwrap() - *second.iter().min().unwrap();
    assert!(spread > SECOND / 2, "{spread:?}");
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_reason_has_its_own_delay_and_a_failure_may_say_its_own() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|run| match run.attempt {
        1 => Err(Failure::retryable("rate limited")),
        2 => Err(Failure::retryable("busy")),
        3 => Err(Failure::retryable("busy").after(7 * SECOND)),
        _ => Ok(()),
    });
    let retry = RetryPolicy::fixed(SECOND).jitter(0.0).for_reason("rate limited", Backoff::Fixed(60 * SECOND));
    let billing = rig.start("billing", |c| c.on_any(handler).retry(retry)).await;
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!(seconds(&runs.all()), [0, 60, 61, 68]);
    billing.stop().await;
}

/// Holes of mq-bridge: no cap on attempts for errors of handlers, and no retry at a handler.
#[tokio::test(start_paused = true)]
async fn attempts_are_capped_and_the_last_one_is_the_last() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|_| Err(Failure::retryable("busy")));
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!(runs.attempts("1"), (1..=10).collect::<Vec<_>>());
    let (_, letter) = rig.dead_letter();
    assert_eq!((letter.reason, letter.attempts), (Reason::AttemptsExhausted, 10));
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!(runs.len(), 10, "a copy does not run it once more");
    billing.stop().await;
}

#[derive(Serialize, Deserialize)]
struct Placed {}
impl Event for Placed {
    const TYPE: &'static str = crate::rig::TYPE;
}

#[tokio::test(start_paused = true)]
async fn a_route_may_have_its_own_policy() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let (typed, any) = (runs.clone(), runs.answer(|_| Err(Failure::retryable("busy"))));
    let placed = move |_: Placed, cx: hapax::Context<()>| {
        typed.note(&cx);
        async { Err::<(), _>(Failure::retryable("busy")) }
    };
    let route = Route::on(placed).retry(RetryPolicy::none());
    let billing = rig.start("billing", |c| c.add(route).on_any(any).attempts_max(3)).await;
    rig.send(event("own")).await;
    rig.send(hapax::Message::event("/shop", "general", "other")).await;
    rig.settled().await;
    assert_eq!((runs.of("own").len(), runs.of("general").len()), (1, 3));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_time_for_all_attempts_together_ends_them() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|_| Err(Failure::retryable("busy")));
    let retry = RetryPolicy::fixed(20 * SECOND).jitter(0.0).total_max(50 * SECOND);
    let billing = rig.start("billing", |c| c.on_any(handler).retry(retry)).await;
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!(seconds(&runs.all()), [0, 20, 40], "the next would begin after 60 s");
    assert_eq!(rig.dead(), [("1".to_owned(), Reason::TimeExhausted)]);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn waiting_for_a_prerequisite_is_not_counted_and_ends_when_it_comes() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.then({
        let runs = runs.clone();
        move |run, _| {
            let is_there = run.id == "order" || runs.of("order").len() == 1;
            async move { if is_there { Ok(()) } else { Err(Failure::not_yet("no order", 10 * SECOND)) } }
        }
    });
    let billing = rig.start("billing", |c| c.on_any(handler).attempts_max(2)).await;
    rig.send(event("payment")).await;
    tokio::time::sleep(605 * SECOND).await;
    rig.send(event("order")).await;
    rig.settled().await;
    assert_eq!(runs.attempts("payment"), [1; 62], "every ten seconds, none of them counted");
    assert_eq!((billing.statistics().processed, rig.dead().len()), (2, 0));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn waiting_for_a_prerequisite_is_bounded_in_time() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|_| Err(Failure::not_yet("no order", 30 * SECOND)));
    let billing = rig.start("billing", |c| c.on_any(handler).not_yet_max(300 * SECOND)).await;
    rig.send(event("payment")).await;
    rig.settled().await;
    assert_eq!(rig.dead(), [("payment".to_owned(), Reason::NeverReady)]);
    let all = runs.all();
    assert!(all.last().unwrap().at <= 301 * SECOND, "{:?}", all.last());
    assert!((10..=11).contains(&all.len()), "{}", all.len());
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_unavailable_dependency_is_not_counted_and_dead_letters_nothing() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let begun = tokio::time::Instant::now();
    let back = 3_600 * SECOND;
    let handler = runs.then(move |_, _| async move {
        if begun.elapsed() < back { Err(Failure::unavailable("no database")) } else { Ok(()) }
    });
    let billing = rig.start("billing", |c| c.on_any(handler).attempts_max(2)).await;
    rig.send_all(0..10).await;
    rig.settled().await;
    assert!(runs.all().iter().all(|run| run.attempt == 1));
    assert_eq!((billing.statistics().processed, rig.dead().len()), (10, 0));
    // The switch probes with one at a time, every 30 s: no storm against what is down.
    assert!(runs.len() < 10 + 120 + 10, "{} runs in an hour", runs.len());
    billing.stop().await;
}

/// celery/kombu#337, celery/celery#3270, #5306: the visibility timeout counted from the pull, so that what was delayed or
/// took long ran again every hour.
#[tokio::test(start_paused = true)]
async fn delay_longer_than_lease_runs_once() {
    let (rig, runs) = (Rig::new(), Runs::default());
    // Waits here for 20 leases, then at the broker for ten, then runs for four.
    let handler = runs.then(|run, _| async move {
        match run.attempt {
            1 => Err(Failure::retryable("here").after(600 * SECOND)),
            2 => Err(Failure::retryable("there").after(3_000 * SECOND)),
            _ => {
                tokio::time::sleep(120 * SECOND).await;
                Ok(())
            }
        }
    });
    let wire = |c: Builder| c.on_any(handler).hold(1_000 * SECOND).timeout(300 * SECOND);
    let billing = rig.start("billing", wire).await;
    let other = rig.start("billing", |c| c.on_any(runs.ok())).await;
    rig.send(event("1")).await;
    tokio::time::sleep(SECOND).await;
    other.stop().await;
    rig.settled().await;
    assert_eq!((seconds(&runs.all()), runs.attempts("1")), (vec![0, 600, 3_600], vec![1, 2, 3]));
    assert_eq!(billing.statistics().leases_lost, 0);
    billing.stop().await;
}

/// Sidekiq Pro #3371: of many jobs with the same scheduled second some were lost.
#[tokio::test(start_paused = true)]
async fn same_timestamp_bulk_schedule() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|run| if run.attempt == 1 { Err(Failure::retryable("busy")) } else { Ok(()) });
    let retry = RetryPolicy::fixed(60 * SECOND).jitter(0.0);
    let billing = rig.start("billing", |c| c.on_any(handler).retry(retry).switch_events_min(u32::MAX)).await;
    rig.send_all(0..1_000).await;
    rig.settled().await;
    assert_eq!((runs.len(), billing.statistics().processed), (2_000, 1_000));
    assert!(rig.journal.lines_of("settle retry 60000ms").len() == 1_000);
    billing.stop().await;
}

/// spring-projects/spring-kafka#4465: failures were queued and polled again, so that attempts grew with the square.
#[tokio::test(start_paused = true)]
async fn attempts_linear_under_burst_failure() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|_| Err(Failure::retryable("busy")));
    let billing = rig.start("billing", |c| c.on_any(handler).attempts_max(5).switch_events_min(u32::MAX)).await;
    rig.send_all(0..200).await;
    rig.settled().await;
    assert_eq!((runs.len(), rig.dead().len()), (1_000, 200));
    for id in 0..200 {
        assert_eq!(runs.attempts(&id.to_string()), [1, 2, 3, 4, 5]);
    }
    billing.stop().await;
}

/// sidekiq/sidekiq#4141, #1511: a job that failed while the broker was down was lost.
#[tokio::test(start_paused = true)]
async fn failure_during_outage_is_retried() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let (store, broker) = (rig.store_faults.clone(), rig.broker_faults.clone());
    let handler = runs.answer(move |run| {
        if run.attempt == 1 {
            store.begin_outage();
            broker.begin_outage();
            return Err(Failure::retryable("busy").after(20 * SECOND));
        }
        Ok(())
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send(event("1")).await;
    tokio::time::sleep(600 * SECOND).await;
    assert_eq!(runs.len(), 1);
    rig.store_faults.end_outage();
    tokio::time::sleep(60 * SECOND).await;
    rig.broker_faults.end_outage();
    rig.settled().await;
    assert_eq!((runs.attempts("1").last(), billing.statistics().processed, rig.dead().len()), (Some(&2), 1, 0));
    billing.stop().await;
}

/// spring-projects/spring-kafka#2464: exceptions that only steer were taken for failures: attempt 2 at the first delivery.
#[tokio::test(start_paused = true)]
async fn control_flow_is_not_failure() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let first = rig.start("billing", |c| c.on_any(runs.take(50 * SECOND)).drain(SECOND).attempts_max(1)).await;
    rig.send_all(0..3).await;
    rig.until("they run", || runs.len() == 3).await;
    first.stop().await;
    let second = rig.start("billing", |c| c.on_any(runs.take(50 * SECOND)).attempts_max(1)).await;
    rig.until("they run again", || runs.len() == 6).await;
    // A partition that is taken away is no failure either.
    second.connection.drain_session();
    rig.settled().await;
    assert!(runs.all().iter().all(|run| (run.attempt, run.crashes) == (1, 0)), "{:?}", runs.all());
    assert_eq!(rig.dead(), []);
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_its_next_attempt_survives_its_process_and_its_time() {
    // Waited for in the process that dies, and kept by the broker.
    for (hold, retry) in [(100 * SECOND, false), (5 * SECOND, true)] {
        let (rig, runs) = (Rig::new(), Runs::default());
        let fail = |runs: &Runs| {
            runs.answer(
                |run| if run.attempt == 1 { Err(Failure::retryable("busy").after(60 * SECOND)) } else { Ok(()) },
            )
        };
        let first = rig.start("billing", |c| c.on_any(fail(&runs)).hold(hold)).await;
        rig.send(event("1")).await;
        rig.until("it waits", || runs.len() == 1).await;
        tokio::time::sleep(SECOND).await;
        assert_eq!(rig.journal.lines_of("settle retry").len(), usize::from(retry));
        first.crash().await;
        let second = rig.start("billing", |c| c.on_any(fail(&runs)).hold(hold)).await;
        rig.settled().await;
        let again = &runs.all()[1];
        assert_eq!((again.attempt, again.crashes), (2, 0), "waiting is not holding");
        assert!((60 * SECOND..62 * SECOND).contains(&again.at), "not before its time: {:?}", again.at);
        second.stop().await;
    }
}

/// Hole of mq-bridge: one retryable error gives the whole batch back, handlers that had finished included.
#[tokio::test(start_paused = true)]
async fn one_failure_spares_its_batch() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.answer(|run| match (run.id.as_str(), run.attempt) {
        ("17", 1) => Err(Failure::retryable("busy")),
        _ => Ok(()),
    });
    rig.send_all(0..60).await;
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.settled().await;
    assert_eq!((runs.len(), runs.attempts("17")), (61, vec![1, 2]));
    assert_eq!(rig.journal.lines_of("settle").len(), 60);
    billing.stop().await;
}

/// BrighterCommand/Brighter@ac6e10301: a field of the broker's own was written again on requeue and came back twice.
#[tokio::test(start_paused = true)]
async fn requeue_roundtrips_headers() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let handler = runs.then({
        let seen = std::sync::Arc::clone(&seen);
        move |run, cx| {
            seen.lock().unwrap().push(cx.message().clone());
            async move { if run.attempt < 3 { Err(Failure::retryable("busy").after(60 * SECOND)) } else { Ok(()) } }
        }
    });
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    let sent = event("1")
        .with_header("X-Tenant", vec![0, 255, 13, 10])
        .with_header("x-tenant", "lower case is another name")
        .with_header("X-Tenant", "twice")
        .with_partition_key("7")
        .with_subject("order/1");
    rig.send(sent.clone()).await;
    rig.settled().await;
    assert_eq!(*seen.lock().unwrap(), [sent.clone(), sent.clone(), sent]);
    billing.stop().await;
}

/// A broker whose retries have no place, as a deleted wait queue or a retry topic without a leader.
struct NoPlace<B> {
    inner: B,
    /// Says nothing at all, instead of an error.
    silent: bool,
}

#[async_trait::async_trait]
impl<B: hapax::Broker> hapax::Broker for NoPlace<B> {
    async fn open(&self, limits: hapax::Limits) -> hapax::Result<()> {
        self.inner.open(limits).await
    }
    async fn receive(&self, want: hapax::Want) -> hapax::Result<Vec<hapax::Delivery>> {
        self.inner.receive(want).await
    }
    async fn settle(&self, batch: &[(hapax::Receipt, hapax::Settlement)]) -> Vec<hapax::Result<()>> {
        let is_retry = |item: &(_, hapax::Settlement)| matches!(item.1, hapax::Settlement::Retry { .. });
        if self.silent && batch.iter().any(is_retry) {
            return std::future::pending().await;
        }
        let mut answers = Vec::new();
        for item in batch {
            answers.push(match is_retry(item) {
                true => Err(hapax::Error::new(hapax::ErrorKind::Unavailable, "settle").because("no such place")),
                false => self.inner.settle(std::slice::from_ref(item)).await.remove(0),
            });
        }
        answers
    }
    async fn stop(&self) -> hapax::Result<()> {
        self.inner.stop().await
    }
    async fn close(&self) -> hapax::Result<()> {
        self.inner.close().await
    }
    fn capabilities(&self) -> hapax::Capabilities {
        self.inner.capabilities()
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_without_a_place_holds_up_no_ack() {
    for silent in [false, true] {
        let (rig, runs) = (Rig::new(), Runs::default());
        let handler = runs.answer(|run| match run.id.as_str() {
            "later" => Err(Failure::retryable("busy").after(Duration::from_secs(60))),
            _ => Ok(()),
        });
        let broker = NoPlace { inner: rig.broker.another(), silent };
        let consumer = hapax::Consumer::builder("billing", broker, rig.journaled_store()).seed(1).on_any(handler);
        let consumer = consumer.build().await.unwrap_or_else(|error| panic!("{error}"));
        let running = tokio::spawn(consumer.run(std::future::pending()));
        rig.send_all(["later", "1", "2"]).await;
        rig.until("the retry is tried", || runs.len() == 3).await;
        tokio::time::sleep(Duration::from_secs(30)).await;
        rig.send_all(["3", "4"]).await;
        rig.until("all but one are acked", || runs.len() == 5 && rig.broker.standing().unsettled == 1).await;
        running.abort();
    }
}
