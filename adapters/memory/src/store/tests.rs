//! The store against the pure functions, with generated histories; then what the functions do not say: limits, sweeps,
//! and fences over what was forgotten.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::time::Duration;

use hapax::record::{self, Moment, Record};
use hapax::{
    Claim, ClaimRequest, ConsumerId, ErrorKind, EventKey, Fingerprint, Lease, Outcome, ProcessedStore, Reason,
    Recorded, Status, StoreAdmin, Trouble,
};

use super::{MemoryStore, view};

const LEASE: Duration = Duration::from_secs(30);
const RETENTION: Duration = Duration::from_secs(600);
const CONSUMERS: [&str; 2] = ["billing", "shipping"];

fn key(number: u64) -> EventKey {
    EventKey::of("billing", "test", &number.to_string())
}

fn request(consumer: ConsumerId, number: u64, token: u128) -> ClaimRequest {
    ClaimRequest { consumer, key: key(number), fingerprint: Fingerprint([1; 16]), token, reopen: None }
}

async fn store(records_max: usize) -> (MemoryStore, ConsumerId) {
    let store = MemoryStore::builder().records_max(records_max).starts_at(Moment(1_000_000)).build();
    let consumer = store.open("billing", RETENTION).await.unwrap();
    (store, consumer)
}

async fn claim(store: &MemoryStore, request: ClaimRequest) -> Claim {
    store.claim(&[request], LEASE).await.unwrap().remove(0)
}

async fn granted(store: &MemoryStore, request: ClaimRequest) -> Lease {
    match claim(store, request).await {
        Claim::Granted(lease, _) => lease,
        other => panic!("not granted: {other:?}"),
    }
}

