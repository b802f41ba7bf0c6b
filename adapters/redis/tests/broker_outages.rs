//! Servers that restart, links that break, rights that are missing: L4 ReconnectHeals, S26 UnknownIsUnknown, H3 NoSecrets.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod broker;
mod store_fixture;

use std::time::Duration;

use broker::{Client, TAKE_OVER, ack, event, id, letter, limits, opened, receive, server_at, settle, silence, unique};
use hapax::{Broker, Durability, ErrorKind, Outgoing, Publisher, Settlement};
use hapax_redis::redis::{self, Value};
use hapax_redis::{RedisBroker, RedisPublisher};
use hapax_testkit::proxy::{After, Proxy};
use store_fixture::Private;
use tokio::time::{Instant, timeout};

fn build(url: &str, stream: &str) -> RedisBroker {
    RedisBroker::builder(server_at(url), stream, "g").take_over_after(TAKE_OVER).build().unwrap()
}

async fn publish_at(url: &str, stream: &str, ids: std::ops::Range<usize>) {
    let publisher = RedisPublisher::new(server_at(url), stream).unwrap();
    for sent in publisher.publish(ids.map(event).map(Outgoing::new).collect()).await {
        sent.unwrap();
    }
}

/// A proxy before the shared server, and its URL.
async fn proxied() -> (Proxy, String) {
    let url = broker::url();
    let upstream = url.split("://").nth(1).unwrap().rsplit('@').next().unwrap().split('/').next().unwrap();
    let proxy = Proxy::start(upstream).await.unwrap();
    let behind = url.replace(upstream, &proxy.address().to_string());
    (proxy, behind)
}

/// The server is killed and comes back: consumption resumes within five seconds without a restart of the consumer, what was
/// in hand is settled, and nothing is lost or doubled.
#[tokio::test]
async fn consumption_resumes_after_a_restart_of_the_server() {
    let mut server = Private::start(&[]).await;
    let url = server.url();
    let broker = opened(build(&url, "orders")).await;
    publish_at(&url, "orders", 0..4).await;
    let held = receive(&broker, 4).await;
    ack(&broker, &held[..2]).await;
    server.kill();
    let error = broker.settle(&[(held[2].receipt, Settlement::Ack)]).await.remove(0).unwrap_err();
    assert!(error.is_retryable(), "{error}");
    let error = timeout(Duration::from_secs(5), broker.receive(broker::WANT)).await.unwrap().unwrap_err();
    assert!(error.is_retryable(), "{error}");
    server.run().await;
    let back = Instant::now();
    publish_at(&url, "orders", 4..5).await;
    let new = receive(&broker, 1).await;
    assert!(back.elapsed() < Duration::from_secs(5), "resumed after {:?}", back.elapsed());
    assert_eq!(id(&new[0]), 4);
    ack(&broker, &held[2..]).await;
    ack(&broker, &new).await;
    silence(&broker, TAKE_OVER * 2).await;
    assert_eq!(Client::to(&url).await.pending("orders").await, 0);
}

/// A server without an append-only file forgets streams and groups: the group is created again, and the next events arrive.
#[tokio::test]
async fn a_server_that_forgot_everything_is_consumed_again() {
    let mut server = Private::start(&["--appendonly", "no"]).await;
    let url = server.url();
    let broker = opened(build(&url, "orders")).await;
    assert_eq!(broker.capabilities().durability, Durability::Process);
    publish_at(&url, "orders", 0..1).await;
    let held = receive(&broker, 1).await;
    server.kill();
    server.run().await;
    publish_at(&url, "orders", 1..2).await;
    let new = receive(&broker, 1).await;
    assert_eq!(id(&new[0]), 1);
    let answer = broker.settle(&[(held[0].receipt, Settlement::Ack)]).await.remove(0);
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::Stale);
    ack(&broker, &new).await;
}

