//! The store suite: one case for each clause on `hapax::ProcessedStore`.
//!
//! Adding a case: one function here, one line in [`store_cases!`](crate::store_cases), its name in the clause.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hapax::{
    Claim, ClaimRequest, ConsumerId, EventKey, Fingerprint, History, Lease, Outcome, ProcessedStore, Reason, Recorded,
    Renewal, Status, StoreAdmin, Trouble,
};

use super::Clock;
pub use super::history::a_batch_equals_its_items;

/// One set of records that nobody else uses.
#[async_trait]
pub trait StoreFixture: Send + Sync + 'static {
    /// The clock it lives by.
    const CLOCK: Clock;

    /// A time that is long against one call: leases and delays are a few of it. A paused clock takes any; a real one
    /// wants it as short as the back end's steadiness allows.
    const UNIT: Duration;

    /// The store.
    async fn store(&self) -> Arc<dyn ProcessedStore>;

    /// A second handle on the same records, as another process would have it; where there can be none, the first.
    async fn again(&self) -> Arc<dyn ProcessedStore>;

    /// The operator's view of the same records.
    async fn admin(&self) -> Arc<dyn StoreAdmin>;

    /// Lets the store's clock pass.
    async fn pass(&self, how_long: Duration) {
        tokio::time::sleep(how_long).await;
    }
}

/// The list of cases, in the order of the contract; hands it to another macro.
#[doc(hidden)]
#[macro_export]
macro_rules! store_cases {
    ($then:ident $($with:tt)*) => {
        $crate::$then! { $($with)*
            a_consumer_keeps_its_number
            consumers_do_not_hide_events_from_each_other
            one_of_many_claims_is_granted
            a_claimed_event_is_held
            an_expired_lease_is_taken_over
            fences_grow_over_forgotten_records
            a_repeated_claim_is_granted_again
            a_processed_event_is_not_granted
            a_dead_lettered_event_is_not_granted
            a_failed_event_waits_its_time
            other_data_is_a_conflict
            a_reopen_token_works_once
            a_reopen_takes_other_data
            a_wrong_reopen_token_changes_nothing
            any_letter_of_a_doomed_event_reopens_it
            a_doomed_event_is_granted_as_doomed
            a_batch_equals_its_items
            a_lost_lease_is_not_renewed
            renewing_never_shortens
            a_renewed_lease_holds
            zombie_complete_is_fenced
            zombie_release_is_fenced
            recording_twice_is_already_done
            an_uncounted_failure_gives_the_attempt_back
            a_dead_letter_is_doomed_first
            a_vanished_record_is_reported
            a_vanished_record_is_written_anew
        }
    };
}

crate::store_cases! { conformance_list [StoreFixture] }

pub(super) const CONSUMER: &str = "conformance";
pub(super) const RETENTION: Duration = Duration::from_secs(24 * 3600);

/// One consumer's view of a store: requests with tokens of their own, answers one by one.
pub(super) struct Desk {
    pub(super) store: Arc<dyn ProcessedStore>,
    pub(super) consumer: ConsumerId,
    lease: Duration,
}

impl Desk {
    pub(super) async fn at<F: StoreFixture>(fixture: &F) -> Self {
        Self::over::<F>(fixture.store().await).await
    }

    pub(super) async fn over<F: StoreFixture>(store: Arc<dyn ProcessedStore>) -> Self {
        let consumer = store.open(CONSUMER, RETENTION).await.expect("the store opens");
        Self { store, consumer, lease: F::UNIT * 10 }
    }

    /// A claim with a token of its own.
    pub(super) fn request(&self, id: &str) -> ClaimRequest {
        ClaimRequest {
            consumer: self.consumer,
            key: key(id),
            fingerprint: Fingerprint::of(Some("text/plain"), b"data"),
            token: (u128::from(fastrand::u64(..)) << 64) | u128::from(fastrand::u64(..)),
            reopen: None,
        }
    }

