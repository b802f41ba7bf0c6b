//! Every event once: deduplication, retries and dead letters for consumers of any broker.

pub mod cloudevents;
pub mod record;

mod broker;
mod dead_letter;
mod error;
mod message;
mod publisher;
mod store;

pub use broker::{
    Broker, BrokerOrder, Capabilities, Delivery, Durability, Limits, Origin, Receipt, Session, SessionState,
    Settlement, Want,
};
pub use dead_letter::{DEAD_LETTER_VERSION, DeadLetter, RESERVED_PREFIX, Reason};
pub use error::{BoxError, Error, ErrorKind, Result};
pub use message::{Attributes, Defect, DefectKind, Headers, Message, MessageId, MessageLimits};
pub use publisher::{Outgoing, Publisher};
pub use store::{
    Claim, ClaimRequest, ConsumerId, EventKey, Fingerprint, History, Lease, Outcome, ProcessedStore, RecordView,
    Recorded, Renewal, Status, StoreAdmin, StoreHealth, Swept, TransactionalStore, Trouble,
};
