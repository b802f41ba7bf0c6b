//! The memory broker behind a wrapper that builds one fault in at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use hapax::{
    Broker, Capabilities, Delivery, Error, ErrorKind, Limits, Message, MessageLimits, Outgoing, Publisher, Receipt,
    Result, Settlement, Want,
};
use hapax_memory::MemoryBroker;
use hapax_testkit::conformance::{BrokerFixture, Clock, broker};

use super::Table;
use crate::memory::MemoryTopic;

/// The fault that is built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// Consumes before it is opened.
    DeliversUnopened,
    /// Once closed, closed for ever.
    StaysClosed,
    /// Drops every seventh message.
    LosesSome,
    /// Headers do not arrive.
    DropsHeaders,
    /// Attributes that are not needed do not arrive.
    DropsAttributes,
    /// What does not decode looks as if it had.
    HidesDefects,
    /// Gives more than was asked for.
    OverDelivers,
    /// Gives more bytes than were asked for.
    IgnoresBytes,
    /// Gives more than may be unsettled.
    IgnoresLimits,
    /// Holds deliveries across an await.
    LosesOnDrop,
    /// Waits on after it was stopped.
    BlocksAfterStop,
    /// Answers an empty vector although it was not stopped.
    EmptyWhenIdle,
    /// Acks what it has when it dies.
    ForgetsUnsettled,
    /// Acks what it has when it is closed.
    AcksOnClose,
    /// Does not tell the broker of an ack.
    AckForgotten,
    /// A release is an ack.
    ReleaseDrops,
    /// Every release counts.
    CountsEveryRelease,
    /// Comes back at once.
    EarlyRetry,
    /// Waits in the consumer, which dies.
    RetryDiesWithConsumer,
    /// Dead letters lose their reason.
    DropsReason,
    /// Dead-letters and delivers again.
    KeepsDeadLettered,
    /// Dead letters lose their token.
    DropsToken,
    /// A settled receipt is settled again.
    DuplicateSettle,
    /// A receipt of an ended session is taken for good.
    TrustsOldReceipts,
    /// One unknown receipt refuses all.
    RefusesWholeBatch,
    /// Nothing is settled after `stop`.
    StopEndsSettling,
    /// Sessions outlive `close`.
    CloseDoesNothing,
}

const BROKER: Table<Wrong, WrongTopic> = Table {
    right: Wrong::Nothing,
    wrong: &[
        (Wrong::DeliversUnopened, &["nothing_arrives_before_open"]),
        (Wrong::StaysClosed, &["open_after_close_receives_again"]),
        (Wrong::LosesSome, &["every_message_arrives"]),
        (Wrong::DropsHeaders, &["a_message_arrives_byte_for_byte"]),
        (Wrong::DropsAttributes, &["a_message_arrives_byte_for_byte"]),
        (Wrong::HidesDefects, &["an_undecodable_message_arrives_with_its_defect"]),
        (Wrong::OverDelivers, &["receive_returns_no_more_than_wanted"]),
        (Wrong::IgnoresBytes, &["receive_returns_no_more_than_wanted"]),
        (Wrong::IgnoresLimits, &["unsettled_deliveries_are_bounded"]),
        (Wrong::LosesOnDrop, &["dropping_receive_loses_nothing"]),
        (Wrong::BlocksAfterStop, &["after_stop_receive_returns_empty"]),
        (Wrong::EmptyWhenIdle, &["an_acked_delivery_stays_away"]),
        (Wrong::ForgetsUnsettled, &["unsettled_deliveries_come_back"]),
        (Wrong::AcksOnClose, &["close_gives_back_what_is_unsettled", "a_receipt_of_an_ended_session_is_stale"]),
        (Wrong::AckForgotten, &["an_acked_delivery_stays_away", "unsettled_deliveries_come_back"]),
        (Wrong::ReleaseDrops, &["a_released_delivery_comes_back", "settle_works_after_stop"]),
        (Wrong::CountsEveryRelease, &["an_uncounted_release_does_not_count"]),
        (Wrong::EarlyRetry, &["a_retried_delivery_comes_back_later"]),
        (Wrong::RetryDiesWithConsumer, &["a_retried_delivery_comes_back_later"]),
        (Wrong::DropsReason, &["a_dead_letter_keeps_bytes_headers_and_reason"]),
        (Wrong::KeepsDeadLettered, &["a_dead_lettered_delivery_stays_away"]),
        (Wrong::DropsToken, &["a_redriven_dead_letter_bears_its_token"]),
        (Wrong::DuplicateSettle, &["settling_twice_has_one_effect"]),
        (Wrong::TrustsOldReceipts, &["a_receipt_of_an_ended_session_is_stale"]),
        (Wrong::RefusesWholeBatch, &["one_bad_receipt_spares_its_neighbours"]),
        (Wrong::StopEndsSettling, &["settle_works_after_stop"]),
        (Wrong::CloseDoesNothing, &["close_gives_back_what_is_unsettled", "a_receipt_of_an_ended_session_is_stale"]),
    ],
    cases: broker::cases,
    fixture: |wrong| WrongTopic { wrong, topic: MemoryTopic::competing(), made: Mutex::default() },
};

