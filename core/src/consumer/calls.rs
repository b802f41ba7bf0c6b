//! The batched calls to store, broker and publisher: a deadline each, repeated until they are answered, halved when a
//! bad item is in them. Every call of the contracts can be repeated, so an unknown outcome is asked again.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio::time::{Instant, timeout, timeout_at};

use super::coalesce::{Batch, Coalescer};
use super::shared::Shared;
use crate::broker::{Receipt, Settlement};
use crate::error::{Error, ErrorKind, Result};
use crate::observer::{Observed, Side, Verb};
use crate::publisher::Outgoing;
use crate::store::{Claim, ClaimRequest, Lease, Outcome, Recorded};

/// Why a call has no answer.
#[derive(Debug)]
pub(super) enum GivenUp {
    /// This one item is refused for good.
    Refused(Box<str>),
    /// The consumer stopped before an answer came, the session ended, or nothing can go on.
    Stopped,
}

/// What a claim is answered, and when it was asked: the lease counts from there.
pub(super) type ClaimAnswer = std::result::Result<(Claim, Instant), GivenUp>;
pub(super) type ClaimCalls = Coalescer<ClaimRequest, ClaimAnswer>;
pub(super) type RecordCalls = Coalescer<(Lease, Outcome), std::result::Result<Recorded, GivenUp>>;
pub(super) type SettleCalls = Coalescer<(Receipt, Settlement), std::result::Result<(), GivenUp>>;
pub(super) type PublishCalls = Coalescer<Outgoing, std::result::Result<(), GivenUp>>;

/// A question to the store.
type Asked<'q, A> = Pin<Box<dyn Future<Output = Result<Vec<A>>> + Send + 'q>>;

/// A call under way.
pub(super) type Call = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The longest wait between two tries of a call to the store.
pub(super) const STORE_RETRY_MAX: Duration = Duration::from_secs(1);
/// The longest wait between two tries of a call to the broker.
const BROKER_RETRY_MAX: Duration = Duration::from_secs(2);

/// Waits between tries: from 50 ms, doubling.
pub(super) fn delays(longest: Duration) -> ExponentialBackoff {
    let delays = ExponentialBuilder::new().with_min_delay(Duration::from_millis(50)).with_max_delay(longest);
    delays.with_factor(2.0).without_max_times().build()
}

impl Shared {
    /// Launches each gathering batch whose predecessor has returned.
    pub(super) fn launch(self: &Arc<Self>, mut launched: impl FnMut(Call)) {
        if let Some(batch) = self.claims.launch() {
            let shared = Arc::clone(self);
            launched(Box::pin(async move { shared.claim_batch(batch).await }));
        }
        if let Some(batch) = self.records.launch() {
            let shared = Arc::clone(self);
            launched(Box::pin(async move { shared.record_batch(batch).await }));
        }
        if let Some(batch) = self.settles.launch() {
            let shared = Arc::clone(self);
            launched(Box::pin(async move { shared.settle_batch(batch).await }));
        }
        if let Some(batch) = self.publishes.launch() {
            let shared = Arc::clone(self);
            launched(Box::pin(async move { shared.publish_batch(batch).await }));
        }
    }

    async fn claim_batch(&self, batch: Batch<ClaimRequest, ClaimAnswer>) {
        fn claim<'q>(shared: &'q Shared, requests: &'q [ClaimRequest]) -> Asked<'q, Claim> {
            shared.store.claim(requests, shared.settings.lease)
        }
        self.ask_store(Verb::Claim, &self.claims, batch, claim, |claim, asked| (claim, asked)).await;
    }

    async fn record_batch(&self, batch: Batch<(Lease, Outcome), std::result::Result<Recorded, GivenUp>>) {
        fn record<'q>(shared: &'q Shared, records: &'q [(Lease, Outcome)]) -> Asked<'q, Recorded> {
            shared.store.record(records)
        }
        self.ask_store(Verb::Record, &self.records, batch, record, |recorded, _| recorded).await;
    }

