//! ONE DELIVERY'S LIFE: read this file first.
//!
//! [`life`] is the whole of it, from the delivery's arrival to its settlement, downward in order. The order inside each
//! arm is the design: what is recorded before what is settled decides what a crash between the two can do. The
//! decisions are in `verdict.rs`, the batched calls in `calls.rs`; what drives many lives at once is `engine.rs`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::calls::{self, GivenUp};
use super::keepalive::Held;
use super::reading::{Event, Read};
use super::shared::Shared;
use super::steps::{End, Rare, text_of};
use super::verdict::{self, Answer, Delay, Verdict};
use super::waiting::{CROWDED, Place, Suspect, Turned};
use crate::broker::{Delivery, Settlement};
use crate::dead_letter::Reason;
use crate::error::ErrorKind;
use crate::event::Ended;
use crate::handler::{Failure, FailureKind};
use crate::observer::{Duplicate, Observed};
use crate::run::{Run, Stop};
use crate::store::{Claim, History, Lease, Outcome, Recorded, Trouble};

/// What a life does next.
enum Step<'a> {
    /// Settle, and that was it.
    Settle(Settlement),
    /// Claim again at once: what we held is not ours any more, or is due.
    ClaimAgain,
    /// Claim again with the same token: whether our last write took place is unknown, and the answer tells.
    AskAgain,
    /// Wait here, unsettled and without a permit, then claim again.
    Wait(Duration),
    /// Wait until no other suspect runs, then claim again.
    WaitAlone,
    /// Set it aside: doom it, place the dead letter, record that.
    Bury(Held<'a>, Box<Burial>),
    /// Nothing: it is settled, or its session ends and the broker delivers it again.
    Over,
}

/// One delivery, from arrival to settlement.
pub(super) async fn life(p: Arc<Shared>, delivery: Delivery) {
    // Decided by the message alone, before anything is claimed: no store round trip.
    let mut event = match p.read(&delivery) {
        Read::Event(event) => event,
        Read::Ignored => {
            p.view.counters.ignored.one();
            p.observe(&Observed::Ignored);
            return p.settle(&delivery, Settlement::Ack).await.unwrap_or_default();
        }
        Read::Unfit(reason, error) => return p.set_aside_unrecorded(&delivery, reason, &error).await,
    };
    // Copies of one event in this process take turns: the second finds the first's record.
    let _turn = match p.turn(event.key, &delivery).await {
        Turned::Yours(turn) => turn,
        Turned::Crowded(after) => return p.settle(&delivery, Settlement::Retry { after }).await.unwrap_or_default(),
        Turned::Over => return p.give_back(&delivery).await,
    };
    let mut request = p.request(&event, &delivery);
    let mut polls = Polls::default();
    let mut alone = None;
    // Only what has no record can be claimed by another's commit.
    let mut unseen = request.reopen.is_none();
    loop {
        // Waits come before the claim, so that no claim waits: only what can run is claimed.
        let mut place = p.admit(&delivery, &event, unseen.then_some(&request)).await;
        unseen = false;
        let Some(admitted) = &mut place else { return p.give_back(&delivery).await };
        let claimed = match admitted.granted.take() {
            Some(granted) => Ok((Claim::Granted(granted.0, None), granted.1)),
            None => p.claims.call(request).await,
        };
        let mut step = match claimed {
            Ok((claim, sent)) => match verdict::after_claim(claim, p.retry(&event).attempts(), &p.bounds) {
                Answer::Run(lease, history) => {
                    let grant = Grant { lease, history, sent, place: place.take() };
                    if event.crashes_seen < grant.crashes() {
                        event.crashes_seen = grant.crashes();
                        p.observe(&Observed::TakenOver);
                    }
                    if verdict::is_suspect(grant.crashes(), &p.bounds) {
                        p.run_alone(&delivery, &mut event, grant, &mut alone).await
                    } else {
                        p.run(&delivery, &mut event, grant).await
                    }
                }
                Answer::Doom { lease, reason, recorded, history } => {
                    let held = p.keepalive.hold(lease, sent, Instant::now(), waker().await);
                    if held.is_lost() {
                        Step::ClaimAgain
                    } else {
                        Step::Bury(held, Box::new(Burial::at_claim(lease, reason, recorded, history)))
                    }
                }
                Answer::Duplicate { dead, ago } => p.ended_before(&mut event, dead, ago),
                Answer::Conflict => {
                    p.view.counters.conflicts.one();
                    p.observe(&Observed::Conflict);
                    drop(place);
                    let error = "the id is known with other data: publish it under a new id";
                    return p.set_aside_unrecorded(&delivery, Reason::Conflict, error).await;
                }
                Answer::Held(wait) => p.held_elsewhere(wait, &mut polls),
                Answer::NotYet(wait) => p.not_due(wait),
            },
            Err(GivenUp::Refused(why)) => {
                drop(place);
                return p.set_aside_unrecorded(&delivery, Reason::Refused, &why).await;
            }
            Err(GivenUp::Stopped) => Step::Over,
        };
        // Free for others before this one settles or waits: a dead letter that cannot be placed holds up nobody.
        drop(place);
        if let Step::Bury(held, burial) = step {
            alone = None;
            step = p.bury(&delivery, held, *burial).await;
        }
        match step {
            Step::Settle(settlement) => return p.settle(&delivery, settlement).await.unwrap_or_default(),
            Step::Bury(..) | Step::Over => return,
            Step::AskAgain => continue,
            Step::ClaimAgain => {}
            Step::Wait(wait) => {
                alone = None;
                if !p.wait(wait, &delivery).await {
                    return p.give_back(&delivery).await;
                }
            }
            Step::WaitAlone => match p.turn_alone(&delivery).await {
                Some(turn) => alone = Some(turn),
                None => return p.give_back(&delivery).await,
            },
        }
        request = p.request(&event, &delivery);
    }
}