    async fn ask(&self, request: ClaimRequest) -> Claim {
        let mut answers = self.store.claim(&[request], self.lease).await.expect("the store answers a claim");
        assert_eq!(answers.len(), 1, "one answer for each item");
        answers.remove(0)
    }

    async fn claim(&self, id: &str) -> Claim {
        self.ask(self.request(id)).await
    }

    pub(super) async fn granted(&self, id: &str) -> Lease {
        granted(self.claim(id).await).0
    }

    pub(super) async fn record(&self, lease: Lease, outcome: Outcome) -> Recorded {
        let answers = self.store.record(&[(lease, outcome)]).await.expect("the store answers a record");
        assert_eq!(answers.len(), 1, "one answer for each item");
        answers[0]
    }

    async fn renew(&self, lease: Lease, how_long: Duration) -> Renewal {
        let answers = self.store.renew(&[lease], how_long).await.expect("the store answers a renewal");
        assert_eq!(answers.len(), 1, "one answer for each item");
        answers[0]
    }

    async fn done(&self, lease: Lease, outcome: Outcome) {
        assert_eq!(self.record(lease, outcome.clone()).await, Recorded::Done, "{outcome:?}");
    }

    /// Claims and dead-letters an event; answers with the lease whose fence reopens it.
    async fn dead_lettered(&self, id: &str) -> Lease {
        let lease = self.granted(id).await;
        self.done(lease, doomed()).await;
        self.done(lease, Outcome::DeadLettered).await;
        lease
    }

    /// Lets a lease end and claims the event anew: the first holder is a zombie now.
    async fn taken_over<F: StoreFixture>(&self, fixture: &F, id: &str) -> (Lease, Lease) {
        let zombie = self.granted(id).await;
        fixture.pass(self.lease + F::UNIT).await;
        (zombie, self.granted(id).await)
    }
}

pub(super) fn key(id: &str) -> EventKey {
    EventKey::of(CONSUMER, "https://conformance.example", id)
}

fn granted(claim: Claim) -> (Lease, Option<Box<History>>) {
    match claim {
        Claim::Granted(lease, history) => (lease, history),
        other => panic!("the claim should be granted, but is {other:?}"),
    }
}

/// Asserts that another holds the event for some time, at most `lease`.
fn assert_held(claim: &Claim, lease: Duration) {
    assert!(matches!(claim, Claim::Held { wait } if *wait > Duration::ZERO && *wait <= lease), "{claim:?}, {lease:?}");
}

fn assert_processed(claim: &Claim) {
    assert!(matches!(claim, Claim::Processed { .. }), "the claim should find it processed, but is {claim:?}");
}

fn assert_dead_lettered(claim: &Claim) {
    assert!(matches!(claim, Claim::DeadLettered { .. }), "the claim should find it dead-lettered, but is {claim:?}");
}

fn trouble() -> Trouble {
    Trouble { id: "order 42".into(), error: "no such customer".into() }
}

pub(super) fn failed(after: Duration, counted: bool) -> Outcome {
    Outcome::Failed { after, counted, trouble: trouble() }
}

pub(super) fn doomed() -> Outcome {
    Outcome::Doomed { reason: Reason::AttemptsExhausted, trouble: trouble() }
}

/// The same name has the same number, over every handle.
pub async fn a_consumer_keeps_its_number<F: StoreFixture>(fixture: &F) {
    let store = fixture.store().await;
    let open = async |store: &Arc<dyn ProcessedStore>, name: &str, days: u64| {
        store.open(name, Duration::from_secs(days * 24 * 3600)).await.expect("the store opens")
    };
    let first = open(&store, "billing", 1).await;
    let names = ["shipping", "Billing", "billing ", "büro", "b"];
    let mut others = Vec::new();
    for name in names {
        others.push(open(&store, name, 1).await);
    }
    let again = fixture.again().await;
    assert_eq!(open(&store, "billing", 1).await, first);
    assert_eq!(open(&again, "billing", 2).await, first, "another retention is no other consumer");
    for (name, number) in names.iter().zip(&others) {
        assert_eq!(open(&again, name, 1).await, *number, "{name:?}");
    }
    others.push(first);
    others.sort_unstable();
    others.dedup();
    assert_eq!(others.len(), 6, "six names, six numbers");
}

