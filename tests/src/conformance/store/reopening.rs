//! Cases of `claim` about dead letters: doomed events, and letters that come back with their token.

use std::num::NonZeroU64;

use hapax::{Claim, ClaimRequest, Fingerprint, Outcome, Reason, Recorded, Renewal};

use super::{
    Desk, StoreFixture, assert_dead_lettered, assert_held, assert_processed, doomed, failed, granted, trouble,
};

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
    fixture.pass(desk.lease - F::UNIT * 4).await;
    assert_held(&desk.claim("1").await, F::UNIT * 4);
    fixture.pass(F::UNIT * 5).await;
    let (next, history) = granted(desk.claim("1").await);
    assert!(next.fence > lease.fence);
    let history = history.expect("a doomed event has a history");
    assert_eq!((next.attempt, history.crashes), (1, 0));
    assert_eq!((history.doomed, history.trouble), (Some(Reason::AttemptsExhausted), trouble()));
    assert_eq!(desk.record(lease, Outcome::DeadLettered).await, Recorded::Fenced);
    desk.done(next, Outcome::DeadLettered).await;
    assert_dead_lettered(&desk.claim("1").await);
}
