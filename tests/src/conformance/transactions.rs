//! The suite for stores whose transactions carry the handler's effects: one case for each clause on
//! `hapax::TransactionalStore`.
//!
//! Adding a case: one function here, one line in [`transactional_cases!`](crate::transactional_cases), its name in the
//! clause.

use async_trait::async_trait;
use hapax::{Claim, Outcome, ProcessedStore, Recorded, Status, TransactionalStore};

use super::store::{CONSUMER, Desk, StoreFixture, failed, key};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

/// A store fixture that can write rows of its own beside the records.
#[async_trait]
pub trait TransactionalFixture: StoreFixture {
    /// The store's own type.
    type Store: TransactionalStore;

    /// The store, on the same records as [`StoreFixture::store`].
    async fn transactional(&self) -> Self::Store;

    /// Writes a row through the transaction, as a handler would.
    async fn write(&self, tx: &mut <Self::Store as TransactionalStore>::Tx, row: &str);

    /// The rows that others see, sorted.
    async fn rows(&self) -> Vec<String>;
}

/// The list of cases, in the order of the contract; hands it to another macro.
#[doc(hidden)]
#[macro_export]
macro_rules! transactional_cases {
    ($then:ident $($with:tt)*) => {
        $crate::$then! { $($with)*
            effects_and_mark_commit_together
            a_rolled_back_transaction_leaves_nothing
            a_fenced_transaction_leaves_nothing
            many_marks_commit_together
            recording_and_committing_at_once_is_both
            a_commit_claims_the_next_event
            a_commit_claims_nothing_that_has_a_record
        }
    };
}

crate::transactional_cases! { conformance_list [TransactionalFixture] }

async fn desk<F: TransactionalFixture>(store: &F::Store) -> Desk {
    Desk::over::<F>(Arc::new(store.clone()) as Arc<dyn ProcessedStore>).await
}

async fn status<F: TransactionalFixture>(fixture: &F, id: &str) -> Option<Status> {
    let view = fixture.admin().await.look_up(CONSUMER, key(id)).await.expect("the store looks up");
    view.map(|view| view.status)
}

/// A transaction in which the handler wrote `row` and gave it back.
async fn written<F: TransactionalFixture>(
    fixture: &F,
    store: &F::Store,
    row: &str,
) -> <F::Store as TransactionalStore>::Lent {
    let (mut tx, lent) = store.begin().await.expect("a transaction begins");
    fixture.write(&mut tx, row).await;
    drop(tx);
    lent
}

/// Neither rows nor outcomes are visible before `commit`; afterwards both are.
pub async fn effects_and_mark_commit_together<F: TransactionalFixture>(fixture: &F) {
    let store = fixture.transactional().await;
    let desk = desk::<F>(&store).await;
    let leases = [desk.granted("1").await, desk.granted("2").await];
    let mut lent = written(fixture, &store, "paid").await;
    let batch = [(leases[0], Outcome::Processed), (leases[1], failed(Duration::ZERO, true))];
    let answers = store.record_in(&mut lent, &batch).await.expect("the outcomes are recorded");
    assert_eq!(answers, [Recorded::Done, Recorded::Done]);
    assert_eq!(fixture.rows().await, [""; 0], "nothing is visible before commit");
    assert_eq!(status(fixture, "1").await, Some(Status::Claimed));
    store.commit(lent).await.expect("the transaction commits");
    assert_eq!(fixture.rows().await, ["paid"]);
    assert_eq!(status(fixture, "1").await, Some(Status::Processed));
    assert_eq!(status(fixture, "2").await, Some(Status::Waiting));
    assert_eq!(desk.record(leases[0], Outcome::Processed).await, Recorded::AlreadyDone);
}

/// A transaction that is dropped leaves neither rows nor outcomes, at whatever point; the lease is as it was.
pub async fn a_rolled_back_transaction_leaves_nothing<F: TransactionalFixture>(fixture: &F) {
    let store = fixture.transactional().await;
    let desk = desk::<F>(&store).await;
    let lease = desk.granted("1").await;
    // The handler failed, and the transaction came back.
    drop(written(fixture, &store, "rolled back").await);
    // The record was written, and then the caller went away.
    let mut lent = written(fixture, &store, "rolled back too").await;
    let answers = store.record_in(&mut lent, &[(lease, Outcome::Processed)]).await.expect("the outcome is recorded");
    assert_eq!(answers, [Recorded::Done]);
    drop(lent);
    // The caller went away before the handler.
    let (mut tx, lent) = store.begin().await.expect("a transaction begins");
    drop(lent);
    fixture.write(&mut tx, "rolled back as well").await;
    drop(tx);
    // The next transaction finds the store as it was.
    let mut lent = written(fixture, &store, "kept").await;
    assert_eq!(status(fixture, "1").await, Some(Status::Claimed));
    let answers = store.record_in(&mut lent, &[(lease, Outcome::Processed)]).await.expect("the outcome is recorded");
    assert_eq!(answers, [Recorded::Done], "the lease is as it was");
    store.commit(lent).await.expect("the transaction commits");
    assert_eq!(fixture.rows().await, ["kept"]);
}

