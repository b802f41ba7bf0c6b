//! The engine: one future that drives every life of a consumer.
//!
//! A round polls the lives that were woken, launches the batches whose predecessor has returned, polls the calls under
//! way, and takes what arrived. Handlers are polled by runners, so that one that blocks does not block it.

use std::future::Future;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};

use super::calls::Call;
use super::helm::{Drive, Driven, Wheel};
use super::intake::{Arrived, Intake};
use super::lanes::{Lane, Lanes};
use super::lives::Lives;
use super::runners::Runners;
use super::shared::Shared;
use crate::broker::{Delivery, Want};
use crate::error::{Error, ErrorKind};
use crate::observer::Observed;
use crate::settings::Order;

/// After so many rounds the engine lets others have the thread.
const ROUNDS_MAX: usize = 32;

/// Drives lives of type `F`, which `live` makes of deliveries.
pub(super) struct Engine<F, L> {
    // Dropped first: no handler begins where lives are gone.
    runners: Runners,
    shared: Arc<Shared>,
    live: L,
    lives: Lives<F, Tag>,
    lanes: Option<Lanes<Delivery>>,
    calls: FuturesUnordered<Call>,
    intake: Intake,
    tick: Interval,
    events: usize,
    bytes: usize,
}

/// What is known of a life apart from it.
struct Tag {
    bytes: usize,
    lane: Option<Lane>,
    begun: Instant,
}