impl Shared {
    /// An event during which processes died before: one after the other, so that innocents beside a killer do not
    /// reach the crash limit with it. Who has not the turn gives its claim back and waits unclaimed.
    fn run_alone<'r, 'a: 'r>(
        &'a self,
        delivery: &'r Delivery,
        event: &'r mut Event,
        grant: Grant<'a>,
        alone: &'r mut Option<tokio::sync::SemaphorePermit<'a>>,
    ) -> Rare<'r, Step<'a>> {
        Box::pin(async move {
            let suspect = Suspect::claimed(self);
            if alone.is_none() {
                *alone = self.alone.try_acquire().ok();
            }
            if alone.is_none() {
                let outcome = Outcome::Failed { after: Duration::ZERO, counted: false, trouble: grant.trouble() };
                return match self.record(grant.lease, outcome).await {
                    Ok(_) => Step::WaitAlone,
                    Err(given_up) => self.unrecorded(given_up),
                };
            }
            // The others' claims are given back first: a crash of this process must not count for them.
            others_first().await;
            suspect.is_the_only_one().await;
            self.run(delivery, event, grant).await
        })
    }

    /// A granted claim: handler, record, and what is to be settled.
    async fn run<'a>(&'a self, delivery: &Delivery, event: &mut Event, mut grant: Grant<'_>) -> Step<'a> {
        let lease = grant.lease;
        if let Some(trouble) = event.uncommitted(lease) {
            let after = self.retry(event).delay(lease.attempt, "", self.chance());
            return self.failed_for(delivery, lease, trouble, after, true).await;
        }
        let now = Instant::now();
        let held = self.keepalive.hold(lease, grant.sent, now, waker().await);
        let _transaction = self.transaction_turn(event).await;
        if held.is_lost() {
            return Step::ClaimAgain;
        }
        if self.is_draining() || !delivery.session.is_live() {
            return self.give_back_claim(&grant).await;
        }
        // An event during which processes died is no company for others.
        let mut tries = if verdict::is_suspect(grant.crashes(), &self.bounds) { 2 } else { 0 };
        let (run, end) = loop {
            let ready = match event.take_ready(self, delivery) {
                Ok(ready) => ready,
                Err(failure) => return self.failed(delivery, event, held, &grant, &failure).await,
            };
            let run = Arc::new(self.begin(delivery, event, &grant, now).alone(tries > 1));
            held.watch(&run);
            match self.handle(event, ready, &run).await {
                // Its batch came to nothing: again at once, under the same claim. Alone at the third try at the latest.
                End::Handler(Ended::Apart(apart)) if !self.is_draining() => tries += if apart.alone { 2 } else { 1 },
                End::Handler(Ended::Apart(_)) => return self.give_back_claim(&grant).await,
                end => break (run, end),
            }
        };
        self.report(grant.place.as_ref(), &end);
        if run.has_passed_permit()
            && let Some(place) = &mut grant.place
        {
            place.pass_permit();
        }
        match end {
            End::Handler(Ended::Effect) => {
                // What the handler published goes out before the record says processed: sent twice it is a duplicate
                // under the same id, recorded first it could be lost.
                if let Err(failure) = self.publish(&run).await {
                    return self.failed(delivery, event, held, &grant, &failure).await;
                }
                held.ending();
                match self.record(lease, Outcome::Processed).await {
                    Ok(answer) => self.after_record(answer),
                    Err(given_up) => self.unrecorded(given_up),
                }
            }
            // Effect and mark were committed together, or rolled back together.
            End::Handler(Ended::Recorded(answer)) => self.after_record(answer),
            // The commit's answer was lost: a claim with the same token tells. Granted again, nothing was committed:
            // that attempt failed, and with its end recorded a commit that is still on its way is fenced off.
            End::Handler(Ended::Unknown(error)) => {
                self.store_is_down(&error);
                event.unknown = Some((lease, self.trouble(delivery, &error.to_string())));
                Step::AskAgain
            }
            End::Handler(Ended::Failed(failure)) => {
                if run.is_shutdown_announced() && matches!(failure.kind(), FailureKind::Retryable { .. }) {
                    return self.give_back_claim(&grant).await;
                }
                self.failed(delivery, event, held, &grant, &failure).await
            }
            End::Handler(Ended::StoreFailed(error)) if !error.is_retryable() && error.kind() != ErrorKind::Rejected => {
                self.fail(error);
                Step::Over
            }
            // Told apart above.
            End::Handler(Ended::Apart(_)) => self.give_back_claim(&grant).await,
            End::Handler(Ended::StoreFailed(error)) => {
                self.store_is_down(&error);
                let trouble = self.trouble(delivery, &error.to_string());
                self.failed_for(delivery, lease, trouble, calls::STORE_RETRY_MAX, false).await
            }
            End::Panicked(what) => {
                let failure = Failure::retryable("panicked").with_source(what);
                self.failed(delivery, event, held, &grant, &failure).await
            }
            End::Stopped(Stop::Timeout) => {
                self.failed(delivery, event, held, &grant, &Failure::retryable("timed out")).await
            }
            End::Stopped(Stop::LeaseLost) => Step::ClaimAgain,
            End::Stopped(Stop::Shutdown) => self.give_back_claim(&grant).await,
        }
    }

    /// The event had ended before this claim: a duplicate, unless it is our own commit whose answer was lost.
    fn ended_before(&self, event: &mut Event, dead: bool, ago: Duration) -> Step<'static> {
        if event.unknown.take().is_some() && !dead {
            return self.after_record(Recorded::AlreadyDone);
        }
        let of = if dead { Duplicate::DeadLettered } else { Duplicate::Processed };
        self.view.counters.duplicates.one();
        self.observe(&Observed::Duplicate { of, ago: Some(ago) });
        Step::Settle(Settlement::Ack)
    }

    /// A fenced holder does not drop its delivery, since nothing would bring it back: it claims again, as if the event
    /// were held by another, which it is.
    fn after_record(&self, answer: Recorded) -> Step<'static> {
        match answer {
            Recorded::Done | Recorded::AlreadyDone => {}
            Recorded::Vanished => self.observe(&Observed::Vanished),
            Recorded::Fenced => return self.fenced(),
        }
        self.view.counters.processed.one();
        Step::Settle(Settlement::Ack)
    }

    /// A failure: either recorded for another attempt, or doomed.
    fn failed<'r, 'a: 'r>(
        &'a self,
        delivery: &'r Delivery,
        event: &'r Event,
        held: Held<'a>,
        grant: &'r Grant<'_>,
        failure: &'r Failure,
    ) -> Rare<'r, Step<'a>> {
        Box::pin(async move {
            let (lease, elapsed) = (grant.lease, grant.elapsed());
            let trouble = self.trouble(delivery, &text_of(failure));
            match verdict::after_failure(
                failure,
                lease.attempt,
                elapsed,
                self.retry(event),
                &self.bounds,
                self.chance(),
            ) {
                Verdict::Again { after, counted } => {
                    held.ending();
                    self.failed_for(delivery, lease, trouble, after, counted).await
                }
                Verdict::Doom(reason) => {
                    let burial =
                        Burial { lease, reason, trouble, recorded: false, attempts: lease.attempt, first: elapsed };
                    Step::Bury(held, Box::new(burial))
                }
            }
        })
    }

    /// record Failed, then wait here or at the broker.
    fn failed_for<'a>(
        &'a self,
        delivery: &'a Delivery,
        lease: Lease,
        trouble: Trouble,
        after: Duration,
        counted: bool,
    ) -> Rare<'a, Step<'static>> {
        Box::pin(async move {
            match self.record(lease, Outcome::Failed { after, counted, trouble }).await {
                Ok(Recorded::Fenced) => return self.fenced(),
                Ok(Recorded::Vanished) => self.observe(&Observed::Vanished),
                Ok(Recorded::Done | Recorded::AlreadyDone) => {}
                Err(given_up) => return self.unrecorded(given_up),
            }
            self.view.counters.retried.one();
            self.observe(&Observed::Retried { after, counted });
            if self.is_draining() || !delivery.session.is_live() {
                return self.released(counted);
            }
            self.not_due(after)
        })
    }

    /// record Doomed -> settle DeadLetter -> record DeadLettered. In this order: a dead letter that was placed before
    /// any mark would let the handler start again behind it. Doomed keeps the lease, which is held until the end, so that
    /// copies wait; lost, another may place it too: a second copy of a dead letter, never a lost one.
    fn bury<'a>(&'a self, delivery: &'a Delivery, held: Held<'a>, burial: Burial) -> Rare<'a, Step<'static>> {
        Box::pin(async move {
            // Renewed until the dead letter is recorded.
            let _held = held;
            let Burial { lease, reason, trouble, recorded, attempts, first } = burial;
            let dead_letter = self.dead_letter(delivery, reason, &trouble.error, attempts, first, Some(lease.fence));
            if !recorded {
                match self.record(lease, Outcome::Doomed { reason, trouble: trouble.clone() }).await {
                    Ok(Recorded::Fenced) => return self.fenced(),
                    Ok(Recorded::Vanished) => self.observe(&Observed::Vanished),
                    Ok(Recorded::Done | Recorded::AlreadyDone) => {}
                    Err(given_up) => return self.unrecorded(given_up),
                }
            }
            if self.settle(delivery, Settlement::DeadLetter(Box::new(dead_letter))).await.is_err() {
                return Step::Over;
            }
            self.view.counters.dead_lettered.one();
            self.observe(&Observed::DeadLettered { reason, id: &trouble.id, error: &trouble.error });
            if let Ok(Recorded::Fenced) = self.record(lease, Outcome::DeadLettered).await {
                self.view.counters.fenced.one();
                self.observe(&Observed::Fenced);
            }
            Step::Over
        })
    }

    /// Ends a claim that was not run, or was stopped by us: the attempt is given back, and so is the delivery.
    fn give_back_claim<'a>(&'a self, grant: &'a Grant<'a>) -> Rare<'a, Step<'static>> {
        Box::pin(async move {
            let outcome = Outcome::Failed { after: Duration::ZERO, counted: false, trouble: grant.trouble() };
            match self.record(grant.lease, outcome).await {
                Ok(Recorded::Fenced) => self.fenced(),
                Ok(_) => self.released(false),
                Err(given_up) => self.unrecorded(given_up),
            }
        })
    }

    /// An outcome that could not be written. Nothing is settled: refused by the store for good, the event is asked for
    /// again when its lease is over, and ends by its crash limit if it stays refused.
    fn unrecorded(&self, given_up: GivenUp) -> Step<'static> {
        match given_up {
            GivenUp::Stopped => Step::Over,
            GivenUp::Refused(error) => {
                tracing::error!(consumer = &*self.name, %error, "the store refuses an outcome; trying again");
                Step::Wait(self.settings.lease)
            }
        }
    }

    fn released(&self, counted: bool) -> Step<'static> {
        self.view.counters.released.one();
        Step::Settle(Settlement::Release { counted })
    }

    fn fenced(&self) -> Step<'static> {
        self.view.counters.fenced.one();
        self.observe(&Observed::Fenced);
        Step::ClaimAgain
    }

    /// Another process holds the event and may be done at any time, long before its lease is over: it is asked for again
    /// soon. Told once a delivery, however often it asks.
    fn held_elsewhere(&self, wait: Duration, polls: &mut Polls) -> Step<'static> {
        let is_first = polls.0 == 0;
        let poll = polls.next(wait);
        if is_first {
            self.observe(&Observed::Duplicate { of: Duplicate::Held, ago: None });
        }
        match verdict::delay(wait.min(CROWDED), self.is_crowded(), &self.bounds) {
            Delay::AtBroker(after) => Step::Settle(Settlement::Retry { after }),
            Delay::Here(_) => {
                if is_first {
                    self.observe(&Observed::Waiting { wait });
                }
                Step::Wait(poll)
            }
        }
    }

    /// Waits here, unless the wait is long or too many wait already: then the broker keeps it.
    fn not_due(&self, wait: Duration) -> Step<'static> {
        match verdict::delay(wait, self.is_crowded(), &self.bounds) {
            Delay::AtBroker(after) => Step::Settle(Settlement::Retry { after }),
            Delay::Here(_) => {
                self.observe(&Observed::Waiting { wait });
                Step::Wait(wait)
            }
        }
    }

    fn begin(&self, delivery: &Delivery, event: &Event, grant: &Grant<'_>, now: Instant) -> Run {
        let (name, message) = (Arc::clone(&self.name), Arc::clone(&delivery.message));
        let run = Run::new(name, message, grant.lease, grant.crashes(), self.timeout(event));
        // In a transaction its time counts from when the transaction has begun, in a batch from when that begins.
        let info = &self.infos[event.route];
        if !info.transactional && !info.batched {
            run.begin(now);
        }
        let may_pass = grant.place.as_ref().is_some_and(Place::has_permit);
        run.before(self.standby.clone().filter(|_| may_pass))
    }

    /// How many deliveries wait, for the share of in_flight that they may fill.
    pub(super) fn is_crowded(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) >= self.in_flight_max / 2
    }
}

