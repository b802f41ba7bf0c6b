//! Invariant: what a handler publishes goes out before its event is recorded as processed, under ids that are the same on
//! every attempt; a failed attempt and a duplicate publish nothing.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use hapax::{
    Consumer, Context, Error, ErrorKind, Event, Failure, Message, Outgoing, PUBLISHED_MAX, Publisher, Reason, Result,
    Status,
};
use hapax_memory::{MemoryBroker, MemoryPublisher};
use serde::{Deserialize, Serialize};

use crate::journal::Journaled;
use crate::rig::{Builder, Rig, Runs, event};

const SECOND: Duration = Duration::from_secs(1);

#[derive(Serialize, Deserialize)]
struct Billed {
    cents: u64,
}
impl Event for Billed {
    const TYPE: &'static str = "order.billed";
    const VERSION: u32 = 2;
}

/// Takes what is published; answers with the scripted errors first.
#[derive(Clone, Default)]
struct Post(Arc<Mutex<(Vec<Outgoing>, VecDeque<ErrorKind>)>>);

impl Post {
    fn failing(errors: impl IntoIterator<Item = ErrorKind>) -> Self {
        let post = Self::default();
        post.0.lock().unwrap().1.extend(errors);
        post
    }

    fn messages(&self) -> Vec<Message> {
        self.0.lock().unwrap().0.iter().map(|outgoing| outgoing.message.clone()).collect()
    }

    fn ids(&self) -> Vec<String> {
        self.messages().iter().map(|message| message.attributes.id.as_deref().unwrap_or_default().into()).collect()
    }

    fn different_ids(&self) -> usize {
        self.ids().into_iter().collect::<BTreeSet<_>>().len()
    }
}

#[async_trait]
impl Publisher for Post {
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        let mut post = self.0.lock().unwrap();
        let mut answers = Vec::new();
        for outgoing in batch {
            match post.1.pop_front() {
                Some(kind) => answers.push(Err(Error::new(kind, "publish"))),
                None => {
                    post.0.push(outgoing);
                    answers.push(Ok(()));
                }
            }
        }
        answers
    }
}

fn journaled(rig: &Rig, post: &Post) -> Journaled<Post> {
    Journaled { inner: post.clone(), journal: rig.journal.clone() }
}