impl<F, L> Engine<F, L>
where
    F: Future<Output = ()> + Send + 'static,
    L: Fn(Arc<Shared>, Delivery) -> F + Send + 'static,
{
    /// An engine whose runners may drive it at `wheel`.
    pub(super) fn new(shared: Arc<Shared>, live: L, wheel: &Arc<Wheel<Self>>) -> Self {
        let mut tick = interval(shared.keepalive.tick());
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            live,
            lives: Lives::new().in_order(shared.is_seeded),
            lanes: (shared.order == Order::PerKey).then(Lanes::new),
            runners: Runners::new(wheel),
            calls: FuturesUnordered::new(),
            intake: Intake::new(Arc::clone(&shared.broker), shared.settings.call_timeout),
            tick,
            events: 0,
            bytes: 0,
            shared,
        }
    }

    fn poll_lives(&mut self) -> bool {
        let Self { lives, lanes, events, bytes, .. } = self;
        let mut next = Vec::new();
        let polled = lives.poll(|tag| {
            *events -= 1;
            *bytes -= tag.bytes;
            if let (Some(lanes), Some(lane)) = (lanes.as_mut(), tag.lane) {
                next.extend(lanes.leave(lane).map(|delivery| (delivery, lane)));
            }
        });
        if !next.is_empty() {
            let now = Instant::now();
            next.into_iter().for_each(|(delivery, lane)| self.start(delivery, Some(lane), now));
        }
        polled > 0
    }

    fn poll_calls(&mut self, cx: &mut Context<'_>) -> bool {
        let mut returned = false;
        while let Poll::Ready(Some(())) = self.calls.poll_next_unpin(cx) {
            returned = true;
        }
        returned | self.shared.may_another_leave()
    }

    fn poll_intake(&mut self, cx: &mut Context<'_>) -> bool {
        let room = self.room();
        let Poll::Ready(arrived) = self.intake.poll(cx, room) else { return false };
        match arrived {
            Arrived::Deliveries(deliveries) => self.arrived(deliveries),
            Arrived::Reached => self.shared.broker_is_up(),
            Arrived::Stopped => {
                if !self.shared.is_draining() {
                    self.shared.ended_by_broker.notify_one();
                }
            }
            Arrived::Failed(error) if error.is_retryable() => self.shared.broker_is_down(&error),
            Arrived::Failed(error) => self.shared.fail(error),
        }
        true
    }

    /// What may be received now.
    fn room(&self) -> Option<Want> {
        let (shared, settings) = (&self.shared, &self.shared.settings);
        if shared.is_draining() || shared.view.is_paused() || !shared.view.vitals.is_store_up() {
            return None;
        }
        let (events, bytes) = (settings.in_flight_max.saturating_sub(self.events), settings.in_flight_bytes_max);
        if shared.switch.is_open() {
            // One delivery to probe with, unless there is one that waits for the probe already.
            return (events > 0 && !shared.switch.is_waited_for()).then_some(Want { events: 1, bytes });
        }
        let bytes = bytes.saturating_sub(self.bytes);
        (events > 0 && bytes > 0).then_some(Want { events, bytes })
    }

    fn arrived(&mut self, deliveries: Vec<Delivery>) {
        let (events, now) = (deliveries.len(), Instant::now());
        let mut bytes = 0;
        self.shared.broker_is_up();
        for delivery in deliveries {
            bytes += delivery.message.bytes();
            self.events += 1;
            self.bytes += delivery.message.bytes();
            match self.lanes.as_mut().and_then(|lanes| Some((lanes, Lane::of(&delivery.message)?))) {
                Some((lanes, lane)) => {
                    if let Some(delivery) = lanes.enter(lane, delivery) {
                        self.start(delivery, Some(lane), now);
                    }
                }
                None => self.start(delivery, None, now),
            }
        }
        self.shared.view.counters.delivered.add(events);
        self.shared.observe(&Observed::Received { events, bytes });
    }

    fn start(&mut self, delivery: Delivery, lane: Option<Lane>, begun: Instant) {
        let tag = Tag { bytes: delivery.message.bytes(), lane, begun };
        self.lives.start((self.live)(Arc::clone(&self.shared), delivery), tag);
    }

    fn poll_tick(&mut self, cx: &mut Context<'_>) -> bool {
        if self.tick.poll_tick(cx).is_pending() {
            return false;
        }
        let shared = &self.shared;
        let now = Instant::now();
        shared.view.vitals.beat();
        self.runners.relieve();
        self.tell_in_flight();
        if let Some(messages) = shared.broker.lag() {
            shared.observe(&Observed::Lag { messages });
        }
        if self.runners.is_broken() {
            shared.fail(Error::new(ErrorKind::Internal, "run").because("a runner of handlers has ended"));
        }
        let due = shared.keepalive.due(now);
        shared.leases_lost(due.lost);
        if !due.renew.is_empty() && shared.begin_renewal() {
            let shared = Arc::clone(shared);
            self.calls.push(Box::pin(async move {
                for leases in due.renew.chunks(shared.settings.batch_max) {
                    shared.renew(leases.to_vec()).await;
                }
                shared.end_renewal();
            }));
        }
        // Nothing else may be asking: without this nobody would find out that the store is back.
        if !shared.view.vitals.is_store_up() && shared.begin_probe() {
            let shared = Arc::clone(shared);
            self.calls.push(Box::pin(async move {
                shared.probe().await;
                shared.end_probe();
            }));
        }
        true
    }

    /// Tells what is unsettled now.
    pub(super) fn tell_in_flight(&self) {
        let oldest = self.lives.tags().map(|tag| tag.begun).min();
        self.shared.view.vitals.in_flight(self.events, self.bytes, oldest);
        self.shared.observe(&Observed::InFlight { events: self.events, bytes: self.bytes });
    }

    /// What is in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.events
    }
}

impl<F, L> Drive for Engine<F, L>
where
    F: Future<Output = ()> + Send + 'static,
    L: Fn(Arc<Shared>, Delivery) -> F + Send + 'static,
{
    fn poll(&mut self, cx: &mut Context<'_>, keeper: Option<usize>) -> Driven {
        while self.poll_tick(cx) {}
        for _ in 0..ROUNDS_MAX {
            let mut moved = self.poll_lives();
            self.shared.launch_batches();
            moved |= self.runners.hand_over(&self.shared.started, keeper);
            self.shared.launch(|call| self.calls.push(call));
            moved |= self.poll_calls(cx);
            moved |= self.poll_intake(cx);
            if !moved && self.lives.rest(cx) {
                let has_answers = !self.intake.has_asked() && self.calls.is_empty();
                return match self.events {
                    0 if self.shared.is_draining() => Driven::Over,
                    _ if has_answers && self.shared.is_in_process => Driven::Answered,
                    _ => Driven::Asked,
                };
            }
        }
        cx.waker().wake_by_ref();
        Driven::Asked
    }

    fn expect_poll(&self) {
        self.lives.expect_poll();
    }
}
