//! What is in Redis: records and their fences over restarts, loss, expiry, a full memory, and what others wrote.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod store_fixture;

use std::time::Duration;

use futures_util::future::join_all;
use hapax::{
    Claim, ClaimRequest, ErrorKind, EventKey, Fingerprint, Outcome, ProcessedStore, Recorded, Renewal, Status,
    StoreAdmin,
};
use hapax_redis::RedisStore;
use hapax_redis::redis::{self, cmd};
use hapax_testkit::servers::Server;
use store_fixture::{
    LEASE, Private, claim, doomed, eventually, failed, key, lease, open, process, request, shared_store,
};

/// The raw name of an event's record, as docs/redis.md says.
fn record_name(consumer: hapax::ConsumerId, key: EventKey) -> Vec<u8> {
    [b"{hapax:0}".as_slice(), &consumer.0.to_be_bytes(), &key.0].concat()
}

async fn ttl_ms(server: &Private, consumer: hapax::ConsumerId, n: u64) -> i64 {
    server.try_ask(cmd("PTTL").arg(record_name(consumer, key(n)))).await.unwrap()
}

#[tokio::test]
async fn scripts_survive_a_flush_of_scripts_and_a_restart() {
    let mut server = Private::start(&[]).await;
    let store = server.store().await;
    let consumer = open(&store).await;
    process(&store, consumer, 0..10).await;
    let held = lease(&store, consumer, 100).await;
    server.ask::<()>("SCRIPT FLUSH").await;
    assert!(matches!(claim(&store, consumer, 0, 7).await, Claim::Processed { .. }), "claim, without its script");
    server.ask::<()>("SCRIPT FLUSH").await;
    assert_eq!(store.renew(&[held], LEASE).await.unwrap(), [Renewal::Renewed]);
    server.ask::<()>("SCRIPT FLUSH").await;
    assert_eq!(store.record(&[(held, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    server.kill();
    server.run().await;
    let mut answer = None;
    eventually("the same store works after the restart", async || {
        answer = store.claim(&[request(consumer, 100, 8)], LEASE).await.ok();
        answer.is_some()
    })
    .await;
    assert!(matches!(answer.unwrap()[0], Claim::Processed { .. }), "and knows what was recorded before kill -9");
}

#[tokio::test]
async fn noscript_is_met_by_calls_that_are_under_way_at_once() {
    let server = Private::start(&[]).await;
    let store = RedisStore::builder(server.at()).partitions(8).connect().await.unwrap();
    let consumer = open(&store).await;
    for round in 0..5 {
        server.ask::<()>("SCRIPT FLUSH").await;
        let batches = (0..8_u64).map(|n| {
            let first = 1_000 * round + 100 * n;
            process(&store, consumer, first..first + 100)
        });
        join_all(batches).await;
    }
    assert!(matches!(claim(&store, consumer, 4_799, 1).await, Claim::Processed { .. }));
}

#[tokio::test]
async fn a_restart_with_aof_keeps_records_and_one_without_forgets_them() {
    for (options, kept) in
        [(vec![], true), (vec!["--appendfsync", "everysec"], true), (vec!["--appendonly", "no"], false)]
    {
        let mut server = Private::start(&options).await;
        let store = server.store().await;
        let consumer = open(&store).await;
        process(&store, consumer, 0..1).await;
        let before = lease(&store, consumer, 1).await;
        server.kill();
        server.run().await;
        let again = server.store().await;
        assert_eq!(open(&again).await, consumer, "the name gives the same number, over a loss too");
        let processed = claim(&again, consumer, 0, 99).await;
        assert_eq!(matches!(processed, Claim::Processed { .. }), kept, "{options:?}: {processed:?}");
        let held = claim(&again, consumer, 1, 99).await;
        assert_eq!(matches!(held, Claim::Held { .. }), kept, "{options:?}: {held:?}");
        if let Claim::Granted(lease, _) = held {
            assert!(lease.fence > before.fence, "a fence grows over a lost record");
            assert_eq!(again.record(&[(before, Outcome::Processed)]).await.unwrap(), [Recorded::Fenced]);
        }
    }
}

#[tokio::test]
async fn fences_grow_over_loss_and_over_a_clock_that_was_set_back() {
    let server = Private::start(&[]).await;
    let store = server.store().await;
    let consumer = open(&store).await;
    let first = lease(&store, consumer, 1).await;
    server.ask::<()>("FLUSHALL").await;
    open(&store).await;
    let second = lease(&store, consumer, 1).await;
    assert!(second.fence > first.fence);
    // The server's clock cannot be set back here; a highest fence that lies ahead of it is the same.
    let ahead = second.fence.get() + 3_600_000_000;
    let bytes = ahead.to_be_bytes();
    server.try_ask::<()>(cmd("SET").arg("{hapax:0}fence").arg(&bytes[1..])).await.unwrap();
    let third = lease(&store, consumer, 2).await;
    assert_eq!(third.fence.get(), ahead + 1, "above every fence of before");
    assert!(store.forget("billing", key(2)).await.unwrap());
    assert_eq!(lease(&store, consumer, 2).await.fence.get(), ahead + 2);
    // Expiry removes the record alone.
    store.record(&[(third, Outcome::Processed)]).await.unwrap();
    server.try_ask::<()>(cmd("DEL").arg(record_name(consumer, key(2)))).await.unwrap();
    assert_eq!(lease(&store, consumer, 2).await.fence.get(), ahead + 3);
}

#[tokio::test]
async fn fences_are_exact_up_to_2_to_the_53_and_refused_beyond() {
    // sidekiq/sidekiq#2478: numbers of scripts are doubles.
    let server = Private::start(&[]).await;
    let store = server.store().await;
    let consumer = open(&store).await;
    let most: u64 = (1 << 53) - 1;
    server.try_ask::<()>(cmd("SET").arg("{hapax:0}fence").arg(&(most - 2).to_be_bytes()[1..])).await.unwrap();
    assert_eq!(lease(&store, consumer, 1).await.fence.get(), most - 1);
    let last = lease(&store, consumer, 2).await;
    assert_eq!(last.fence.get(), most);
    let refused = store.claim(&[request(consumer, 3, 1)], LEASE).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Incompatible, "{refused}");
    assert!(refused.to_string().contains("2^53"), "{refused}");
    assert_eq!(store.look_up("billing", key(3)).await.unwrap(), None, "nothing was written");
    assert_eq!(store.record(&[(last, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
}

#[tokio::test]
async fn terminal_records_expire_and_others_do_not() {
    let server = Private::start(&[]).await;
    let store = server.store().await;
    let retention = Duration::from_millis(1_500);
    let consumer = ProcessedStore::open(&store, "billing", retention).await.unwrap();
    let short = Duration::from_millis(1);
    let mut leases = Vec::new();
    for n in 0..5 {
        match store.claim(&[request(consumer, n, 1)], short).await.unwrap().remove(0) {
            Claim::Granted(lease, _) => leases.push(lease),
            other => panic!("{other:?}"),
        }
    }
    let outcomes =
        [(leases[1], failed()), (leases[2], Outcome::Processed), (leases[3], doomed()), (leases[4], doomed())];
    assert_eq!(store.record(&outcomes).await.unwrap(), [Recorded::Done; 4]);
    assert_eq!(store.record(&[(leases[4], Outcome::DeadLettered)]).await.unwrap(), [Recorded::Done]);
    for n in [0, 1] {
        assert_eq!(ttl_ms(&server, consumer, n).await, -1, "event {n} is under way and never expires");
    }
    for n in [2, 3, 4] {
        assert!((1..=1_500).contains(&ttl_ms(&server, consumer, n).await), "event {n} ended and expires");
    }
    // A lease keeps its doomed record longer, and a reopened dead letter has no end.
    assert_eq!(store.renew(&[leases[3]], Duration::from_secs(60)).await.unwrap(), [Renewal::Renewed]);
    assert!(ttl_ms(&server, consumer, 3).await > 55_000);
    let reopened = ClaimRequest { reopen: Some(leases[4].fence), token: 2, ..request(consumer, 4, 2) };
    assert!(matches!(store.claim(&[reopened], LEASE).await.unwrap()[0], Claim::Granted(_, None)));
    assert_eq!(ttl_ms(&server, consumer, 4).await, -1);
    eventually("the processed record expires", async || store.look_up("billing", key(2)).await.unwrap().is_none())
        .await;
    let again = lease(&store, consumer, 2).await;
    assert!(again.fence > leases[2].fence && again.attempt == 1, "an event whose record expired is new");
    for (n, status) in [(0, Status::Claimed), (1, Status::Waiting), (3, Status::Doomed), (4, Status::Claimed)] {
        let view = store.look_up("billing", key(n)).await.unwrap().expect("it is kept");
        assert_eq!(view.status, status, "event {n}");
    }
}

#[tokio::test]
async fn a_full_memory_refuses_a_batch_and_writes_nothing_of_it() {
    let server = Private::start(&[]).await;
    let store = server.store().await;
    let consumer = open(&store).await;
    process(&store, consumer, 0..10).await;
    let held: Vec<_> = join_all((100..110).map(|n| lease(&store, consumer, n))).await;
    let batch: Vec<_> = (1_000..1_500).map(|n| request(consumer, n, u128::from(n))).collect();
    // Less than what is in use: every write that needs memory is refused from here on.
    server.ask::<()>("CONFIG SET maxmemory 500kb").await;
    let refused = store.claim(&batch, LEASE).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Full, "{refused}");
    assert!(refused.is_retryable());
    let keys: u64 = server.ask("DBSIZE").await;
    // Records of both kinds that cannot be written: one by MSET first, the other by SET alone.
    let mixed = [(held[0], failed()), (held[1], Outcome::Processed)];
    assert_eq!(store.record(&mixed).await.unwrap_err().kind(), ErrorKind::Full);
    assert_eq!(store.record(&[(held[2], Outcome::Processed)]).await.unwrap_err().kind(), ErrorKind::Full);
    assert_eq!(store.renew(&held, LEASE).await.unwrap_err().kind(), ErrorKind::Full);
    assert_eq!(server.ask::<u64>("DBSIZE").await, keys);
    let told = store.probe().await.unwrap().trouble.unwrap();
    assert!(told.contains("bytes of memory are in use"), "{told}");
    server.ask::<()>("CONFIG SET maxmemory 100mb").await;
    let claims = store.claim(&batch, LEASE).await.unwrap();
    assert!(
        claims.iter().all(|claim| matches!(claim, Claim::Granted(lease, None) if lease.attempt == 1)),
        "all are new"
    );
    assert_eq!(store.record(&mixed).await.unwrap(), [Recorded::Done; 2]);
    assert!(matches!(claim(&store, consumer, 5, 1).await, Claim::Processed { .. }), "what was there is there");
}

#[tokio::test]
async fn a_primary_that_became_a_replica_is_told_and_works_again_when_it_is_one_no_more() {
    let server = Private::start(&[]).await;
    let store = server.store().await;
    let consumer = open(&store).await;
    let held = lease(&store, consumer, 1).await;
    server.ask::<()>("REPLICAOF 127.0.0.1 1").await;
    for error in [
        store.claim(&[request(consumer, 2, 1)], LEASE).await.unwrap_err(),
        store.renew(&[held], LEASE).await.unwrap_err(),
        store.record(&[(held, Outcome::Processed)]).await.unwrap_err(),
        store.probe().await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    }
    server.ask::<()>("REPLICAOF NO ONE").await;
    assert_eq!(store.record(&[(held, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
}

#[tokio::test]
async fn what_hapax_did_not_write_under_its_names_is_refused_and_left_as_it_is() {
    let server = Private::start(&[]).await;
    let store = server.store().await;
    let consumer = open(&store).await;
    let granted = lease(&store, consumer, 1).await;
    let name = record_name(consumer, key(1));
    let raw: Vec<u8> = server.try_ask(cmd("GET").arg(&name)).await.unwrap();
    let mut newer = raw.clone();
    newer[0] = 0x30;
    let foreign: [(&str, Option<Vec<u8>>); 5] = [
        ("a list", None),
        ("a word", Some(b"word".to_vec())),
        ("nothing", Some(Vec::new())),
        ("a record cut short", Some(raw[..raw.len() - 1].to_vec())),
        ("a newer version's record", Some(newer)),
    ];
    for (what, value) in foreign {
        server.try_ask::<()>(cmd("DEL").arg(&name)).await.unwrap();
        match &value {
            Some(value) => server.try_ask::<()>(cmd("SET").arg(&name).arg(value.as_slice())).await.unwrap(),
            None => server.try_ask::<()>(cmd("RPUSH").arg(&name).arg("x")).await.unwrap(),
        }
        let errors = [
            store.claim(&[request(consumer, 2, 1), request(consumer, 1, 1)], LEASE).await.unwrap_err(),
            store.look_up("billing", key(1)).await.unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::Incompatible, "{what}: {error}");
        }
        let recorded = store.record(&[(granted, Outcome::Processed)]).await;
        assert!(recorded.is_err_and(|error| error.kind() == ErrorKind::Incompatible), "{what}");
        if let Some(value) = value {
            assert_eq!(server.try_ask::<Vec<u8>>(cmd("GET").arg(&name)).await.unwrap(), value, "{what} is untouched");
        }
        assert_eq!(store.look_up("billing", key(2)).await.unwrap(), None, "its neighbour was not written");
    }
}

#[tokio::test]
async fn known_and_foreign_events_are_found_although_all_before_were_new() {
    let server = Private::start(&[]).await;
    let store = server.store().await;
    let consumer = open(&store).await;
    let all_new = async |first: u64| {
        for n in first..first + 10 {
            lease(&store, consumer, n).await;
        }
    };
    all_new(0).await;
    let granted = lease(&store, consumer, 100).await;
    assert_eq!(store.record(&[(granted, Outcome::Processed)]).await.unwrap(), [Recorded::Done]);
    let mixed = [request(consumer, 101, 1), request(consumer, 100, 2), request(consumer, 0, 2)];
    let claims = store.claim(&mixed, LEASE).await.unwrap();
    assert!(matches!(claims[..], [Claim::Granted(..), Claim::Processed { .. }, Claim::Held { .. }]), "{claims:?}");
    let Claim::Granted(held, None) = &claims[0] else { panic!("{claims:?}") };
    assert!(held.fence > granted.fence);
    assert_eq!(store.record(&[(*held, Outcome::Processed)]).await.unwrap(), [Recorded::Done], "under its own fence");
    all_new(200).await;
    for (name, left) in [(record_name(consumer, key(301)), 300), (b"{hapax:0}fence".to_vec(), 302)] {
        server.try_ask::<()>(cmd("DEL").arg(&name)).await.unwrap();
        server.try_ask::<()>(cmd("RPUSH").arg(&name).arg("x")).await.unwrap();
        let batch = [request(consumer, left, 1), request(consumer, 301, 1)];
        let refused = store.claim(&batch, LEASE).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Incompatible, "{refused}");
        assert_eq!(store.look_up("billing", key(left)).await.unwrap(), None, "its neighbour was not written");
        assert_eq!(server.try_ask::<u64>(cmd("LLEN").arg(&name)).await.unwrap(), 1, "it is as it was");
        server.try_ask::<()>(cmd("DEL").arg(&name)).await.unwrap();
        all_new(400 + left).await;
    }
}

#[tokio::test]
async fn outcomes_of_many_claims_that_are_recorded_together_keep_their_own_fences() {
    let server = Private::start(&[]).await;
    let store = server.store().await;
    let consumer = open(&store).await;
    let mut batch = Vec::new();
    for n in 0..40 {
        let held = lease(&store, consumer, n).await;
        batch.push((held, if n % 5 == 4 { failed() } else { Outcome::Processed }));
    }
    let claims: Vec<_> = (100..120).map(|n| request(consumer, n, 1)).collect();
    for claim in store.claim(&claims, LEASE).await.unwrap() {
        let Claim::Granted(held, None) = claim else { panic!("{claim:?}") };
        batch.push((held, Outcome::Processed));
    }
    // One in the middle of those that share a fence is another's since.
    let fenced = batch.len() - 10;
    batch[fenced].0.fence = batch[0].0.fence;
    let mut expected = vec![Recorded::Done; batch.len()];
    expected[fenced] = Recorded::Fenced;
    assert_eq!(store.record(&batch).await.unwrap(), expected);
    for (held, outcome) in &batch {
        let view = store.look_up("billing", held.key).await.unwrap().unwrap();
        let status = match outcome {
            _ if held.key == batch[fenced].0.key => Status::Claimed,
            Outcome::Processed => Status::Processed,
            _ => Status::Waiting,
        };
        assert_eq!((view.status, view.attempt), (status, 1));
    }
}

#[tokio::test]
async fn an_unknown_consumer_is_no_bad_item() {
    let store = shared_store(&Server::Redis.url()).await;
    let stranger = ClaimRequest { consumer: hapax::ConsumerId(7), ..request(hapax::ConsumerId(7), 1, 1) };
    let error = store.claim(&[stranger], LEASE).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
}

#[tokio::test]
async fn a_number_that_another_handle_opened_is_known() {
    let server = Private::start(&[]).await;
    let (first, second) = (server.store().await, server.store().await);
    let consumer = open(&first).await;
    process(&second, consumer, 0..3).await;
    assert!((3_599_000..=3_600_000).contains(&ttl_ms(&server, consumer, 0).await), "with its retention");
}

#[tokio::test]
async fn names_whose_wished_number_is_taken_get_the_next() {
    let server = Private::start(&[]).await;
    let store = server.store().await;
    let number = ProcessedStore::open(&store, "billing", LEASE).await.unwrap();
    let name = "{hapax:0}consumers";
    server.try_ask::<()>(cmd("DEL").arg(name)).await.unwrap();
    server.try_ask::<()>(cmd("HSET").arg(name).arg("other").arg(number.0)).await.unwrap();
    let next = ProcessedStore::open(&store, "billing", LEASE).await.unwrap();
    assert_eq!(next.0, number.0.wrapping_add(1));
    assert_eq!(ProcessedStore::open(&store, "billing", LEASE).await.unwrap(), next);
}

#[tokio::test]
async fn operators_list_the_oldest_of_many_and_forget_one() {
    let server = Private::start(&[]).await;
    let store = RedisStore::builder(server.at()).partitions(3).connect().await.unwrap();
    let consumer = open(&store).await;
    let other = ProcessedStore::open(&store, "shipping", LEASE).await.unwrap();
    lease(&store, other, 9_999).await;
    for n in 0..40 {
        let held = lease(&store, consumer, n).await;
        store.record(&[(held, doomed())]).await.unwrap();
    }
    process(&store, consumer, 100..3_000).await;
    let oldest = store.list("billing", Status::Doomed, 5).await.unwrap();
    assert_eq!(oldest.iter().map(|view| view.key).collect::<Vec<_>>(), (0..5).map(key).collect::<Vec<_>>());
    assert!(oldest.iter().all(|view| view.reason.is_some() && view.trouble.is_some()));
    assert_eq!(store.list("billing", Status::Doomed, 100).await.unwrap().len(), 40);
    assert_eq!(store.list("billing", Status::Processed, 5_000).await.unwrap().len(), 2_900);
    assert_eq!(store.list("nobody", Status::Processed, 5).await.unwrap(), []);
    assert!(store.forget("billing", key(0)).await.unwrap());
    assert!(!store.forget("billing", key(0)).await.unwrap());
    assert_eq!(store.sweep(10).await.unwrap().removed, 0, "Redis expires by itself");
}

#[tokio::test]
async fn an_overlong_trouble_is_cut_and_stays_readable() {
    let store = shared_store(&Server::Redis.url()).await;
    let consumer = open(&store).await;
    let held = lease(&store, consumer, 1).await;
    let trouble = hapax::Trouble { id: "é".repeat(40_000).into(), error: "x".repeat(100_000).into() };
    let outcome = Outcome::Failed { after: Duration::MAX, counted: true, trouble };
    assert_eq!(store.record(&[(held, outcome)]).await.unwrap(), [Recorded::Done]);
    let view = store.look_up("billing", key(1)).await.unwrap().unwrap();
    let kept = view.trouble.unwrap();
    assert_eq!((kept.id.len(), kept.error.len()), (8_192, 8_192));
    assert!(view.since > Duration::from_secs(3600 * 24 * 365 * 50), "the longest delay is long: {:?}", view.since);
}

#[tokio::test]
async fn a_batch_larger_than_one_script_is_answered_in_order() {
    let store = shared_store(&Server::Redis.url()).await;
    let consumer = open(&store).await;
    process(&store, consumer, 0..2_500).await;
    let mut batch: Vec<_> = (0..5_000).map(|n| request(consumer, n, 1 << 70)).collect();
    batch[17].fingerprint = Fingerprint::of(None, b"other");
    let claims = store.claim(&batch, LEASE).await.unwrap();
    assert_eq!(claims[17], Claim::Conflict);
    for (n, claim) in claims.iter().enumerate().filter(|(n, _)| *n != 17) {
        match claim {
            Claim::Processed { .. } => assert!(n < 2_500),
            Claim::Granted(lease, None) => assert!(n >= 2_500 && lease.key == key(n as u64)),
            other => panic!("{n}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_processed_record_takes_few_bytes() {
    let server = Private::start(&[]).await;
    let store = server.store().await;
    let consumer = open(&store).await;
    let used = async || -> u64 {
        let info: redis::InfoDict = server.ask("INFO memory").await;
        info.get("used_memory").unwrap()
    };
    let before = used().await;
    for first in (0..50_000).step_by(1_000) {
        process(&store, consumer, first..first + 1_000).await;
    }
    let bytes = (used().await - before) / 50_000;
    println!("{bytes} bytes a record");
    assert!(bytes < 200, "{bytes} bytes a record");
}