#[tokio::test]
async fn durability_is_what_the_server_is_set_to() {
    for (option, durability) in [("always", Durability::Durable), ("everysec", Durability::Lossy)] {
        let server = Private::start(&["--appendfsync", option]).await;
        let broker = opened(build(&server.url(), "s")).await;
        assert_eq!(broker.capabilities().durability, durability, "{option}");
    }
}

/// A server at its `maxmemory`: what needs room is refused as full and stays in hand, and consuming goes on, since acks are
/// what makes room.
#[tokio::test]
async fn a_full_server_is_still_consumed() {
    let server = Private::start(&[]).await;
    let broker = opened(build(&server.url(), "s")).await;
    publish_at(&server.url(), "s", 0..5).await;
    let held = receive(&broker, 5).await;
    settle(&broker, held[4].receipt, Settlement::Retry { after: Duration::from_secs(2) }).await;
    server.ask::<()>("CONFIG SET maxmemory 1").await;
    publish_refused(&server.url()).await;
    for settlement in [Settlement::Retry { after: Duration::ZERO }, Settlement::DeadLetter(letter())] {
        let answer = broker.settle(&[(held[0].receipt, settlement)]).await.remove(0);
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::Full);
    }
    ack(&broker, &held[1..4]).await;
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    settle(&broker, held[0].receipt, Settlement::Release { counted: true }).await;
    let again = receive(&broker, 1).await;
    assert_eq!(id(&again[0]), 0, "the retry is due, but there is no room to move it");
    ack(&broker, &again).await;
    server.ask::<()>("CONFIG SET maxmemory 0").await;
    let last = receive(&broker, 1).await;
    assert_eq!((id(&last[0]), last[0].count), (4, Some(2)));
    ack(&broker, &last).await;
}

async fn publish_refused(url: &str) {
    let publisher = RedisPublisher::new(server_at(url), "s").unwrap();
    let answer = publisher.publish(vec![Outgoing::new(event(9))]).await.remove(0);
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::Full);
}

/// `SCRIPT FLUSH`, a failover: the server does not know the scripts any more.
#[tokio::test]
async fn scripts_that_the_server_forgot_are_sent_again() {
    let server = Private::start(&[]).await;
    let broker = opened(build(&server.url(), "s")).await;
    publish_at(&server.url(), "s", 0..1).await;
    let held = receive(&broker, 1).await;
    server.ask::<()>("SCRIPT FLUSH").await;
    ack(&broker, &held).await;
    publish_at(&server.url(), "s", 1..2).await;
    assert_eq!(receive(&broker, 1).await.len(), 1);
}

/// Entries whose reply was lost are on our pending list and in nobody's hand; they come from there, not a takeover later.
#[tokio::test]
async fn timeouts_and_lost_replies_strand_nothing() {
    let (proxy, url) = proxied().await;
    let stream = unique("lost-reply");
    // So long that nothing is taken over in this test.
    let builder = RedisBroker::builder(server_at(&url), stream.as_str(), "g").take_over_after(Duration::from_secs(600));
    let broker = opened(builder.build().unwrap()).await;
    let reading = timeout(Duration::from_millis(100), broker.receive(broker::WANT)).await;
    assert!(reading.is_err());
    proxy.swallow_replies(Duration::from_millis(300));
    broker::publish(&stream, 0..5).await;
    let client = Client::connect().await;
    let assigned = async {
        while client.pending(&stream).await == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(5), assigned).await.expect("the server gave us the first");
    proxy.heal();
    let healed = Instant::now();
    let all = receive(&broker, 5).await;
    assert!(healed.elapsed() < Duration::from_secs(5), "after {:?}", healed.elapsed());
    ack(&broker, &all).await;
    silence(&broker, Duration::from_secs(3)).await;
    assert_eq!(client.pending(&stream).await, 0);
}

