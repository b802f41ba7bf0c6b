//! The broker suite: one case for each clause on `hapax::Broker`.
//!
//! Adding a case: one function here, one line in [`broker_cases!`](crate::broker_cases), its name in the clause.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::FutureExt;
use hapax::{
    Broker, DeadLetter, Delivery, ErrorKind, Limits, Message, MessageLimits, Outgoing, Publisher, Reason, Receipt,
    Session, Settlement, Want,
};
use tokio::time::{Instant, timeout};

use super::Clock;

/// One topic that nobody else uses, and one consumer group on it.
#[async_trait]
pub trait BrokerFixture: Send + Sync + 'static {
    /// The clock it lives by.
    const CLOCK: Clock;

    /// A time that is long against one call: delays and silences are a few of it. A paused clock takes any; a real one
    /// wants it as short as the back end's steadiness allows.
    const UNIT: Duration;

    /// A consumer of the group, not opened. Every call makes another member of the same group.
    async fn broker(&self) -> Arc<dyn Broker>;

    /// Sends to the topic.
    async fn publisher(&self) -> Arc<dyn Publisher>;

    /// Puts something on the topic that does not decode; answers with its body as it travels.
    async fn publish_undecodable(&self) -> Bytes;

    /// Every dead letter of the group as it is stored: `hapax-` headers among the headers.
    async fn dead_letters(&self) -> Vec<Message>;

    /// Sends every dead letter back as it is stored, as an operator's own tool would.
    async fn redrive(&self);

    /// Ends a consumer as a crash would: without `close`.
    async fn crash(&self, broker: Arc<dyn Broker>) {
        drop(broker);
    }

    /// What this broker is known not to do.
    fn quirks(&self) -> Quirks {
        Quirks::default()
    }
}

/// What a broker is known not to do: named by its adapter, documented on its page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quirks {
    /// It keeps one header of a name (AMQP tables).
    pub one_header_a_name: bool,
    /// It counts every release (RabbitMQ before 4.3).
    pub counts_every_release: bool,
}

/// The list of cases, in the order of the contract; hands it to another macro.
#[doc(hidden)]
#[macro_export]
macro_rules! broker_cases {
    ($then:ident $($with:tt)*) => {
        $crate::$then! { $($with)*
            nothing_arrives_before_open
            open_after_close_receives_again
            every_message_arrives
            a_message_arrives_byte_for_byte
            an_undecodable_message_arrives_with_its_defect
            receive_returns_no_more_than_wanted
            unsettled_deliveries_are_bounded
            dropping_receive_loses_nothing
            after_stop_receive_returns_empty
            unsettled_deliveries_come_back
            an_acked_delivery_stays_away
            a_released_delivery_comes_back
            an_uncounted_release_does_not_count
            a_retried_delivery_comes_back_later
            a_dead_letter_keeps_bytes_headers_and_reason
            a_dead_lettered_delivery_stays_away
            a_redriven_dead_letter_bears_its_token
            settling_twice_has_one_effect
            a_receipt_of_an_ended_session_is_stale
            one_bad_receipt_spares_its_neighbours
            settle_works_after_stop
            close_gives_back_what_is_unsettled
        }
    };
}

crate::broker_cases! { conformance_list [BrokerFixture] }

const WANT: Want = Want { events: 64, bytes: 1 << 20 };

fn limits<F: BrokerFixture>(events: usize) -> Limits {
    Limits { events, bytes: 16 << 20, held_max: F::UNIT * 20, drain: F::UNIT * 2, message: MessageLimits::DEFAULT }
}

fn event(id: usize) -> Message {
    Message::event("https://conformance.example", id.to_string(), "com.example.tested")
        .with_data("text/plain", format!("data of {id}"))
        .with_partition_key(format!("key {}", id % 7))
}

async fn publish<F: BrokerFixture>(fixture: &F, messages: impl IntoIterator<Item = Message>) {
    let batch = messages.into_iter().map(Outgoing::new).collect();
    for sent in fixture.publisher().await.publish(batch).await {
        sent.expect("the broker takes a message");
    }
}

