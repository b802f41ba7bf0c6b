//! What a message is, by itself: an event with a handler, ignored by rule, or unfit. Decided before anything is claimed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::builder::MissingId;
use super::shared::Shared;
use super::steps::panic_text;
use crate::broker::Delivery;
use crate::dead_letter::Reason;
use crate::event::{Otherwise, Ready, Resolved, Start};
use crate::handler::Failure;
use crate::identity::identify;
use crate::message::{Defect, DefectKind, Message};
use crate::retry::RetryPolicy;
use crate::store::{ClaimRequest, EventKey, Fingerprint, Lease, Trouble};

/// An event that was read: which handler, which key, ready to start once.
pub(super) struct Event {
    pub(super) route: usize,
    version: u32,
    pub(super) key: EventKey,
    fingerprint: Fingerprint,
    /// In a lock that is never taken, only opened by its owner: events need not be `Sync`, and a life must be `Send`.
    ready: Mutex<Option<Box<dyn Ready>>>,
    /// Crashes in its history that were told to the observer.
    pub(super) crashes_seen: u32,
    /// The lease of a commit whose answer was lost.
    pub(super) unknown: Option<(Lease, Trouble)>,
}

/// What a message turned out to be.
pub(super) enum Read {
    /// An event with a handler.
    Event(Event),
    /// Acked by rule.
    Ignored,
    /// To the dead letters without a record.
    Unfit(Reason, Box<str>),
}

impl Shared {
    /// What a message is, by itself: an event with a handler, ignored by rule, or unfit.
    pub(super) fn read(&self, delivery: &Delivery) -> Read {
        let message = &delivery.message;
        if let Some(defect) = message.defect() {
            return unfit(defect);
        }
        let ty = message.attributes.ty.as_deref();
        let (route, start, version) = match self.routes.resolve(ty) {
            Resolved::Route(route, start, version) => (route as usize, start, version),
            Resolved::UnknownVersion => {
                let error = format!("no handler knows this version of {:?}", ty.unwrap_or_default());
                return Read::Unfit(Reason::UnknownVersion, error.into());
            }
            Resolved::Otherwise(Otherwise::Ignore) => return Read::Ignored,
            Resolved::Otherwise(Otherwise::DeadLetter) => {
                let error = format!("no handler for type {:?}", ty.unwrap_or_default());
                return Read::Unfit(Reason::UnknownType, error.into());
            }
        };
        let identity = match identify(message, delivery.origin.as_deref(), &self.extractors, &self.limits) {
            Ok(Some(identity)) => identity,
            Ok(None) => match self.missing_id {
                MissingId::Ignore => return Read::Ignored,
                MissingId::DeadLetter => return Read::Unfit(Reason::MissingId, "no extractor found an id".into()),
            },
            Err(defect) => return unfit(&defect),
        };
        let key = identity.key(&self.name);
        match self.prepare(start, message, version) {
            Ok(ready) => Read::Event(Event {
                route,
                version,
                key,
                fingerprint: Fingerprint::of(message.attributes.content_type.as_deref(), &message.data),
                ready: Mutex::new(Some(ready)),
                crashes_seen: 0,
                unknown: None,
            }),
            Err(defect) => unfit(&defect),
        }
    }

    fn prepare(&self, start: &Arc<dyn Start>, message: &Arc<Message>, version: u32) -> Result<Box<dyn Ready>, Defect> {
        // A user's `Deserialize` runs here, in the engine: its panic must not end all lives.
        let read = || start.prepare(message, version, self.limits.json_depth_max);
        catch_unwind(AssertUnwindSafe(read))
            .unwrap_or_else(|panic| Err(Defect::undecodable(format!("reading it panicked: {}", panic_text(&*panic)))))
    }

    /// A claim for this event with a fresh token.
    pub(super) fn request(&self, event: &Event, delivery: &Delivery) -> ClaimRequest {
        let (process, counter) = &self.token;
        let token = u128::from(*process) << 64 | u128::from(counter.fetch_add(1, Ordering::Relaxed));
        ClaimRequest {
            consumer: self.consumer,
            key: event.key,
            fingerprint: event.fingerprint,
            token,
            reopen: delivery.message.reopen(),
        }
    }

    pub(super) fn retry(&self, event: &Event) -> &RetryPolicy {
        self.infos[event.route].retry.as_ref().unwrap_or(&self.retry)
    }

    pub(super) fn timeout(&self, event: &Event) -> Duration {
        self.infos[event.route].timeout.unwrap_or(self.timeout)
    }
}

impl Event {
    /// What the handler is started with; read again for another attempt.
    pub(super) fn take_ready(&mut self, shared: &Shared, delivery: &Delivery) -> Result<Box<dyn Ready>, Failure> {
        if let Some(ready) = self.ready.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            return Ok(ready);
        }
        let ty = delivery.message.attributes.ty.as_deref();
        let Resolved::Route(_, start, _) = shared.routes.resolve(ty) else {
            return Err(Failure::permanent("its route is gone"));
        };
        // It was read before, so this fails only if reading it depends on something else than the message.
        shared
            .prepare(start, &delivery.message, self.version)
            .map_err(|defect| Failure::permanent("it was readable before and is not now").with_source(&*defect.detail))
    }

    /// The trouble of a commit under this very lease that turned out not to have taken place.
    pub(super) fn uncommitted(&mut self, lease: Lease) -> Option<Trouble> {
        self.unknown.take().filter(|(unknown, _)| unknown.fence == lease.fence).map(|(_, trouble)| trouble)
    }
}

fn unfit(defect: &Defect) -> Read {
    let reason = match defect.kind {
        DefectKind::Undecodable => Reason::Undecodable,
        DefectKind::BeyondLimit => Reason::BeyondLimit,
    };
    Read::Unfit(reason, defect.detail.clone())
}