/// Two consumers of one event each have it.
pub async fn consumers_do_not_hide_events_from_each_other<F: StoreFixture>(fixture: &F) {
    let store = fixture.store().await;
    let mut numbers = Vec::new();
    for name in ["billing", "shipping"] {
        let consumer = store.open(name, RETENTION).await.expect("the store opens");
        let desk = Desk { store: Arc::clone(&store), consumer, lease: F::UNIT * 10 };
        let request = ClaimRequest { key: EventKey::of(name, "s", "1"), ..desk.request("1") };
        let (lease, history) = granted(desk.ask(request).await);
        assert_eq!((lease.consumer, lease.key, lease.attempt, history), (consumer, request.key, 1, None));
        desk.done(lease, Outcome::Processed).await;
        numbers.push(consumer);
    }
    assert_ne!(numbers[0], numbers[1]);
}

/// Of any number of claims at once, over both handles, one is granted.
pub async fn one_of_many_claims_is_granted<F: StoreFixture>(fixture: &F) {
    let handles = [fixture.store().await, fixture.again().await];
    let desk = Desk::over::<F>(Arc::clone(&handles[0])).await;
    for round in 0..5 {
        let id = round.to_string();
        let claims = (0..16).map(|n| {
            let (store, request, lease) = (Arc::clone(&handles[n % 2]), desk.request(&id), desk.lease);
            tokio::spawn(async move { store.claim(&[request], lease).await })
        });
        let mut answers = Vec::new();
        for claim in claims.collect::<Vec<_>>() {
            answers.extend(claim.await.expect("a claim does not panic").expect("the store answers a claim"));
        }
        let grants = answers.iter().filter(|answer| matches!(answer, Claim::Granted(..))).count();
        let held = answers.iter().filter(|answer| matches!(answer, Claim::Held { .. })).count();
        assert_eq!((grants, held), (1, 15), "{answers:?}");
    }
}

/// A granted event is held until its lease ends.
pub async fn a_claimed_event_is_held<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let (lease, history) = granted(desk.claim("1").await);
    assert_eq!((lease.key, lease.attempt, history), (key("1"), 1, None));
    assert_held(&desk.claim("1").await, desk.lease);
    fixture.pass(desk.lease / 2).await;
    assert_held(&desk.claim("1").await, desk.lease / 2);
    assert_ne!(desk.granted("2").await.key, lease.key, "another event is not held");
}

/// After the lease's end the next claim gets a higher fence, the next attempt, and one crash more.
pub async fn an_expired_lease_is_taken_over<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let mut last = desk.granted("1").await;
    for crashes in 1..=3 {
        fixture.pass(desk.lease + F::UNIT).await;
        let (lease, history) = granted(desk.claim("1").await);
        assert!(lease.fence > last.fence, "{lease:?} after {last:?}");
        assert_eq!(lease.attempt, last.attempt + 1);
        let history = history.expect("a second claim has a history");
        assert_eq!((history.crashes, history.doomed), (crashes, None));
        assert!(history.first >= desk.lease * crashes, "the first claim was {:?} ago", history.first);
        last = lease;
    }
    desk.done(last, Outcome::Processed).await;
}

