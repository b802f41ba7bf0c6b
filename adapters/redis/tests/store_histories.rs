//! Hundreds of generated histories, answered by the scripts and by `hapax::record` item by item. Leases and delays are none
//! or an hour, so that nothing has to be waited for: the kit's own history waits, this one goes through more states.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod store_fixture;

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::time::Duration;

use hapax::record::{self, Moment, Record};
use hapax::{
    Claim, ClaimRequest, ConsumerId, EventKey, Fingerprint, Lease, Outcome, ProcessedStore, Reason, RecordView,
    Recorded, Renewal, StoreAdmin, Trouble,
};
use hapax_redis::RedisStore;
use hapax_testkit::servers::Server;
use store_fixture::{open, server, unique};

const HOUR: Duration = Duration::from_secs(3600);
const KEYS: usize = 12;
const BATCHES: usize = 60;

/// One event: what the specification believes of it, and its leases in both namings.
#[derive(Default)]
struct Event {
    slot: Option<Record>,
    leases: Vec<(Lease, Lease)>,
    last: Option<ClaimRequest>,
}

struct History {
    seed: u64,
    random: fastrand::Rng,
    store: RedisStore,
    consumer: ConsumerId,
    now: Moment,
    events: BTreeMap<EventKey, Event>,
}

#[tokio::test]
async fn the_scripts_answer_as_the_specification() {
    follow(0..80, 1).await;
}

#[tokio::test]
async fn divided_batches_are_answered_as_the_specification() {
    follow(80..120, 4).await;
}

async fn follow(seeds: std::ops::Range<u64>, partitions: u16) {
    let builder = RedisStore::builder(server(&Server::Redis.url())).prefix(unique()).partitions(partitions);
    let store = builder.connect().await.unwrap();
    let consumer = open(&store).await;
    for seed in seeds {
        let key = |n: usize| EventKey::of("billing", &format!("history {seed}"), &n.to_string());
        let events = (0..KEYS).map(|n| (key(n), Event::default())).collect();
        let random = fastrand::Rng::with_seed(seed);
        let mut history = History { seed, random, store: store.clone(), consumer, now: Moment(1 << 40), events };
        for _ in 0..BATCHES {
            history.now = history.now.after(Duration::from_micros(1));
            match history.random.u8(..10) {
                0..=4 => history.claim().await,
                5..=7 => history.record().await,
                8 => history.renew().await,
                _ => history.forget().await,
            }
        }
        history.compare().await;
    }
}

fn told(view: &RecordView) -> (hapax::Status, u32, u32, Option<Trouble>, Option<Reason>) {
    (view.status, view.attempt, view.crashes, view.trouble.clone(), view.reason)
}

impl History {
    fn some_keys(&mut self) -> Vec<EventKey> {
        let mut keys: Vec<_> = self.events.keys().copied().collect();
        self.random.shuffle(&mut keys);
        keys.truncate(self.random.usize(1..=8));
        keys
    }

    fn none_or_an_hour(&mut self) -> Duration {
        if self.random.u8(..3) == 0 { HOUR } else { Duration::ZERO }
    }

    fn request(&mut self, key: EventKey) -> ClaimRequest {
        let (again, wrong, coin) = (self.random.u8(..4) == 0, self.random.u8(..10) == 0, self.random.u8(..3));
        let event = &self.events[&key];
        if let Some(last) = event.last.filter(|_| again) {
            return last;
        }
        let reopen = self.random.choice(&event.leases).filter(|_| coin == 0).map(|(ours, _)| ours.fence);
        let fingerprint = Fingerprint::of(None, &[u8::from(wrong)]);
        ClaimRequest { consumer: self.consumer, key, fingerprint, token: self.random.u128(1..), reopen }
    }