/// A holder that was overtaken is told inside its transaction; dropping it leaves nothing of its effects.
pub async fn a_fenced_transaction_leaves_nothing<F: TransactionalFixture>(fixture: &F) {
    let store = fixture.transactional().await;
    let desk = desk::<F>(&store).await;
    let zombie = desk.granted("1").await;
    fixture.pass(F::UNIT * 11).await;
    let holder = desk.granted("1").await;
    let mut lent = written(fixture, &store, "by the zombie").await;
    let answers = store.record_in(&mut lent, &[(zombie, Outcome::Processed)]).await.expect("the store answers");
    assert_eq!(answers, [Recorded::Fenced]);
    drop(lent);
    let mut lent = written(fixture, &store, "by the holder").await;
    let answers = store.record_in(&mut lent, &[(holder, Outcome::Processed)]).await.expect("the store answers");
    assert_eq!(answers, [Recorded::Done]);
    store.commit(lent).await.expect("the transaction commits");
    assert_eq!(fixture.rows().await, ["by the holder"]);
}

/// A batch handler's marks: each is answered for itself, none is visible before `commit`, and one that is fenced says so
/// beside the others.
pub async fn many_marks_commit_together<F: TransactionalFixture>(fixture: &F) {
    const EVENTS: usize = 70;
    let store = fixture.transactional().await;
    let desk = desk::<F>(&store).await;
    let ids: Vec<_> = (0..EVENTS).map(|n| n.to_string()).collect();
    let mut leases = Vec::new();
    for id in &ids {
        leases.push(desk.granted(id).await);
    }
    let marks: Vec<_> = leases.iter().map(|lease| (*lease, Outcome::Processed)).collect();
    // One is fenced: the caller rolls back.
    let fenced = EVENTS / 2;
    let mut stale = marks.clone();
    stale[fenced].0.fence = NonZeroU64::MIN;
    let mut lent = written(fixture, &store, "rolled back").await;
    let answers = store.record_in(&mut lent, &stale).await.expect("the store answers for each");
    for (n, answer) in answers.iter().enumerate() {
        let wanted = if n == fenced { Recorded::Fenced } else { Recorded::Done };
        assert_eq!(*answer, wanted, "of event {n}");
    }
    drop(lent);
    let mut lent = written(fixture, &store, "all").await;
    let answers = store.record_in(&mut lent, &marks).await.expect("the outcomes are recorded");
    assert_eq!(answers, [Recorded::Done; EVENTS]);
    assert_eq!(status(fixture, "0").await, Some(Status::Claimed), "nothing is visible before commit");
    store.commit(lent).await.expect("the transaction commits");
    for id in &ids {
        assert_eq!(status(fixture, id).await, Some(Status::Processed), "of event {id}");
    }
    assert_eq!(fixture.rows().await, ["all"]);
}

/// In one call as in two: what was marked is there with its effects, what was not left nothing of them, for one event and
/// for many.
pub async fn recording_and_committing_at_once_is_both<F: TransactionalFixture>(fixture: &F) {
    let store = fixture.transactional().await;
    let desk = desk::<F>(&store).await;
    let done = |lease| (lease, Outcome::Processed);
    let zombie = desk.granted("1").await;
    fixture.pass(F::UNIT * 11).await;
    let (holder, other) = (desk.granted("1").await, desk.granted("2").await);
    for (row, batch, wanted) in [
        ("by the zombie", vec![done(zombie)], vec![Recorded::Fenced]),
        ("beside the zombie", vec![done(other), done(zombie)], vec![Recorded::Done, Recorded::Fenced]),
    ] {
        let lent = written(fixture, &store, row).await;
        let answers = store.record_and_commit(lent, &batch).await.expect("the store answers");
        assert_eq!(answers, wanted, "{row}");
        assert_eq!(status(fixture, "2").await, Some(Status::Claimed), "{row}: nothing is committed");
    }
    let lent = written(fixture, &store, "one").await;
    let answers = store.record_and_commit(lent, &[done(holder)]).await.expect("the outcome is recorded");
    assert_eq!(answers, [Recorded::Done]);
    let lent = written(fixture, &store, "one again").await;
    let answers = store.record_and_commit(lent, &[done(holder)]).await.expect("the store answers");
    assert_eq!(answers, [Recorded::AlreadyDone]);
    let third = desk.granted("3").await;
    let lent = written(fixture, &store, "two").await;
    let batch = [done(other), (third, failed(Duration::ZERO, true))];
    let answers = store.record_and_commit(lent, &batch).await.expect("the outcomes are recorded");
    assert_eq!(answers, [Recorded::Done; 2]);
    let vanished = desk.granted("4").await;
    fixture.admin().await.forget(CONSUMER, key("4")).await.expect("the store forgets");
    let lent = written(fixture, &store, "vanished").await;
    let answers = store.record_and_commit(lent, &[done(vanished)]).await.expect("the outcome is recorded");
    assert_eq!(answers, [Recorded::Vanished]);
    assert_eq!(fixture.rows().await, ["one", "two", "vanished"]);
    for (id, wanted) in
        [("1", Status::Processed), ("2", Status::Processed), ("3", Status::Waiting), ("4", Status::Processed)]
    {
        assert_eq!(status(fixture, id).await, Some(wanted), "of event {id}");
    }
}