/// Fences of a key only grow, even over a record that was forgotten.
pub async fn fences_grow_over_forgotten_records<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let admin = fixture.admin().await;
    let mut last = desk.granted("1").await;
    for round in 0..6 {
        match round % 3 {
            0 => desk.done(last, Outcome::Processed).await,
            1 => desk.done(last, failed(Duration::ZERO, true)).await,
            _ => {}
        }
        assert!(admin.forget(CONSUMER, key("1")).await.expect("the store forgets"), "there was a record");
        let lease = desk.granted("1").await;
        assert!(lease.fence > last.fence, "{lease:?} after {last:?}");
        assert_eq!(lease.attempt, 1);
        last = lease;
    }
    assert!(last.fence.get() < 1 << 53, "a fence fits a double: {last:?}");
}

/// A claim repeated with its token is granted the same fence.
pub async fn a_repeated_claim_is_granted_again<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let request = desk.request("1");
    let first = granted(desk.ask(request).await);
    assert_eq!(granted(desk.ask(request).await), first);
    assert_held(&desk.claim("1").await, desk.lease);
    // Its lease is over, but nobody took it: still the same try.
    fixture.pass(desk.lease + F::UNIT).await;
    assert_eq!(granted(desk.ask(request).await).0, first.0);
    assert_held(&desk.claim("1").await, desk.lease);
    // Overtaken: the old token holds nothing any more.
    fixture.pass(desk.lease + F::UNIT).await;
    let second = desk.request("1");
    let next = granted(desk.ask(second).await);
    assert!(next.0.fence > first.0.fence);
    assert_held(&desk.ask(request).await, desk.lease);
    let again = granted(desk.ask(second).await);
    assert_eq!((again.0, again.1.map(|history| history.crashes)), (next.0, Some(1)));
}

/// A processed event is not granted: at once, later, over another handle, to an old token.
pub async fn a_processed_event_is_not_granted<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let request = desk.request("1");
    let lease = granted(desk.ask(request).await).0;
    desk.done(lease, Outcome::Processed).await;
    assert_processed(&desk.claim("1").await);
    assert_processed(&desk.ask(request).await);
    fixture.pass(desk.lease * 2).await;
    let other = Desk::over::<F>(fixture.again().await).await;
    let later = other.claim("1").await;
    assert!(matches!(later, Claim::Processed { ago } if ago >= desk.lease * 2), "it is told how long ago: {later:?}");
}

/// A dead-lettered event is not granted to an ordinary claim: at once, later, over another handle.
pub async fn a_dead_lettered_event_is_not_granted<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    desk.dead_lettered("1").await;
    assert_dead_lettered(&desk.claim("1").await);
    fixture.pass(desk.lease * 2).await;
    let other = Desk::over::<F>(fixture.again().await).await;
    let later = other.claim("1").await;
    assert!(
        matches!(later, Claim::DeadLettered { ago } if ago >= desk.lease * 2),
        "it is told how long ago: {later:?}"
    );
}

/// What failed is not granted before its time, then with its history.
pub async fn a_failed_event_waits_its_time<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let lease = desk.granted("1").await;
    let after = F::UNIT * 6;
    desk.done(lease, failed(after, true)).await;
    let early = desk.claim("1").await;
    assert!(matches!(early, Claim::NotYet { wait } if wait > Duration::ZERO && wait <= after), "{early:?}");
    fixture.pass(F::UNIT * 3).await;
    let early = desk.claim("1").await;
    assert!(matches!(early, Claim::NotYet { wait } if wait > Duration::ZERO && wait <= F::UNIT * 3), "{early:?}");
    fixture.pass(F::UNIT * 4).await;
    let (next, history) = granted(desk.claim("1").await);
    assert!(next.fence > lease.fence);
    assert_eq!(next.attempt, 2);
    let history = history.expect("a second claim has a history");
    assert_eq!((history.crashes, history.trouble, history.doomed), (0, trouble(), None));
    desk.done(next, failed(Duration::ZERO, true)).await;
    assert_eq!(desk.granted("1").await.attempt, 3, "without a delay it is due at once");
}

