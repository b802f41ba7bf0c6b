//! The steps of a life that decide nothing: the single calls, the run of the handler, what is told to people.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tracing::Instrument;

use super::calls::GivenUp;
use super::reading::Event;
use super::runners::Handler;
use super::shared::Shared;
use super::verdict;
use super::waiting::Place;
use crate::broker::{Delivery, Settlement};
use crate::dead_letter::{DeadLetter, Reason, cut};
use crate::error::{Error, ErrorKind};
use crate::event::{Apart, Ended, Ready};
use crate::handler::Failure;
use crate::identity::identify;
use crate::observer::Observed;
use crate::run::{Finish, Run, Stop};
use crate::stepping::Stepped;
use crate::store::{Lease, Outcome, Recorded, Trouble};
use crate::trace;

/// A step that few lives take: boxed, so that the common life stays small enough to move and keep.
pub(super) type Rare<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// How a handler's task ended.
pub(super) enum End {
    /// It returned.
    Handler(Ended),
    /// It panicked, with this text.
    Panicked(String),
    /// It was stopped.
    Stopped(Stop),
}

impl Shared {
    /// Gives a delivery back that was not claimed.
    pub(super) fn give_back<'a>(&'a self, delivery: &'a Delivery) -> Rare<'a, ()> {
        Box::pin(async move {
            self.view.counters.released.one();
            let _ = self.settle(delivery, Settlement::Release { counted: false }).await;
        })
    }

