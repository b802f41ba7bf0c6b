//! Generated histories of batches, answered by a store and by the pure functions of `hapax::record` item by item.
//!
//! Fences are the store's own, so they are compared as names: equal where the specification's are equal, higher where
//! they are higher. Leases and delays are chosen so that no instant of the history comes near an end of one: the two
//! clocks need not agree to the microsecond.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::time::Duration;

use hapax::record::{self, Moment, Record};
use hapax::{Claim, ClaimRequest, EventKey, Fingerprint, Lease, Outcome, Reason, Recorded, Renewal, Trouble};
use tokio::time::Instant;

use super::Clock;
use super::store::{CONSUMER, Desk, StoreFixture};

const KEYS: usize = 32;
const ROUNDS: u32 = 14;
const BATCHES_A_ROUND: u32 = 5;

/// The answer to a batch is that of its items one by one.
pub async fn a_batch_equals_its_items<F: StoreFixture>(fixture: &F) {
    let seeds = match F::CLOCK {
        Clock::Paused => 0..60,
        Clock::Real => 0..1,
    };
    for seed in seeds {
        History::new::<F>(seed, Desk::at(fixture).await).run(fixture).await;
    }
}

/// What the specification believes of one event, and what its leases are called in the store.
#[derive(Default)]
struct Event {
    slot: Option<Record>,
    /// Every lease granted so far: the specification's, and the store's.
    leases: Vec<(Lease, Lease)>,
    last: Option<ClaimRequest>,
}

impl Event {
    fn named(&self, fence: NonZeroU64) -> Option<Lease> {
        self.leases.iter().rev().find(|(ours, _)| ours.fence == fence).map(|(_, theirs)| *theirs)
    }
}

struct History {
    seed: u64,
    rng: fastrand::Rng,
    desk: Desk,
    lease: Duration,
    now: Moment,
    events: BTreeMap<EventKey, Event>,
}

impl History {
    fn new<F: StoreFixture>(seed: u64, desk: Desk) -> Self {
        let events = (0..KEYS)
            .map(|n| (EventKey::of(CONSUMER, &format!("history {seed}"), &n.to_string()), Event::default()))
            .collect();
        let rng = fastrand::Rng::with_seed(seed);
        Self { seed, rng, desk, lease: F::UNIT * 10, now: Moment(1 << 40), events }
    }

    async fn run<F: StoreFixture>(&mut self, fixture: &F) {
        let begun = Instant::now();
        let mut passed = Duration::ZERO;
        for _ in 0..ROUNDS {
            for _ in 0..BATCHES_A_ROUND {
                // The specification's clock never stands still: a fence after a forgotten record must be a new one.
                self.now = self.now.after(Duration::from_micros(1));
                match self.rng.u8(..10) {
                    0..=4 => self.claim().await,
                    5..=7 => self.record().await,
                    8 => self.renew().await,
                    _ => self.forget(fixture).await,
                }
            }
            // Leases last ten units, delays ten or none: multiples of four stay two away from every end.
            let drawn = F::UNIT * 4 * self.rng.u32(..2);
            // What the calls took is part of it, and is no more than a unit without one: added up, it would bring an
            // instant near an end.
            let late = begun.elapsed().saturating_sub(passed);
            let pass = if late > F::UNIT { F::UNIT * 4 } else { drawn };
            fixture.pass(pass.saturating_sub(late)).await;
            passed += pass;
            self.now = self.now.after(pass);
        }
        self.compare_records(fixture).await;
    }

    fn some_keys(&mut self) -> Vec<EventKey> {
        let mut keys: Vec<_> = self.events.keys().copied().collect();
        self.rng.shuffle(&mut keys);
        keys.truncate(self.rng.usize(1..=16));
        keys
    }