    async fn claim(&mut self) {
        let lease = self.none_or_an_hour();
        let batch: Vec<_> = self.some_keys().into_iter().map(|key| self.request(key)).collect();
        let named = |key: EventKey, fence: NonZeroU64| {
            self.events[&key].leases.iter().rev().find(|(ours, _)| ours.fence == fence).map(|(_, theirs)| theirs.fence)
        };
        let sent: Vec<_> = batch
            .iter()
            .map(|request| ClaimRequest { reopen: request.reopen.and_then(|f| named(request.key, f)), ..*request })
            .collect();
        let answers = self.store.claim(&sent, lease).await.unwrap();
        for (request, answer) in batch.into_iter().zip(answers) {
            let event = self.events.get_mut(&request.key).unwrap();
            let before = event.slot.clone();
            event.last = Some(request);
            let expected = record::claim(&mut event.slot, &request, lease, self.now);
            let agree = match (&expected, &answer) {
                (Claim::Granted(ours, our_history), Claim::Granted(theirs, their_history)) => {
                    let before = event.leases.iter().rev().find(|(known, _)| known.fence == ours.fence);
                    let fence_agrees = match before {
                        Some((_, known)) => known.fence == theirs.fence,
                        None => event.leases.last().is_none_or(|(_, last)| theirs.fence > last.fence),
                    };
                    event.leases.push((*ours, *theirs));
                    let told = |history: &Option<Box<hapax::History>>| {
                        history.as_deref().map(|told| (told.crashes, told.trouble.clone(), told.doomed))
                    };
                    fence_agrees && ours.attempt == theirs.attempt && told(our_history) == told(their_history)
                }
                (Claim::Processed { .. }, Claim::Processed { ago }) => *ago < HOUR,
                (Claim::DeadLettered { .. }, Claim::DeadLettered { ago }) => *ago < HOUR,
                (Claim::Held { .. }, Claim::Held { wait }) | (Claim::NotYet { .. }, Claim::NotYet { wait }) => {
                    *wait > HOUR / 2 && *wait <= HOUR
                }
                (Claim::Conflict, Claim::Conflict) => true,
                _ => false,
            };
            assert!(agree, "seed {}: {request:?} on {before:?}: {answer:?} instead of {expected:?}", self.seed);
        }
    }

    fn some_leases(&mut self) -> Vec<(Lease, Lease)> {
        let keys = self.some_keys();
        let random = &mut self.random;
        let pick = |key| {
            let leases = &self.events[key].leases;
            if random.u8(..5) == 0 { random.choice(leases) } else { leases.last() }
        };
        keys.iter().filter_map(pick).copied().collect()
    }

    fn outcome(&mut self) -> Outcome {
        let error = "é".repeat(self.random.usize(..40));
        let trouble = Trouble { id: format!("id {}", self.random.u8(..)).into(), error: error.into() };
        match self.random.u8(..8) {
            0 | 1 => Outcome::Processed,
            2 | 3 => Outcome::Failed { after: self.none_or_an_hour(), counted: self.random.bool(), trouble },
            4 | 5 => {
                let reasons = [Reason::Permanent, Reason::AttemptsExhausted, Reason::UnknownVersion];
                Outcome::Doomed { reason: reasons[self.random.usize(..3)], trouble }
            }
            _ => Outcome::DeadLettered,
        }
    }

    async fn record(&mut self) {
        let batch: Vec<_> = self.some_leases().into_iter().map(|lease| (lease, self.outcome())).collect();
        let sent: Vec<_> = batch.iter().map(|((_, theirs), outcome)| (*theirs, outcome.clone())).collect();
        let answers = self.store.record(&sent).await.unwrap();
        let mut expected: Vec<Recorded> = Vec::new();
        for ((ours, _), outcome) in &batch {
            let slot = &mut self.events.get_mut(&ours.key).unwrap().slot;
            expected.push(record::record(slot, ours, outcome, self.now));
        }
        assert_eq!(answers, expected, "seed {}: {batch:?}", self.seed);
    }

    async fn renew(&mut self) {
        let lease = self.none_or_an_hour();
        let batch = self.some_leases();
        let sent: Vec<_> = batch.iter().map(|(_, theirs)| *theirs).collect();
        let answers = self.store.renew(&sent, lease).await.unwrap();
        let mut expected: Vec<Renewal> = Vec::new();
        for (ours, _) in &batch {
            expected.push(record::renew(&mut self.events.get_mut(&ours.key).unwrap().slot, ours, lease, self.now));
        }
        assert_eq!(answers, expected, "seed {}: {batch:?}", self.seed);
    }

    async fn forget(&mut self) {
        let key = self.some_keys()[0];
        let was_there = self.store.forget("billing", key).await.unwrap();
        let slot = &mut self.events.get_mut(&key).unwrap().slot;
        assert_eq!(was_there, slot.take().is_some(), "seed {}: forget {key:?}", self.seed);
    }

    async fn compare(&self) {
        for (key, event) in &self.events {
            let theirs = self.store.look_up("billing", *key).await.unwrap();
            let ours = event.slot.as_ref().map(|record| {
                let reason = match record.state {
                    record::State::Doomed { reason, .. } | record::State::DeadLettered { reason, .. } => Some(reason),
                    _ => None,
                };
                let trouble = record.trouble.as_deref().cloned();
                (record.status(), record.attempt, record.crashes, trouble, reason)
            });
            assert_eq!(theirs.as_ref().map(told), ours, "seed {}: {key:?} at the end", self.seed);
        }
    }
}
