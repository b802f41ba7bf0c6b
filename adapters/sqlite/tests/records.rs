//! The store answers as the specification does, whatever is asked together: invariants of the record.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::time::Duration;

use fixture::{Folder, LEASE, RETENTION, claim, doomed, failed, key, lease, process, request, store, trouble};
use hapax::record::{self, Record};
use hapax::{
    Claim, ClaimRequest, ConsumerId, ErrorKind, EventKey, Fingerprint, Lease, Outcome, ProcessedStore, Reason,
    Recorded, Status, StoreAdmin,
};

#[tokio::test]
async fn generated_histories_are_answered_as_the_specification_answers() {
    for seed in 0..40 {
        history(seed, 12, 60, Mix::Any).await;
    }
}

/// What needs no record to be read: claims of one consumer, most of unknown events, and records of processed ones.
#[tokio::test]
async fn what_is_usual_is_answered_as_the_specification_answers_too() {
    for seed in 200..260 {
        history(seed, 12, 60, Mix::Usual).await;
    }
    history(300, 3_000, 16, Mix::Usual).await;
}

/// Larger than any statement, most of the records alike and some not.
#[tokio::test]
async fn large_batches_are_answered_as_the_specification_answers() {
    for seed in 100..102 {
        history(seed, 3_000, 16, Mix::Any).await;
    }
}

/// What batches are made of.
#[derive(Clone, Copy, PartialEq)]
enum Mix {
    Any,
    Usual,
}

/// Random claims, renewals and records of so many events, by batches, against the pure functions on a map.
async fn history(seed: u64, most: u64, steps: u64, mix: Mix) {
    let mut random = fastrand::Rng::with_seed(seed);
    let folder = Folder::new();
    let (store, clock, first) = store(&folder).await;
    let second = ProcessedStore::open(&store, "mail", RETENTION).await.unwrap();
    let mut map: BTreeMap<(ConsumerId, EventKey), Option<Record>> = BTreeMap::new();
    let mut leases: Vec<Lease> = Vec::new();
    for step in 0..steps {
        clock.advance(Duration::from_micros(random.u64(0..20_000_000)));
        let now = clock.now();
        let mut events: Vec<u64> = (0..most).collect();
        random.shuffle(&mut events);
        events.truncate(random.usize(1..most as usize));
        let mut held = leases.clone();
        random.shuffle(&mut held);
        if mix == Mix::Usual {
            // Each event once in a call, and half of the calls with one.
            let mut seen = BTreeSet::new();
            held.retain(|lease| seen.insert(lease.key));
            if random.bool() {
                events.truncate(1);
                held.truncate(1);
            }
        } else {
            held = (0..most / 3).filter_map(|_| held.get(random.usize(..held.len().max(1))).copied()).collect();
        }
        match random.u8(0..5) {
            0 | 1 => {
                let batch: Vec<_> =
                    events.iter().map(|n| any_request(&mut random, [first, second], *n, &leases, mix)).collect();
                let expected: Vec<_> = batch
                    .iter()
                    .map(|item| record::claim(map.entry((item.consumer, item.key)).or_default(), item, LEASE, now))
                    .collect();
                let answers = store.claim(&batch, LEASE).await.unwrap();
                assert_eq!(answers, expected, "seed {seed}, step {step}");
                leases.extend(answers.iter().filter_map(|claim| match claim {
                    Claim::Granted(lease, _) => Some(*lease),
                    _ => None,
                }));
            }
            2 if !leases.is_empty() => {
                let batch = held;
                let expected: Vec<_> = batch
                    .iter()
                    .map(|held| record::renew(map.entry((held.consumer, held.key)).or_default(), held, LEASE, now))
                    .collect();
                assert_eq!(store.renew(&batch, LEASE).await.unwrap(), expected, "seed {seed}, step {step}");
            }
            _ if !leases.is_empty() => {
                let batch: Vec<_> = held.into_iter().map(|held| (held, any_outcome(&mut random, mix))).collect();
                let expected: Vec<_> = batch
                    .iter()
                    .map(|(held, outcome)| {
                        record::record(map.entry((held.consumer, held.key)).or_default(), held, outcome, now)
                    })
                    .collect();
                assert_eq!(store.record(&batch).await.unwrap(), expected, "seed {seed}, step {step}");
            }
            _ => {}
        }
    }
    for ((consumer, key), record) in map.into_iter().step_by(most as usize / 12) {
        let name = if consumer == first { "billing" } else { "mail" };
        let found = store.look_up(name, key).await.unwrap();
        let facts = |record: &Record| {
            (record.status(), record.fence.get(), record.attempt, record.crashes, record.trouble.as_deref().cloned())
        };
        let found = found.map(|view| (view.status, view.fence, view.attempt, view.crashes, view.trouble));
        assert_eq!(found, record.as_ref().map(facts), "seed {seed}");
    }
}