async fn opened<F: BrokerFixture>(fixture: &F) -> Arc<dyn Broker> {
    let broker = fixture.broker().await;
    broker.open(limits::<F>(1024)).await.expect("the broker opens");
    broker
}

/// One receive of a broker that was not stopped.
async fn receive(broker: &Arc<dyn Broker>) -> Vec<Delivery> {
    let deliveries = broker.receive(WANT).await.expect("the broker delivers");
    assert!(!deliveries.is_empty(), "an empty vector means that the broker was stopped");
    deliveries
}

/// Receives until there are `count` deliveries.
async fn receive_all(broker: &Arc<dyn Broker>, count: usize) -> Vec<Delivery> {
    let mut all = Vec::new();
    while all.len() < count {
        all.extend(receive(broker).await);
    }
    assert_eq!(all.len(), count, "more arrived than was there: {:?}", ids(&all));
    all
}

/// Asserts that nothing arrives for that long.
async fn silence(broker: &Arc<dyn Broker>, how_long: Duration) {
    if let Ok(arrived) = timeout(how_long, broker.receive(WANT)).await {
        panic!("nothing should arrive, but {:?} did", arrived.map(|deliveries| ids(&deliveries)));
    }
}

fn id(delivery: &Delivery) -> &str {
    delivery.message.attributes.id.as_deref().unwrap_or("(no id)")
}

fn ids(deliveries: &[Delivery]) -> BTreeSet<String> {
    deliveries.iter().map(|delivery| id(delivery).to_owned()).collect()
}

fn names(ids: impl IntoIterator<Item = usize>) -> BTreeSet<String> {
    ids.into_iter().map(|id| id.to_string()).collect()
}

/// Settles one delivery and expects that it is done.
async fn settle(broker: &Arc<dyn Broker>, receipt: Receipt, settlement: Settlement) {
    let answers = broker.settle(&[(receipt, settlement)]).await;
    assert_eq!(answers.len(), 1, "one answer for each item");
    for answer in answers {
        answer.expect("a live receipt is settled");
    }
}

async fn ack_all(broker: &Arc<dyn Broker>, deliveries: &[Delivery]) {
    for delivery in deliveries {
        settle(broker, delivery.receipt, Settlement::Ack).await;
    }
}

/// Repeating may answer `Ok` or `Stale`, nothing else.
async fn settle_again(broker: &Arc<dyn Broker>, receipt: Receipt, settlement: Settlement) {
    for answer in broker.settle(&[(receipt, settlement)]).await {
        let kind = answer.err().map(|error| error.kind());
        assert!(matches!(kind, None | Some(ErrorKind::Stale)), "a settled receipt answers Ok or Stale, not {kind:?}");
    }
}

fn dead_letter(delivery: &Delivery) -> Settlement {
    Settlement::DeadLetter(Box::new(DeadLetter {
        reason: Reason::AttemptsExhausted,
        error: "no such order".into(),
        consumer: "conformance".into(),
        attempts: 3,
        first: SystemTime::UNIX_EPOCH + Duration::from_secs(1),
        last: SystemTime::UNIX_EPOCH + Duration::from_secs(2),
        origin: delivery.origin.clone(),
        reopen: std::num::NonZeroU64::new(7_001),
    }))
}

/// Nothing is received before `open` returned.
pub async fn nothing_arrives_before_open<F: BrokerFixture>(fixture: &F) {
    publish(fixture, [event(1)]).await;
    let broker = fixture.broker().await;
    if let Ok(Ok(deliveries)) = timeout(F::UNIT * 3, broker.receive(WANT)).await {
        panic!("{:?} arrived before open", ids(&deliveries));
    }
    broker.open(limits::<F>(1024)).await.expect("the broker opens");
    assert_eq!(ids(&receive_all(&broker, 1).await), names([1]));
}

