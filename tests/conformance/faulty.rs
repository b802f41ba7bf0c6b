//! The faulty wrappers do what they say: each fault strikes when it is on, never when it is off, and a seed repeats.

use std::sync::Arc;
use std::time::Duration;

use hapax::{
    Broker, Claim, ClaimRequest, ErrorKind, EventKey, Fingerprint, Limits, Message, MessageLimits, Outcome,
    ProcessedStore, Recorded, Settlement, Want,
};
use hapax_memory::{MemoryBroker, MemoryStore};
use hapax_testkit::faulty::{FaultSwitch, Faults, FaultyBroker, FaultyStore};
use tokio::time::{Instant, timeout};

const LEASE: Duration = Duration::from_secs(30);
const WANT: Want = Want { events: 100, bytes: 1 << 20 };

fn key(id: u32) -> EventKey {
    EventKey::of("billing", "s", &id.to_string())
}

async fn store(faults: Faults) -> (FaultyStore, FaultSwitch, hapax::ConsumerId) {
    let switch = faults.switch();
    let store = FaultyStore::new(Arc::new(MemoryStore::new()), switch.clone());
    let consumer = store.open("billing", Duration::from_secs(3600)).await.expect("the store opens");
    (store, switch, consumer)
}

fn request(consumer: hapax::ConsumerId, id: u32) -> ClaimRequest {
    ClaimRequest {
        consumer,
        key: key(id),
        fingerprint: Fingerprint::of(None, b""),
        token: u128::from(id),
        reopen: None,
    }
}

async fn broker(faults: Faults, messages: u32) -> (FaultyBroker, FaultSwitch) {
    let topic = MemoryBroker::new("orders");
    let publisher = topic.publisher();
    for id in 0..messages {
        publisher.send(Message::event("s", id.to_string(), "t")).await;
    }
    let switch = faults.switch();
    let broker = FaultyBroker::new(Arc::new(topic), switch.clone()).duplicating(Arc::new(publisher));
    let hour = Duration::from_secs(3600);
    let limits = Limits { events: 99, bytes: 1 << 20, held_max: hour, drain: hour, message: MessageLimits::DEFAULT };
    broker.open(limits).await.expect("the broker opens");
    (broker, switch)
}

