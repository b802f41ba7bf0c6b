//! Every event once: deduplication, retries and dead letters for consumers of any broker.

pub mod cloudevents;
pub mod record;

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
mod stepping;
mod store;
mod trace;

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