/// Other data under a known key is a conflict in every state, and changes nothing.
pub async fn other_data_is_a_conflict<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let other = Fingerprint::of(Some("text/plain"), b"other data");
    let claimed = desk.granted("claimed").await;
    desk.done(desk.granted("processed").await, Outcome::Processed).await;
    desk.done(desk.granted("waiting").await, failed(F::UNIT * 12, true)).await;
    desk.done(desk.granted("doomed").await, doomed()).await;
    desk.dead_lettered("dead").await;
    for id in ["claimed", "processed", "waiting", "doomed", "dead"] {
        let request = ClaimRequest { fingerprint: other, ..desk.request(id) };
        assert_eq!(desk.ask(request).await, Claim::Conflict, "{id}");
    }
    assert_held(&desk.claim("claimed").await, desk.lease);
    assert_processed(&desk.claim("processed").await);
    assert!(matches!(desk.claim("waiting").await, Claim::NotYet { .. }));
    assert_held(&desk.claim("doomed").await, desk.lease);
    assert_dead_lettered(&desk.claim("dead").await);
    desk.done(claimed, Outcome::Processed).await;
    // Neither does an expired lease let other data in.
    let expired = desk.granted("expired").await;
    fixture.pass(desk.lease + F::UNIT).await;
    let request = ClaimRequest { fingerprint: other, ..desk.request("expired") };
    assert_eq!(desk.ask(request).await, Claim::Conflict);
    assert!(desk.granted("expired").await.fence > expired.fence);
}

/// A dead letter's own token reopens it, once: attempts start again, and the token is used up.
pub async fn a_reopen_token_works_once<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let (_, lease) = desk.taken_over(fixture, "1").await;
    assert_eq!(lease.attempt, 2);
    desk.done(lease, doomed()).await;
    desk.done(lease, Outcome::DeadLettered).await;
    let reopen = || ClaimRequest { reopen: Some(lease.fence), ..desk.request("1") };
    let request = reopen();
    let (again, history) = granted(desk.ask(request).await);
    assert!(again.fence > lease.fence);
    assert_eq!((again.attempt, history), (1, None), "attempts and crashes start again");
    assert_eq!(granted(desk.ask(request).await).0, again, "its answer was lost: the same grant");
    assert_held(&desk.ask(reopen()).await, desk.lease);
    assert_eq!(desk.record(lease, Outcome::Processed).await, Recorded::Fenced, "the holder before it is overtaken");
    desk.done(again, Outcome::Processed).await;
    assert_processed(&desk.ask(reopen()).await);
    assert_processed(&desk.claim("1").await);
}

/// A reopened event may have other data; from then on that data is its own.
pub async fn a_reopen_takes_other_data<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let lease = desk.dead_lettered("1").await;
    let repaired = Fingerprint::of(Some("text/plain"), b"repaired");
    let request = ClaimRequest { reopen: Some(lease.fence), fingerprint: repaired, ..desk.request("1") };
    let (again, _) = granted(desk.ask(request).await);
    assert_eq!(desk.claim("1").await, Claim::Conflict, "the old data is the other data now");
    desk.done(again, Outcome::Processed).await;
    let duplicate = ClaimRequest { fingerprint: repaired, ..desk.request("1") };
    assert_processed(&desk.ask(duplicate).await);
}

/// A token that is not the dead letter's reopens nothing, nor does any token reopen what is no dead letter.
pub async fn a_wrong_reopen_token_changes_nothing<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let dead = desk.dead_lettered("dead").await;
    for wrong in [dead.fence.get() - 1, dead.fence.get() + 1, 1, (1 << 53) - 1].into_iter().filter_map(NonZeroU64::new)
    {
        let request = ClaimRequest { reopen: Some(wrong), ..desk.request("dead") };
        assert_dead_lettered(&desk.ask(request).await);
    }
    let done = desk.granted("done").await;
    desk.done(done, Outcome::Processed).await;
    let request = ClaimRequest { reopen: Some(done.fence), ..desk.request("done") };
    assert_processed(&desk.ask(request).await);
    let held = desk.granted("held").await;
    let request = ClaimRequest { reopen: Some(held.fence), ..desk.request("held") };
    assert_held(&desk.ask(request).await, desk.lease);
    let waiting = desk.granted("waiting").await;
    desk.done(waiting, failed(F::UNIT * 10, true)).await;
    let request = ClaimRequest { reopen: Some(waiting.fence), ..desk.request("waiting") };
    assert!(matches!(desk.ask(request).await, Claim::NotYet { .. }));
    // The right token still works.
    let request = ClaimRequest { reopen: Some(dead.fence), ..desk.request("dead") };
    granted(desk.ask(request).await);
}

