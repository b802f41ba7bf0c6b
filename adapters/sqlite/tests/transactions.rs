//! Effects and mark commit together or not at all, and no transaction is left open, whatever the handler does.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use fixture::{Folder, LEASE, claim, failed, key, lease, process, store};
use hapax::{Claim, ErrorKind, Outcome, ProcessedStore, Recorded, Status, StoreAdmin, TransactionalStore};
use hapax_sqlite::{SqliteStore, SqliteTx, sqlx};
use tokio::sync::Semaphore;

async fn with_effects(folder: &Folder) -> (SqliteStore, fixture::Clock, hapax::ConsumerId) {
    let (store, clock, consumer) = store(folder).await;
    sqlx::query("CREATE TABLE effects (event INTEGER NOT NULL)").execute(store.pool()).await.unwrap();
    (store, clock, consumer)
}

async fn effect(tx: &mut SqliteTx, event: i64) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO effects VALUES (?)").bind(event).execute(&mut **tx).await.map(drop)
}

async fn effects(store: &SqliteStore) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM effects").fetch_one(store.pool()).await.unwrap()
}

async fn status(store: &SqliteStore, n: u64) -> Option<Status> {
    store.look_up("billing", key(n)).await.unwrap().map(|view| view.status)
}

#[tokio::test]
async fn effects_and_mark_commit_together() {
    let folder = Folder::new();
    let (store, _clock, consumer) = with_effects(&folder).await;
    let lease = lease(&store, consumer, 1).await;
    let (mut tx, mut lent) = store.begin().await.unwrap();
    effect(&mut tx, 1).await.unwrap();
    drop(tx);
    assert_eq!(store.record_in(&mut lent, &[(lease, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    assert_eq!((effects(&store).await, status(&store, 1).await), (0, Some(Status::Claimed)), "nothing is visible yet");
    store.commit(lent).await.unwrap();
    assert_eq!((effects(&store).await, status(&store, 1).await), (1, Some(Status::Processed)));
}

#[tokio::test]
async fn rollback_leaves_no_completed_flag() {
    let folder = Folder::new();
    let (store, _clock, consumer) = with_effects(&folder).await;
    let held = lease(&store, consumer, 1).await;
    for tx_first in [true, false] {
        let (mut tx, mut lent) = store.begin().await.unwrap();
        effect(&mut tx, 1).await.unwrap();
        if tx_first {
            drop(tx);
            store.record_in(&mut lent, &[(held, Outcome::Processed)]).await.unwrap();
            drop(lent);
        } else {
            drop(lent);
            drop(tx);
        }
        assert_eq!((effects(&store).await, status(&store, 1).await), (0, Some(Status::Claimed)));
    }
    assert_eq!(store.record(&[(held, failed())]).await.unwrap(), [Recorded::Done]);
}

#[tokio::test]
async fn a_fenced_transaction_leaves_nothing() {
    let folder = Folder::new();
    let (store, clock, consumer) = with_effects(&folder).await;
    let zombie = lease(&store, consumer, 1).await;
    clock.advance(LEASE);
    assert!(matches!(claim(&store, consumer, 1, 7).await, Claim::Granted(..)));
    let (mut tx, mut lent) = store.begin().await.unwrap();
    effect(&mut tx, 1).await.unwrap();
    drop(tx);
    assert_eq!(store.record_in(&mut lent, &[(zombie, Outcome::Processed)]).await.unwrap(), [Recorded::Fenced]);
    drop(lent);
    assert_eq!((effects(&store).await, status(&store, 1).await), (0, Some(Status::Claimed)));
}

#[tokio::test]
async fn a_savepoint_takes_back_a_part_only() {
    let folder = Folder::new();
    let (store, _clock, _) = with_effects(&folder).await;
    let (mut tx, lent) = store.begin().await.unwrap();
    effect(&mut tx, 1).await.unwrap();
    for keep in [false, true] {
        let mut part = tx.savepoint().await.unwrap();
        sqlx::query("INSERT INTO effects VALUES (2)").execute(&mut *part).await.unwrap();
        if keep {
            part.commit().await.unwrap();
        }
    }
    drop(tx);
    store.commit(lent).await.unwrap();
    assert_eq!(effects(&store).await, 2);
}

/// A handler that ends the transaction itself must not leave effects without the mark.
#[tokio::test]
async fn a_commit_by_the_handler_commits_nothing() {
    let folder = Folder::new();
    let (store, _clock, consumer) = with_effects(&folder).await;
    let held = lease(&store, consumer, 1).await;
    for sql in ["COMMIT", "ROLLBACK"] {
        let (mut tx, mut lent) = store.begin().await.unwrap();
        effect(&mut tx, 1).await.unwrap();
        let ended = sqlx::raw_sql(sql).execute(&mut *tx).await;
        assert_eq!(ended.is_err(), sql == "COMMIT");
        let _refused_too = effect(&mut tx, 2).await.is_err();
        drop(tx);
        let refused = store.record_in(&mut lent, &[(held, Outcome::Processed)]).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Rejected, "{refused}");
        drop(lent);
        assert_eq!((effects(&store).await, status(&store, 1).await), (0, Some(Status::Claimed)), "{sql}");
    }
    // The next one is whole again.
    let (mut tx, mut lent) = store.begin().await.unwrap();
    effect(&mut tx, 3).await.unwrap();
    drop(tx);
    assert_eq!(store.record_in(&mut lent, &[(held, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    store.commit(lent).await.unwrap();
    assert_eq!(effects(&store).await, 1);
}

/// The handler's future may be dropped at any await: by a timeout, a lost lease, a shutdown.
#[tokio::test]
async fn a_handler_dropped_at_any_await_leaves_no_open_transaction() {
    let folder = Folder::new();
    let (store, _clock, consumer) = with_effects(&folder).await;
    let mut finished = false;
    for polls in 0..200 {
        let attempt = async {
            let (mut tx, lent) = store.begin().await?;
            effect(&mut tx, 1).await.unwrap();
            let mut part = tx.savepoint().await.unwrap();
            sqlx::query("INSERT INTO effects VALUES (2)").execute(&mut *part).await.unwrap();
            part.commit().await.unwrap();
            drop(tx);
            tokio::task::yield_now().await;
            drop(lent);
            Ok::<_, hapax::Error>(())
        };
        finished |= dropped_after(polls, attempt).await;
        process(&store, consumer, polls..polls + 1).await;
        assert_eq!(effects(&store).await, 0);
        if finished {
            return;
        }
    }
    panic!("the handler never came to its end");
}

/// Polls `future` at most `polls` times, then drops it. Answers whether it ended.
async fn dropped_after(polls: u64, future: impl Future) -> bool {
    let mut future = pin!(future);
    for _ in 0..polls {
        if future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
            return true;
        }
        // SQLite works on a thread of its own: give it the time to answer.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    false
}

#[tokio::test]
async fn a_transaction_kept_in_a_task_is_told_and_later_rolled_back() {
    let folder = Folder::new();
    let (store, _clock, consumer) = with_effects(&folder).await;
    let held = lease(&store, consumer, 1).await;
    let (mut tx, mut lent) = store.begin().await.unwrap();
    effect(&mut tx, 1).await.unwrap();
    let (let_go, wait) = tokio::sync::oneshot::channel::<()>();
    let keeper = tokio::spawn(async move {
        wait.await.unwrap();
        drop(tx);
    });
    let refused = store.record_in(&mut lent, &[(held, Outcome::Processed)]).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Rejected, "{refused}");
    drop(lent);
    let_go.send(()).unwrap();
    keeper.await.unwrap();
    assert_eq!(store.record(&[(held, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    assert_eq!(effects(&store).await, 0);
}

/// Renewals of other events come between transactions, however many of these wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_of_transactions_does_not_keep_renewals_out() {
    let folder = Folder::new();
    let (store, _clock, consumer) = with_effects(&folder).await;
    let held = lease(&store, consumer, 1).await;
    let (first, lent) = store.begin().await.unwrap();
    // So many may go before the renewal; the next one stays in its transaction until that is done.
    let may_go = Arc::new(Semaphore::new(3));
    let queue: Vec<_> = (0..50)
        .map(|event| {
            let (store, may_go) = (store.clone(), Arc::clone(&may_go));
            tokio::spawn(async move {
                let (mut tx, lent) = store.begin().await.unwrap();
                may_go.acquire().await.unwrap().forget();
                effect(&mut tx, event).await.unwrap();
                drop(tx);
                store.commit(lent).await.unwrap();
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let renewing = {
        let store = store.clone();
        tokio::spawn(async move { store.renew(&[held], LEASE).await.unwrap() })
    };
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop((first, lent));
    let renewed = tokio::time::timeout(Duration::from_secs(20), renewing).await;
    renewed.expect("at most three transactions go before a renewal").unwrap();
    may_go.add_permits(50);
    for transaction in queue {
        transaction.await.unwrap();
    }
    assert_eq!(effects(&store).await, 50);
}

#[tokio::test]
async fn a_deferred_constraint_fails_the_commit_and_leaves_nothing() {
    let folder = Folder::new();
    let (store, _clock, consumer) = with_effects(&folder).await;
    let tables = "CREATE TABLE parents (id INTEGER PRIMARY KEY); CREATE TABLE children \
        (parent INTEGER REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED)";
    sqlx::raw_sql(tables).execute(store.pool()).await.unwrap();
    let held = lease(&store, consumer, 1).await;
    let (mut tx, mut lent) = store.begin().await.unwrap();
    sqlx::query("INSERT INTO children VALUES (1)").execute(&mut *tx).await.unwrap();
    drop(tx);
    store.record_in(&mut lent, &[(held, Outcome::Processed)]).await.unwrap();
    assert_eq!(store.commit(lent).await.unwrap_err().kind(), ErrorKind::Rejected);
    assert_eq!(status(&store, 1).await, Some(Status::Claimed));
    process(&store, consumer, 2..3).await;
}

/// A handler that goes on after SQLite found no room: what it wrote and the mark still go together.
#[tokio::test]
async fn a_full_disk_inside_a_handler_is_all_or_nothing() {
    let folder = Folder::new();
    let (store, _clock, consumer) = with_effects(&folder).await;
    let held = lease(&store, consumer, 1).await;
    let (mut tx, mut lent) = store.begin().await.unwrap();
    sqlx::query("PRAGMA max_page_count = 20").execute(&mut *tx).await.unwrap();
    effect(&mut tx, 1).await.unwrap();
    let full = sqlx::query("INSERT INTO effects SELECT zeroblob(200000)").execute(&mut *tx).await.unwrap_err();
    assert_eq!(full.as_database_error().unwrap().code().unwrap(), "13", "{full}");
    let goes_on = effect(&mut tx, 2).await.is_ok();
    drop(tx);
    let recorded = store.record_in(&mut lent, &[(held, Outcome::Processed)]).await;
    if recorded.is_ok() {
        store.commit(lent).await.unwrap();
        let written = 1 + i64::from(goes_on);
        assert_eq!((effects(&store).await, status(&store, 1).await), (written, Some(Status::Processed)));
    } else {
        drop(lent);
        assert_eq!((effects(&store).await, status(&store, 1).await), (0, Some(Status::Claimed)));
    }
}
