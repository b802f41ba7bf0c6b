//! Cases of `renew` and `record`: what a holder may write, and what one that was overtaken may not.

use std::time::Duration;

use hapax::{Claim, ClaimRequest, Fingerprint, Outcome, Reason, Recorded, Renewal, Status};

use super::{
    CONSUMER, Desk, StoreFixture, assert_dead_lettered, assert_held, assert_processed, doomed, failed, granted, key,
};

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
