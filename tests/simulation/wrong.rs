//! Deliberately wrong back ends: a simulation in which none of them breaks an invariant proves nothing. The same back
//! ends without their fault pass.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use hapax::record::{self, Moment, Record, State};
use hapax::{
    Broker, Capabilities, Claim, ClaimRequest, ConsumerId, Delivery, Durability, EventKey, Lease, Limits, Outcome,
    ProcessedStore, Receipt, Recorded, Renewal, Result, Settlement, StoreHealth, Want,
};
use hapax_memory::MemoryBroker;
use hapax_testkit::simulation::{BackEnds, START, simulate_on};
use tokio::time::Instant;

/// The fault that is built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// Records whoever asks.
    UnfencedRecord,
    /// Renews whoever asks.
    RenewsAnyFence,
    /// Takes every lease for ended.
    GrantsHeld,
    /// Fences do not grow.
    OneFence,
    /// Drops the record of what is processed.
    ForgetsProcessed,
    /// Drops the record of what is dead-lettered.
    ForgetsDeadLetters,
    /// What is doomed runs like any other.
    HidesDoom,
    /// Counts to two.
    ForgetsAttempts,
    /// A takeover is no crash.
    ForgetsCrashes,
    /// A delay is over at once.
    IgnoresDelay,
    /// Compares no data.
    IgnoresConflict,
    /// Says processed where another holds it.
    HeldIsProcessed,
    /// An ack does not reach the broker.
    LosesAcks,
    /// Acks what a worker has when it dies.
    LosesOnDeath,
    /// A release is an ack.
    LosesReleases,
    /// A dead letter is an ack.
    LosesDeadLetters,
    /// Dead letters lose their data.
    SpoilsDeadLetters,
    /// Delivers the later first.
    TurnsOrder,
}

/// Each with an invariant that some seed finds broken.
const WRONG: &[(Wrong, &str)] = &[
    (Wrong::UnfencedRecord, "fenced_write_rejected"),
    (Wrong::RenewsAnyFence, "fenced_write_rejected"),
    (Wrong::GrantsHeld, "one_live_lease"),
    (Wrong::OneFence, "fence_monotonic"),
    (Wrong::ForgetsProcessed, "no_start_after_terminal"),
    (Wrong::ForgetsProcessed, "explained_duplicate"),
    (Wrong::ForgetsProcessed, "effect_once_tx"),
    (Wrong::ForgetsDeadLetters, "terminal_exclusive"),
    (Wrong::HidesDoom, "attempts_bounded"),
    (Wrong::ForgetsAttempts, "attempts_survive"),
    (Wrong::ForgetsAttempts, "attempts_bounded"),
    (Wrong::ForgetsCrashes, "attempts_bounded"),
    (Wrong::IgnoresDelay, "retry_not_early"),
    (Wrong::IgnoresConflict, "conflict_never_runs"),
    (Wrong::HeldIsProcessed, "terminal_exclusive"),
    (Wrong::LosesAcks, "quiesce"),
    (Wrong::LosesOnDeath, "no_loss"),
    (Wrong::LosesReleases, "retry_not_lost"),
    (Wrong::LosesDeadLetters, "dead_letter_complete"),
    (Wrong::SpoilsDeadLetters, "dead_letter_complete"),
    (Wrong::TurnsOrder, "key_order"),
];

/// Enough for each.
const SEEDS_MAX: u64 = 400;

fn finds(wrong: Wrong, invariant: &str) -> bool {
    (0..SEEDS_MAX).any(|seed| {
        let report = simulate_on(seed, || Back::with(wrong));
        report.violations.iter().any(|violation| violation.invariant == invariant)
    })
}