    async fn claim(&mut self) {
        let mut batch = Vec::new();
        for key in self.some_keys() {
            let event = &self.events[&key];
            let coin = self.rng.u8(..3);
            let request = match event.last {
                // Its answer was lost.
                Some(last) if self.rng.u8(..4) == 0 => last,
                _ => ClaimRequest {
                    key,
                    fingerprint: Fingerprint::of(None, &[u8::from(self.rng.u8(..12) == 0)]),
                    token: self.rng.u128(..),
                    // In the specification's names: a right token, an old one, or none.
                    reopen: self.rng.choice(&event.leases).filter(|_| coin == 0).map(|(ours, _)| ours.fence),
                    ..self.desk.request("")
                },
            };
            batch.push(request);
        }
        let sent: Vec<_> = batch
            .iter()
            .map(|request| {
                let reopen = request.reopen.and_then(|fence| self.events[&request.key].named(fence));
                ClaimRequest { reopen: reopen.map(|lease| lease.fence), ..*request }
            })
            .collect();
        let answers = self.desk.store.claim(&sent, self.lease).await.expect("the store answers a claim");
        assert_eq!(answers.len(), batch.len(), "one answer for each item");
        for (request, answer) in batch.into_iter().zip(answers) {
            let event = self.events.get_mut(&request.key).expect("the event is one of ours");
            let before = event.slot.clone();
            event.last = Some(request);
            let expected = record::claim(&mut event.slot, &request, self.lease, self.now);
            let agree = match (&expected, &answer) {
                (Claim::Granted(ours, our_history), Claim::Granted(theirs, their_history)) => {
                    let fence_agrees = match event.named(ours.fence) {
                        Some(before) => before.fence == theirs.fence,
                        None => event.leases.last().is_none_or(|(_, last)| theirs.fence > last.fence),
                    };
                    event.leases.push((*ours, *theirs));
                    let told = |history: &Option<Box<hapax::History>>| {
                        history.as_deref().map(|told| (told.crashes, told.trouble.clone(), told.doomed))
                    };
                    fence_agrees
                        && (ours.key, ours.attempt, ours.consumer) == (theirs.key, theirs.attempt, theirs.consumer)
                        && told(our_history) == told(their_history)
                }
                (Claim::Processed { ago: ours }, Claim::Processed { ago: theirs })
                | (Claim::DeadLettered { ago: ours }, Claim::DeadLettered { ago: theirs }) => {
                    ours.abs_diff(*theirs) < self.lease
                }
                (Claim::Held { wait: ours }, Claim::Held { wait: theirs })
                | (Claim::NotYet { wait: ours }, Claim::NotYet { wait: theirs }) => {
                    ours.abs_diff(*theirs) < self.lease / 5
                }
                _ => expected == answer,
            };
            assert!(agree, "seed {}: {request:?} on {before:?}: {answer:?} instead of {expected:?}", self.seed);
        }
    }

    /// A lease of each of some events: mostly the last one, at times one that was overtaken.
    fn some_leases(&mut self) -> Vec<(Lease, Lease)> {
        let keys = self.some_keys();
        let rng = &mut self.rng;
        let pick = |key| {
            let leases = &self.events[key].leases;
            if rng.u8(..5) == 0 { rng.choice(leases) } else { leases.last() }
        };
        keys.iter().filter_map(pick).copied().collect()
    }

    fn some_outcome(&mut self) -> Outcome {
        let trouble = Trouble { id: "id".into(), error: format!("error {}", self.rng.u8(..)).into() };
        match self.rng.u8(..8) {
            0 | 1 => Outcome::Processed,
            2 | 3 => Outcome::Failed { after: self.lease * self.rng.u32(..2), counted: self.rng.bool(), trouble },
            4 | 5 => Outcome::Doomed { reason: Reason::Permanent, trouble },
            _ => Outcome::DeadLettered,
        }
    }

    async fn record(&mut self) {
        let batch: Vec<_> = self.some_leases().into_iter().map(|lease| (lease, self.some_outcome())).collect();
        let sent: Vec<_> = batch.iter().map(|((_, theirs), outcome)| (*theirs, outcome.clone())).collect();
        let answers = self.desk.store.record(&sent).await.expect("the store answers a record");
        let expected: Vec<Recorded> = batch
            .iter()
            .map(|((ours, _), outcome)| {
                let event = self.events.get_mut(&ours.key).expect("the event is one of ours");
                record::record(&mut event.slot, ours, outcome, self.now)
            })
            .collect();
        assert_eq!(answers, expected, "seed {}: {sent:?}", self.seed);
    }

    async fn renew(&mut self) {
        let batch = self.some_leases();
        let sent: Vec<_> = batch.iter().map(|(_, theirs)| *theirs).collect();
        let answers = self.desk.store.renew(&sent, self.lease).await.expect("the store answers a renewal");
        let expected: Vec<Renewal> = batch
            .iter()
            .map(|(ours, _)| {
                let event = self.events.get_mut(&ours.key).expect("the event is one of ours");
                record::renew(&mut event.slot, ours, self.lease, self.now)
            })
            .collect();
        assert_eq!(answers, expected, "seed {}: {sent:?}", self.seed);
    }

    async fn forget<F: StoreFixture>(&mut self, fixture: &F) {
        let admin = fixture.admin().await;
        let key = self.some_keys()[0];
        let event = self.events.get_mut(&key).expect("the event is one of ours");
        let was_there = admin.forget(CONSUMER, key).await.expect("the store forgets");
        assert_eq!(was_there, event.slot.take().is_some(), "seed {}: forget {key:?}", self.seed);
    }

    async fn compare_records<F: StoreFixture>(&self, fixture: &F) {
        let admin = fixture.admin().await;
        for (key, event) in &self.events {
            let theirs = admin.look_up(CONSUMER, *key).await.expect("the store looks up");
            let theirs = theirs.map(|view| (view.status, view.attempt, view.crashes));
            let ours = event.slot.as_ref().map(|record| (record.status(), record.attempt, record.crashes));
            assert_eq!(theirs, ours, "seed {}: {key:?} at the end", self.seed);
        }
    }
}