fn bill(cx: &Context<()>) -> std::result::Result<(), Failure> {
    cx.publish(&Billed { cents: 7 }).send()?;
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn what_is_published_goes_out_before_the_record_and_the_record_before_the_ack() {
    let (rig, runs, post) = (Rig::new(), Runs::default(), Post::default());
    let handler = runs.then(|_, cx| std::future::ready(bill(&cx)));
    let billing = rig.start("billing", |c| c.on_any(handler).publisher(journaled(&rig, &post))).await;
    rig.send(event("1")).await;
    rig.settled().await;
    let id = &post.ids()[0];
    assert_eq!(
        rig.journal.lines(),
        ["store claim 1", &format!("publish {id}"), "store record processed", "settle ack"]
    );
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_published_event_tells_where_it_comes_from() {
    let (rig, runs, post) = (Rig::new(), Runs::default(), Post::default());
    let handler = runs.then(|_, cx| {
        let published = cx.publish(&Billed { cents: 7 }).key("k").to("bills").send();
        std::future::ready(published.map_err(Failure::from))
    });
    let billing = rig.start("billing", |c| c.on_any(handler).publisher(post.clone())).await;
    let mut second = event("2");
    second.attributes.correlation_id = Some("conversation".into());
    rig.send(event("1")).await;
    rig.send(second).await;
    rig.settled().await;
    let messages = post.messages();
    let first = &messages[0].attributes;
    assert_eq!((first.ty.as_deref(), first.source.as_deref()), (Some("order.billed.v2"), Some("billing")));
    assert_eq!((first.correlation_id.as_deref(), first.causation_id.as_deref()), (Some("1"), Some("1")));
    assert_eq!(first.partition_key.as_deref(), Some("k"));
    assert_eq!(&messages[0].data[..], br#"{"cents":7}"#);
    let second = &messages[1].attributes;
    assert_eq!((second.correlation_id.as_deref(), second.causation_id.as_deref()), (Some("conversation"), Some("2")));
    assert_eq!(post.0.lock().unwrap().0[0].to.as_deref(), Some("bills"));
    assert_ne!(first.id, second.id);
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_crash_behind_publishing_publishes_the_same_id_again() {
    let (rig, runs, post) = (Rig::new(), Runs::default(), Post::default());
    let store = rig.store_faults.clone();
    let noted = runs.clone();
    let handler = runs.then(move |_, cx| {
        if noted.len() == 1 {
            store.begin_outage();
        }
        std::future::ready(bill(&cx))
    });
    let first = rig.start("billing", |c| c.on_any(handler).publisher(post.clone())).await;
    rig.send(event("1")).await;
    rig.until("it is published", || post.ids().len() == 1).await;
    first.crash().await;
    rig.store_faults.end_outage();
    let again = runs.then(|_, cx| std::future::ready(bill(&cx)));
    let second = rig.start("billing", |c| c.on_any(again).publisher(post.clone())).await;
    rig.settled().await;
    assert_eq!((runs.len(), post.ids().len(), post.different_ids()), (2, 2, 1), "consumers know the copy");
    second.stop().await;
}

/// Particular/NServiceBus#3070: a duplicate sent everything again.
#[tokio::test(start_paused = true)]
async fn duplicate_emits_nothing() {
    let (rig, runs, post) = (Rig::new(), Runs::default(), Post::default());
    let handler = runs.then(|_, cx| std::future::ready(bill(&cx)));
    let billing = rig.start("billing", |c| c.on_any(handler).publisher(post.clone())).await;
    rig.send_all(["1", "1", "1"]).await;
    rig.settled().await;
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!((post.ids().len(), billing.statistics().duplicates), (1, 3));
    billing.stop().await;
}

/// spring-projects/spring-kafka#2934: a retry inside a transaction committed the outputs of the failed attempt.
#[tokio::test(start_paused = true)]
async fn failed_attempt_outputs_not_committed() {
    let (rig, runs, post) = (Rig::new(), Runs::default(), Post::default());
    let handler = runs.then(|run, cx| async move {
        bill(&cx)?;
        match (run.id.as_str(), run.attempt) {
            ("late", 1) => tokio::time::sleep(100 * SECOND).await,
            (_, 1) => return Err(Failure::retryable("busy")),
            ("dead", _) => return Err(Failure::permanent("no")),
            ("panic", 2) => panic!("on purpose"),
            _ => {}
        }
        Ok(())
    });
    let wire = |c: Builder| c.on_any(handler).publisher(post.clone()).timeout(10 * SECOND);
    let billing = rig.start("billing", wire).await;
    rig.send_all(["retried", "dead", "panic", "late"]).await;
    rig.settled().await;
    assert_eq!((post.ids().len(), post.different_ids()), (3, 3), "one each that succeeded in the end");
    assert_eq!(rig.dead(), [("dead".to_owned(), Reason::Permanent)]);
    billing.stop().await;
}

/// JasperFx/wolverine GH-3926: a message that was too large was retried for ever as if that could help.
#[tokio::test(start_paused = true)]
async fn permanent_publish_error_is_permanent() {
    let (rig, runs, post) = (Rig::new(), Runs::default(), Post::failing([ErrorKind::Rejected]));
    let handler = runs.then(|_, cx| std::future::ready(bill(&cx)));
    let billing = rig.start("billing", |c| c.on_any(handler).publisher(journaled(&rig, &post))).await;
    rig.send_all(["1", "2"]).await;
    rig.settled().await;
    assert_eq!((runs.len(), rig.dead()), (2, vec![("1".to_owned(), Reason::Permanent)]));
    assert_eq!(rig.journal.lines_of("publish ").len(), 2, "one try of each");
    let error = rig.dead_letter().1.error.to_string();
    assert!(error.contains("published"), "{error}");
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_the_publisher_holds_the_record_up_and_runs_nothing_twice() {
    let errors = [ErrorKind::Unavailable; 8].into_iter().chain([ErrorKind::Unknown; 4]);
    let (rig, runs, post) = (Rig::new(), Runs::default(), Post::failing(errors));
    let handler = runs.then(|_, cx| std::future::ready(bill(&cx)));
    let billing = rig.start("billing", |c| c.on_any(handler).publisher(journaled(&rig, &post)).lease(5 * SECOND)).await;
    rig.send(event("1")).await;
    let begun = tokio::time::Instant::now();
    rig.settled().await;
    assert!(begun.elapsed() > 10 * SECOND, "longer than a lease: {:?}", begun.elapsed());
    let lines = rig.journal.lines();
    let place = |line: &str| lines.iter().position(|l| l == line).unwrap();
    assert!(place(&format!("publish {}", post.ids()[0])) < place("store record processed"));
    assert_eq!((runs.len(), billing.statistics().leases_lost, rig.dead().len()), (1, 0, 0));
    assert_eq!(rig.journal.observed("Reach { side: Publisher, up: false"), 1, "told once");
    assert_eq!(rig.journal.observed("Reach { side: Publisher, up: true"), 1, "and that it is back");
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn one_event_that_cannot_be_published_yet_holds_up_no_other() {
    #[derive(Clone, Default)]
    struct Half(Post);
    #[async_trait]
    impl Publisher for Half {
        async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
            let mut answers = Vec::new();
            for outgoing in batch {
                if outgoing.to.as_deref() == Some("down") {
                    answers.push(Err(Error::new(ErrorKind::Unavailable, "publish")));
                } else {
                    answers.extend(self.0.publish(vec![outgoing]).await);
                }
            }
            answers
        }
    }
    let (rig, runs, half) = (Rig::new(), Runs::default(), Half::default());
    let handler = runs.then(|run, cx| {
        let place = if run.id == "stuck" { "down" } else { "up" };
        std::future::ready(cx.publish(&Billed { cents: 1 }).to(place).send().map_err(Failure::from))
    });
    let billing = rig.start("billing", |c| c.on_any(handler).publisher(half.clone())).await;
    rig.send(event("stuck")).await;
    rig.until("it is tried", || runs.len() == 1).await;
    let begun = tokio::time::Instant::now();
    rig.send_all(0..20).await;
    rig.until("the others are done", || billing.statistics().processed == 20).await;
    assert!(begun.elapsed() < 2 * SECOND, "{:?}", begun.elapsed());
    drop(billing);
}

/// JasperFx/wolverine@cd1b918e0 (#2529): an unsynchronised list lost what was published at once.
#[tokio::test(start_paused = true)]
async fn concurrent_emit_from_handler() {
    let (rig, runs, post) = (Rig::new(), Runs::default(), Post::default());
    let handler = runs.then(|_, cx| async move {
        let publish = |part: usize| {
            let cx = cx.clone();
            tokio::spawn(async move {
                for number in 0..25 {
                    cx.publish(&Billed { cents: 1 }).step(&format!("{part}/{number}")).send().unwrap();
                    tokio::task::yield_now().await;
                }
            })
        };
        for part in (0..8).map(publish).collect::<Vec<_>>() {
            part.await?;
        }
        Ok(())
    });
    let billing = rig.start("billing", |c| c.on_any(handler).publisher(post.clone())).await;
    rig.send(event("1")).await;
    rig.settled().await;
    assert_eq!((post.ids().len(), post.different_ids()), (200, 200));
    billing.stop().await;
}

/// MassTransit/MassTransit#4676: the count of redeliveries was copied onto outgoing messages.
#[tokio::test(start_paused = true)]
async fn attempt_headers_not_propagated() {
    let (rig, runs, post) = (Rig::new(), Runs::default(), Post::default());
    let noted = runs.clone();
    let handler = runs.then(move |_, cx| {
        let answer = match noted.len() {
            1 => Err(Failure::retryable("busy").after(60 * SECOND)),
            2 => Err(Failure::permanent("no")),
            _ => bill(&cx),
        };
        let ours = cx.message().headers.iter().any(|(name, _)| name.starts_with("hapax-"));
        std::future::ready(if ours { Err(Failure::permanent("a header of ours")) } else { answer })
    });
    let billing = rig.start("billing", |c| c.on_any(handler).publisher(post.clone())).await;
    rig.send(event("1").with_header("x-tenant", "7")).await;
    rig.settled().await;
    rig.broker.redrive();
    rig.settled().await;
    assert_eq!((runs.len(), rig.dead()), (3, vec![]), "handlers see none of them either");
    let message = &post.messages()[0];
    assert!(message.headers.is_empty(), "{:?}", message.headers);
    assert_eq!(message.attributes.causation_id.as_deref(), Some("1"));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn ids_tell_consumers_events_types_and_steps_apart() {
    let (rig, runs, post) = (Rig::new(), Runs::default(), Post::default());
    let handler = |runs: &Runs| {
        runs.then(|_, cx| {
            let both = || {
                cx.publish(&Billed { cents: 1 }).send()?;
                cx.publish(&Billed { cents: 1 }).step("fee").send()?;
                Ok(())
            };
            std::future::ready(both())
        })
    };
    let billing = rig.start("billing", |c| c.on_any(handler(&runs)).publisher(post.clone())).await;
    let shipping = rig.start("shipping", |c| c.on_any(handler(&runs)).publisher(post.clone())).await;
    rig.send_all(["1", "2"]).await;
    rig.settled().await;
    rig.until("both groups are done", || post.ids().len() == 8).await;
    assert_eq!(post.different_ids(), 8);
    billing.stop().await;
    shipping.stop().await;
}

#[tokio::test(start_paused = true)]
async fn one_step_twice_and_too_many_events_are_refused_to_the_handler() {
    let (rig, runs, post) = (Rig::new(), Runs::default(), Post::default());
    let handler = runs.then(|run, cx| async move {
        if run.id == "twice" {
            bill(&cx)?;
            let refused = cx.publish(&Billed { cents: 8 }).send().unwrap_err();
            assert!(refused.to_string().contains("step"), "{refused}");
            return Ok(());
        }
        for number in 0..PUBLISHED_MAX {
            cx.publish(&Billed { cents: 1 }).step(&number.to_string()).send()?;
        }
        let refused = cx.publish(&Billed { cents: 1 }).step("one more").send().unwrap_err();
        assert!(!refused.is_retryable(), "{refused}");
        Ok(())
    });
    let billing = rig.start("billing", |c| c.on_any(handler).publisher(post.clone())).await;
    rig.send_all(["twice", "many"]).await;
    rig.settled().await;
    assert_eq!((post.ids().len(), rig.dead()), (1 + PUBLISHED_MAX, vec![]));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn publishing_without_a_publisher_is_set_aside_and_says_what_is_missing() {
    let (rig, runs) = (Rig::new(), Runs::default());
    let handler = runs.then(|_, cx| std::future::ready(bill(&cx)));
    let billing = rig.start("billing", |c| c.on_any(handler)).await;
    rig.send(event("1")).await;
    rig.settled().await;
    let (_, letter) = rig.dead_letter();
    assert!(letter.reason == Reason::Permanent && letter.error.contains(".publisher("), "{}", letter.error);
    assert_eq!(rig.status("billing", "1").await, Some(Status::DeadLettered));
    billing.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_chain_of_consumers_has_one_effect_at_its_end_whatever_is_lost() {
    let (rig, billed, shipped) = (Rig::new(), Runs::default(), Runs::default());
    let bills = MemoryBroker::builder("bills").group("shipping").build();
    let lossy = LossyPost(bills.publisher());
    let handler = billed.then(|_, cx| std::future::ready(bill(&cx)));
    let billing = rig.start("billing", |c| c.on_any(handler).publisher(lossy)).await;
    let shipping = Consumer::builder("shipping", bills.another(), rig.journaled_store());
    let shipping = shipping.on_any(shipped.ok()).build().await.unwrap();
    let running = tokio::spawn(shipping.run(std::future::pending()));
    rig.send_all(0..50).await;
    rig.send_all(0..50).await;
    rig.settled().await;
    bills.settled().await;
    assert_eq!((billed.len(), shipped.len()), (50, 50));
    running.abort();
    billing.stop().await;
}

/// Publishes all, and loses the answers to the first half of every batch of several.
struct LossyPost(MemoryPublisher);

#[async_trait]
impl Publisher for LossyPost {
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        let answers = self.0.publish(batch).await;
        let half = answers.len() / 2;
        let lose = |(n, answer)| if n < half { Err(Error::new(ErrorKind::Unknown, "publish")) } else { answer };
        answers.into_iter().enumerate().map(lose).collect()
    }
}
