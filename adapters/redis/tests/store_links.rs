//! Connections that break under the store: what was under way is unknown, can be repeated, and the next call finds a
//! connection again.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod store_fixture;

use std::time::Duration;

use hapax::{Claim, ClaimRequest, ErrorKind, Outcome, ProcessedStore, Recorded};
use hapax_redis::redis::cmd;
use hapax_redis::{RedisServer, RedisStore};
use hapax_testkit::proxy::{After, Proxy};
use store_fixture::{LEASE, Private, lease, open, process, request};
use tokio::time::{Instant, timeout};

/// How long anything may take before a test fails.
const SOON: Duration = Duration::from_secs(10);
/// How long a connection may be silent where that is what a test waits for.
const SILENCE: Duration = Duration::from_secs(1);

/// A store that gives a silent connection up after this long.
async fn behind(server: &Private, silence_max: Duration) -> (Proxy, RedisStore) {
    let proxy = Proxy::start(format!("127.0.0.1:{}", server.port())).await.unwrap();
    let at = RedisServer::at(format!("redis://{}", proxy.address()).parse().unwrap()).unwrap();
    let at = at.response_timeout(silence_max).connect_timeout(Duration::from_secs(5));
    let store = RedisStore::builder(at).connect().await.unwrap();
    (proxy, store)
}

/// Asks until there is an answer.
async fn claimed(store: &RedisStore, asked: ClaimRequest) -> Claim {
    loop {
        match store.claim(&[asked], LEASE).await {
            Ok(mut claims) => return claims.remove(0),
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
    }
}

fn may_have_taken_place(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Unknown | ErrorKind::Unavailable)
}

#[tokio::test]
async fn a_claim_whose_answer_was_lost_is_granted_again() {
    let server = Private::start(&[]).await;
    let (proxy, store) = behind(&server, SILENCE).await;
    let consumer = open(&store).await;
    // The server knows the scripts from here on, so that the next request is the call itself.
    process(&store, consumer, 0..1).await;
    proxy.cut_after_request(After::Reply);
    let asked = request(consumer, 1, 4711);
    let lost = store.claim(&[asked], LEASE).await.unwrap_err();
    assert!(may_have_taken_place(lost.kind()), "{lost}");
    proxy.heal();
    let Claim::Granted(granted, None) = store.claim(&[asked], LEASE).await.unwrap().remove(0) else {
        panic!("granted")
    };
    assert_eq!(granted.attempt, 1, "the first claim was applied, and this is the same");
    proxy.cut_after_request(After::Reply);
    let lost = store.record(&[(granted, Outcome::Processed)]).await.unwrap_err();
    assert!(may_have_taken_place(lost.kind()), "{lost}");
    proxy.heal();
    assert_eq!(store.record(&[(granted, Outcome::Processed)]).await.unwrap(), [Recorded::AlreadyDone]);
}

#[tokio::test]
async fn a_request_cut_in_the_middle_changes_nothing() {
    let server = Private::start(&[]).await;
    let (proxy, store) = behind(&server, SILENCE).await;
    let consumer = open(&store).await;
    lease(&store, consumer, 0).await;
    let batch: Vec<_> = (10..300).map(|n| request(consumer, n, 1)).collect();
    proxy.cut_after_request(After::Bytes(9_000));
    let lost = store.claim(&batch, LEASE).await.unwrap_err();
    assert!(may_have_taken_place(lost.kind()), "{lost}");
    proxy.heal();
    let keys: u64 = server.ask("DBSIZE").await;
    assert!(keys < 10, "{keys} keys: half a request is none");
    assert!(store.claim(&batch, LEASE).await.unwrap().iter().all(|claim| matches!(claim, Claim::Granted(_, None))));
}

#[tokio::test]
async fn a_server_that_is_silent_is_given_up_in_time_and_found_again() {
    let server = Private::start(&[]).await;
    let (proxy, store) = behind(&server, SILENCE).await;
    let consumer = open(&store).await;
    lease(&store, consumer, 0).await;
    proxy.freeze();
    let begun = Instant::now();
    let unknown = store.claim(&[request(consumer, 1, 1)], LEASE).await.unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::Unknown, "{unknown}");
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    let accepted = proxy.accepted();
    proxy.heal();
    let granted = timeout(SOON, claimed(&store, request(consumer, 1, 1))).await;
    assert!(matches!(granted.unwrap(), Claim::Granted(..)));
    assert!(proxy.accepted() > accepted, "over a new connection: nobody knows what still comes over the old one");
}