#[test]
fn every_broker_case_passes_on_the_right_back_end() {
    BROKER.every_case_passes_on_the_right_back_end();
}

#[test]
fn every_broker_case_fails_on_its_wrong_back_end() {
    BROKER.every_case_fails_on_its_wrong_back_end();
}

struct WrongBroker {
    wrong: Wrong,
    inner: MemoryBroker,
    stopped: AtomicBool,
    closed: AtomicBool,
    seen: AtomicU64,
    held: Mutex<BTreeMap<Receipt, Arc<Message>>>,
    settled: Mutex<BTreeSet<Receipt>>,
}

impl WrongBroker {
    fn held(&self) -> MutexGuard<'_, BTreeMap<Receipt, Arc<Message>>> {
        self.held.lock().expect("nobody panics while holding the deliveries")
    }

    async fn ack_everything(&self) {
        let acks: Vec<_> = self.held().keys().map(|receipt| (*receipt, Settlement::Ack)).collect();
        self.inner.settle(&acks).await;
    }

    fn spoil(&self, delivery: &mut Delivery) {
        let message = &delivery.message;
        let spoiled = match self.wrong {
            Wrong::DropsHeaders => {
                let mut spoiled = (**message).clone();
                spoiled.headers = hapax::Headers::new();
                spoiled
            }
            Wrong::DropsAttributes => {
                let mut spoiled = (**message).clone();
                spoiled.attributes.tracestate = None;
                spoiled
            }
            Wrong::HidesDefects => {
                let mut spoiled = Message::default();
                spoiled.headers = message.headers.clone();
                spoiled.data = message.data.clone();
                spoiled.attributes = message.attributes.clone();
                spoiled
            }
            _ => return,
        };
        delivery.message = Arc::new(spoiled);
    }

    /// What is settled instead, if anything.
    fn instead(&self, receipt: Receipt, settlement: &Settlement) -> Option<Settlement> {
        let mut settlement = settlement.clone();
        match (self.wrong, &mut settlement) {
            (Wrong::AckForgotten, Settlement::Ack) => return None,
            (Wrong::ReleaseDrops, Settlement::Release { .. }) => return Some(Settlement::Ack),
            (Wrong::CountsEveryRelease, Settlement::Release { counted }) => *counted = true,
            (Wrong::EarlyRetry, Settlement::Retry { after }) => *after = Duration::ZERO,
            (Wrong::RetryDiesWithConsumer, Settlement::Retry { .. }) => return Some(Settlement::Ack),
            (Wrong::DropsReason, Settlement::DeadLetter(letter)) => letter.reason = hapax::Reason::Permanent,
            (Wrong::DropsToken, Settlement::DeadLetter(letter)) => letter.reopen = None,
            _ => {}
        }
        let known = self.held().contains_key(&receipt);
        (known || self.wrong != Wrong::TrustsOldReceipts).then_some(settlement)
    }

    async fn deliver_again(&self, message: &Message) {
        self.inner.publisher().publish(vec![Outgoing::new(message.clone())]).await;
    }

    async fn settle_one(&self, receipt: Receipt, settlement: &Settlement) -> Result<()> {
        let Some(settlement) = self.instead(receipt, settlement) else { return Ok(()) };
        let message = self.held().get(&receipt).cloned();
        let dead = matches!(settlement, Settlement::DeadLetter(_));
        let released = matches!(settlement, Settlement::Release { .. });
        let answer = self.inner.settle(&[(receipt, settlement)]).await.remove(0);
        if let Some(message) = message {
            let settled_again = !self.settled.lock().expect("nobody panics while holding the receipts").insert(receipt);
            if (self.wrong == Wrong::KeepsDeadLettered && dead)
                || (self.wrong == Wrong::DuplicateSettle && released && settled_again)
            {
                self.deliver_again(&message).await;
            }
        }
        answer
    }
}

