//! The trickiest parts of the broker: who gets what, what comes back when, and what a dropped future leaves behind.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hapax::{
    Broker, DeadLetter, DefectKind, Delivery, ErrorKind, Limits, Message, MessageLimits, Reason, Receipt, SessionState,
    Settlement, Want,
};
use tokio::time::{Instant, timeout};

use super::{MemoryBroker, Standing};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const WANT: Want = Want { events: 256, bytes: 1 << 20 };

fn limits(events: usize) -> Limits {
    Limits { events, bytes: 1 << 20, held_max: MINUTE, drain: 5 * SECOND, message: MessageLimits::DEFAULT }
}

fn message(id: u64) -> Message {
    Message::event("test:orders", id.to_string(), "order.placed").with_data("text/plain", "0123456789")
}

async fn opened(broker: MemoryBroker) -> MemoryBroker {
    broker.open(limits(1024)).await.unwrap();
    broker
}

async fn filled(messages: u64) -> MemoryBroker {
    let broker = opened(MemoryBroker::new("orders")).await;
    for id in 1..=messages {
        assert_eq!(broker.publisher().send(message(id)).await, id);
    }
    broker
}

async fn receive(broker: &MemoryBroker) -> Vec<Delivery> {
    timeout(SECOND, broker.receive(WANT)).await.expect("something is ready").unwrap()
}

async fn nothing_for(broker: &MemoryBroker, long: Duration) -> bool {
    timeout(long, broker.receive(WANT)).await.is_err()
}

fn ids(deliveries: &[Delivery]) -> Vec<&str> {
    deliveries.iter().map(|delivery| delivery.message.attributes.id.as_deref().unwrap()).collect()
}

async fn settle(broker: &MemoryBroker, receipt: Receipt, settlement: Settlement) -> Result<(), ErrorKind> {
    broker.settle(&[(receipt, settlement)]).await.remove(0).map_err(|error| error.kind())
}

fn letter(reopen: Option<u64>) -> Settlement {
    Settlement::DeadLetter(Box::new(DeadLetter {
        reason: Reason::Permanent,
        error: "no such order".into(),
        consumer: "billing".into(),
        attempts: 1,
        first: SystemTime::UNIX_EPOCH,
        last: SystemTime::UNIX_EPOCH,
        origin: None,
        reopen: reopen.and_then(NonZeroU64::new),
    }))
}

#[tokio::test(start_paused = true)]
async fn every_group_sees_each_message_and_consumers_of_a_group_share_them() {
    let billing = opened(MemoryBroker::builder("orders").group("billing").build()).await;
    let beside = opened(billing.another()).await;
    let shipping = opened(billing.group("shipping")).await;
    for id in 1..=4 {
        billing.publisher().send(message(id)).await;
    }
    let two = Want { events: 2, ..WANT };
    assert_eq!(ids(&billing.receive(two).await.unwrap()), ["1", "2"]);
    assert_eq!(ids(&receive(&beside).await), ["3", "4"]);
    assert_eq!(ids(&receive(&shipping).await), ["1", "2", "3", "4"]);
}

