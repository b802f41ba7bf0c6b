//! What a life waits for before it claims: its key's turn, the kill switch, a permit, a transaction. Each wait ends early when
//! the consumer or the delivery's session drains.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::SemaphorePermit;
use tokio::time::Instant;

use super::copies::Turn;
use super::reading::Event;
use super::shared::Shared;
use super::steps::Rare;
use super::switch::Pass;
use super::verdict;
use super::verdict::Delay;
use crate::broker::Delivery;
use crate::standby::{Answer, Granted, Passed};
use crate::store::{ClaimRequest, EventKey, Lease};

/// How long a copy stays at the broker when too many wait here.
pub(super) const CROWDED: Duration = Duration::from_secs(1);

/// The share of a lease that claims may wait for the one transaction of a store that blocks.
pub(super) const TRANSACTION_BUDGET: u32 = 64;

/// The right to claim: a permit for the handler, and the kill switch's pass.
pub(super) struct Place<'a> {
    pub(super) pass: Pass<'a>,
    /// What another's commit claimed meanwhile.
    pub(super) granted: Option<Box<(Lease, Instant)>>,
    permit: Option<Permit<'a>>,
    _budget: Option<SemaphorePermit<'a>>,
}

/// A permit for the handler: of its own, or that of the handler whose commit claimed.
enum Permit<'a> {
    Own(SemaphorePermit<'a>),
    Passed(Passed),
}

impl Place<'_> {
    pub(super) fn has_permit(&self) -> bool {
        self.permit.is_some()
    }

    /// The permit went to another.
    pub(super) fn pass_permit(&mut self) {
        match self.permit.take() {
            Some(Permit::Own(permit)) => permit.forget(),
            Some(Permit::Passed(permit)) => permit.forget(),
            None => {}
        }
    }
}

/// How waiting for a permit ended.
struct Waited<'a> {
    permit: Option<Permit<'a>>,
    granted: Option<Box<(Lease, Instant)>>,
    /// A commit may have claimed it.
    is_unknown: bool,
}

/// The answer to waiting for a key's turn.
pub(super) enum Turned<'a> {
    /// Until it is dropped, no copy is claimed in this process.
    Yours(Turn<'a>),
    /// Too many wait already: the broker is to keep it for so long.
    Crowded(Duration),
    /// The consumer drains, or the session is taken away.
    Over,
}

/// A claimed event with so many crashes in its history that it runs alone.
pub(super) struct Suspect<'a>(&'a Shared);

impl<'a> Suspect<'a> {
    pub(super) fn claimed(shared: &'a Shared) -> Self {
        shared.suspects.fetch_add(1, Ordering::SeqCst);
        Self(shared)
    }

    /// Waits until every other suspect gave its claim back.
    pub(super) async fn is_the_only_one(&self) {
        loop {
            let fewer = self.0.suspects_fewer.notified();
            if self.0.suspects.load(Ordering::SeqCst) <= 1 {
                return;
            }
            fewer.await;
        }
    }
}

impl Drop for Suspect<'_> {
    fn drop(&mut self) {
        self.0.suspects.fetch_sub(1, Ordering::SeqCst);
        self.0.suspects_fewer.notify_waiters();
    }
}