    /// Asks the store until it answered every item, or the consumer gives up.
    async fn ask_store<Q, A, R>(
        &self,
        verb: Verb,
        coalescer: &Coalescer<Q, std::result::Result<R, GivenUp>>,
        batch: Batch<Q, std::result::Result<R, GivenUp>>,
        call: for<'q> fn(&'q Self, &'q [Q]) -> Asked<'q, A>,
        answer: fn(A, Instant) -> R,
    ) {
        let mut next = Some(0..batch.requests.len());
        let mut ranges = VecDeque::new();
        let mut waits = delays(STORE_RETRY_MAX);
        let mut aside = None;
        while let Some(range) = next.take().or_else(|| ranges.pop_back()) {
            let asked = Instant::now();
            let requests = &batch.requests[range.clone()];
            match self.in_time(verb, asked, requests.len(), call(self, requests)).await {
                Ok(answers) => {
                    self.store_is_up();
                    batch.answer(range.start, answers.into_iter().map(|a| Ok(answer(a, asked))));
                }
                // A bad item: halved until it stands alone, so that it stops nobody.
                Err(error) if error.kind() == ErrorKind::Rejected => match halves(range.clone()) {
                    Some(halves) => ranges.extend(halves),
                    None => batch.answer(range.start, [Err(GivenUp::Refused(error.to_string().into()))]),
                },
                Err(error) if error.is_retryable() => {
                    // From aside it tells nothing of the store: the others do.
                    if aside.is_none() {
                        self.store_is_down(&error);
                    }
                    // Behind the others: it may be this part alone that cannot be written.
                    ranges.push_front(range);
                    // Those that stand alone keep nobody back: their records may be locked by somebody's transaction.
                    if aside.is_none() && ranges.iter().all(|range| range.len() == 1) {
                        aside = coalescer.step_aside();
                        self.let_another_leave();
                    }
                    if !self.pause(&mut waits).await {
                        give_up(&batch, ranges.drain(..));
                    }
                }
                Err(error) => {
                    self.fail(error);
                    give_up(&batch, ranges.drain(..).chain([range]));
                }
            }
        }
        match aside {
            Some(aside) => coalescer.ended_aside(aside),
            None => coalescer.returned(),
        }
        coalescer.recycle(batch);
    }

    /// Settles until every item is answered or stale. A dead letter or a retry that cannot be placed is tried again: never
    /// acked, never dropped. The next batch waits for a broker that is out of reach, but not for what lacks its place.
    async fn settle_batch(&self, batch: Batch<(Receipt, Settlement), std::result::Result<(), GivenUp>>) {
        let has_place = |index: &usize| has_place_of_its_own(&batch.requests[*index].1);
        let all = 0..batch.requests.len();
        let mut next_waits = true;
        if all.clone().any(|index| has_place(&index)) {
            // Apart, and behind the others: a call that waits for a place would keep their answers back.
            let (placed, plain): (Vec<usize>, Vec<usize>) = all.partition(has_place);
            if !plain.is_empty() {
                self.settle_some(&batch, plain, &mut next_waits).await;
            }
            self.settle_some(&batch, placed, &mut next_waits).await;
        } else {
            self.settle_some(&batch, Vec::new(), &mut next_waits).await;
        }
        if next_waits {
            self.settles.returned();
        }
        self.settles.recycle(batch);
    }