/// A broker that was opened before is opened again after `close`.
pub async fn open_after_close_receives_again<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, [event(1)]).await;
    ack_all(&broker, &receive_all(&broker, 1).await).await;
    broker.stop().await.expect("the broker stops");
    broker.close().await.expect("the broker closes");
    publish(fixture, [event(2)]).await;
    broker.open(limits::<F>(1024)).await.expect("the broker opens again");
    let again = receive_all(&broker, 1).await;
    assert_eq!(ids(&again), names([2]));
    assert!(again[0].session.is_live(), "the deliveries of an open broker belong to a live session");
    ack_all(&broker, &again).await;
}

/// Everything that was published arrives.
pub async fn every_message_arrives<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, (0..150).map(event)).await;
    let mut seen = BTreeSet::new();
    for half in [150..300, 300..300] {
        publish(fixture, half.map(event)).await;
        while seen.len() < 300 {
            let deliveries = receive(&broker).await;
            ack_all(&broker, &deliveries).await;
            seen.extend(ids(&deliveries));
        }
    }
    assert_eq!(seen, names(0..300));
}

/// Attributes, headers and data arrive byte for byte.
pub async fn a_message_arrives_byte_for_byte<F: BrokerFixture>(fixture: &F) {
    let mut sent = Message::event("/a source/ü", "id with spaces, \"quotes\" and ü", "com.example.tested.v2")
        .with_data("application/octet-stream", (0..=255).collect::<Vec<u8>>())
        .with_subject("order/42")
        .with_partition_key("tenant 7")
        .with_header("x-tenant", "7")
        .with_header("X-Case", "kept as it is")
        .with_header("x-empty", "")
        .with_header("x-binary", vec![0, 159, 146, 150, 255]);
    if !fixture.quirks().one_header_a_name {
        sent = sent.with_header("x-twice", "first").with_header("x-twice", "second");
    }
    let a = &mut sent.attributes;
    a.time = Some("2026-02-28T23:59:60Z".into());
    a.data_schema = Some("https://schemas.example/order#2".into());
    a.correlation_id = Some("conversation 1".into());
    a.causation_id = Some("cause 1".into());
    a.sequence = Some("0000017".into());
    a.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
    a.tracestate = Some("vendor=value".into());
    let bare = Message::event("s", "bare", "t");

    let broker = opened(fixture).await;
    publish(fixture, [sent.clone(), bare.clone()]).await;
    let arrived = receive_all(&broker, 2).await;
    for sent in [sent, bare] {
        let found = arrived.iter().find(|delivery| delivery.message.attributes.id == sent.attributes.id);
        let message = &found.expect("the id arrives as it was sent").message;
        assert_eq!(message.attributes, sent.attributes);
        assert_eq!(message.data, sent.data);
        assert_eq!(headers(message), headers(&sent));
        assert_eq!(message.defect(), None);
        assert_eq!(message.reopen(), None);
    }
}

/// Names and values, sorted by name; equal names in the order in which they travelled.
fn headers(message: &Message) -> Vec<(&str, &Bytes)> {
    let mut headers: Vec<_> = message.headers.iter().collect();
    headers.sort_by_key(|(name, _)| *name);
    headers
}

/// A message that cannot be decoded arrives with a defect, its body as it travelled.
pub async fn an_undecodable_message_arrives_with_its_defect<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    let body = fixture.publish_undecodable().await;
    publish(fixture, [event(1)]).await;
    let arrived = receive_all(&broker, 2).await;
    let defective: Vec<_> = arrived.iter().filter(|delivery| delivery.message.defect().is_some()).collect();
    assert_eq!(defective.len(), 1, "the defective message, and it alone, has a defect");
    assert_eq!(defective[0].message.data, body);
    ack_all(&broker, &arrived).await;
}

