//! Context: what a handler knows of its event, its lease and its time, and how it publishes.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, type_name};
use crate::message::Message;
use crate::publisher::Outgoing;
use crate::run::{Run, Stop};
use crate::store::{EventKey, Lease, digest, hex};
use crate::trace;

/// What a handler gets beside the event. Cheap to clone.
pub struct Context<S> {
    run: Arc<Run>,
    state: Arc<S>,
}

impl<S> Clone for Context<S> {
    fn clone(&self) -> Self {
        Self { run: Arc::clone(&self.run), state: Arc::clone(&self.state) }
    }
}

impl<S> fmt::Debug for Context<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("run", &self.run).finish_non_exhaustive()
    }
}

impl<S> Context<S> {
    pub(crate) fn new(run: Arc<Run>, state: Arc<S>) -> Self {
        Self { run, state }
    }

    /// A context for calling a handler as the plain function it is: first attempt, fence 1, a minute of time, nothing
    /// is sent. What the handler published is in [`published`](Self::published).
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(async {
    /// use hapax::{Context, Failure, Message};
    /// async fn hello(_: (), cx: Context<u32>) -> Result<(), Failure> {
    ///     assert_eq!(*cx.state(), 7);
    ///     Ok(())
    /// }
    /// hello((), Context::test(7, Message::event("/shop", "1", "order.placed"))).await.unwrap();
    /// # }); Ok::<(), std::io::Error>(())
    /// ```
    pub fn test(state: S, message: Message) -> Self {
        let attributes = &message.attributes;
        let text = |value: &Option<Box<str>>| value.clone().unwrap_or_default();
        let key = EventKey::of("test", &text(&attributes.source), &text(&attributes.id));
        let lease = Lease { consumer: crate::store::ConsumerId(0), key, fence: NonZeroU64::MIN, attempt: 1 };
        let run = Run::new("test".into(), Arc::new(message), lease, 0, Duration::from_secs(60));
        run.begin(Instant::now());
        Self::new(Arc::new(run), Arc::new(state))
    }

    /// What `.state(..)` was given.
    pub fn state(&self) -> &S {
        &self.state
    }

    /// The message as it arrived.
    pub fn message(&self) -> &Message {
        &self.run.message
    }

    /// Which consumer this is.
    pub fn consumer(&self) -> &str {
        &self.run.consumer
    }

    /// Which attempt it is, from 1.
    pub fn attempt(&self) -> u32 {
        self.run.lease.attempt
    }

    /// How often a process died, or lost its lease, while it held this event.
    pub fn crashes(&self) -> u32 {
        self.run.crashes
    }

    /// 32 hexadecimal characters for the callee's idempotency key: the same on every attempt and after a redrive.
    pub fn idempotency_key(&self) -> String {
        self.run.lease.key.to_hex()
    }

    /// A key for one step of the handler, as stable as [`idempotency_key`](Self::idempotency_key).
    pub fn key(&self, step: &str) -> String {
        self.run.lease.key.step(step)
    }

    /// A number that grows with every attempt of this event, for resources that refuse an older one
    /// (`update .. where fence < $1`).
    pub fn fence(&self) -> u64 {
        self.run.lease.fence.get()
    }

    /// Time until the handler's timeout; zero if it is over.
    pub fn remaining(&self) -> Duration {
        self.run.remaining()
    }

    /// The conversation: the message's `correlationid`, else its id.
    pub fn correlation_id(&self) -> Option<&str> {
        let attributes = &self.run.message.attributes;
        attributes.correlation_id.as_deref().or(attributes.id.as_deref())
    }

    /// What led to this message: its `causationid`.
    pub fn causation_id(&self) -> Option<&str> {
        self.run.message.attributes.causation_id.as_deref()
    }

    /// Cancelled when the lease is lost or the consumer shuts down. After a lost lease another may run the event
    /// already: start nothing new. At shutdown the handler may go on until the drain deadline; at a lost lease it is
    /// dropped at its next await point, so that only what holds the token beside it sees this.
    pub fn cancelled(&self) -> CancellationToken {
        self.run.token()
    }

    /// Why [`cancelled`](Self::cancelled) is, if it is.
    pub fn stopped(&self) -> Option<Stop> {
        self.run.stopped().or_else(|| self.run.is_shutdown_announced().then_some(Stop::Shutdown))
    }

    /// Publishes an event: collected now, sent after the handler succeeded and before the record says processed. A
    /// failed attempt sends nothing; a repeated one sends the same ids.
    ///
    /// At most [`PUBLISHED_MAX`] events an attempt.
    ///
    /// Fails where the event has no JSON form, where a step is used twice for one type, or beyond the bound.
    pub fn publish<E: Event>(&self, event: &E) -> Publish<'_> {
        Publish { run: &self.run, data: serde_json::to_vec(event), ty: type_name::<E>(), step: "", key: None, to: None }
    }

    /// What was published so far in this attempt.
    pub fn published(&self) -> Vec<Outgoing> {
        self.run.outbox().clone()
    }
}

/// Most events that one attempt can publish.
pub const PUBLISHED_MAX: usize = 1_000;

/// An event about to be published; [`send`](Self::send) collects it.
#[must_use = "call .send() to publish"]
#[derive(Debug)]
pub struct Publish<'a> {
    run: &'a Run,
    data: serde_json::Result<Vec<u8>>,
    ty: String,
    step: &'a str,
    key: Option<&'a str>,
    to: Option<&'a str>,
}