#[test]
fn some_seed_finds_each_wrong_back_end() {
    let missed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let (even, odd): (Vec<_>, Vec<_>) = WRONG.iter().enumerate().partition(|(n, _)| n % 2 == 0);
        for half in [even, odd] {
            scope.spawn(|| {
                for (_, (wrong, invariant)) in half {
                    if !finds(*wrong, invariant) {
                        missed.lock().expect("nobody panics while holding it").push((*wrong, *invariant));
                    }
                }
            });
        }
    });
    let missed = missed.into_inner().expect("nobody panics while holding it");
    assert!(missed.is_empty(), "no seed below {SEEDS_MAX} finds {missed:?}");
}

#[test]
fn the_same_back_ends_without_a_fault_pass() {
    for seed in 0..60 {
        let report = simulate_on(seed, || Back::with(Wrong::Nothing));
        assert!(report.is_clean(), "{report}");
    }
}

struct Back(Store);

impl Back {
    fn with(wrong: Wrong) -> Self {
        Self(Store { wrong, begun: Instant::now(), table: Arc::default() })
    }
}

impl BackEnds for Back {
    fn store(&self) -> Arc<dyn ProcessedStore> {
        Arc::new(self.0.clone())
    }

    fn step_clock(&self, micros: i64) {
        self.0.table().step_micros += micros;
    }

    fn broker(&self, consumer: Arc<MemoryBroker>) -> Arc<dyn Broker> {
        Arc::new(WrongBroker { wrong: self.0.wrong, inner: consumer, held: Mutex::default() })
    }
}

#[derive(Clone)]
struct Store {
    wrong: Wrong,
    begun: Instant,
    table: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    step_micros: i64,
    consumers: Vec<String>,
    slots: BTreeMap<EventKey, Option<Record>>,
}

impl Store {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("nobody panics while holding the table")
    }

    /// The record's place and the time.
    fn with<A>(&self, key: EventKey, act: impl FnOnce(&mut Option<Record>, Moment) -> A) -> A {
        let mut table = self.table();
        let now = START.after(self.begun.elapsed()).0.saturating_add_signed(table.step_micros);
        act(table.slots.entry(key).or_default(), Moment(now))
    }

    fn claim_one(&self, request: &ClaimRequest, lease: Duration) -> Claim {
        let mut request = *request;
        self.with(request.key, |slot, now| {
            if let Some(record) = slot {
                match (self.wrong, &mut record.state) {
                    (Wrong::GrantsHeld, State::Claimed { until }) => *until = now,
                    (Wrong::HidesDoom, State::Doomed { until, .. }) => record.state = State::Claimed { until: *until },
                    (Wrong::IgnoresConflict, _) => request.fingerprint = record.fingerprint,
                    _ => {}
                }
            }
            let before = slot.as_ref().map(|record| record.fence);
            let mut claim = record::claim(slot, &request, lease, now);
            match (&mut claim, slot) {
                (Claim::Granted(lease, history), Some(record)) => match (self.wrong, before, history) {
                    (Wrong::OneFence, Some(before), _) => (record.fence, lease.fence) = (before, before),
                    (Wrong::ForgetsAttempts, Some(_), Some(history))
                        if history.doomed.is_none() && lease.attempt > 2 =>
                    {
                        (record.attempt, lease.attempt) = (1, 1);
                    }
                    (Wrong::ForgetsCrashes, _, Some(history)) if history.doomed.is_none() && record.crashes > 0 => {
                        (record.crashes, history.crashes) = (0, 0);
                        record.attempt = record.attempt.saturating_sub(1).max(1);
                        lease.attempt = record.attempt;
                    }
                    _ => {}
                },
                (Claim::Held { .. }, _) if self.wrong == Wrong::HeldIsProcessed => {
                    return Claim::Processed { ago: Duration::ZERO };
                }
                _ => {}
            }
            claim
        })
    }

    fn record_one(&self, lease: &Lease, outcome: &Outcome) -> Recorded {
        let (mut lease, mut outcome) = (*lease, outcome.clone());
        self.with(lease.key, |slot, now| {
            match (self.wrong, &slot, &mut outcome) {
                (Wrong::UnfencedRecord, Some(record), _) => lease.fence = record.fence,
                (Wrong::IgnoresDelay, _, Outcome::Failed { after, .. }) => *after = Duration::ZERO,
                _ => {}
            }
            let answer = record::record(slot, &lease, &outcome, now);
            let state = slot.as_ref().map(|record| record.state);
            match (self.wrong, state) {
                (Wrong::ForgetsProcessed, Some(State::Processed { .. }))
                | (Wrong::ForgetsDeadLetters, Some(State::DeadLettered { .. })) => *slot = None,
                _ => {}
            }
            answer
        })
    }

    fn renew_one(&self, held: &Lease, lease: Duration) -> Renewal {
        let mut held = *held;
        self.with(held.key, |slot, now| {
            if let (Wrong::RenewsAnyFence, Some(record)) = (self.wrong, &slot) {
                held.fence = record.fence;
            }
            record::renew(slot, &held, lease, now)
        })
    }
}

