//! The broker's contract: receive deliveries, settle each once, stop.
//!
//! Adapters implement [`Broker`]; the runtime is its only caller. Each clause under `# Contract` names the conformance
//! case of `hapax-testkit` that holds it up.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::dead_letter::DeadLetter;
use crate::error::Result;
use crate::message::{Message, MessageLimits};

/// Where events come from. Every method can be called from several tasks at once and can be repeated.
#[async_trait]
pub trait Broker: Send + Sync + 'static {
    /// Connects, checks or creates what is needed, and says how much may be unsettled.
    ///
    /// # Contract
    /// - Nothing is received before `open` returned (`nothing_arrives_before_open`).
    /// - A broker that was opened before is opened again after [`close`](Self::close) (`open_after_close_receives_again`).
    async fn open(&self, limits: Limits) -> Result<()>;

    /// Waits for deliveries and returns at least one, at most `want.events`, of at most `want.bytes` together unless the
    /// first alone is larger.
    ///
    /// # Contract
    /// - Everything that was published arrives (`every_message_arrives`), attributes, headers and data byte for byte
    ///   (`a_message_arrives_byte_for_byte`).
    /// - A message that cannot be decoded arrives with a defect (`an_undecodable_message_arrives_with_its_defect`).
    /// - Never more than asked for (`receive_returns_no_more_than_wanted`), never more unsettled than
    ///   [`Limits::events`] (`unsettled_deliveries_are_bounded`).
    /// - Dropping the future loses nothing (`dropping_receive_loses_nothing`).
    /// - After [`stop`](Self::stop) it returns an empty vector at once, and an empty vector means nothing else
    ///   (`after_stop_receive_returns_empty`).
    /// - What an ended session left unsettled is delivered again (`unsettled_deliveries_come_back`).
    async fn receive(&self, want: Want) -> Result<Vec<Delivery>>;

    /// Ends deliveries, one answer each, in order.
    ///
    /// # Contract
    /// - An acked delivery never comes back (`an_acked_delivery_stays_away`).
    /// - A released one comes back, here or elsewhere (`a_released_delivery_comes_back`); with `counted: false` the
    ///   broker's count does not rise where the broker can (`an_uncounted_release_does_not_count`).
    /// - A retried one comes back not before its time and survives the consumer (`a_retried_delivery_comes_back_later`).
    /// - A dead-lettered one is found in the dead letters with its bytes, headers and reason
    ///   (`a_dead_letter_keeps_bytes_headers_and_reason`) and stays away (`a_dead_lettered_delivery_stays_away`); sent
    ///   back with its token it arrives with it (`a_redriven_dead_letter_bears_its_token`).
    /// - Repeating a settled receipt answers `Ok` or [`ErrorKind::Stale`](crate::ErrorKind::Stale) and has no second
    ///   effect (`settling_twice_has_one_effect`); a receipt of an ended session neither
    ///   (`a_receipt_of_an_ended_session_is_stale`).
    /// - One item that is refused does not refuse the others (`one_bad_receipt_spares_its_neighbours`).
    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>>;

    /// No new deliveries from here on; settling goes on working (`settle_works_after_stop`).
    async fn stop(&self) -> Result<()>;

    /// Lets go: what is unsettled is delivered again, sessions end (`close_gives_back_what_is_unsettled`).
    async fn close(&self) -> Result<()>;

    /// What this broker, configured as it is, can promise. Constant after `open`.
    fn capabilities(&self) -> Capabilities;

    /// Messages that wait for this consumer, where the broker knows without asking a server. For metrics only.
    fn lag(&self) -> Option<u64> {
        None
    }
}

#[async_trait]
impl<B: Broker + ?Sized> Broker for Arc<B> {
    async fn open(&self, limits: Limits) -> Result<()> {
        (**self).open(limits).await
    }
    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        (**self).receive(want).await
    }
    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        (**self).settle(batch).await
    }
    async fn stop(&self) -> Result<()> {
        (**self).stop().await
    }
    async fn close(&self) -> Result<()> {
        (**self).close().await
    }
    fn capabilities(&self) -> Capabilities {
        (**self).capabilities()
    }
    fn lag(&self) -> Option<u64> {
        (**self).lag()
    }
}

/// How much a consumer will hold, told to the broker before it consumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most unsettled deliveries.
    pub events: usize,
    /// Most bytes of unsettled deliveries.
    pub bytes: usize,
    /// Longest that a delivery stays unsettled; the adapter keeps it ours that long.
    pub held_max: Duration,
    /// Longest that a session drains before it ends.
    pub drain: Duration,
    /// What a message may measure; checked before it is decoded.
    pub message: MessageLimits,
}

/// How much one [`Broker::receive`] may return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// Most deliveries, at least 1.
    pub events: usize,
    /// Most bytes; a single larger delivery is returned alone.
    pub bytes: usize,
}