    /// Settles these, or all where none is named.
    async fn settle_some(
        &self,
        batch: &Batch<(Receipt, Settlement), std::result::Result<(), GivenUp>>,
        mut open: Vec<usize>,
        next_waits: &mut bool,
    ) {
        let mut waits = delays(BROKER_RETRY_MAX);
        loop {
            let again: Vec<_>;
            let items = if open.is_empty() {
                &batch.requests
            } else {
                again = open.iter().map(|index| batch.requests[*index].clone()).collect();
                &again
            };
            let settle = async { Ok(self.broker.settle(items).await) };
            let results = match self.in_time(Verb::Settle, Instant::now(), items.len(), settle).await {
                Ok(results) => results,
                Err(error) => (0..items.len()).map(|_| Err(Error::new(error.kind(), "settle"))).collect(),
            };
            let (mut failed, mut out_of_reach) = (Vec::new(), false);
            for (item, result) in results.into_iter().enumerate() {
                let index = open.get(item).copied().unwrap_or(item);
                match result {
                    Ok(()) => batch.answer(index, [Ok(())]),
                    Err(error) if error.kind() == ErrorKind::Stale => batch.answer(index, [Err(GivenUp::Stopped)]),
                    Err(error) => {
                        if is_of_broker(&error, &batch.requests[index].1) {
                            out_of_reach = true;
                            self.broker_is_down(&error);
                        } else {
                            self.settlement_failed(&error);
                        }
                        failed.push(index);
                    }
                }
            }
            if !out_of_reach && failed.len() < items.len() {
                self.broker_is_up();
            }
            open = failed;
            if open.is_empty() {
                return;
            }
            if *next_waits && !out_of_reach {
                *next_waits = false;
                self.settles.returned();
                self.let_another_leave();
            }
            if !self.pause(&mut waits).await {
                return open.drain(..).for_each(|index| batch.answer(index, [Err(GivenUp::Stopped)]));
            }
        }
    }

    /// The next batch of this kind may leave, though this one goes on: the engine looks for it when it has polled the calls.
    fn let_another_leave(&self) {
        self.another_may_leave.store(true, Ordering::Relaxed);
    }

    pub(super) fn may_another_leave(&self) -> bool {
        self.another_may_leave.swap(false, Ordering::Relaxed)
    }

    fn settlement_failed(&self, error: &Error) {
        let error = self.error_text(&error.to_string());
        tracing::warn!(consumer = &*self.name, %error, "a settlement failed; it is tried again and keeps its delivery");
    }

    /// Publishes until every item is answered or refused. The next batch waits for the first answer, but not for an item
    /// whose place is out of reach.
    async fn publish_batch(&self, batch: Batch<Outgoing, std::result::Result<(), GivenUp>>) {
        let Some(publisher) = &self.publisher else { return self.publishes.returned() };
        let mut waits = delays(BROKER_RETRY_MAX);
        let mut open: Vec<usize> = (0..batch.requests.len()).collect();
        let mut next_waits = true;
        while !open.is_empty() {
            let items: Vec<_> = open.iter().map(|index| batch.requests[*index].clone()).collect();
            let count = items.len();
            let publish = async { Ok(publisher.publish(items).await) };
            let results = match self.in_time(Verb::Publish, Instant::now(), count, publish).await {
                Ok(results) => results,
                Err(error) => (0..count).map(|_| Err(Error::new(error.kind(), "publish"))).collect(),
            };
            let (mut failed, mut last) = (Vec::new(), None);
            for (index, result) in open.into_iter().zip(results) {
                match result {
                    Ok(()) => batch.answer(index, [Ok(())]),
                    Err(error) if error.is_retryable() => {
                        last = Some(error);
                        failed.push(index);
                    }
                    Err(error) => batch.answer(index, [Err(GivenUp::Refused(error.to_string().into()))]),
                }
            }
            // One that was taken or refused was answered.
            self.publisher_answered(last.filter(|_| failed.len() == count));
            open = failed;
            if std::mem::take(&mut next_waits) {
                self.publishes.returned();
                self.let_another_leave();
            }
            if !open.is_empty() && !self.pause(&mut waits).await {
                open.drain(..).for_each(|index| batch.answer(index, [Err(GivenUp::Stopped)]));
            }
        }
    }

    /// Tells when the publisher goes out of reach and when it is back, each once.
    fn publisher_answered(&self, error: Option<Error>) {
        let up = error.is_none();
        if self.is_publisher_up.swap(up, Ordering::SeqCst) != up {
            let error = error.map(|error| self.error_text(&error.to_string())).unwrap_or_default();
            self.observe(&Observed::Reach { side: Side::Publisher, up, error: &error });
        }
    }