/// A claim that travels with a commit is one like any other: it holds, its token is granted the same again, and it ends with
/// its outcome. Without the commit there is none. A store that makes no such claims commits all the same.
pub async fn a_commit_claims_the_next_event<F: TransactionalFixture>(fixture: &F) {
    let store = fixture.transactional().await;
    let claims = store.probe().await.expect("the store answers").claims_at_commit;
    let desk = desk::<F>(&store).await;
    let zombie = desk.granted("1").await;
    fixture.pass(F::UNIT * 11).await;
    let holder = desk.granted("1").await;
    let done = |lease| [(lease, Outcome::Processed)];
    let next = desk.request("2");
    let lent = written(fixture, &store, "by the zombie").await;
    let answer = store.commit_and_claim(lent, &done(zombie), &next, F::UNIT * 10).await.expect("the store answers");
    assert_eq!(answer, (vec![Recorded::Fenced], None));
    assert_eq!(status(fixture, "2").await, None, "nothing was committed, so nothing was claimed");
    let lent = written(fixture, &store, "kept").await;
    let (answers, granted) =
        store.commit_and_claim(lent, &done(holder), &next, F::UNIT * 10).await.expect("the outcome is recorded");
    assert_eq!(answers, [Recorded::Done]);
    assert_eq!(fixture.rows().await, ["kept"]);
    assert_eq!(granted.is_some(), claims, "what the store says of itself");
    let Some(lease) = granted else { return };
    assert_eq!((lease.consumer, lease.key, lease.attempt), (next.consumer, next.key, 1));
    assert!(matches!(desk.claim("2").await, Claim::Held { .. }), "another asks");
    assert_eq!(desk.ask(next).await, Claim::Granted(lease, None), "its own token asks");
    assert_eq!(desk.record(lease, Outcome::Processed).await, Recorded::Done);
    // Nobody ran it: its claim counts as any other's.
    let (fourth, next) = (desk.granted("4").await, desk.request("5"));
    let lent = written(fixture, &store, "of 4").await;
    let (_, granted) =
        store.commit_and_claim(lent, &done(fourth), &next, F::UNIT * 10).await.expect("the outcome is recorded");
    let lease = granted.expect("it claims at a commit");
    fixture.pass(F::UNIT * 11).await;
    match desk.claim("5").await {
        Claim::Granted(after, Some(history)) => {
            assert!(after.fence > lease.fence, "fences grow");
            assert_eq!((after.attempt, history.crashes), (2, 1));
        }
        other => panic!("its lease is over: {other:?}"),
    }
}

/// What is known already, in whatever state, is left as it is, and the commit takes place.
pub async fn a_commit_claims_nothing_that_has_a_record<F: TransactionalFixture>(fixture: &F) {
    let store = fixture.transactional().await;
    let desk = desk::<F>(&store).await;
    let (held, over, waiting) = (desk.granted("held").await, desk.granted("over").await, desk.granted("waiting").await);
    assert_eq!(desk.record(over, Outcome::Processed).await, Recorded::Done);
    assert_eq!(desk.record(waiting, failed(Duration::ZERO, true)).await, Recorded::Done);
    for (id, wanted) in [("held", Status::Claimed), ("over", Status::Processed), ("waiting", Status::Waiting)] {
        let lease = desk.granted(&format!("beside {id}")).await;
        let lent = written(fixture, &store, id).await;
        let answer =
            store.commit_and_claim(lent, &[(lease, Outcome::Processed)], &desk.request(id), F::UNIT * 10).await;
        assert_eq!(answer.expect("the outcome is recorded"), (vec![Recorded::Done], None), "of {id}");
        assert_eq!(status(fixture, id).await, Some(wanted), "of {id}");
    }
    assert_eq!(fixture.rows().await, ["held", "over", "waiting"]);
    assert_eq!(desk.record(held, Outcome::Processed).await, Recorded::Done, "its holder holds it");
}