async fn process(store: &MemoryStore, consumer: ConsumerId, number: u64) -> Lease {
    let lease = granted(store, request(consumer, number, 1)).await;
    assert_eq!(store.record(&[(lease, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    lease
}

/// The specification as it stands: a map of records under the pure functions.
#[derive(Default)]
struct Model {
    records: BTreeMap<(u32, EventKey), Option<Record>>,
    forgotten_fence: u64,
}

impl Model {
    fn slot(&mut self, consumer: ConsumerId, key: EventKey) -> &mut Option<Record> {
        self.records.entry((consumer.0, key)).or_default()
    }

    fn claim(&mut self, request: &ClaimRequest, now: Moment) -> Claim {
        let forgotten = self.forgotten_fence;
        let slot = self.slot(request.consumer, request.key);
        let was_known = slot.is_some();
        let mut claim = record::claim(slot, request, LEASE, now);
        if let (Claim::Granted(lease, _), Some(record), false) = (&mut claim, slot, was_known)
            && record.fence.get() <= forgotten
        {
            record.fence = NonZeroU64::new(forgotten + 1).unwrap();
            lease.fence = record.fence;
        }
        claim
    }

    fn forget(&mut self, consumer: ConsumerId, key: EventKey) -> bool {
        let Some(record) = self.slot(consumer, key).take() else { return false };
        self.forgotten_fence = self.forgotten_fence.max(record.fence.get());
        true
    }

    /// Everything in the store is as in the model; what is missing there was due, and goes here too.
    async fn agree(&mut self, store: &MemoryStore, now: Moment) {
        let mut records = 0;
        for ((consumer, key), slot) in &mut self.records {
            let seen = store.look_up(CONSUMERS[*consumer as usize], *key).await.unwrap();
            records += u64::from(seen.is_some());
            if let (None, Some(record)) = (&seen, &*slot) {
                assert!(record.is_swept(RETENTION, now), "swept before its time: {record:?}");
                self.forgotten_fence = self.forgotten_fence.max(record.fence.get());
                *slot = None;
            }
            assert_eq!(seen, slot.as_ref().map(|record| view(*key, record, now)));
        }
        assert_eq!(store.probe().await.unwrap().records, Some(records));
    }
}

/// Draws requests so that every arm of the state machine is met.
struct Draw {
    rng: fastrand::Rng,
    leases: Vec<Lease>,
    fences: Vec<NonZeroU64>,
}

impl Draw {
    fn requests(&mut self) -> Vec<ClaimRequest> {
        let mut numbers: Vec<u64> = (0..6).collect();
        self.rng.shuffle(&mut numbers);
        numbers.truncate(self.rng.usize(1..4));
        let recent = &self.fences[self.fences.len().saturating_sub(10)..];
        let request = |number| ClaimRequest {
            fingerprint: Fingerprint([if self.rng.u8(..8) == 0 { 2 } else { 1 }; 16]),
            reopen: if self.rng.bool() { None } else { self.rng.choice(recent).copied() },
            ..request(ConsumerId(self.rng.u32(..2)), number, self.rng.u128(1..6))
        };
        numbers.into_iter().map(request).collect()
    }

    fn lease(&mut self) -> Option<Lease> {
        // Mostly a recent one; old ones are those of overtaken holders.
        let recent = self.leases.len().saturating_sub(8);
        let from = if self.rng.u8(..4) == 0 { 0 } else { recent };
        (from < self.leases.len()).then(|| self.leases[self.rng.usize(from..self.leases.len())])
    }

    fn outcome(&mut self) -> Outcome {
        let trouble = Trouble { id: "1".into(), error: self.rng.u8(..3).to_string().into() };
        match self.rng.u8(..5) {
            0 => Outcome::Processed,
            1 => {
                let after = Duration::from_secs(self.rng.u64(..40));
                Outcome::Failed { after, counted: self.rng.bool(), trouble }
            }
            2 => Outcome::Doomed { reason: Reason::Permanent, trouble },
            _ => Outcome::DeadLettered,
        }
    }

    fn note(&mut self, claims: &[Claim]) {
        for claim in claims {
            if let Claim::Granted(lease, _) = claim {
                self.leases.push(*lease);
                self.fences.push(lease.fence);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_store_answers_as_the_pure_functions_do() {
    for seed in 0..40 {
        let store = MemoryStore::builder().starts_at(Moment(1_000_000)).build();
        for (number, name) in CONSUMERS.into_iter().enumerate() {
            assert_eq!(store.open(name, RETENTION).await.unwrap(), ConsumerId(number as u32));
        }
        let mut draw = Draw { rng: fastrand::Rng::with_seed(seed), leases: Vec::new(), fences: Vec::new() };
        let mut model = Model::default();
        for _ in 0..400 {
            let now = store.now();
            match draw.rng.u8(..20) {
                0..=7 => {
                    let batch = draw.requests();
                    let claims = store.claim(&batch, LEASE).await.unwrap();
                    let expected: Vec<_> = batch.iter().map(|request| model.claim(request, now)).collect();
                    assert_eq!(claims, expected, "seed {seed}");
                    draw.note(&claims);
                }
                8..=13 => {
                    let Some(lease) = draw.lease() else { continue };
                    let outcome = draw.outcome();
                    let recorded = store.record(&[(lease, outcome.clone())]).await.unwrap().remove(0);
                    let slot = model.slot(lease.consumer, lease.key);
                    assert_eq!(recorded, record::record(slot, &lease, &outcome, now), "seed {seed}");
                }
                14 => {
                    let Some(lease) = draw.lease() else { continue };
                    let renewed = store.renew(&[lease], LEASE).await.unwrap().remove(0);
                    let slot = model.slot(lease.consumer, lease.key);
                    assert_eq!(renewed, record::renew(slot, &lease, LEASE, now), "seed {seed}");
                }
                15 | 16 => tokio::time::advance(Duration::from_secs(draw.rng.u64(..60))).await,
                17 => store.step_clock(draw.rng.i64(-900..900) * 1_000_000),
                18 => {
                    store.sweep(draw.rng.usize(..3)).await.unwrap();
                }
                _ => {
                    let consumer = ConsumerId(draw.rng.u32(..2));
                    let number = draw.rng.u64(..6);
                    let forgotten = store.forget(CONSUMERS[consumer.0 as usize], key(number)).await.unwrap();
                    assert_eq!(forgotten, model.forget(consumer, key(number)));
                }
            }
            model.agree(&store, store.now()).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_store_refuses_new_events_and_forgets_none() {
    let (store, consumer) = store(3).await;
    for number in 0..3 {
        process(&store, consumer, number).await;
    }
    let refused = store.claim(&[request(consumer, 9, 1)], LEASE).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Full);
    assert!(refused.is_retryable() && refused.to_string().contains("records_max"), "{refused}");
    for number in 0..3 {
        assert!(matches!(claim(&store, request(consumer, number, 2)).await, Claim::Processed { .. }));
    }
    tokio::time::advance(RETENTION).await;
    granted(&store, request(consumer, 9, 1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_refused_batch_has_changed_nothing() {
    let (store, consumer) = store(2).await;
    process(&store, consumer, 0).await;
    let batch = [1, 2].map(|number| request(consumer, number, 1));
    assert_eq!(store.claim(&batch, LEASE).await.map_err(|error| error.kind()), Err(ErrorKind::Full));
    assert_eq!(store.probe().await.unwrap().records, Some(1));
    let stranger = request(ConsumerId(7), 1, 1);
    let batch = [request(consumer, 1, 1), stranger];
    assert_eq!(store.claim(&batch, LEASE).await.map_err(|error| error.kind()), Err(ErrorKind::Incompatible));
    assert_eq!(store.probe().await.unwrap().records, Some(1));
}

#[tokio::test(start_paused = true)]
async fn each_record_takes_at_most_two_due_ones_along() {
    let (store, consumer) = store(100).await;
    for number in 0..10 {
        process(&store, consumer, number).await;
    }
    tokio::time::advance(RETENTION).await;
    process(&store, consumer, 10).await;
    assert_eq!(store.probe().await.unwrap().records, Some(9), "eleven less two");
    let swept = store.sweep(5).await.unwrap();
    assert_eq!((swept.removed, swept.more), (5, true));
    let swept = store.sweep(usize::MAX).await.unwrap();
    assert_eq!((swept.removed, swept.more), (3, false));
}

#[tokio::test(start_paused = true)]
async fn a_doomed_record_that_nobody_ended_is_swept_in_the_end() {
    let (store, consumer) = store(100).await;
    let lease = granted(&store, request(consumer, 0, 1)).await;
    let doomed = Outcome::Doomed { reason: Reason::Permanent, trouble: Trouble::default() };
    store.record(&[(lease, doomed)]).await.unwrap();
    tokio::time::advance(RETENTION).await;
    process(&store, consumer, 1).await;
    assert_eq!(store.list("billing", Status::Doomed, 10).await.unwrap().len(), 1, "its lease ended later");
    tokio::time::advance(LEASE).await;
    process(&store, consumer, 2).await;
    assert!(store.list("billing", Status::Doomed, 10).await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn fences_grow_over_forgotten_records_though_the_clock_steps_back() {
    let (store, consumer) = store(100).await;
    tokio::time::advance(Duration::from_secs(100)).await;
    let before = process(&store, consumer, 0).await;
    assert!(store.forget("billing", key(0)).await.unwrap());
    store.step_clock(-90_000_000);
    let after = granted(&store, request(consumer, 0, 2)).await;
    assert!(after.fence > before.fence, "{after:?} after {before:?}");
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_shows_its_trouble_and_its_token_reopens_it_once() {
    let (store, consumer) = store(100).await;
    let lease = granted(&store, request(consumer, 0, 1)).await;
    let trouble = Trouble { id: "42".into(), error: "no such order".into() };
    let doomed = Outcome::Doomed { reason: Reason::NeverReady, trouble: trouble.clone() };
    store.record(&[(lease, doomed)]).await.unwrap();
    store.record(&[(lease, Outcome::DeadLettered)]).await.unwrap();
    let dead = store.list("billing", Status::DeadLettered, 10).await.unwrap();
    assert_eq!((dead[0].trouble.clone(), dead[0].reason), (Some(trouble), Some(Reason::NeverReady)));
    let reopen = ClaimRequest { reopen: Some(lease.fence), ..request(consumer, 0, 2) };
    let again = granted(&store, reopen).await;
    assert_eq!((again.attempt, again.fence > lease.fence), (1, true));
    assert!(matches!(claim(&store, ClaimRequest { token: 3, ..reopen }).await, Claim::Held { .. }));
    assert!(store.list("billing", Status::DeadLettered, 10).await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn lists_are_oldest_first_and_of_one_consumer() {
    let (store, consumer) = store(100).await;
    let other = store.open("shipping", RETENTION).await.unwrap();
    for number in [4, 2, 3] {
        process(&store, consumer, number).await;
        tokio::time::advance(Duration::from_secs(1)).await;
        granted(&store, request(other, number, 1)).await;
    }
    let keys =
        async |name, status| store.list(name, status, 2).await.unwrap().iter().map(|view| view.key).collect::<Vec<_>>();
    assert_eq!(keys("billing", Status::Processed).await, [key(4), key(2)]);
    assert_eq!(keys("shipping", Status::Claimed).await, [key(4), key(2)]);
    assert!(keys("billing", Status::Claimed).await.is_empty());
    assert!(keys("nobody", Status::Claimed).await.is_empty());
}
