//! Every event once: deduplication, retries and dead letters for consumers of any broker.
//!
//! Brokers deliver at least once. hapax claims each event in a store before its handler runs, tries again what failed, sets
//! aside what cannot succeed, and records how it ended before the broker is told, so that an event takes effect once.
//!
//! This package holds the contracts and the runtime and names no broker and no database; those are adapters
//! (`hapax-memory`, `hapax-sqlite`). `hapax-testkit` has what proves them, and a harness for your own handlers.
//!
//! # What users write
//!
//! ```
//! use hapax::{Broker, Consumer, Context, Event, Failure, Otherwise, ProcessedStore};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct OrderPlaced { cents: i64 }
//!
//! impl Event for OrderPlaced {
//!     const TYPE: &'static str = "com.shop.order.placed";
//! }
//!
//! async fn charge(event: OrderPlaced, cx: Context<()>) -> Result<(), Failure> {
//!     let header = ("Idempotency-Key", cx.key("charge")); // the same on every attempt
//!     # let _ = (event.cents, header);
//!     Ok(())
//! }
//!
//! async fn consume(broker: impl Broker, store: impl ProcessedStore) -> Result<(), hapax::BoxError> {
//!     let consumer = Consumer::builder("billing", broker, store)
//!         .on(charge)
//!         .otherwise(Otherwise::Ignore) // types without a handler
//!         .build() // asks broker and store, tells every fault at once
//!         .await?;
//!     println!("{}", consumer.guarantee());
//!     consumer.run(hapax::shutdown_signal()).await?;
//!     Ok(())
//! }
//! ```
//!
//! | to | see |
//! |---|---|
//! | handle events, plainly or in the store's transaction | [`Handler`], [`TxHandler`], [`Route`], [`Event`] |
//! | say what a failure means | [`Failure`], [`IntoFailure`], [`FailureExt`] |
//! | know the attempt, the keys, the time left; publish | [`Context`] |
//! | put a consumer together and run it | [`Consumer::builder`], [`ConsumerBuilder`], [`Service`] |
//! | set numbers, from code, files or the environment | [`Settings`], [`RetryPolicy`] |
//! | read what is promised, and assert it | [`Guarantee`], [`Level`], [`Window`] |
//! | watch it | [`Health`], [`Statistics`], [`Observer`], [`Telemetry`] |
//!
//! # What adapters implement
//!
//! [`Broker`], [`ProcessedStore`], and where they can [`TransactionalStore`], [`StoreAdmin`] and [`Publisher`]. Each clause
//! under `# Contract` is a named case of the conformance kit. [`record`] is the store's contract as pure functions,
//! [`cloudevents`] reads and writes messages for all of them.
//!
//! # What is promised
//!
//! Once broker and store can be reached, every event that the broker durably accepted ends, for each consumer, as
//! processed, dead-lettered or ignored by rule. A handler is not started after its outcome is recorded and retained. How
//! often its effect takes place depends on where: once in the store's own transaction ([`Level::ExactlyOnceEffect`]),
//! elsewhere again only in a declared [`Window`]. `docs/guarantees.md` in the repository has each window and each point at
//! which a process can die; its `ARCHITECTURE.md` is the map of this code.

pub mod cloudevents;
pub mod record;

mod batch;
mod broker;
mod consumer;
mod context;
mod dead_letter;
mod error;
mod event;
mod fault;
mod guarantee;
mod handler;
mod health;
mod identity;
mod message;
mod observer;
mod publisher;
mod retry;
mod run;
mod secret;
mod service;
mod settings;
mod shutdown;
mod standby;
mod stepping;
mod store;
mod trace;

pub use batch::{BatchHandler, Item, Outcomes, TxBatchHandler};
pub use broker::{
    Broker, BrokerOrder, Capabilities, Delivery, Durability, Limits, Origin, Receipt, Session, SessionState,
    Settlement, Want,
};
pub use consumer::{Consumer, ConsumerBuilder, ConsumerHandle, MissingId};
pub use context::{Context, PUBLISHED_MAX, Publish};
pub use dead_letter::{DEAD_LETTER_VERSION, DeadLetter, RESERVED_PREFIX, Reason};
pub use error::{BoxError, Error, ErrorKind, Result};
pub use event::{Effects, Event, Otherwise, Route};
pub use fault::{BuildError, Fault};
pub use guarantee::{Guarantee, HandlerGuarantee, Level, OpenWindow, Window};
pub use handler::{Failure, FailureExt, FailureKind, Handler, IntoFailure, TxHandler};
pub use health::{BEAT_MAX, Health, InFlight, Phase, Reach, Statistics};
pub use identity::IdFrom;
pub use message::{Attributes, Defect, DefectKind, Headers, Message, MessageId, MessageLimits};
pub use observer::{
    Duplicate, HandlerEnd, Observed, Observer, ROUTES_MAX, Side, Telemetry, Verb, describe as describe_metrics,
};
pub use publisher::{Outgoing, Publisher};
pub use retry::{Backoff, Over, RetryPolicy};
pub use run::Stop;
pub use secret::{SecretUrl, redact};
pub use service::{ConsumerReport, Report, Service, ServiceHandle};
pub use settings::{Order, Settings};
pub use shutdown::shutdown_signal;
#[doc(hidden)]
pub use stepping::Stepper;
pub use store::{
    Claim, ClaimRequest, ConsumerId, EventKey, Fingerprint, History, Lease, Outcome, ProcessedStore, RecordView,
    Recorded, Renewal, Status, StoreAdmin, StoreHealth, Swept, TransactionalStore, Trouble,
};
