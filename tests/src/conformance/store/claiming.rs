//! Cases of `open` and `claim`: who gets an event, and when.

use std::sync::Arc;
use std::time::Duration;

use hapax::{Claim, ClaimRequest, EventKey, Fingerprint, Outcome, ProcessedStore};

use super::{
    CONSUMER, Desk, RETENTION, StoreFixture, assert_dead_lettered, assert_held, assert_processed, doomed, failed,
    granted, key, trouble,
};

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