/// Never more than asked for, in events and in bytes.
pub async fn receive_returns_no_more_than_wanted<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    let sized = |id: usize, bytes: usize| event(id).with_data("text/plain", vec![b'x'; bytes]);
    publish(fixture, (0..12).map(|id| sized(id, 100))).await;
    let mut left = 12;
    while left > 0 {
        let want = if left > 6 { Want { events: 3, bytes: 1 << 20 } } else { Want { events: 64, bytes: 250 } };
        let deliveries = broker.receive(want).await.expect("the broker delivers");
        let bytes: usize = deliveries.iter().map(|delivery| delivery.message.bytes()).sum();
        assert!((1..=want.events).contains(&deliveries.len()), "{} events for {want:?}", deliveries.len());
        assert!(bytes <= want.bytes || deliveries.len() == 1, "{bytes} bytes for {want:?}");
        ack_all(&broker, &deliveries).await;
        left -= deliveries.len();
    }
    publish(fixture, [sized(12, 4_000), sized(13, 10)]).await;
    for _ in 0..2 {
        let deliveries = broker.receive(Want { events: 64, bytes: 1_000 }).await.expect("the broker delivers");
        assert_eq!(deliveries.len(), 1, "a message larger than the wanted bytes comes alone");
        ack_all(&broker, &deliveries).await;
    }
}

/// Never more unsettled deliveries than [`Limits::events`].
pub async fn unsettled_deliveries_are_bounded<F: BrokerFixture>(fixture: &F) {
    let broker = fixture.broker().await;
    broker.open(limits::<F>(5)).await.expect("the broker opens");
    publish(fixture, (0..20).map(event)).await;
    let mut held = Vec::new();
    while let Ok(more) = timeout(F::UNIT * 3, broker.receive(WANT)).await {
        held.extend(more.expect("the broker delivers"));
        assert!(held.len() <= 5, "{} are unsettled, 5 may be", held.len());
    }
    assert!(!held.is_empty());
    let mut seen = ids(&held);
    while seen.len() < 20 {
        ack_all(&broker, &std::mem::take(&mut held)).await;
        held = receive(&broker).await;
        assert!(held.len() <= 5, "{} are unsettled, 5 may be", held.len());
        seen.extend(ids(&held));
    }
    ack_all(&broker, &held).await;
}

/// Dropping the future of `receive` loses nothing.
pub async fn dropping_receive_loses_nothing<F: BrokerFixture>(fixture: &F) {
    let broker = fixture.broker().await;
    // Held for so long that nothing comes back because the broker took it for abandoned.
    let held_max = Duration::from_secs(3600);
    broker.open(Limits { held_max, ..limits::<F>(1024) }).await.expect("the broker opens");
    let few = Want { events: 3, bytes: 1 << 20 };
    let mut seen = BTreeSet::new();
    for round in 0..20 {
        publish(fixture, (round * 5..round * 5 + 5).map(event)).await;
        for patience in [Duration::ZERO, F::UNIT / 50, F::UNIT / 10] {
            // Once polled a single time and dropped, once dropped while it waits.
            let at_once = broker.receive(few).now_or_never();
            let soon = timeout(patience, broker.receive(few)).await.ok();
            for deliveries in [at_once, soon].into_iter().flatten() {
                let deliveries = deliveries.expect("the broker delivers");
                ack_all(&broker, &deliveries).await;
                seen.extend(ids(&deliveries));
            }
        }
    }
    while seen.len() < 100 {
        let deliveries = receive(&broker).await;
        ack_all(&broker, &deliveries).await;
        seen.extend(ids(&deliveries));
    }
}

/// After `stop`, `receive` returns an empty vector at once; so does one that was waiting.
pub async fn after_stop_receive_returns_empty<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    let waiting = tokio::spawn({
        let broker = Arc::clone(&broker);
        async move { broker.receive(WANT).await }
    });
    tokio::time::sleep(F::UNIT).await;
    broker.stop().await.expect("the broker stops");
    let waited = timeout(F::UNIT * 10, waiting).await.expect("a waiting receive ends with stop");
    assert_eq!(waited.expect("it does not panic").expect("stop is no error").len(), 0);
    publish(fixture, [event(1)]).await;
    for _ in 0..3 {
        let after = timeout(F::UNIT * 10, broker.receive(WANT)).await.expect("receive returns at once after stop");
        assert_eq!(ids(&after.expect("stop is no error")), names([]));
    }
}