#[tokio::test(start_paused = true)]
async fn a_new_group_begins_with_what_another_has_not_finished() {
    let billing = filled(3).await;
    let got = receive(&billing).await;
    settle(&billing, got[1].receipt, Settlement::Ack).await.unwrap();
    let late = opened(billing.group("audit")).await;
    assert_eq!(ids(&receive(&late).await), ["1", "3"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_given_back_returns_to_its_place() {
    let broker = filled(4).await;
    let got = broker.receive(Want { events: 3, ..WANT }).await.unwrap();
    settle(&broker, got[1].receipt, Settlement::Release { counted: true }).await.unwrap();
    settle(&broker, got[0].receipt, Settlement::Release { counted: false }).await.unwrap();
    let again = receive(&broker).await;
    assert_eq!(ids(&again), ["1", "2", "4"]);
    assert_eq!(again.iter().map(|d| d.count.unwrap()).collect::<Vec<_>>(), [1, 2, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_retry_comes_at_its_time_and_an_idle_receive_waits_for_it() {
    let broker = filled(1).await;
    let got = receive(&broker).await;
    let began = Instant::now();
    settle(&broker, got[0].receipt, Settlement::Retry { after: MINUTE }).await.unwrap();
    assert_eq!(broker.standing(), Standing { later: 1, ..Standing::default() });
    let again = broker.receive(WANT).await.unwrap();
    assert_eq!(began.elapsed(), MINUTE);
    assert_eq!(again[0].count, Some(2));
}

#[tokio::test(start_paused = true)]
async fn a_retry_asked_for_while_another_receive_waits_is_not_overslept() {
    let broker = Arc::new(filled(1).await);
    let got = receive(&broker).await;
    let waiting = tokio::spawn({
        let broker = Arc::clone(&broker);
        async move { broker.receive(WANT).await.unwrap().len() }
    });
    tokio::task::yield_now().await;
    settle(&broker, got[0].receipt, Settlement::Retry { after: SECOND }).await.unwrap();
    assert_eq!(timeout(2 * SECOND, waiting).await.expect("woken").unwrap(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_receive_loses_nothing() {
    let broker = opened(MemoryBroker::new("orders")).await;
    let beside = opened(broker.another()).await;
    for id in 1..=50 {
        let mut dropped = Box::pin(broker.receive(WANT));
        assert!(poll_once(dropped.as_mut()).await.is_none());
        broker.publisher().send(message(id)).await;
        drop(dropped);
        let got = receive(&beside).await;
        assert_eq!(ids(&got), [id.to_string()]);
        settle(&beside, got[0].receipt, Settlement::Ack).await.unwrap();
    }
    broker.settled().await;
}

/// A consumer that waits against a publisher that spins, and the other way about, one message at a time: each looks
/// just when the other acts. One lost wake-up and both stand still.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn no_wake_up_is_lost_between_threads() {
    const MESSAGES: u64 = 2_000;
    for publisher_spins in [true, false] {
        let broker = Arc::new(opened(MemoryBroker::builder("orders").capacity(1).build()).await);
        let publisher = broker.publisher();
        let publishing = tokio::spawn(async move {
            for id in 0..MESSAGES {
                if publisher_spins {
                    while publisher.try_publish(&message(id)).is_err() {
                        tokio::task::consume_budget().await;
                    }
                } else {
                    publisher.send(message(id)).await;
                }
            }
        });
        let consumer = Arc::clone(&broker);
        let consuming = tokio::spawn(async move {
            for _ in 0..MESSAGES {
                let got = if publisher_spins {
                    consumer.receive(WANT).await.unwrap()
                } else {
                    loop {
                        match poll_once(consumer.receive(WANT).as_mut()).await {
                            Some(got) => break got.unwrap(),
                            None => tokio::task::consume_budget().await,
                        }
                    }
                };
                settle(&consumer, got[0].receipt, Settlement::Ack).await.unwrap();
            }
        });
        let both = async { (publishing.await.unwrap(), consuming.await.unwrap()) };
        timeout(MINUTE, both).await.expect("nobody is left waiting");
        broker.settled().await;
    }
}

async fn poll_once<F: Future + ?Sized>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        std::task::Poll::Ready(output) => std::task::Poll::Ready(Some(output)),
        std::task::Poll::Pending => std::task::Poll::Ready(None),
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn settling_twice_has_one_effect_even_after_the_message_went_out_again() {
    let broker = filled(1).await;
    let first = receive(&broker).await[0].receipt;
    settle(&broker, first, Settlement::Release { counted: true }).await.unwrap();
    let second = receive(&broker).await[0].receipt;
    assert_eq!(settle(&broker, first, Settlement::Ack).await, Ok(()));
    assert_eq!(broker.standing().unsettled, 1, "the old receipt must not settle the new delivery");
    settle(&broker, second, Settlement::Ack).await.unwrap();
    assert_eq!(settle(&broker, second, Settlement::Release { counted: true }).await, Ok(()));
    assert_eq!(broker.standing(), Standing::default());
}

#[tokio::test(start_paused = true)]
async fn an_ended_session_gives_back_what_it_held_and_its_receipts_are_stale() {
    let broker = filled(2).await;
    let got = receive(&broker).await;
    broker.end_session();
    assert_eq!(got[0].session.state(), SessionState::Ended);
    assert_eq!(settle(&broker, got[0].receipt, Settlement::Ack).await, Err(ErrorKind::Stale));
    let again = receive(&broker).await;
    assert_eq!((ids(&again), again[0].count), (vec!["1", "2"], Some(2)));
    assert_ne!(again[0].session.id(), got[0].session.id());
}

#[tokio::test(start_paused = true)]
async fn a_dropped_consumer_gives_back_what_it_held() {
    let broker = filled(2).await;
    let beside = opened(broker.another()).await;
    let got = receive(&beside).await;
    drop(beside);
    assert_eq!(got[0].session.state(), SessionState::Ended);
    assert_eq!(ids(&receive(&broker).await), ["1", "2"]);
}

#[tokio::test(start_paused = true)]
async fn a_draining_session_ends_when_its_last_delivery_is_settled() {
    let broker = filled(1).await;
    let got = receive(&broker).await;
    broker.publisher().send(message(2)).await;
    broker.drain_session();
    assert_eq!(got[0].session.state(), SessionState::Draining);
    assert!(nothing_for(&broker, 4 * SECOND).await);
    settle(&broker, got[0].receipt, Settlement::Ack).await.unwrap();
    assert_eq!(got[0].session.state(), SessionState::Ended);
    assert_eq!(ids(&receive(&broker).await), ["2"]);
}

#[tokio::test(start_paused = true)]
async fn a_session_that_does_not_drain_in_time_ends() {
    let broker = filled(1).await;
    let got = receive(&broker).await;
    broker.drain_session();
    let began = Instant::now();
    assert_eq!(broker.receive(WANT).await.unwrap().len(), 1);
    assert_eq!(began.elapsed(), 5 * SECOND);
    assert_eq!(settle(&broker, got[0].receipt, Settlement::Ack).await, Err(ErrorKind::Stale));
}

#[tokio::test(start_paused = true)]
async fn what_is_held_too_long_becomes_another_consumers() {
    let broker = filled(1).await;
    let got = receive(&broker).await;
    let beside = opened(broker.another()).await;
    let began = Instant::now();
    let taken = beside.receive(WANT).await.unwrap();
    assert_eq!(began.elapsed(), MINUTE);
    assert_eq!(settle(&broker, got[0].receipt, Settlement::Ack).await, Err(ErrorKind::Stale));
    assert_eq!(settle(&beside, taken[0].receipt, Settlement::Ack).await, Ok(()));
    assert_eq!(broker.standing(), Standing::default());
}

#[tokio::test(start_paused = true)]
async fn a_standby_takes_over_from_a_stuck_consumer_that_began_after_it_waited() {
    let stuck = opened(MemoryBroker::builder("orders").ordered().build()).await;
    let standby = opened(stuck.another()).await;
    for id in 1..=2 {
        stuck.publisher().send(message(id)).await;
    }
    let one = Want { events: 1, ..WANT };
    let first = stuck.receive(one).await.unwrap();
    settle(&stuck, first[0].receipt, Settlement::Ack).await.unwrap();
    let waiting = tokio::spawn(async move { ids(&standby.receive(WANT).await.unwrap()).join(" ") });
    tokio::task::yield_now().await;
    let held = stuck.receive(one).await.unwrap();
    assert_eq!(timeout(2 * MINUTE, waiting).await.expect("woken by the time").unwrap(), "2");
    assert_eq!(held[0].session.state(), SessionState::Ended);
}

#[tokio::test(start_paused = true)]
async fn limits_bound_what_is_unsettled_and_settling_makes_room() {
    let broker = Arc::new(filled(5).await);
    broker.open(Limits { bytes: 30, ..limits(2) }).await.unwrap();
    let got = receive(&broker).await;
    assert_eq!(got.len(), 2);
    assert!(nothing_for(&broker, SECOND).await);
    let waiting = tokio::spawn({
        let broker = Arc::clone(&broker);
        async move { broker.receive(WANT).await.unwrap().len() }
    });
    tokio::task::yield_now().await;
    settle(&broker, got[0].receipt, Settlement::Ack).await.unwrap();
    assert_eq!(timeout(SECOND, waiting).await.expect("woken").unwrap(), 1);
    broker.open(Limits { bytes: 25, ..limits(100) }).await.unwrap();
    settle(&broker, got[1].receipt, Settlement::Ack).await.unwrap();
    assert_eq!(receive(&broker).await.len(), 1, "one of 10 bytes beside one of 10 held, in 25");
}

#[tokio::test(start_paused = true)]
async fn a_message_larger_than_wanted_comes_alone() {
    let broker = filled(3).await;
    assert_eq!(broker.receive(Want { events: 10, bytes: 25 }).await.unwrap().len(), 2);
    assert_eq!(broker.receive(Want { events: 10, bytes: 3 }).await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn stop_ends_a_waiting_receive_and_settling_goes_on() {
    let broker = Arc::new(filled(1).await);
    let got = receive(&broker).await;
    let waiting = tokio::spawn({
        let broker = Arc::clone(&broker);
        async move { broker.receive(WANT).await.unwrap().len() }
    });
    tokio::task::yield_now().await;
    broker.stop().await.unwrap();
    assert_eq!(timeout(SECOND, waiting).await.expect("at once").unwrap(), 0);
    settle(&broker, got[0].receipt, Settlement::Ack).await.unwrap();
    broker.close().await.unwrap();
    broker.publisher().send(message(2)).await;
    assert!(receive(&broker).await.is_empty());
    broker.open(limits(8)).await.unwrap();
    assert_eq!(ids(&receive(&broker).await), ["2"]);
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_keeps_its_headers_and_a_redriven_one_bears_its_token() {
    let broker = opened(MemoryBroker::new("orders")).await;
    broker.publisher().send(message(1).with_header("x-tenant", "7")).await;
    broker.publisher().send(message(2)).await;
    let got = receive(&broker).await;
    settle(&broker, got[0].receipt, letter(Some(42))).await.unwrap();
    settle(&broker, got[1].receipt, letter(None)).await.unwrap();
    broker.settled().await;
    let dead = broker.dead_letters();
    let header = |index: usize, name| dead[index].0.headers.get_str(name);
    assert_eq!((header(0, "x-tenant"), header(0, "hapax-reason")), (Some("7"), Some("permanent")));
    assert_eq!(dead[0].0.data.as_ref(), b"0123456789");
    assert_eq!(broker.redrive_where(|message, _| message.attributes.id.as_deref() == Some("1")), 1);
    let again = receive(&broker).await;
    assert_eq!(again[0].message.reopen(), NonZeroU64::new(42));
    assert_eq!(again[0].message.headers.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["x-tenant"]);
    // Set aside again, now without a token: the old one must not come back.
    settle(&broker, again[0].receipt, letter(None)).await.unwrap();
    assert_eq!(broker.redrive(), 2);
    assert!(receive(&broker).await.iter().all(|delivery| delivery.message.reopen().is_none()));
}

#[tokio::test(start_paused = true)]
async fn a_full_list_of_dead_letters_refuses_and_keeps_the_delivery() {
    let broker = opened(MemoryBroker::builder("orders").dead_letters_max(1).build()).await;
    broker.publisher().send(message(1)).await;
    broker.publisher().send(message(2)).await;
    let got = receive(&broker).await;
    settle(&broker, got[0].receipt, letter(None)).await.unwrap();
    assert_eq!(settle(&broker, got[1].receipt, letter(None)).await, Err(ErrorKind::Full));
    assert_eq!(settle(&broker, got[0].receipt, letter(None)).await, Ok(()), "it was settled before");
    assert_eq!(broker.standing().unsettled, 1);
    broker.publisher().send(message(3)).await;
    assert_eq!(receive(&broker).await.len(), 1, "takes the place that the first one left");
    assert_eq!(settle(&broker, got[0].receipt, letter(None)).await, Ok(()), "it was settled before");
}

#[tokio::test(start_paused = true)]
async fn a_full_topic_makes_publishers_wait_and_a_dropped_one_sends_nothing() {
    let broker = opened(MemoryBroker::builder("orders").capacity(2).build()).await;
    let publisher = broker.publisher();
    publisher.send(message(1)).await;
    publisher.try_publish(&message(2)).unwrap();
    assert_eq!(publisher.try_publish(&message(3)).map_err(|error| error.kind()), Err(ErrorKind::Full));
    assert!(timeout(SECOND, publisher.send(message(4))).await.is_err());
    let waiting = tokio::spawn(async move { publisher.send(message(5)).await });
    tokio::task::yield_now().await;
    let got = receive(&broker).await;
    settle(&broker, got[0].receipt, Settlement::Ack).await.unwrap();
    assert_eq!(timeout(SECOND, waiting).await.expect("there is room").unwrap(), 3);
    assert_eq!(ids(&receive(&broker).await), ["5"]);
}

#[tokio::test(start_paused = true)]
async fn an_ordered_group_has_one_receiver_at_a_time() {
    let first = opened(MemoryBroker::builder("orders").ordered().build()).await;
    let second = opened(first.another()).await;
    for id in 1..=3 {
        first.publisher().send(message(id)).await;
    }
    let got = first.receive(Want { events: 1, ..WANT }).await.unwrap();
    assert!(nothing_for(&second, SECOND).await);
    settle(&first, got[0].receipt, Settlement::Ack).await.unwrap();
    first.close().await.unwrap();
    assert_eq!(ids(&receive(&second).await), ["2", "3"]);
}

#[tokio::test(start_paused = true)]
async fn a_message_beyond_the_limits_arrives_with_a_defect() {
    let broker = opened(MemoryBroker::new("orders")).await;
    let message_limits = MessageLimits { body_max: 5, ..MessageLimits::DEFAULT };
    broker.open(Limits { message: message_limits, ..limits(8) }).await.unwrap();
    broker.publisher().send(message(1)).await;
    let headers = [("content-type", "application/cloudevents+json")].into_iter().collect();
    broker.publisher().send_wire(headers, "no").await;
    let got = receive(&broker).await;
    assert!(got.iter().all(|delivery| delivery.message.defect().is_some()), "{got:?}");
}

#[tokio::test(start_paused = true)]
async fn copies_are_deliveries_of_their_own() {
    let broker = filled(2).await;
    broker.duplicate(1);
    let got = receive(&broker).await;
    assert_eq!(ids(&got), ["1", "1", "2"]);
    assert!(broker.redeliver(2));
    assert!(!broker.redeliver(3));
    let copy = receive(&broker).await;
    for delivery in got.iter().chain(&copy) {
        settle(&broker, delivery.receipt, Settlement::Ack).await.unwrap();
    }
    broker.settled().await;
}

#[tokio::test(start_paused = true)]
async fn a_seed_gives_one_order() {
    let order = async |seed| {
        let broker = filled(100).await;
        broker.shuffle(seed);
        ids(&receive(&broker).await).join(" ")
    };
    let (plain, one, two) = (order(None).await, order(Some(1)).await, order(Some(2)).await);
    assert_eq!(one, order(Some(1)).await);
    assert!(plain != one && one != two);
    let mut sorted: Vec<u32> = one.split(' ').map(|id| id.parse().unwrap()).collect();
    sorted.sort_unstable();
    assert!(sorted.into_iter().eq(1..=100));
}

#[tokio::test(start_paused = true)]
async fn the_limits_of_a_structured_document_are_those_of_what_travelled() {
    let broker = MemoryBroker::new("orders");
    let message = MessageLimits { body_max: 200, headers_max: 8, json_depth_max: 3, ..MessageLimits::DEFAULT };
    broker.open(Limits { message, ..limits(8) }).await.unwrap();
    let document = |more: &str| format!(r#"{{"specversion":"1.0","id":"1","source":"/s","type":"t",{more}}}"#);
    for more in
        [format!(r#""data":1{}"#, " ".repeat(200)), r#""a":1,"b":2,"c":3,"d":4"#.into(), r#""data":[[[[]]]]"#.into()]
    {
        let headers = [("content-type", "application/cloudevents+json")].into_iter().collect();
        broker.publisher().send_wire(headers, document(&more)).await;
        let got = receive(&broker).await;
        let kind = got[0].message.defect().map(|defect| defect.kind);
        assert_eq!(kind, Some(DefectKind::BeyondLimit), "{more}");
    }
}

#[tokio::test(start_paused = true)]
async fn dead_letters_that_were_taken_make_room_and_do_not_come_back() {
    let broker = opened(MemoryBroker::builder("orders").dead_letters_max(1).build()).await;
    for id in 1..=2 {
        broker.publisher().send(message(id)).await;
    }
    let got = receive(&broker).await;
    settle(&broker, got[0].receipt, letter(None)).await.unwrap();
    assert_eq!(settle(&broker, got[1].receipt, letter(None)).await, Err(ErrorKind::Full));
    let taken = broker.take_dead_letters();
    assert_eq!(taken[0].0.attributes.id.as_deref(), Some("1"));
    assert_eq!(taken[0].1.reason, Reason::Permanent);
    settle(&broker, got[1].receipt, letter(None)).await.unwrap();
    assert_eq!(broker.redrive(), 1, "only the second is left");
}