    /// Renews leases once; what could not be asked is asked at the next tick, until the lease is over.
    pub(super) async fn renew(&self, due: Vec<(usize, Lease)>) {
        let leases: Vec<_> = due.iter().map(|(_, lease)| *lease).collect();
        let mut ranges = std::iter::once(0..due.len()).collect::<Vec<_>>();
        while let Some(range) = ranges.pop() {
            let sent = Instant::now();
            let renew = self.store.renew(&leases[range.clone()], self.settings.lease);
            match self.in_time(Verb::Renew, sent, range.len(), renew).await {
                Ok(answers) => {
                    self.store_is_up();
                    let lost = self.keepalive.renewed(&due[range], &answers, sent);
                    self.leases_lost(lost);
                }
                // A bad item costs the others nothing; alone it is lost when its time is over.
                Err(error) if error.kind() == ErrorKind::Rejected => {
                    ranges.extend(halves(range).into_iter().flatten());
                }
                Err(error) if error.is_retryable() => return self.store_is_down(&error),
                Err(error) => return self.fail(error),
            }
        }
    }

    /// Asks an idle store whether it is back.
    pub(super) async fn probe(&self) {
        match timeout(self.settings.call_timeout, self.store.probe()).await {
            Ok(Ok(health)) => {
                if let Some(trouble) = health.trouble {
                    tracing::error!(consumer = &*self.name, %trouble, "the store answers, but is in trouble");
                }
                self.store_is_up();
            }
            Ok(Err(error)) if !error.is_retryable() => self.fail(error),
            Ok(Err(error)) => self.store_is_down(&error),
            Err(_) => {}
        }
    }

    /// A call that is asked now, with its deadline and one answer for each item. Dropping it means that its outcome is unknown.
    async fn in_time<A>(
        &self,
        verb: Verb,
        asked: Instant,
        items: usize,
        call: impl Future<Output = Result<Vec<A>>>,
    ) -> Result<Vec<A>> {
        let result = match timeout_at(asked + self.settings.call_timeout, call).await {
            Ok(Ok(answers)) if answers.len() != items => {
                let why = format!("{} answers to {items} items", answers.len());
                Err(Error::new(ErrorKind::Internal, name(verb)).because(why))
            }
            Ok(result) => result,
            Err(_) => {
                let why = format!("no answer within call_timeout = {:?}", self.settings.call_timeout);
                Err(Error::new(ErrorKind::Unknown, name(verb)).because(why))
            }
        };
        self.observe(&Observed::Called { verb, batch: items, took: asked.elapsed(), ok: result.is_ok() });
        result
    }

    /// Waits before the next try; false when the consumer gives up.
    async fn pause(&self, waits: &mut ExponentialBackoff) -> bool {
        let wait = waits.next().unwrap_or(BROKER_RETRY_MAX).mul_f32(1.0 + 0.25 * self.chance());
        tokio::select! {
            biased;
            () = self.given_up.cancelled() => false,
            () = tokio::time::sleep(wait) => true,
        }
    }
}

/// Whether a settlement failed because the broker is out of reach, and not because of this one item.
fn is_of_broker(error: &Error, settlement: &Settlement) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Unknown) && !has_place_of_its_own(settlement)
}

/// Whether it goes to a place of its own, which can be missing, full, or without a leader.
fn has_place_of_its_own(settlement: &Settlement) -> bool {
    matches!(settlement, Settlement::DeadLetter(_) | Settlement::Retry { .. })
}

fn halves(range: Range<usize>) -> Option<[Range<usize>; 2]> {
    let middle = range.start + range.len() / 2;
    (range.len() > 1).then_some([middle..range.end, range.start..middle])
}

fn give_up<Q, R>(batch: &Batch<Q, std::result::Result<R, GivenUp>>, ranges: impl IntoIterator<Item = Range<usize>>) {
    for range in ranges {
        batch.answer(range.start, range.clone().map(|_| Err(GivenUp::Stopped)));
    }
}

fn name(verb: Verb) -> &'static str {
    match verb {
        Verb::Claim => "claim",
        Verb::Renew => "renew",
        Verb::Record => "record",
        Verb::Settle => "settle",
        Verb::Publish => "publish",
    }
}