#[async_trait]
impl Broker for WrongBroker {
    async fn open(&self, mut limits: Limits) -> Result<()> {
        if self.wrong == Wrong::StaysClosed && self.closed.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.stopped.store(false, Ordering::Relaxed);
        if self.wrong == Wrong::IgnoresLimits {
            limits.events = 1024;
        }
        match self.inner.open(limits).await {
            Err(_) if matches!(self.wrong, Wrong::DeliversUnopened | Wrong::CloseDoesNothing) => Ok(()),
            answer => answer,
        }
    }

    async fn receive(&self, mut want: Want) -> Result<Vec<Delivery>> {
        match self.wrong {
            Wrong::OverDelivers => want.events *= 2,
            Wrong::IgnoresBytes => want.bytes = usize::MAX,
            Wrong::BlocksAfterStop if self.stopped.load(Ordering::Relaxed) => return std::future::pending().await,
            Wrong::EmptyWhenIdle => {
                let patience = super::UNIT;
                return tokio::time::timeout(patience, self.inner.receive(want)).await.unwrap_or(Ok(Vec::new()));
            }
            _ => {}
        }
        let mut deliveries = self.inner.receive(want).await?;
        if self.wrong == Wrong::LosesOnDrop {
            tokio::task::yield_now().await;
        }
        if self.wrong == Wrong::LosesSome {
            let mut kept = Vec::new();
            for delivery in deliveries {
                if self.seen.fetch_add(1, Ordering::Relaxed) % 7 == 6 {
                    self.inner.settle(&[(delivery.receipt, Settlement::Ack)]).await;
                } else {
                    kept.push(delivery);
                }
            }
            deliveries = kept;
        }
        for delivery in &mut deliveries {
            self.spoil(delivery);
            self.held().insert(delivery.receipt, Arc::clone(&delivery.message));
        }
        Ok(deliveries)
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        let refused = || Err(Error::new(ErrorKind::Rejected, "settle"));
        let unknown = batch.iter().any(|(receipt, _)| !self.held().contains_key(receipt));
        if (self.wrong == Wrong::RefusesWholeBatch && unknown)
            || (self.wrong == Wrong::StopEndsSettling && self.stopped.load(Ordering::Relaxed))
        {
            return batch.iter().map(|_| refused()).collect();
        }
        let mut answers = Vec::new();
        for (receipt, settlement) in batch {
            answers.push(self.settle_one(*receipt, settlement).await);
        }
        answers
    }

    async fn stop(&self) -> Result<()> {
        self.stopped.store(true, Ordering::Relaxed);
        self.inner.stop().await
    }

    async fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::Relaxed);
        match self.wrong {
            Wrong::CloseDoesNothing => return Ok(()),
            Wrong::AcksOnClose => self.ack_everything().await,
            _ => {}
        }
        if self.wrong == Wrong::TrustsOldReceipts {
            self.held().clear();
        }
        self.inner.close().await
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
}

struct WrongTopic {
    wrong: Wrong,
    topic: MemoryTopic,
    made: Mutex<Vec<Weak<WrongBroker>>>,
}

impl WrongTopic {
    fn made(&self) -> MutexGuard<'_, Vec<Weak<WrongBroker>>> {
        self.made.lock().expect("nobody panics while holding the list")
    }
}

#[async_trait]
impl BrokerFixture for WrongTopic {
    const CLOCK: Clock = super::CLOCK;
    const UNIT: Duration = super::UNIT;

    async fn broker(&self) -> Arc<dyn Broker> {
        let broker = WrongBroker {
            wrong: self.wrong,
            inner: self.topic.0.another(),
            stopped: AtomicBool::default(),
            closed: AtomicBool::default(),
            seen: AtomicU64::default(),
            held: Mutex::default(),
            settled: Mutex::default(),
        };
        if self.wrong == Wrong::DeliversUnopened {
            let hour = Duration::from_secs(3600);
            let limits =
                Limits { events: 64, bytes: 1 << 20, held_max: hour, drain: hour, message: MessageLimits::DEFAULT };
            broker.inner.open(limits).await.expect("the broker opens");
        }
        let broker = Arc::new(broker);
        self.made().push(Arc::downgrade(&broker));
        broker
    }

    async fn publisher(&self) -> Arc<dyn Publisher> {
        self.topic.publisher().await
    }

    async fn publish_undecodable(&self) -> Bytes {
        self.topic.publish_undecodable().await
    }

    async fn dead_letters(&self) -> Vec<Message> {
        self.topic.dead_letters().await
    }

    async fn redrive(&self) {
        self.topic.redrive().await;
    }

    async fn crash(&self, broker: Arc<dyn Broker>) {
        if self.wrong == Wrong::ForgetsUnsettled {
            let made: Vec<_> = self.made().iter().filter_map(Weak::upgrade).collect();
            for broker in made {
                broker.ack_everything().await;
            }
        }
        drop(broker);
    }
}