/// Callers have deadlines of their own, shorter than the link's: what they drop unanswered counts as silence too.
#[tokio::test]
async fn a_silent_connection_is_given_up_although_its_callers_wait_for_less() {
    let server = Private::start(&[]).await;
    for patience in [Duration::from_millis(1200), Duration::from_millis(300)] {
        let proxy = Proxy::start(format!("127.0.0.1:{}", server.port())).await.unwrap();
        let at = RedisServer::at(format!("redis://{}", proxy.address()).parse().unwrap()).unwrap();
        let store = RedisStore::builder(at).prefix(store_fixture::unique()).connect().await.unwrap();
        let consumer = open(&store).await;
        lease(&store, consumer, 0).await;
        let accepted = proxy.accepted();
        proxy.freeze();
        let begun = Instant::now();
        let ask = || async { timeout(patience, store.claim(&[request(consumer, 1, 1)], LEASE)).await };
        while begun.elapsed() < Duration::from_millis(1100) {
            assert!(ask().await.is_err(), "no byte flows");
        }
        // A call or two more, where this test was slower than its clock.
        let renewed = async {
            while proxy.accepted() == accepted {
                assert!(ask().await.is_err(), "no byte flows");
            }
        };
        timeout(SOON, renewed).await.expect("the next call does not wait on the silent connection again");
        proxy.heal();
        let granted =
            timeout(SOON, claimed(&store, request(consumer, 1, 1))).await.expect("the new connection is good");
        assert!(matches!(granted, Claim::Granted(..)));
    }
}

#[tokio::test]
async fn a_caller_in_a_hurry_does_not_cost_the_connection() {
    let server = Private::start(&[]).await;
    // Far longer than the proxy is silent, however slowly this test runs.
    let (proxy, store) = behind(&server, SOON).await;
    let consumer = open(&store).await;
    lease(&store, consumer, 0).await;
    let accepted = proxy.accepted();
    for _ in 0..3 {
        proxy.freeze();
        assert!(timeout(Duration::from_millis(100), store.claim(&[request(consumer, 1, 1)], LEASE)).await.is_err());
        proxy.heal();
        let granted = timeout(SOON, store.claim(&[request(consumer, 1, 1)], LEASE)).await;
        assert!(matches!(granted.unwrap().unwrap().remove(0), Claim::Granted(..)));
    }
    assert_eq!(proxy.accepted(), accepted);
}

#[tokio::test]
async fn while_the_server_is_away_calls_fail_soon_and_the_next_one_after_works() {
    let mut server = Private::start(&[]).await;
    let store = server.store().await;
    let consumer = open(&store).await;
    let held = lease(&store, consumer, 1).await;
    server.kill();
    for _ in 0..3 {
        let begun = Instant::now();
        let calls = (0..8).map(|_| store.renew(std::slice::from_ref(&held), LEASE));
        for answer in futures_util::future::join_all(calls).await {
            assert_eq!(answer.unwrap_err().kind(), ErrorKind::Unavailable);
        }
        assert!(begun.elapsed() < Duration::from_secs(3), "eight calls share a try: {:?}", begun.elapsed());
    }
    server.run().await;
    let begun = Instant::now();
    assert_eq!(store.record(&[(held, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_call_that_is_dropped_disturbs_no_other() {
    // https://github.com/redis-rs/redis-rs/issues/851: an answer that nobody waits for must not reach another.
    let server = Private::start(&[]).await;
    let store = server.store().await;
    let consumer = open(&store).await;
    for n in 0..200_u64 {
        let batch = [request(consumer, 1_000 + n, 1)];
        let dropped = store.claim(&batch, LEASE);
        tokio::select! { biased; _ = dropped => {} () = tokio::task::yield_now() => {} }
        assert_eq!(lease(&store, consumer, n).await.key, store_fixture::key(n));
    }
}

#[tokio::test]
async fn the_last_handle_closes_its_connection() {
    let server = Private::start(&[]).await;
    let clients = async || -> usize {
        let list: String = server.try_ask(cmd("CLIENT").arg("LIST")).await.unwrap();
        list.lines().count()
    };
    let store = server.store().await;
    let again = store.clone();
    assert_eq!(clients().await, 2, "one, and the one that asks");
    drop(store);
    open(&again).await;
    drop(again);
    store_fixture::eventually("the connection is closed", async || clients().await == 1).await;
}