/// Counts a delivery that waits, for as long as it does.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// Waits for this key's turn in this process.
    pub(super) async fn turn(&self, key: EventKey, delivery: &Delivery) -> Turned<'_> {
        let mut turn = std::pin::pin!(self.copies.turn(key));
        if let Some(turn) = turn.as_mut().now_or_never() {
            return Turned::Yours(turn);
        }
        if let Delay::AtBroker(after) = verdict::delay(CROWDED, self.is_crowded(), &self.bounds) {
            return Turned::Crowded(after);
        }
        let _waits = Waits::new(&self.waiting);
        self.unless_over(delivery, turn).await.map_or(Turned::Over, Turned::Yours)
    }

    /// Waits until this delivery may be claimed: the kill switch lets it pass and a handler's permit is free. Meanwhile the
    /// commit of another's handler may claim `next` for it. `None` when nothing may be started any more.
    pub(super) async fn admit(
        &self,
        delivery: &Delivery,
        event: &Event,
        next: Option<&ClaimRequest>,
    ) -> Option<Place<'_>> {
        loop {
            let pass = match self.switch.try_pass() {
                Some(pass) => pass,
                None => self.unless_over(delivery, self.switch.pass()).await?,
            };
            // Closed when the consumer drains.
            let budget = match self.transaction_weight(event) {
                Some(weight) => {
                    let budget = self.transaction_budget.acquire_many(weight);
                    Some(self.unless_over(delivery, budget).await?.ok()?)
                }
                None => None,
            };
            let Waited { permit, granted, is_unknown } = match self.permits.try_acquire() {
                Ok(permit) => Waited { permit: Some(Permit::Own(permit)), granted: None, is_unknown: false },
                // A probe is to be the only one.
                Err(_) => self.permit(delivery, next.filter(|_| !pass.is_probe())).await,
            };
            // What is claimed goes on, or may be: where nothing is started any more, its claim is given back.
            if granted.is_none() && !is_unknown {
                if permit.is_none() || self.is_draining() || !delivery.session.is_live() {
                    return None;
                }
                // It may have opened while this one waited for its permit.
                if !pass.is_probe() && self.switch.is_open() {
                    continue;
                }
            }
            return Some(Place { pass, granted, permit, _budget: budget });
        }
    }

    /// Waits for a handler's permit. There are none when the consumer drains.
    fn permit<'d, 'a: 'd>(&'a self, delivery: &'d Delivery, next: Option<&ClaimRequest>) -> Rare<'d, Waited<'a>> {
        let waiting = self.standby.as_ref().map(|standby| standby.wait(next.copied()));
        Box::pin(async move {
            let Some(mut waiting) = waiting else {
                let permit = tokio::select! {
                    biased;
                    permit = self.permits.acquire() => permit.ok(),
                    () = delivery.session.not_live() => None,
                };
                return Waited { permit: permit.map(Permit::Own), granted: None, is_unknown: false };
            };
            let own = tokio::select! {
                biased;
                granted = waiting.granted() => return self.waited(None, granted),
                permit = self.permits.acquire() => permit.ok(),
                () = delivery.session.not_live() => None,
            };
            match waiting.end().await {
                Answer::Granted(granted) => self.waited(own, granted),
                Answer::NotAsked => Waited { permit: own.map(Permit::Own), granted: None, is_unknown: false },
                Answer::Unknown => Waited { permit: own.map(Permit::Own), granted: None, is_unknown: true },
            }
        })
    }

    /// A grant has the permit that came with it, or the life's own.
    fn waited<'a>(&'a self, own: Option<SemaphorePermit<'a>>, granted: Granted) -> Waited<'a> {
        let Granted { lease, asked, permit } = granted;
        let permit = permit.map(Permit::Passed).or(own.map(Permit::Own));
        Waited { permit, granted: Some(Box::new((lease, asked))), is_unknown: false }
    }

    /// On a store with one transaction at a time, claims wait for their turn with the lease running: as many are claimed
    /// as handlers will have run in a quarter of the lease, going by what they took lately.
    fn transaction_weight(&self, event: &Event) -> Option<u32> {
        if !self.transactions_block || !self.has_transaction_of_its_own(event) {
            return None;
        }
        let took_us = match self.transaction_us.load(Ordering::Relaxed) {
            0 => return Some(TRANSACTION_BUDGET),
            took_us => took_us,
        };
        let quarter_us = (self.settings.lease.as_micros() as u64 / 4).max(1);
        let weight = (took_us * u64::from(TRANSACTION_BUDGET)).div_ceil(quarter_us);
        Some(weight.clamp(1, u64::from(TRANSACTION_BUDGET)) as u32)
    }

    /// The turn to run a transaction, where the handler takes one; the store's connections are shared by all.
    pub(super) async fn transaction_turn(&self, event: &Event) -> Option<SemaphorePermit<'_>> {
        if self.has_transaction_of_its_own(event) { self.transactions.acquire().await.ok() } else { None }
    }

    /// Whether one transaction is for this event alone; a batch takes one for all.
    fn has_transaction_of_its_own(&self, event: &Event) -> bool {
        let info = &self.infos[event.route];
        info.transactional && !info.batched
    }

    /// Learns how long transactions take, for those that hold up every other write.
    pub(super) fn transaction_took(&self, event: &Event, took: Duration) {
        if !self.transactions_block || !self.has_transaction_of_its_own(event) {
            return;
        }
        let took_us = (took.as_micros() as u64).max(1);
        let before = self.transaction_us.load(Ordering::Relaxed);
        let next = if before == 0 { took_us } else { before - before / 8 + took_us / 8 };
        self.transaction_us.store(next.max(1), Ordering::Relaxed);
    }

    /// Waits for the turn of suspects; `None` when the delivery is to be given back instead.
    pub(super) fn turn_alone<'a>(&'a self, delivery: &'a Delivery) -> Rare<'a, Option<SemaphorePermit<'a>>> {
        Box::pin(async move {
            let _waits = Waits::new(&self.waiting);
            self.unless_over(delivery, self.alone.acquire()).await?.ok()
        })
    }

    /// Waits here; false when the delivery is to be given back instead.
    pub(super) fn wait<'a>(&'a self, wait: Duration, delivery: &'a Delivery) -> Rare<'a, bool> {
        Box::pin(async move {
            let _waits = Waits::new(&self.waiting);
            tokio::select! {
                biased;
                () = self.draining.cancelled() => false,
                () = delivery.session.not_live() => false,
                () = tokio::time::sleep(wait) => true,
            }
        })
    }

    /// Waits for it, unless nothing may be started any more: the consumer drains, or the session is taken away.
    fn unless_over<'a, T: 'a>(
        &'a self,
        delivery: &'a Delivery,
        what: impl Future<Output = T> + Send + 'a,
    ) -> Rare<'a, Option<T>> {
        Box::pin(async move {
            tokio::select! {
                biased;
                what = what => Some(what),
                () = self.draining.cancelled() => None,
                () = delivery.session.not_live() => None,
            }
        })
    }
}