fn any_request(
    random: &mut fastrand::Rng,
    consumers: [ConsumerId; 2],
    n: u64,
    leases: &[Lease],
    mix: Mix,
) -> ClaimRequest {
    let key = key(n);
    if mix == Mix::Usual {
        let fingerprint = Fingerprint::of(None, b"data");
        return ClaimRequest { consumer: consumers[0], key, fingerprint, token: random.u128(..), reopen: None };
    }
    let reopen = leases.iter().rfind(|lease| lease.key == key).map(|lease| lease.fence);
    ClaimRequest {
        consumer: consumers[random.usize(..2)],
        key,
        fingerprint: Fingerprint::of(None, if random.u8(0..10) == 0 { b"other" } else { b"data" }),
        token: random.u128(1..4),
        reopen: reopen.filter(|_| random.bool()),
    }
}

fn any_outcome(random: &mut fastrand::Rng, mix: Mix) -> Outcome {
    if mix == Mix::Usual {
        return if random.u8(0..20) == 0 { failed() } else { Outcome::Processed };
    }
    match random.u8(0..5) {
        0 => Outcome::Processed,
        1 => failed(),
        2 => Outcome::Failed { after: Duration::ZERO, counted: false, trouble: trouble() },
        3 => doomed(),
        _ => Outcome::DeadLettered,
    }
}

/// Whatever way an item takes: alone, among others.
#[tokio::test]
async fn a_database_that_changed_below_is_refused_and_nothing_is_written() {
    let folder = Folder::new();
    let (store, _, consumer) = store(&folder).await;
    let [lone, one, other] =
        [lease(&store, consumer, 1).await, lease(&store, consumer, 2).await, lease(&store, consumer, 3).await];
    let kind = |error: hapax::Error| error.kind();

    let stranger = |n| ClaimRequest { consumer: ConsumerId(9), ..request(consumer, n, 1) };
    assert_eq!(store.claim(&[stranger(4)], LEASE).await.map_err(kind), Err(ErrorKind::Incompatible));
    assert_eq!(store.claim(&[stranger(4), stranger(5)], LEASE).await.map_err(kind), Err(ErrorKind::Incompatible));

    let version = "UPDATE hapax_meta SET value = ? WHERE name = 'schema'";
    sqlx::query(version).bind(99).execute(store.pool()).await.unwrap();
    assert_eq!(store.claim(&[request(consumer, 4, 1)], LEASE).await.map_err(kind), Err(ErrorKind::Incompatible));
    let two = [request(consumer, 4, 1), request(consumer, 5, 1)];
    assert_eq!(store.claim(&two, LEASE).await.map_err(kind), Err(ErrorKind::Incompatible));
    let done = |lease| (lease, Outcome::Processed);
    assert_eq!(store.record(&[done(lone)]).await.map_err(kind), Err(ErrorKind::Incompatible));
    assert_eq!(store.record(&[done(one), done(other)]).await.map_err(kind), Err(ErrorKind::Incompatible));

    sqlx::query(version).bind(1).execute(store.pool()).await.unwrap();
    assert_eq!(store.list("billing", Status::Claimed, 10).await.unwrap().len(), 3);
    assert_eq!(store.list("billing", Status::Processed, 10).await.unwrap().len(), 0);
}

#[tokio::test]
async fn a_damaged_record_of_an_event_under_way_is_refused() {
    let folder = Folder::new();
    let (store, _, consumer) = store(&folder).await;
    let leases = [lease(&store, consumer, 1).await, lease(&store, consumer, 2).await];
    let done = leases.map(|lease| (lease, Outcome::Processed));
    sqlx::query("UPDATE hapax_open SET fingerprint = x'00'").execute(store.pool()).await.unwrap();
    for batch in [&done[..1], &done] {
        assert_eq!(store.record(batch).await.unwrap_err().kind(), ErrorKind::Incompatible);
    }
    assert_eq!(store.list("billing", Status::Processed, 10).await.unwrap(), []);
}

#[tokio::test]
async fn a_refused_claim_leaves_no_lease_behind() {
    let folder = Folder::new();
    let (store, _, consumer) = store(&folder).await;
    process(&store, consumer, 1..2).await;
    sqlx::query("UPDATE hapax_record SET state = 9").execute(store.pool()).await.unwrap();
    let refused = store.claim(&[request(consumer, 2, 1), request(consumer, 1, 1)], LEASE).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Incompatible);
    assert_eq!(store.look_up("billing", key(2)).await.unwrap(), None);
}