/// Each holder of a doomed event may have placed its letter before it died: any of their tokens reopens it, once in all.
pub async fn any_letter_of_a_doomed_event_reopens_it<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    for (id, which) in [("first", 1), ("second", 2), ("last", 3)] {
        let overtaken = desk.granted(id).await;
        fixture.pass(desk.lease + F::UNIT).await;
        let mut holders = vec![overtaken, desk.granted(id).await];
        desk.done(holders[1], doomed()).await;
        for _ in 0..2 {
            fixture.pass(desk.lease + F::UNIT).await;
            holders.push(desk.granted(id).await);
        }
        desk.done(holders[3], Outcome::DeadLettered).await;
        let with = |holder: usize| ClaimRequest { reopen: Some(holders[holder].fence), ..desk.request(id) };
        assert_dead_lettered(&desk.ask(with(0)).await);
        let (again, history) = granted(desk.ask(with(which)).await);
        assert!(again.fence > holders[3].fence);
        assert_eq!((again.attempt, history), (1, None), "attempts and crashes start again");
        for holder in 1..4 {
            assert_held(&desk.ask(with(holder)).await, desk.lease);
        }
        desk.done(again, Outcome::Processed).await;
        for holder in 1..4 {
            assert_processed(&desk.ask(with(holder)).await);
        }
    }
}

/// A doomed event is held while its lease lives, and then granted as doomed: no attempt, no crash more.
pub async fn a_doomed_event_is_granted_as_doomed<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let lease = desk.granted("1").await;
    desk.done(lease, doomed()).await;
    assert_held(&desk.claim("1").await, desk.lease);
    fixture.pass(desk.lease / 2).await;
    assert_eq!(desk.renew(lease, desk.lease).await, Renewal::Renewed, "its holder places the dead letter");
    fixture.pass(desk.lease - F::UNIT * 2).await;
    assert_held(&desk.claim("1").await, F::UNIT * 2);
    fixture.pass(F::UNIT * 4).await;
    let (next, history) = granted(desk.claim("1").await);
    assert!(next.fence > lease.fence);
    let history = history.expect("a doomed event has a history");
    assert_eq!((next.attempt, history.crashes), (1, 0));
    assert_eq!((history.doomed, history.trouble), (Some(Reason::AttemptsExhausted), trouble()));
    assert_eq!(desk.record(lease, Outcome::DeadLettered).await, Recorded::Fenced);
    desk.done(next, Outcome::DeadLettered).await;
    assert_dead_lettered(&desk.claim("1").await);
}

/// Only the fence that holds the event is renewed.
pub async fn a_lost_lease_is_not_renewed<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let (zombie, holder) = desk.taken_over(fixture, "1").await;
    assert_eq!(desk.renew(zombie, desk.lease * 100).await, Renewal::Lost);
    assert_eq!(desk.renew(holder, desk.lease).await, Renewal::Renewed);
    desk.done(holder, Outcome::Processed).await;
    assert_eq!(desk.renew(holder, desk.lease).await, Renewal::Lost, "what ended is not held");
    let failing = desk.granted("2").await;
    desk.done(failing, failed(Duration::ZERO, true)).await;
    assert_eq!(desk.renew(failing, desk.lease).await, Renewal::Lost, "what waits is not held");
    granted(desk.claim("2").await);
    let forgotten = desk.granted("3").await;
    fixture.admin().await.forget(CONSUMER, key("3")).await.expect("the store forgets");
    assert_eq!(desk.renew(forgotten, desk.lease).await, Renewal::Lost, "what is forgotten is not held");
}