/// A granted claim.
struct Grant<'a> {
    lease: Lease,
    history: Option<Box<History>>,
    /// When the claim was asked for: the lease counts from there.
    sent: Instant,
    place: Option<Place<'a>>,
}

impl Grant<'_> {
    fn crashes(&self) -> u32 {
        self.history.as_ref().map_or(0, |history| history.crashes)
    }

    /// Since the first claim of this event.
    fn elapsed(&self) -> Duration {
        self.history.as_ref().map_or(Duration::ZERO, |history| history.first) + self.sent.elapsed()
    }

    /// The trouble that the record holds already.
    fn trouble(&self) -> Trouble {
        self.history.as_ref().map(|history| history.trouble.clone()).unwrap_or_default()
    }
}

/// What is needed to set an event aside.
struct Burial {
    lease: Lease,
    reason: Reason,
    trouble: Trouble,
    /// Whether the record says doomed already.
    recorded: bool,
    /// How often the handler was started.
    attempts: u32,
    /// How long ago the first attempt was.
    first: Duration,
}

impl Burial {
    fn at_claim(lease: Lease, reason: Reason, recorded: bool, history: Option<Box<History>>) -> Self {
        let (first, trouble) = history.map(|history| (history.first, history.trouble)).unwrap_or_default();
        // This claim counted an attempt that is not run; a doomed record had stopped counting.
        let attempts = if recorded { lease.attempt } else { lease.attempt.saturating_sub(1) };
        Self { lease, reason, trouble, recorded, attempts, first }
    }
}

/// How often to ask for an event that another process holds: from 50 ms, doubling to 1 s.
#[derive(Default)]
struct Polls(u32);

impl Polls {
    fn next(&mut self, wait: Duration) -> Duration {
        let poll = Duration::from_millis(50) * 2u32.pow(self.0.min(5));
        self.0 += 1;
        poll.min(Duration::from_secs(1)).min(wait.max(Duration::from_millis(1)))
    }
}

/// Lets the lives that were woken with this one go first: those whose claims came with its own show themselves.
async fn others_first() {
    let mut gave_way = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut gave_way, true) {
            return std::task::Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}

/// The waker of the life that asks.
async fn waker() -> std::task::Waker {
    std::future::poll_fn(|cx| std::task::Poll::Ready(cx.waker().clone())).await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It is moved into its slot, once an event.
    #[test]
    fn a_life_is_small() {
        fn size<F>(_: impl Fn(Arc<Shared>, Delivery) -> F) -> usize {
            size_of::<F>()
        }
        assert!(size(life) <= 2_048, "{} bytes", size(life));
    }
}