impl<'a> Publish<'a> {
    /// Names the step, where one handler publishes several events of one type: part of the derived id.
    pub fn step(self, step: &'a str) -> Self {
        Self { step, ..self }
    }

    /// The ordering key of the new message.
    pub fn key(self, key: &'a str) -> Self {
        Self { key: Some(key), ..self }
    }

    /// Topic, queue or stream; else the publisher's default.
    pub fn to(self, place: &'a str) -> Self {
        Self { to: Some(place), ..self }
    }

    /// Collects it. The id derives from consumer, source event, type and step, never from a running index, so that every
    /// attempt sends the same.
    pub fn send(self) -> Result<()> {
        let refuse = |why: String| Error::new(ErrorKind::Rejected, "publish").because(why);
        let data = self.data.map_err(|e| refuse(format!("{} has no JSON form", self.ty)).with_source(e))?;
        let run = self.run;
        let id = hex(digest(b"hapax derived id 1", &[&run.lease.key.0, self.ty.as_bytes(), self.step.as_bytes()]));
        let mut message = Message::event(&*run.consumer, id, self.ty).with_data("application/json", data);
        let (attributes, cause) = (&mut message.attributes, &run.message.attributes);
        attributes.correlation_id = cause.correlation_id.clone().or_else(|| cause.id.clone());
        attributes.causation_id = cause.id.clone();
        attributes.partition_key = self.key.map(Into::into);
        // Without a valid traceparent the tracestate means nothing (W3C Trace Context, 4.3).
        let continued = |parent: &str| trace::child(parent, trace::span_id(&run.lease));
        attributes.traceparent = cause.traceparent.as_deref().and_then(continued).map(Into::into);
        attributes.tracestate = attributes.traceparent.as_ref().and(cause.tracestate.clone());
        let mut outbox = run.outbox();
        if outbox.len() >= PUBLISHED_MAX {
            return Err(refuse(format!("more than {PUBLISHED_MAX} events published by one attempt")));
        }
        if outbox.iter().any(|other| other.message.attributes.id == message.attributes.id) {
            let ty = message.attributes.ty.unwrap_or_default();
            return Err(refuse(format!("{ty} is published twice under step {:?}: name each .step(..)", self.step)));
        }
        outbox.push(Outgoing { to: self.to.map(Into::into), message });
        Ok(())
    }
}