/// Renewing with a shorter lease leaves the longer one.
pub async fn renewing_never_shortens<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let lease = desk.granted("1").await;
    assert_eq!(desk.renew(lease, F::UNIT).await, Renewal::Renewed);
    fixture.pass(F::UNIT * 4).await;
    assert_held(&desk.claim("1").await, F::UNIT * 6);
}

/// A renewed lease keeps others out until its new end, and no longer.
pub async fn a_renewed_lease_holds<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let lease = desk.granted("1").await;
    for _ in 0..3 {
        fixture.pass(F::UNIT * 7).await;
        assert_eq!(desk.renew(lease, desk.lease).await, Renewal::Renewed);
        assert_held(&desk.claim("1").await, desk.lease);
    }
    fixture.pass(desk.lease + F::UNIT).await;
    assert_eq!(desk.granted("1").await.attempt, 2);
}

/// A holder that was overtaken cannot say that it is done, before or after the new holder's end.
pub async fn zombie_complete_is_fenced<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let (zombie, holder) = desk.taken_over(fixture, "1").await;
    for outcome in [Outcome::Processed, doomed(), Outcome::DeadLettered] {
        assert_eq!(desk.record(zombie, outcome).await, Recorded::Fenced);
    }
    assert_held(&desk.claim("1").await, desk.lease);
    desk.done(holder, failed(Duration::ZERO, true)).await;
    assert_eq!(desk.record(zombie, Outcome::Processed).await, Recorded::Fenced);
    let last = desk.granted("1").await;
    desk.done(last, Outcome::Processed).await;
    for outcome in [Outcome::Processed, doomed()] {
        assert_eq!(desk.record(zombie, outcome).await, Recorded::Fenced);
    }
    assert_processed(&desk.claim("1").await);
}

/// A holder that was overtaken cannot give the event back.
pub async fn zombie_release_is_fenced<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let (zombie, holder) = desk.taken_over(fixture, "1").await;
    for counted in [true, false] {
        assert_eq!(desk.record(zombie, failed(Duration::ZERO, counted)).await, Recorded::Fenced);
        assert_held(&desk.claim("1").await, desk.lease);
    }
    desk.done(holder, Outcome::Processed).await;
    assert_eq!(desk.record(zombie, failed(Duration::ZERO, true)).await, Recorded::Fenced);
    assert_processed(&desk.claim("1").await);
}

/// Repeating a record answers that it is done already, and has no second effect.
pub async fn recording_twice_is_already_done<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let outcomes = [Outcome::Processed, failed(F::UNIT * 6, true), failed(Duration::ZERO, false), doomed()];
    for (n, outcome) in outcomes.into_iter().enumerate() {
        let lease = desk.granted(&n.to_string()).await;
        desk.done(lease, outcome.clone()).await;
        for _ in 0..2 {
            assert_eq!(desk.record(lease, outcome.clone()).await, Recorded::AlreadyDone, "{outcome:?}");
        }
    }
    assert_processed(&desk.claim("0").await);
    let waits = desk.claim("1").await;
    assert!(matches!(waits, Claim::NotYet { wait } if wait <= F::UNIT * 6), "{waits:?}");
    assert_eq!(desk.granted("2").await.attempt, 1, "the attempt was given back once");
    let dead = desk.dead_lettered("dead").await;
    assert_eq!(desk.record(dead, Outcome::DeadLettered).await, Recorded::AlreadyDone);
    assert_eq!(desk.record(dead, doomed()).await, Recorded::AlreadyDone);
    assert_dead_lettered(&desk.claim("dead").await);
}