/// Half-cut: the link is open and silent. What flows on after it is healed arrives once.
#[tokio::test]
async fn a_link_that_freezes_heals() {
    let (proxy, url) = proxied().await;
    let stream = unique("frozen");
    let broker = opened(build(&url, &stream)).await;
    broker::publish(&stream, 0..1).await;
    ack(&broker, &receive(&broker, 1).await).await;
    proxy.freeze();
    broker::publish(&stream, 1..4).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    proxy.heal();
    let all = receive(&broker, 3).await;
    assert_eq!(all.iter().map(id).collect::<Vec<_>>(), [1, 2, 3]);
    ack(&broker, &all).await;
    assert_eq!(Client::connect().await.pending(&stream).await, 0);
}

/// xing/beetle#61 and F23: the settlement took place, its answer was lost. Asked again it has no second effect.
#[tokio::test]
async fn a_settlement_whose_answer_was_lost_has_one_effect() {
    let (proxy, url) = proxied().await;
    let stream = unique("settled");
    let broker = opened(build(&url, &stream)).await;
    broker::publish(&stream, 0..3).await;
    let held = receive(&broker, 3).await;
    broker.stop().await.unwrap();
    // The reader is gone by now; what is cut is the connection that settles.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let settlements = [Settlement::Ack, Settlement::Retry { after: Duration::ZERO }, Settlement::DeadLetter(letter())];
    for (delivery, settlement) in held.iter().zip(settlements) {
        proxy.cut_after_request(After::Reply);
        let mut answers = 0;
        loop {
            answers += 1;
            assert!(answers < 20, "it ends");
            match broker.settle(&[(delivery.receipt, settlement.clone())]).await.remove(0) {
                Err(error) if error.is_retryable() => continue,
                Ok(()) => break,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Stale);
                    break;
                }
            }
        }
    }
    broker.close().await.unwrap();
    let other = opened(build(&url, &stream)).await;
    let again = receive(&other, 1).await;
    assert_eq!(id(&again[0]), 1, "the retry comes, once");
    ack(&other, &again).await;
    silence(&other, TAKE_OVER).await;
    let client = Client::connect().await;
    assert_eq!((client.number(&["XLEN", other.dead_letter_streams()[0]]).await, client.pending(&stream).await), (1, 0));
}