#[tokio::test(start_paused = true)]
async fn a_refused_call_changed_nothing_and_a_lost_reply_changed_everything() {
    let (refusing, switch, consumer) = store(Faults { refuse: 1.0, ..Faults::none(1) }).await;
    let error = refusing.claim(&[request(consumer, 1)], LEASE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    switch.heal();
    let other = ClaimRequest { token: 99, ..request(consumer, 1) };
    assert!(matches!(refusing.claim(&[other], LEASE).await.unwrap()[0], Claim::Granted(..)));

    let (losing, switch, consumer) = store(Faults { lose_reply: 1.0, ..Faults::none(1) }).await;
    let error = losing.claim(&[request(consumer, 1)], LEASE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unknown);
    switch.heal();
    assert!(matches!(losing.claim(&[other], LEASE).await.unwrap()[0], Claim::Held { .. }));
}

#[tokio::test(start_paused = true)]
async fn an_outage_begins_and_ends_at_the_switch() {
    let (store, switch, consumer) = store(Faults::none(1)).await;
    switch.begin_outage();
    assert_eq!(store.claim(&[request(consumer, 1)], LEASE).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(store.probe().await.unwrap_err().kind(), ErrorKind::Unavailable);
    switch.end_outage();
    let Claim::Granted(lease, _) = store.claim(&[request(consumer, 1)], LEASE).await.unwrap().remove(0) else {
        panic!("granted after the outage")
    };
    assert_eq!(store.record(&[(lease, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    assert_eq!(switch.injected().get("outage"), Some(&2));
}

#[tokio::test(start_paused = true)]
async fn a_rejected_event_refuses_its_batch_and_no_other() {
    let (store, switch, consumer) = store(Faults::none(1)).await;
    switch.reject(key(2));
    let batch = [1, 2, 3].map(|id| request(consumer, id));
    assert_eq!(store.claim(&batch, LEASE).await.unwrap_err().kind(), ErrorKind::Rejected);
    assert_eq!(store.claim(&batch[..1], LEASE).await.unwrap().len(), 1);
    assert_eq!(store.claim(&batch[1..2], LEASE).await.unwrap_err().kind(), ErrorKind::Rejected);
    switch.heal();
    assert_eq!(store.claim(&batch[1..], LEASE).await.unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_call_hangs_until_it_is_dropped_and_a_delay_passes() {
    let (hanging, switch, consumer) = store(Faults { hang: 1.0, ..Faults::none(1) }).await;
    let batch = [request(consumer, 1)];
    assert!(timeout(Duration::from_secs(3600), hanging.claim(&batch, LEASE)).await.is_err());
    switch.heal();
    assert!(matches!(hanging.claim(&batch, LEASE).await.unwrap()[0], Claim::Granted(..)));

    let (slow, _, consumer) = store(Faults { delay: 1.0, ..Faults::none(1) }).await;
    let start = Instant::now();
    slow.claim(&[request(consumer, 1)], LEASE).await.unwrap();
    assert!(start.elapsed() > Duration::ZERO && start.elapsed() <= Faults::none(1).delay_max);
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_is_a_delivery_of_its_own() {
    let (broker, switch) = broker(Faults { duplicate: 1.0, ..Faults::none(1) }, 1).await;
    let first = broker.receive(WANT).await.unwrap().remove(0);
    let second = broker.receive(WANT).await.unwrap().remove(0);
    assert_eq!(first.message, second.message);
    assert_ne!(first.receipt, second.receipt);
    switch.heal();
    // The copy was drawn to be copied too.
    let third = broker.receive(WANT).await.unwrap().remove(0);
    for delivery in [first, second, third] {
        broker.settle(&[(delivery.receipt, Settlement::Ack)]).await.remove(0).unwrap();
    }
    assert!(timeout(LEASE, broker.receive(WANT)).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn deliveries_come_in_another_order_and_settlements_lose_their_answers() {
    let (broker, switch) = broker(Faults { reorder: 1.0, lose_reply: 1.0, ..Faults::none(7) }, 20).await;
    let deliveries = broker.receive(WANT).await.unwrap();
    let ids: Vec<_> = deliveries.iter().map(|delivery| delivery.message.attributes.id.clone()).collect();
    let in_order: Vec<_> = (0..deliveries.len()).map(|id| Some(id.to_string().into_boxed_str())).collect();
    assert!(ids.len() > 10 && ids != in_order, "{ids:?}");
    let answer = broker.settle(&[(deliveries[0].receipt, Settlement::Ack)]).await.remove(0);
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::Unknown);
    switch.begin_outage();
    assert_eq!(broker.receive(WANT).await.unwrap_err().kind(), ErrorKind::Unavailable);
    let batch = [(deliveries[1].receipt, Settlement::Ack), (deliveries[2].receipt, Settlement::Ack)];
    assert!(broker.settle(&batch).await.iter().all(Result::is_err));
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_gives_the_same_faults() {
    let mut answers = Vec::new();
    for seed in [3, 3, 4] {
        let (store, switch, consumer) = store(Faults { refuse: 0.3, lose_reply: 0.3, ..Faults::none(seed) }).await;
        let mut kinds = Vec::new();
        for id in 0..40 {
            kinds.push(store.claim(&[request(consumer, id)], LEASE).await.err().map(|error| error.kind()));
        }
        answers.push((kinds, switch.injected()));
    }
    assert_eq!(answers[0], answers[1]);
    assert_ne!(answers[0], answers[2]);
    assert_eq!(Faults::swarm(5, 0.2), Faults::swarm(5, 0.2));
    assert_ne!(Faults::swarm(5, 0.2), Faults::swarm(6, 0.2));
}