#[tokio::test]
async fn an_empty_call_is_answered_beside_others() {
    let folder = Folder::new();
    let (store, _, consumer) = store(&folder).await;
    let held = lease(&store, consumer, 1).await;
    let done = [(held, Outcome::Processed)];
    let (done, claims, renewals) = tokio::join!(store.record(&done), store.claim(&[], LEASE), store.renew(&[], LEASE));
    assert_eq!((done.unwrap(), claims.unwrap(), renewals.unwrap()), (vec![Recorded::Done], Vec::new(), Vec::new()));
}

#[tokio::test]
async fn what_shares_a_transaction_with_a_refused_claim_is_written() {
    let folder = Folder::new();
    let (store, _, consumer) = store(&folder).await;
    let held = lease(&store, consumer, 1).await;
    let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON hapax_open BEGIN SELECT RAISE(ABORT, 'refused'); END";
    sqlx::query(refuse).execute(store.pool()).await.unwrap();
    let (done, new) = ([(held, Outcome::Processed)], [request(consumer, 2, 1)]);
    let (done, claims) = tokio::join!(store.record(&done), store.claim(&new, LEASE));
    assert_eq!(claims.unwrap_err().kind(), ErrorKind::Rejected);
    assert!(matches!(done.unwrap()[..], [Recorded::Done]));
    assert_eq!(store.look_up("billing", key(1)).await.unwrap().unwrap().status, Status::Processed);
}

/// One that waits for the lock of another process.
#[tokio::test]
async fn a_lease_begins_when_it_is_granted() {
    let folder = Folder::new();
    let (store, clock, consumer) = store(&folder).await;
    let mut other = store.pool().acquire().await.unwrap();
    sqlx::query("BEGIN IMMEDIATE").execute(&mut *other).await.unwrap();
    let claims = {
        let store = store.clone();
        tokio::spawn(async move { store.claim(&[request(consumer, 1, 1)], LEASE).await })
    };
    tokio::time::sleep(Duration::from_millis(150)).await;
    clock.advance(LEASE);
    tokio::time::sleep(Duration::from_millis(300)).await;
    sqlx::query("ROLLBACK").execute(&mut *other).await.unwrap();
    assert!(matches!(claims.await.unwrap().unwrap()[..], [Claim::Granted(..)]));
    assert_eq!(store.look_up("billing", key(1)).await.unwrap().unwrap().since, LEASE);
}

#[tokio::test]
async fn zombie_complete_is_fenced() {
    let folder = Folder::new();
    let (store, clock, consumer) = store(&folder).await;
    let zombie = lease(&store, consumer, 1).await;
    clock.advance(LEASE);
    let successor = claim(&store, consumer, 1, 7).await;
    assert!(matches!(successor, Claim::Granted(lease, Some(_)) if lease.fence > zombie.fence && lease.attempt == 2));
    assert_eq!(store.record(&[(zombie, Outcome::Processed)]).await.unwrap(), [Recorded::Fenced]);
    assert_eq!(store.look_up("billing", key(1)).await.unwrap().unwrap().status, Status::Claimed);
}