/// What a crashed consumer left unsettled is delivered again, and only that.
pub async fn unsettled_deliveries_come_back<F: BrokerFixture>(fixture: &F) {
    let first = opened(fixture).await;
    publish(fixture, (0..3).map(event)).await;
    let deliveries = receive_all(&first, 3).await;
    let (done, left): (Vec<_>, Vec<_>) = deliveries.into_iter().partition(|delivery| id(delivery) == "0");
    ack_all(&first, &done).await;
    drop((done, left));
    fixture.crash(first).await;
    let second = opened(fixture).await;
    let again = receive_all(&second, 2).await;
    assert_eq!(ids(&again), names([1, 2]));
    silence(&second, F::UNIT * 3).await;
    ack_all(&second, &again).await;
}

/// An acked delivery never comes back.
pub async fn an_acked_delivery_stays_away<F: BrokerFixture>(fixture: &F) {
    let first = opened(fixture).await;
    publish(fixture, (0..10).map(event)).await;
    let deliveries = receive_all(&first, 10).await;
    // As one batch and out of order.
    let batch: Vec<_> = deliveries.iter().rev().map(|delivery| (delivery.receipt, Settlement::Ack)).collect();
    let answers = first.settle(&batch).await;
    assert!(answers.len() == 10 && answers.iter().all(Result::is_ok), "{answers:?}");
    silence(&first, F::UNIT * 3).await;
    first.close().await.expect("the broker closes");
    let second = opened(fixture).await;
    silence(&second, F::UNIT * 3).await;
}

/// A released delivery comes back, counted or not.
pub async fn a_released_delivery_comes_back<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, [event(1)]).await;
    let first = receive_all(&broker, 1).await;
    settle(&broker, first[0].receipt, Settlement::Release { counted: true }).await;
    let second = receive_all(&broker, 1).await;
    assert_eq!(second[0].message, first[0].message);
    settle(&broker, second[0].receipt, Settlement::Release { counted: false }).await;
    let third = receive_all(&broker, 1).await;
    assert_eq!(third[0].message, first[0].message);
    assert_ne!(third[0].receipt, second[0].receipt, "another delivery has another receipt");
    ack_all(&broker, &third).await;
    silence(&broker, F::UNIT * 3).await;
}

/// An uncounted release leaves the broker's count as it is, where the broker counts and can.
pub async fn an_uncounted_release_does_not_count<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, [event(1)]).await;
    let mut counts = Vec::new();
    for counted in [false, false, true] {
        let delivery = receive_all(&broker, 1).await.remove(0);
        counts.push(delivery.count);
        settle(&broker, delivery.receipt, Settlement::Release { counted }).await;
    }
    let last = receive_all(&broker, 1).await;
    counts.push(last[0].count);
    ack_all(&broker, &last).await;
    if counts.iter().any(Option::is_some) && !fixture.quirks().counts_every_release {
        assert_eq!(counts, [Some(1), Some(1), Some(1), Some(2)], "deliveries: first, uncounted, uncounted, counted");
    }
}

/// A retried delivery comes back not before its time, and survives the consumer.
pub async fn a_retried_delivery_comes_back_later<F: BrokerFixture>(fixture: &F) {
    let first = opened(fixture).await;
    publish(fixture, [event(1)]).await;
    let delivery = receive_all(&first, 1).await.remove(0);
    let after = F::UNIT * 6;
    let settled = Instant::now();
    settle(&first, delivery.receipt, Settlement::Retry { after }).await;
    silence(&first, F::UNIT * 3).await;
    first.stop().await.expect("the broker stops");
    first.close().await.expect("the broker closes");
    let second = opened(fixture).await;
    let again = receive_all(&second, 1).await;
    assert!(settled.elapsed() >= after, "it came back after {:?} instead of {after:?}", settled.elapsed());
    assert_eq!(again[0].message, delivery.message);
    ack_all(&second, &again).await;
    silence(&second, F::UNIT * 3).await;
}

