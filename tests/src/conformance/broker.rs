//! The broker suite: one case for each clause on `hapax::Broker`.
//!
//! Adding a case: one function here, one line in [`broker_cases!`](crate::broker_cases), its name in the clause.

mod dead_letters;
mod receiving;
mod settling;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use hapax::{
    Broker, DeadLetter, Delivery, ErrorKind, Limits, Message, MessageLimits, Outgoing, Publisher, Reason, Receipt,
    Session, Settlement, Want,
};
use tokio::time::timeout;

use super::Clock;
pub use dead_letters::*;
pub use receiving::*;
pub use settling::*;

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

/// Names and values, sorted by name; equal names in the order in which they travelled.
fn headers(message: &Message) -> Vec<(&str, &Bytes)> {
    let mut headers: Vec<_> = message.headers.iter().collect();
    headers.sort_by_key(|(name, _)| *name);
    headers
}

fn assert_ended(session: &Session) {
    assert!(!session.is_live(), "the session is {:?} after close", session.state());
}