/// One arrival of a message.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// How to settle it.
    pub receipt: Receipt,
    /// The session it belongs to.
    pub session: Session,
    /// What arrived; shared, never copied.
    pub message: Arc<Message>,
    /// How often the broker has delivered it, from 1, where it counts.
    pub count: Option<u32>,
    /// Where it stands at the broker.
    pub origin: Option<Arc<Origin>>,
}

/// What the broker needs to find a delivery again. Minted by the adapter, which keeps the native handle and the message
/// until it is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Receipt {
    /// The session's number; a receipt of another session is stale.
    pub session: u32,
    /// The partition, or 0 where there is none.
    pub partition: u32,
    /// The position within the partition or session.
    pub position: u64,
}

/// Where a message stands at the broker: the id of messages without one where
/// [`Capabilities::position_is_stable`], and a header of dead letters.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Topic, queue or stream, with the partition where there is one.
    pub place: Arc<str>,
    /// Offset, entry id or sequence number.
    pub position: Box<str>,
}

/// The time during which receipts are good: a channel, an assignment, a connection.
#[derive(Clone)]
pub struct Session {
    id: u32,
    state: watch::Receiver<SessionState>,
}

impl Session {
    /// A session with its number and the adapter's view of its state.
    pub fn new(id: u32, state: watch::Receiver<SessionState>) -> Self {
        Self { id, state }
    }

    /// The number in its receipts.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Its state now. A session whose adapter is gone has ended.
    pub fn state(&self) -> SessionState {
        if self.state.has_changed().is_err() { SessionState::Ended } else { *self.state.borrow() }
    }

    /// Whether deliveries of this session may be started.
    pub fn is_live(&self) -> bool {
        self.state() == SessionState::Live
    }

    /// Waits until it is no longer live. Cancel safe.
    pub async fn not_live(&self) {
        let mut state = self.state.clone();
        // An error means that the sender is gone: the session has ended.
        let _ = state.wait_for(|state| *state != SessionState::Live).await;
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("id", &self.id).field("state", &self.state()).finish()
    }
}

/// How a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionState {
    /// Deliveries may be started and settled.
    Live,
    /// It is being taken away: start nothing, release what waits, settle what runs.
    Draining,
    /// Settling answers stale; what was unsettled comes again.
    Ended,
}

/// How a delivery ends at the broker.
#[derive(Clone, Debug)]
pub enum Settlement {
    /// Done: it never comes back.
    Ack,
    /// Given back: it comes again soon, here or elsewhere.
    Release {
        /// Whether the broker may count it as a failed try.
        counted: bool,
    },
    /// Comes again after this long, kept by the broker durably.
    Retry {
        /// How long it stays away.
        after: Duration,
    },
    /// Set aside with a reason, then done.
    DeadLetter(Box<DeadLetter>),
}

/// Which order a broker keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokerOrder {
    /// None that a consumer could rely on: competing consumers overtake each other.
    None,
    /// Deliveries of one key come to one consumer, in order.
    Key,
    /// Deliveries of one partition come to one consumer, in order.
    Partition,
}

/// How safely a broker or a store keeps what it acknowledged. Later variants survive more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Durability {
    /// Lives as long as the process.
    Process,
    /// Survives the process; a crash of the machine or a failover may lose the last second.
    Lossy,
    /// Survives a crash of the machine.
    Durable,
}

/// What a broker, as configured, can promise. Feeds the [`Guarantee`](crate::Guarantee).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Capabilities {
    /// The order it keeps.
    pub order: BrokerOrder,
    /// Whether a [`Settlement::Retry`] keeps the order within a key.
    pub retry_keeps_order: bool,
    /// The longest [`Settlement::Retry`].
    pub retry_max: Duration,
    /// After how many deliveries the broker sets a message aside or drops it by itself.
    pub deliveries_max: Option<u32>,
    /// Most unsettled deliveries it hands to one consumer.
    pub unsettled_max: Option<usize>,
    /// Longest that it lets a delivery stay unsettled.
    pub hold_max: Option<Duration>,
    /// Whether dead-lettering and acking are one step.
    pub dead_letter_in_one_step: bool,
    /// Whether a settlement by a consumer that lost the delivery is refused.
    pub settle_fenced: bool,
    /// Whether [`Origin`] identifies a message for as long as it exists.
    pub position_is_stable: bool,
    /// How safely it keeps messages.
    pub durability: Durability,
    /// The longest time after which it can still deliver a message again (its retention), where it is known.
    pub redelivery_horizon: Option<Duration>,
    /// Its name, for people: `memory`, `kafka`.
    pub name: &'static str,
}

impl Capabilities {
    /// A broker about which nothing is promised: set what holds.
    pub fn none(name: &'static str) -> Self {
        Self {
            order: BrokerOrder::None,
            retry_keeps_order: false,
            retry_max: Duration::ZERO,
            deliveries_max: None,
            unsettled_max: None,
            hold_max: None,
            dead_letter_in_one_step: false,
            settle_fenced: false,
            position_is_stable: false,
            durability: Durability::Process,
            redelivery_horizon: None,
            name,
        }
    }
}