    /// To the dead letters without a record: there is nothing that could be claimed, so it needs no token to come back.
    pub(super) fn set_aside_unrecorded<'a>(
        &'a self,
        delivery: &'a Delivery,
        reason: Reason,
        error: &'a str,
    ) -> Rare<'a, ()> {
        Box::pin(async move {
            let error = self.error_text(error);
            let dead_letter = self.dead_letter(delivery, reason, &error, 0, Duration::ZERO, None);
            if self.settle(delivery, Settlement::DeadLetter(Box::new(dead_letter))).await.is_ok() {
                self.view.counters.dead_lettered.one();
                let id = delivery.message.attributes.id.as_deref().unwrap_or_default();
                self.observe(&Observed::DeadLettered { reason, id, error: &error });
            }
        })
    }

    /// Settles. An error says that the session ended or the calls were given up: the broker delivers again.
    pub(super) async fn settle(&self, delivery: &Delivery, settlement: Settlement) -> Result<(), GivenUp> {
        self.settles.call((delivery.receipt, settlement)).await
    }

    /// Records, or says that the calls were given up.
    pub(super) async fn record(&self, lease: Lease, outcome: Outcome) -> Result<Recorded, GivenUp> {
        self.records.call((lease, outcome)).await
    }

    /// Sends what the handler published, and waits until the broker has it.
    pub(super) async fn publish(&self, run: &Run) -> Result<(), Failure> {
        let published = std::mem::take(&mut *run.outbox());
        if published.is_empty() {
            return Ok(());
        }
        if self.publisher.is_none() {
            return Err(Failure::permanent("a handler published, and the consumer has no .publisher(..)"));
        }
        let sent: Vec<_> = published.into_iter().map(|outgoing| self.publishes.call(outgoing)).collect();
        for sent in sent {
            match sent.await {
                Ok(()) => {}
                Err(GivenUp::Refused(why)) => {
                    return Err(Failure::permanent("the broker refuses what was published").with_source(&*why));
                }
                Err(GivenUp::Stopped) => return Err(Failure::retryable("shut down while publishing")),
            }
        }
        Ok(())
    }

    /// Runs the handler, apart from the engine: a panic is its end, and one that blocks stops a runner and not the engine.
    pub(super) async fn handle(&self, event: &Event, ready: Box<dyn Ready>, run: &Arc<Run>) -> End {
        let end = self.ended(event, ready, run).await;
        let took = run.taken();
        self.transaction_took(event, took);
        if let End::Handler(Ended::Apart(apart)) = &end {
            self.batch_failed(event, apart);
            return end;
        }
        let how = verdict::handler_end(&end);
        self.observe(&Observed::Handled { route: self.infos[event.route].name(), end: how, took });
        end
    }

    /// Tells of a batch that failed as a whole, once for all of its events.
    fn batch_failed(&self, event: &Event, apart: &Apart) {
        if let Some((events, why)) = &apart.why {
            let error = self.error_text(&text_of(why));
            self.observe(&Observed::BatchFailed {
                route: self.infos[event.route].name(),
                events: *events,
                error: &error,
            });
        }
    }

    /// Tells the kill switch how it went.
    pub(super) fn report(&self, place: Option<&Place<'_>>, end: &End) {
        let changed = place.zip(verdict::for_switch(end)).and_then(|(place, result)| place.pass.report(result));
        if let Some(open) = changed {
            // Who waits for a permit is to wait for the switch first.
            self.standby.iter().for_each(|standby| standby.pause(open));
            self.view.vitals.switch(open);
            self.observe(&Observed::Switch { open });
        }
    }

    /// Hands the handler to a runner and waits for its end, its stop, or its panic.
    async fn ended(&self, event: &Event, ready: Box<dyn Ready>, run: &Arc<Run>) -> End {
        if let Some(mut running) = ready.start(Arc::clone(run)) {
            if let Some(stepper) = &self.stepper {
                running = Box::pin(Stepped::new(running, Arc::clone(stepper), run.lease));
            }
            let span = trace::handler_span(&self.name, self.infos[event.route].name(), &run.message, &run.lease);
            if !span.is_disabled() {
                running = Box::pin(running.instrument(span));
            }
            self.started.push(Handler::one(running, Arc::clone(run)));
        }
        let (finish, stopped) = match std::future::poll_fn(|cx| run.poll_end(cx)).await {
            Ok(finish) => (Some(finish), None),
            Err(stop) => {
                // A commit under way is not cut off: its answer is better than none.
                if !run.is_committing() {
                    run.cancel();
                }
                let is_gathering = self.infos[event.route].batched && run.company() == 0;
                // It ends at its next await; one that blocks is waited for as long as a lease, then left behind.
                let finish = std::future::poll_fn(|cx| run.poll_finish(cx));
                let wait = if is_gathering { Duration::ZERO } else { self.settings.lease };
                let finish = tokio::time::timeout(wait, finish).await.ok();
                run.cancel();
                (finish, Some(stop))
            }
        };
        match (finish, stopped) {
            (Some(Finish::Returned(ended)), _) => End::Handler(ended),
            (Some(Finish::Panicked(panic)), _) => End::Panicked(panic_text(&*panic)),
            (_, Some(_)) if run.is_committing() => {
                let error = Error::new(ErrorKind::Unknown, "commit").because("stopped while it was under way");
                End::Handler(Ended::Unknown(error))
            }
            // Whose doing it was is to be found out.
            (_, Some(Stop::Timeout)) if run.company() > 1 => {
                let why = run.leads().then(|| (run.company(), Failure::retryable("timed out")));
                End::Handler(Ended::Apart(Apart { alone: true, why }))
            }
            (_, Some(stop)) => End::Stopped(stop),
            (_, None) => End::Stopped(Stop::Shutdown),
        }
    }

    pub(super) fn dead_letter(
        &self,
        delivery: &Delivery,
        reason: Reason,
        error: &str,
        attempts: u32,
        first: Duration,
        reopen: Option<std::num::NonZeroU64>,
    ) -> DeadLetter {
        let last = SystemTime::now();
        DeadLetter {
            reason,
            error: error.into(),
            consumer: Arc::clone(&self.name),
            attempts,
            first: last.checked_sub(first).unwrap_or(SystemTime::UNIX_EPOCH),
            last,
            origin: delivery.origin.clone(),
            reopen,
        }
    }

    /// For people: the id as text, and the error, redacted and cut.
    pub(super) fn trouble(&self, delivery: &Delivery, error: &str) -> Trouble {
        let identity = identify(&delivery.message, delivery.origin.as_deref(), &self.extractors, &self.limits);
        let id = identity.ok().flatten().map(|identity| identity.id.into()).unwrap_or_default();
        Trouble { id, error: self.error_text(error) }
    }

    pub(super) fn error_text(&self, error: &str) -> Box<str> {
        let redacted = crate::secret::redact(error);
        let redacted = self.redact.map_or_else(
            || redacted.to_string(),
            |redact| {
                catch_unwind(|| redact(&redacted)).unwrap_or_else(|_| "not told: redacting it panicked".to_owned())
            },
        );
        cut(&redacted, self.settings.error_text_max)
    }
}

/// A failure's text; a user's error that panics when it is told must not end the engine.
pub(super) fn text_of(failure: &Failure) -> String {
    catch_unwind(AssertUnwindSafe(|| failure.to_string()))
        .unwrap_or_else(|_| "its text cannot be told: it panicked".into())
}

pub(super) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no text".to_owned())
}