/// A dead letter is found with its bytes, its own headers and the reason.
pub async fn a_dead_letter_keeps_bytes_headers_and_reason<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    let sent = event(1).with_header("x-tenant", "7").with_header("x-binary", vec![0, 255]);
    publish(fixture, [sent.clone()]).await;
    let body = fixture.publish_undecodable().await;
    for delivery in receive_all(&broker, 2).await {
        settle(&broker, delivery.receipt, dead_letter(&delivery)).await;
    }
    let dead = fixture.dead_letters().await;
    assert_eq!(dead.len(), 2, "{dead:?}");
    let one = dead.iter().find(|one| one.attributes.id == sent.attributes.id).expect("the dead letter has its id");
    assert_eq!(one.data, sent.data);
    assert_eq!(one.attributes, sent.attributes);
    for (name, value) in sent.headers.iter() {
        assert_eq!(one.headers.get(name), Some(value), "header {name}");
    }
    for (name, value) in [
        ("hapax-reason", "attempts-exhausted"),
        ("hapax-error", "no such order"),
        ("hapax-consumer", "conformance"),
        ("hapax-attempts", "3"),
        ("hapax-first-unix-ms", "1000"),
        ("hapax-last-unix-ms", "2000"),
        ("hapax-reopen", "7001"),
    ] {
        assert_eq!(one.headers.get_str(name), Some(value), "header {name}");
    }
    assert!(dead.iter().any(|other| other.data == body), "what did not decode is kept as it travelled");
}

/// A dead-lettered delivery stays away.
pub async fn a_dead_lettered_delivery_stays_away<F: BrokerFixture>(fixture: &F) {
    let first = opened(fixture).await;
    publish(fixture, [event(1)]).await;
    let delivery = receive_all(&first, 1).await.remove(0);
    settle(&first, delivery.receipt, dead_letter(&delivery)).await;
    silence(&first, F::UNIT * 3).await;
    first.close().await.expect("the broker closes");
    let second = opened(fixture).await;
    silence(&second, F::UNIT * 3).await;
    assert_eq!(fixture.dead_letters().await.len(), 1);
}

/// A dead letter that is sent back as it is stored arrives with its token, and bears no other header of ours.
pub async fn a_redriven_dead_letter_bears_its_token<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    let sent = event(1).with_header("x-tenant", "7");
    publish(fixture, [sent.clone()]).await;
    let delivery = receive_all(&broker, 1).await.remove(0);
    assert_eq!(delivery.message.reopen(), None);
    settle(&broker, delivery.receipt, dead_letter(&delivery)).await;
    fixture.redrive().await;
    let back = receive_all(&broker, 1).await;
    let message = &back[0].message;
    assert_eq!(message.reopen().map(u64::from), Some(7_001));
    assert_eq!((&message.attributes, &message.data), (&sent.attributes, &sent.data));
    assert_eq!(headers(message), headers(&sent));
    ack_all(&broker, &back).await;
}

/// Repeating a settled receipt, also with another settlement, has no second effect.
pub async fn settling_twice_has_one_effect<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, (0..3).map(event)).await;
    for delivery in receive_all(&broker, 3).await {
        let (receipt, dead) = (delivery.receipt, dead_letter(&delivery));
        let settlement = match id(&delivery) {
            "0" => Settlement::Ack,
            "1" => dead.clone(),
            _ => Settlement::Release { counted: false },
        };
        settle(&broker, receipt, settlement.clone()).await;
        settle_again(&broker, receipt, settlement).await;
        settle_again(&broker, receipt, dead).await;
        settle_again(&broker, receipt, Settlement::Retry { after: F::UNIT }).await;
        settle_again(&broker, receipt, Settlement::Release { counted: true }).await;
    }
    let back = receive_all(&broker, 1).await;
    assert_eq!(ids(&back), names([2]), "the released one comes back");
    silence(&broker, F::UNIT * 4).await;
    ack_all(&broker, &back).await;
    let dead = fixture.dead_letters().await;
    assert_eq!(dead.len(), 1, "one was dead-lettered, once: {dead:?}");
}