/// After an uncounted failure the next claim is the same attempt with a higher fence.
pub async fn an_uncounted_failure_gives_the_attempt_back<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let mut last = desk.granted("1").await;
    for (counted, attempt) in [(false, 1), (true, 2), (false, 2), (false, 2), (true, 3)] {
        desk.done(last, failed(Duration::ZERO, counted)).await;
        let (lease, history) = granted(desk.claim("1").await);
        assert_eq!(lease.attempt, attempt, "counted: {counted}");
        assert!(lease.fence > last.fence);
        assert_eq!(history.expect("a second claim has a history").crashes, 0);
        last = lease;
    }
}

/// An event that is not doomed is not dead-lettered, whoever says so.
pub async fn a_dead_letter_is_doomed_first<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let lease = desk.granted("1").await;
    assert_eq!(desk.record(lease, Outcome::DeadLettered).await, Recorded::Fenced);
    assert_held(&desk.claim("1").await, desk.lease);
    desk.done(lease, doomed()).await;
    assert_eq!(desk.record(lease, Outcome::Processed).await, Recorded::Fenced, "what is doomed is not processed");
    desk.done(lease, Outcome::DeadLettered).await;
    let processed = desk.granted("2").await;
    desk.done(processed, Outcome::Processed).await;
    for outcome in [doomed(), Outcome::DeadLettered, failed(Duration::ZERO, true)] {
        assert_eq!(desk.record(processed, outcome).await, Recorded::Fenced, "what is processed stays processed");
    }
    assert_processed(&desk.claim("2").await);
}

/// A record that has vanished is said to have, and a failure leaves nothing behind.
pub async fn a_vanished_record_is_reported<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let admin = fixture.admin().await;
    for (id, outcome) in [("1", failed(F::UNIT * 10, true)), ("2", Outcome::Processed), ("3", doomed())] {
        let lease = desk.granted(id).await;
        assert!(admin.forget(CONSUMER, key(id)).await.expect("the store forgets"), "there was a record");
        assert_eq!(desk.record(lease, outcome).await, Recorded::Vanished);
    }
    let lease = desk.granted("1").await;
    assert_eq!(lease.attempt, 1, "after a failure it starts afresh");
    // Vanished and claimed by another since: that is an overtaken holder.
    admin.forget(CONSUMER, key("1")).await.expect("the store forgets");
    desk.granted("1").await;
    assert_eq!(desk.record(lease, Outcome::Processed).await, Recorded::Fenced);
}

/// What ended is remembered although its record had vanished.
pub async fn a_vanished_record_is_written_anew<F: StoreFixture>(fixture: &F) {
    let desk = Desk::at(fixture).await;
    let admin = fixture.admin().await;
    for (id, outcome, then) in [
        ("1", Outcome::Processed, Status::Processed),
        ("2", Outcome::DeadLettered, Status::DeadLettered),
        ("3", doomed(), Status::Doomed),
    ] {
        let lease = desk.granted(id).await;
        admin.forget(CONSUMER, key(id)).await.expect("the store forgets");
        assert_eq!(desk.record(lease, outcome.clone()).await, Recorded::Vanished);
        assert_eq!(desk.record(lease, outcome).await, Recorded::AlreadyDone, "it was written");
        let view = admin.look_up(CONSUMER, key(id)).await.expect("the store looks up").expect("there is a record");
        assert_eq!((view.status, view.fence), (then, lease.fence.get()));
    }
    assert_processed(&desk.claim("1").await);
    assert_dead_lettered(&desk.claim("2").await);
    let other = ClaimRequest { fingerprint: Fingerprint::of(None, b"other"), ..desk.request("1") };
    // Its data is not known any more, so none is other data.
    assert_processed(&desk.ask(other).await);
    let history = granted(desk.claim("3").await).1.expect("a doomed event has a history");
    assert_eq!(history.doomed, Some(Reason::AttemptsExhausted), "its dead letter is not placed");
}