#[tokio::test]
async fn losing_claim_has_no_side_effect() {
    let folder = Folder::new();
    let (store, _clock, consumer) = store(&folder).await;
    let winner = lease(&store, consumer, 1).await;
    let before = store.look_up("billing", key(1)).await.unwrap();
    assert!(matches!(claim(&store, consumer, 1, 7).await, Claim::Held { .. }));
    let other_data = ClaimRequest { fingerprint: Fingerprint::of(None, b"other"), ..request(consumer, 1, 8) };
    assert_eq!(store.claim(&[other_data], LEASE).await.unwrap(), [Claim::Conflict]);
    assert_eq!(store.look_up("billing", key(1)).await.unwrap(), before);
    assert_eq!(store.record(&[(winner, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
}

/// Bug 11 of semantics.md section 4: two copies in one batch are answered, not reported as an outage.
#[tokio::test]
async fn duplicate_in_batch_is_not_an_outage() {
    let folder = Folder::new();
    let (store, _clock, consumer) = store(&folder).await;
    let copies = [request(consumer, 1, 1), request(consumer, 2, 2), request(consumer, 1, 3)];
    let answers = store.claim(&copies, LEASE).await.unwrap();
    assert!(matches!(answers[..], [Claim::Granted(..), Claim::Granted(..), Claim::Held { .. }]), "{answers:?}");
}

#[tokio::test]
async fn fences_grow_over_forgotten_records_and_a_clock_set_back() {
    let folder = Folder::new();
    let (store, clock, consumer) = store(&folder).await;
    let before = lease(&store, consumer, 1).await.fence;
    assert!(store.forget("billing", key(1)).await.unwrap());
    assert!(!store.forget("billing", key(1)).await.unwrap());
    clock.set_back(Duration::from_secs(3600));
    assert!(lease(&store, consumer, 1).await.fence > before);
}

#[tokio::test]
async fn one_bad_call_does_not_spoil_the_others_of_its_commit() {
    let folder = Folder::new();
    let (store, _clock, consumer) = store(&folder).await;
    process(&store, consumer, 5..6).await;
    sqlx::query("UPDATE hapax_record SET state = 9").execute(store.pool()).await.unwrap();
    let (good, stranger, damaged) = tokio::join!(
        async { store.claim(&[request(consumer, 1, 1)], LEASE).await },
        async { store.claim(&[request(ConsumerId(99), 2, 2)], LEASE).await },
        async { store.claim(&[request(consumer, 5, 3), request(consumer, 6, 3)], LEASE).await },
    );
    assert!(matches!(good.unwrap()[..], [Claim::Granted(..)]));
    assert_eq!(stranger.unwrap_err().kind(), ErrorKind::Incompatible);
    assert_eq!(damaged.unwrap_err().kind(), ErrorKind::Incompatible);
    assert_eq!(store.look_up("billing", key(6)).await.unwrap(), None, "a refused batch changes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_at_the_same_time_share_commits() {
    let folder = Folder::new();
    let (store, _clock, consumer) = store(&folder).await;
    let wal = || std::fs::metadata(folder.path().join("events.db-wal")).unwrap().len();
    let start = wal();
    for n in 0..64 {
        claim(&store, consumer, n, 1).await;
    }
    let one_by_one = wal() - start;
    let together: Vec<_> = (64..128)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move { claim(&store, consumer, n, 1).await })
        })
        .collect();
    for granted in together {
        assert!(matches!(granted.await.unwrap(), Claim::Granted(..)));
    }
    let shared = wal() - start - one_by_one;
    assert!(shared * 2 < one_by_one, "{shared} bytes of WAL together, {one_by_one} one by one");
}

#[tokio::test]
async fn large_batches_and_several_consumers_are_answered_in_order() {
    let folder = Folder::new();
    let (store, _clock, first) = store(&folder).await;
    let second = ProcessedStore::open(&store, "mail", RETENTION).await.unwrap();
    let batch: Vec<_> = (0..1500).map(|n| request(if n % 2 == 0 { first } else { second }, n, 1)).collect();
    let answers = store.claim(&batch, LEASE).await.unwrap();
    let outcomes: Vec<_> = answers
        .iter()
        .zip(&batch)
        .map(|(claim, request)| match claim {
            Claim::Granted(lease, None) if lease.key == request.key => (*lease, Outcome::Processed),
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(store.record(&outcomes).await.unwrap().iter().all(|recorded| *recorded == Recorded::Done));
    let again = store.claim(&batch, LEASE).await.unwrap();
    assert!(again.iter().all(|claim| matches!(claim, Claim::Processed { .. })));
    assert_eq!(store.list("billing", Status::Processed, 2000).await.unwrap().len(), 750);
    assert!(store.claim(&[], LEASE).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_consumer_keeps_its_number_over_a_restart() {
    let folder = Folder::new();
    let (before, _clock, number) = store(&folder).await;
    let other = ProcessedStore::open(&before, "mail", RETENTION).await.unwrap();
    assert_ne!(number, other);
    before.close().await;
    assert_eq!(before.claim(&[request(number, 1, 1)], LEASE).await.unwrap_err().kind(), ErrorKind::Unavailable);
    let (_after, _clock, again) = store(&folder).await;
    assert_eq!(again, number);
}

#[tokio::test]
async fn an_operator_sees_reason_trouble_and_waiting_time() {
    let folder = Folder::new();
    let (store, clock, consumer) = store(&folder).await;
    let first = lease(&store, consumer, 1).await;
    clock.advance(Duration::from_secs(1));
    let second = lease(&store, consumer, 2).await;
    store.record(&[(first, doomed()), (second, failed())]).await.unwrap();
    store.record(&[(first, Outcome::DeadLettered)]).await.unwrap();
    clock.advance(Duration::from_millis(400));
    let dead = store.list("billing", Status::DeadLettered, 10).await.unwrap();
    assert_eq!(dead.len(), 1);
    assert_eq!((dead[0].reason, dead[0].since), (Some(Reason::Permanent), Duration::from_millis(400)));
    assert_eq!(dead[0].trouble, Some(trouble()));
    let waiting = store.look_up("billing", key(2)).await.unwrap().unwrap();
    assert_eq!((waiting.status, waiting.since), (Status::Waiting, Duration::from_millis(600)));
    assert!(store.list("nobody", Status::Waiting, 10).await.unwrap().is_empty());
    let reopened = ClaimRequest { reopen: NonZeroU64::new(dead[0].fence), ..request(consumer, 1, 9) };
    assert!(
        matches!(store.claim(&[reopened], LEASE).await.unwrap()[..], [Claim::Granted(lease, None)] if lease.attempt == 1)
    );
    assert!(store.list("billing", Status::DeadLettered, 10).await.unwrap().is_empty());
}