/// A receipt of an ended session is stale and has no effect, also where the same consumer opened again.
pub async fn a_receipt_of_an_ended_session_is_stale<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, [event(1)]).await;
    let old = receive_all(&broker, 1).await.remove(0);
    broker.close().await.expect("the broker closes");
    assert_ended(&old.session);
    for reopened in [false, true] {
        if reopened {
            broker.open(limits::<F>(1024)).await.expect("the broker opens again");
        }
        for settlement in [Settlement::Ack, dead_letter(&old)] {
            let answer = broker.settle(&[(old.receipt, settlement)]).await.remove(0);
            let kind = answer.map_err(|error| error.kind());
            assert_eq!(kind, Err(ErrorKind::Stale), "opened again: {reopened}");
        }
    }
    let again = receive_all(&broker, 1).await;
    assert_eq!(ids(&again), names([1]), "the stale ack had no effect");
    assert_ne!(again[0].receipt.session, old.receipt.session, "an ended session's number is not given again");
    ack_all(&broker, &again).await;
    assert_eq!(fixture.dead_letters().await.len(), 0, "the stale dead letter was not placed");
}

fn assert_ended(session: &Session) {
    assert!(!session.is_live(), "the session is {:?} after close", session.state());
}

/// One item that is refused does not refuse the others.
pub async fn one_bad_receipt_spares_its_neighbours<F: BrokerFixture>(fixture: &F) {
    let broker = opened(fixture).await;
    publish(fixture, [event(1), event(2)]).await;
    let good = receive_all(&broker, 2).await;
    let never_minted = Receipt { position: u64::MAX - 1, ..good[0].receipt };
    let of_no_session = Receipt { session: u32::MAX, ..good[0].receipt };
    let batch = [good[0].receipt, never_minted, of_no_session, good[1].receipt].map(|one| (one, Settlement::Ack));
    let answers = broker.settle(&batch).await;
    assert_eq!(answers.len(), 4, "one answer for each item");
    assert!(answers[0].is_ok() && answers[3].is_ok(), "the good ones are settled: {answers:?}");
    broker.close().await.expect("the broker closes");
    silence(&opened(fixture).await, F::UNIT * 3).await;
}

/// After `stop`, settling goes on working.
pub async fn settle_works_after_stop<F: BrokerFixture>(fixture: &F) {
    let first = opened(fixture).await;
    publish(fixture, (0..3).map(event)).await;
    let deliveries = receive_all(&first, 3).await;
    first.stop().await.expect("the broker stops");
    for delivery in &deliveries {
        let settlement = match id(delivery) {
            "0" => Settlement::Ack,
            "1" => dead_letter(delivery),
            _ => Settlement::Release { counted: false },
        };
        settle(&first, delivery.receipt, settlement).await;
    }
    first.close().await.expect("the broker closes");
    let second = opened(fixture).await;
    let again = receive_all(&second, 1).await;
    assert_eq!(ids(&again), names([2]));
    ack_all(&second, &again).await;
    silence(&second, F::UNIT * 3).await;
    assert_eq!(fixture.dead_letters().await.len(), 1);
}

/// `close` gives back what is unsettled and ends the sessions; repeating it is allowed.
pub async fn close_gives_back_what_is_unsettled<F: BrokerFixture>(fixture: &F) {
    let first = opened(fixture).await;
    publish(fixture, (0..4).map(event)).await;
    let deliveries = receive_all(&first, 4).await;
    let (done, left): (Vec<_>, Vec<_>) = deliveries.into_iter().partition(|delivery| id(delivery) == "0");
    ack_all(&first, &done).await;
    first.close().await.expect("the broker closes");
    first.close().await.expect("closing twice is closing once");
    assert_ended(&left[0].session);
    let second = opened(fixture).await;
    let again = receive_all(&second, 3).await;
    assert_eq!(ids(&again), names([1, 2, 3]));
    ack_all(&second, &again).await;
    silence(&second, F::UNIT * 3).await;
}