/// The entry was trimmed away and the answer to its settlement was lost: our hands still have the only copy, so that the next
/// try brings it.
#[tokio::test]
async fn a_trimmed_entry_whose_settlement_got_no_answer_is_not_lost() {
    let (proxy, url) = proxied().await;
    let stream = unique("trimmed-unanswered");
    // So long that the keeper does not notice what was trimmed.
    let builder = RedisBroker::builder(server_at(&url), stream.as_str(), "g").take_over_after(Duration::from_secs(600));
    let broker = opened(builder.build().unwrap()).await;
    broker::publish(&stream, 0..4).await;
    let held = receive(&broker, 4).await;
    broker.stop().await.unwrap();
    // The server knows the script from here on, and the reader is gone: the next request is the settlement.
    ack(&broker, &held[..1]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let client = Client::connect().await;
    client.command(&["XTRIM", &stream, "MAXLEN", "0"]).await;
    let settlements = [
        Settlement::Retry { after: Duration::ZERO },
        Settlement::Release { counted: false },
        Settlement::DeadLetter(letter()),
    ];
    for (delivery, settlement) in held[1..].iter().zip(settlements) {
        proxy.cut_after_request(After::Reply);
        let lost = broker.settle(&[(delivery.receipt, settlement.clone())]).await.remove(0);
        assert!(lost.unwrap_err().is_retryable());
        settle(&broker, delivery.receipt, settlement).await;
    }
    let letters = client.messages(broker.dead_letter_streams()[0]).await;
    assert_eq!(letters.iter().map(|one| &one.data[..]).collect::<Vec<_>>(), [b"3"]);
    let other = broker::member(&stream).await;
    let mut back = receive(&other, 2).await;
    back.sort_by_key(id);
    assert_eq!(back.iter().map(id).collect::<Vec<_>>(), [1, 2]);
    ack(&other, &back).await;
}

/// The beat that keeps entries ours found one trimmed away, and its answer was lost: the body is in our hands still, and is set
/// aside rather than taken for another's.
#[tokio::test]
async fn a_trimmed_entry_whose_beat_got_no_answer_is_not_lost() {
    let client = Client::connect().await;
    for _ in 0..20 {
        let (proxy, url) = proxied().await;
        let stream = unique("trimmed-unheard");
        let broker = opened(build(&url, &stream)).await;
        broker::publish(&stream, 0..2).await;
        let held = receive(&broker, 2).await;
        broker.stop().await.unwrap();
        // The reader is gone by now, and the keeper goes on.
        tokio::time::sleep(Duration::from_secs(1)).await;
        proxy.cut_after_request(After::Reply);
        let trimmed = Instant::now();
        client.command(&["XTRIM", &stream, "MAXLEN", "1"]).await;
        timeout(Duration::from_secs(10), proxy.resets_reach(1)).await.expect("the keeper asks now and then");
        // A beat resets the idle time of the other entry; it may have been another question.
        let idle = idle(&client, &stream).await;
        if idle >= trimmed.elapsed() {
            continue;
        }
        tokio::time::sleep(TAKE_OVER).await;
        settle(&broker, held[0].receipt, Settlement::DeadLetter(letter())).await;
        settle(&broker, held[1].receipt, Settlement::Ack).await;
        let letters = client.messages(broker.dead_letter_streams()[0]).await;
        assert_eq!(letters.iter().map(|one| &one.data[..]).collect::<Vec<_>>(), [b"0"]);
        assert_eq!((client.pending(&stream).await, broker.trimmed()), (0, 0));
        return;
    }
    panic!("no beat was cut");
}

/// How long ago the last pending entry was kept.
async fn idle(client: &Client, stream: &str) -> Duration {
    let Value::Array(pending) = client.command(&["XPENDING", stream, "g", "-", "+", "10"]).await else {
        panic!("a list")
    };
    let last: (String, String, u64, u64) = redis::from_redis_value(pending.last().cloned().unwrap()).unwrap();
    Duration::from_millis(last.2)
}

/// Entries whose reply was lost are read again by their ids. A server that refuses that read has them still: they are not
/// acked as if they had been trimmed away.
#[tokio::test]
async fn a_refused_read_of_pending_entries_acks_nothing() {
    let server = Private::start(&[]).await;
    server.ask::<()>("ACL SETUSER limited on >pw ~* &* +@all").await;
    let proxy = Proxy::start(format!("127.0.0.1:{}", server.port())).await.unwrap();
    let url = format!("redis://limited:pw@{}", proxy.address());
    // So long that nothing is taken over in this test.
    let builder = RedisBroker::builder(server_at(&url), "s", "g").take_over_after(Duration::from_secs(600));
    let broker = opened(builder.build().unwrap()).await;
    assert!(timeout(Duration::from_millis(100), broker.receive(broker::WANT)).await.is_err());
    server.ask::<()>("ACL SETUSER limited -xrange").await;
    proxy.swallow_replies(Duration::from_millis(300));
    publish_at(&server.url(), "s", 0..5).await;
    let client = Client::to(&server.url()).await;
    store_fixture::eventually("the server gave us some", async || client.pending("s").await > 0).await;
    proxy.heal();
    let refused = async {
        loop {
            match broker.receive(broker::WANT).await {
                Err(error) if error.kind() == ErrorKind::Configuration => break,
                other => assert!(other.is_err_and(|error| error.is_retryable()), "nothing arrives unread"),
            }
        }
    };
    timeout(Duration::from_secs(10), refused).await.expect("the missing right is told");
    server.ask::<()>("ACL SETUSER limited +xrange").await;
    let mut all = receive(&broker, 5).await;
    all.sort_by_key(id);
    assert_eq!(all.iter().map(id).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert_eq!(broker.trimmed(), 0);
    ack(&broker, &all).await;
}

/// Connections cut again and again while events flow: each arrives, and what was acked stays away.
#[tokio::test]
async fn cuts_lose_nothing() {
    let (proxy, url) = proxied().await;
    let stream = unique("cuts");
    let broker = opened(build(&url, &stream)).await;
    let sending = async {
        for some in 0..20 {
            broker::publish(&stream, some * 10..some * 10 + 10).await;
            tokio::time::sleep(Duration::from_millis(30)).await;
            match some % 3 {
                0 => proxy.drop_connections(),
                1 => proxy.cut_after_request(After::Bytes(100)),
                _ => proxy.cut_after_request(After::Reply),
            }
        }
    };
    let mut seen = std::collections::BTreeSet::new();
    let consuming = async {
        while seen.len() < 200 {
            let arrived = broker.receive(broker::WANT).await.unwrap_or_default();
            let mut left: Vec<_> = arrived.iter().collect();
            while !left.is_empty() {
                let batch: Vec<_> = left.iter().map(|one| (one.receipt, Settlement::Ack)).collect();
                let answers = broker.settle(&batch).await;
                // As a consumer does: what is unknown is in hand, and kept there, until it was asked again.
                let settled = |answer: &Result<(), hapax::Error>| {
                    answer.as_ref().err().is_none_or(|error| error.kind() == ErrorKind::Stale)
                };
                let (done, again): (Vec<_>, Vec<_>) = left.into_iter().zip(answers).partition(|(_, it)| settled(it));
                seen.extend(done.into_iter().map(|(delivery, _)| id(delivery)));
                left = again.into_iter().map(|(delivery, _)| delivery).collect();
            }
        }
    };
    timeout(Duration::from_secs(25), async { tokio::join!(sending, consuming) }).await.expect("all arrive");
}

/// The rights that docs/redis.md lists are enough for everything that a member and a publisher do, and no others are needed.
#[tokio::test]
async fn the_documented_rights_are_enough() {
    let page = include_str!("../../../docs/redis.md");
    let rights = |user: &str| {
        let line = page.lines().find(|line| line.starts_with(&format!("ACL SETUSER {user} ")));
        line.unwrap_or_else(|| panic!("the page has the rights of {user}")).replace("<password>", "pw")
    };
    let server = Private::start(&[]).await;
    for user in ["hapax-broker", "hapax-publisher"] {
        server.ask::<()>(&rights(user)).await;
    }
    let url = format!("redis://hapax-broker:pw@127.0.0.1:{}", server.port());
    let build = || {
        let builder = RedisBroker::builder(server_at(&url), "orders", "billing").take_over_after(TAKE_OVER);
        builder.forget_members_after(TAKE_OVER).delete_done().build().unwrap()
    };
    let broker = opened(build()).await;
    assert_eq!(broker.capabilities().durability, Durability::Lossy, "the right to ask CONFIG is not needed");
    let publisher = format!("redis://hapax-publisher:pw@127.0.0.1:{}", server.port());
    publish_at(&publisher, "orders", 0..5).await;
    let held = receive(&broker, 5).await;
    settle(&broker, held[0].receipt, Settlement::Ack).await;
    settle(&broker, held[1].receipt, Settlement::Release { counted: true }).await;
    settle(&broker, held[2].receipt, Settlement::Retry { after: Duration::from_millis(10) }).await;
    settle(&broker, held[3].receipt, Settlement::DeadLetter(letter())).await;
    assert_eq!(receive(&broker, 2).await.len(), 2);
    tokio::time::sleep(TAKE_OVER * 2).await;
    assert!(broker.lag().is_some());
    drop(broker);
    let next = opened(build()).await;
    assert_eq!(receive(&next, 3).await.len(), 3);
    next.close().await.unwrap();
    let denied: Vec<Vec<Value>> = server.try_ask(redis::cmd("ACL").arg("LOG")).await.unwrap();
    let denied = format!("{denied:?}");
    for needed in ["xreadgroup", "xclaim", "xgroup", "xpending", "zadd", "xadd", "xinfo"] {
        assert!(!denied.to_lowercase().contains(needed), "{needed} was denied: {denied}");
    }
    let elsewhere = RedisBroker::builder(server_at(&url), "payments", "billing").build().unwrap();
    let error = elsewhere.open(limits(TAKE_OVER)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
}

/// H3: a password in the URL is in no text.
#[tokio::test]
async fn no_secret_is_shown() {
    let server = Private::start(&[]).await;
    let url = format!("redis://c4nary:c4nary-password@127.0.0.1:{}", server.port());
    let broker = build(&url, "s");
    let refused = broker.open(limits(TAKE_OVER)).await.unwrap_err();
    let publisher = RedisPublisher::new(server_at(&url), "s").unwrap();
    let unsent = publisher.publish(vec![Outgoing::new(event(1))]).await.remove(0).unwrap_err();
    assert_eq!((refused.kind(), unsent.kind()), (ErrorKind::Configuration, ErrorKind::Configuration));
    let builder = RedisBroker::builder(server_at(&url), "s", "g");
    for text in [format!("{broker:?} {builder:?} {publisher:?}"), format!("{refused:?} {refused} {unsent:?} {unsent}")]
    {
        assert!(!text.contains("c4nary"), "{text}");
    }
}

/// Everything a member does, over one kind of connection.
async fn consume_everything(url: &str) {
    let builder = RedisBroker::builder(server_at(url), "{shop}orders", "g").and("{shop}payments");
    let broker = opened(builder.take_over_after(TAKE_OVER).build().unwrap()).await;
    publish_at(url, "{shop}orders", 0..4).await;
    publish_at(url, "{shop}payments", 4..5).await;
    let mut held = receive(&broker, 5).await;
    held.sort_by_key(id);
    settle(&broker, held[0].receipt, Settlement::Ack).await;
    settle(&broker, held[1].receipt, Settlement::Release { counted: true }).await;
    settle(&broker, held[2].receipt, Settlement::Retry { after: Duration::from_millis(10) }).await;
    settle(&broker, held[3].receipt, Settlement::DeadLetter(letter())).await;
    let again = receive(&broker, 2).await;
    assert!(again.iter().all(|delivery| delivery.count == Some(2)), "{again:?}");
    tokio::time::sleep(TAKE_OVER * 2).await;
    assert_eq!(broker.lag(), Some(0));
    drop(broker);
    let builder = RedisBroker::builder(server_at(url), "{shop}orders", "g").and("{shop}payments");
    let next = opened(builder.take_over_after(TAKE_OVER).build().unwrap()).await;
    let rest = receive(&next, 3).await;
    ack(&next, &rest).await;
    silence(&next, TAKE_OVER).await;
    next.close().await.unwrap();
}

#[tokio::test]
async fn a_cluster_is_consumed_like_one_node() {
    let server = Private::start(&["--cluster-enabled", "yes"]).await;
    server.ask::<()>("CLUSTER ADDSLOTSRANGE 0 16383").await;
    store_fixture::eventually("the cluster is up", async || {
        server.ask::<String>("CLUSTER INFO").await.contains("cluster_state:ok")
    })
    .await;
    let url = format!("redis-cluster://127.0.0.1:{}", server.port());
    consume_everything(&url).await;
    // Messages to streams of several slots in one batch.
    let publisher = RedisPublisher::new(server_at(&url), "a").unwrap();
    let batch = ["a", "b", "a", "c"].map(|stream| Outgoing::new(event(1)).to(stream));
    assert!(publisher.publish(batch.into()).await.iter().all(Result::is_ok));
    let error = RedisBroker::builder(server_at(&url), "orders", "g").and("payments").build().unwrap_err();
    assert!(error.to_string().contains("hash tag"), "{error}");
}

#[tokio::test]
async fn both_protocols_read_the_same() {
    for protocol in ["resp2", "resp3"] {
        let server = Private::start(&[]).await;
        consume_everything(&format!("{}?protocol={protocol}", server.url())).await;
    }
}