#[async_trait]
impl ProcessedStore for Store {
    async fn open(&self, consumer: &str, _: Duration) -> Result<ConsumerId> {
        let mut table = self.table();
        let known = table.consumers.iter().position(|name| name == consumer);
        let number = known.unwrap_or_else(|| {
            table.consumers.push(consumer.to_owned());
            table.consumers.len() - 1
        });
        Ok(ConsumerId(number as u32))
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        Ok(batch.iter().map(|request| self.claim_one(request, lease)).collect())
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        Ok(leases.iter().map(|held| self.renew_one(held, lease)).collect())
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        Ok(batch.iter().map(|(lease, outcome)| self.record_one(lease, outcome)).collect())
    }

    async fn probe(&self) -> Result<StoreHealth> {
        Ok(StoreHealth::new("wrong", "0", Durability::Process))
    }
}

struct WrongBroker {
    wrong: Wrong,
    inner: Arc<MemoryBroker>,
    held: Mutex<BTreeMap<Receipt, ()>>,
}

impl WrongBroker {
    fn held(&self) -> MutexGuard<'_, BTreeMap<Receipt, ()>> {
        self.held.lock().expect("nobody panics while holding the receipts")
    }

    /// What is settled instead, if anything.
    fn instead(&self, settlement: &Settlement) -> Option<Settlement> {
        let mut settlement = settlement.clone();
        match (self.wrong, &mut settlement) {
            (Wrong::LosesAcks, Settlement::Ack) => return None,
            (Wrong::LosesReleases, Settlement::Release { .. } | Settlement::Retry { .. })
            | (Wrong::LosesDeadLetters, Settlement::DeadLetter(_)) => return Some(Settlement::Ack),
            (Wrong::SpoilsDeadLetters, Settlement::DeadLetter(letter)) => letter.consumer = "nobody".into(),
            _ => {}
        }
        Some(settlement)
    }
}

#[async_trait]
impl Broker for WrongBroker {
    async fn open(&self, limits: Limits) -> Result<()> {
        self.inner.open(limits).await
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        let mut deliveries = self.inner.receive(want).await?;
        if self.wrong == Wrong::TurnsOrder {
            deliveries.reverse();
        }
        self.held().extend(deliveries.iter().map(|delivery| (delivery.receipt, ())));
        Ok(deliveries)
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        let mut answers = Vec::new();
        for (receipt, settlement) in batch {
            self.held().remove(receipt);
            answers.push(match self.instead(settlement) {
                Some(settlement) => self.inner.settle(&[(*receipt, settlement)]).await.remove(0),
                None => Ok(()),
            });
        }
        answers
    }

    async fn stop(&self) -> Result<()> {
        self.inner.stop().await
    }

    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
}

impl Drop for WrongBroker {
    fn drop(&mut self) {
        if self.wrong == Wrong::LosesOnDeath {
            let acks: Vec<_> = self.held().keys().map(|receipt| (*receipt, Settlement::Ack)).collect();
            // In memory it is answered at once.
            let settled = futures_util::FutureExt::now_or_never(self.inner.settle(&acks));
            assert!(settled.is_some());
        }
    }
}
