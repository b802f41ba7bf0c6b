//! Entries change members when theirs is gone, and only then: S1 NoLoss and S8 NoSettleWhenFenced at the broker.
//!
//! Names are those of the bugs in semantics.md, section 4, each with its source.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod broker;

use std::time::Duration;

use broker::{Client, TAKE_OVER, WANT, ack, event, id, limits, member, opened, publish, receive, server, silence};
use broker::{settle, unique};
use hapax::{Broker, ErrorKind, Limits, Outgoing, Publisher, Settlement, Want};
use hapax_redis::{RedisBroker, RedisPublisher};
use tokio::time::{Instant, sleep};

/// openlinker-project/openlinker#2164: only `>` was read, and after a kill the entry was never delivered again.
#[tokio::test]
async fn kill_between_read_and_ack_recovers() {
    let stream = unique("kill");
    let first = member(&stream).await;
    publish(&stream, 0..3).await;
    assert_eq!(receive(&first, 3).await.len(), 3);
    drop(first);
    let second = member(&stream).await;
    let again = receive(&second, 3).await;
    assert!(
        again.iter().all(|delivery| delivery.count == Some(2)),
        "the broker's count says that it was delivered before"
    );
    ack(&second, &again).await;
    assert_eq!(Client::connect().await.pending(&stream).await, 0);
}

/// riverqueue/river#350, #1288, #1331: what runs for long is not taken for abandoned. dapr/components-contrib#4599: nor by
/// the very process that handles it.
#[tokio::test]
async fn a_long_handler_keeps_its_entry() {
    let stream = unique("long");
    let (first, second) = (member(&stream).await, member(&stream).await);
    publish(&stream, 0..1).await;
    let held = tokio::select! {
        held = receive(&first, 1) => (held, &first),
        held = receive(&second, 1) => (held, &second),
    };
    tokio::join!(silence(&first, TAKE_OVER * 3), silence(&second, TAKE_OVER * 3));
    let (deliveries, holder) = held;
    ack(holder, &deliveries).await;
}

/// dapr/components-contrib#4599, mastra-ai/mastra#23648: what waits in the buffer does not age into the reclaim window, and is
/// not handed out twice.
#[tokio::test]
async fn buffered_entry_not_reclaimed_by_self() {
    let stream = unique("buffered");
    let broker = member(&stream).await;
    publish(&stream, 0..20).await;
    let one = Want { events: 1, bytes: 1 << 20 };
    let mut seen = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < TAKE_OVER * 3 {
        seen.extend(broker.receive(one).await.unwrap());
        if seen.len() == 20 {
            break;
        }
        sleep(TAKE_OVER / 8).await;
    }
    silence(&broker, TAKE_OVER * 2).await;
    assert!(seen.iter().all(|delivery| delivery.count == Some(1)), "each was delivered once: {seen:?}");
    ack(&broker, &seen).await;
}

/// mastra-ai/mastra#23648: the reclaim loop ran again what was in flight. Here it skips that, and counts what it takes.
#[tokio::test]
async fn reclaim_counts_attempts_and_skips_in_flight() {
    let stream = unique("reclaim");
    let survivor = member(&stream).await;
    publish(&stream, 0..2).await;
    let held = receive(&survivor, 2).await;
    for expected in 2..4 {
        let victim = member(&stream).await;
        if expected == 2 {
            publish(&stream, 2..3).await;
        }
        // Whoever gets it: the victim dies with it, the survivor hands it on by holding it no longer.
        let taken = receive(&victim, 1);
        let taken = taken.await;
        assert_eq!(taken[0].count, Some(expected - 1));
        drop(victim);
    }
    let last = receive(&survivor, 1).await;
    assert_eq!((id(&last[0]), last[0].count), (2, Some(3)));
    ack(&survivor, &held).await;
    ack(&survivor, &last).await;
}

/// riverqueue/river#1318: a page full of long-running ones starved those behind it.
#[tokio::test]
async fn reclaim_paginates_past_live_leases() {
    let stream = unique("pages");
    let busy = RedisBroker::builder(server(), stream.as_str(), "g").take_over_after(TAKE_OVER).build().unwrap();
    busy.open(Limits { events: 5000, ..limits(Duration::from_secs(60)) }).await.unwrap();
    publish(&stream, 0..4000).await;
    let held = receive(&busy, 4000).await;
    let victim = member(&stream).await;
    publish(&stream, 4000..4001).await;
    assert_eq!(receive(&victim, 1).await.len(), 1);
    drop(victim);
    let survivor = opened_small(&stream).await;
    assert_eq!(id(&receive(&survivor, 1).await[0]), 4000);
    assert_eq!(held.len(), 4000);
    silence(&survivor, TAKE_OVER).await;
}

async fn opened_small(stream: &str) -> RedisBroker {
    let broker = RedisBroker::builder(server(), stream, "g").take_over_after(TAKE_OVER).build().unwrap();
    broker.open(Limits { events: 1, ..limits(Duration::from_secs(60)) }).await.unwrap();
    broker
}

/// What design.md calls `held_max`: after it the entry is another's, and the late settlement is stale.
#[tokio::test]
async fn an_entry_held_for_too_long_becomes_anothers() {
    let stream = unique("held");
    let build = || RedisBroker::builder(server(), stream.as_str(), "g").take_over_after(TAKE_OVER).build().unwrap();
    let (first, second) = (build(), build());
    first.open(limits(TAKE_OVER)).await.unwrap();
    publish(&stream, 0..1).await;
    let stuck = receive(&first, 1).await;
    second.open(limits(Duration::from_secs(60))).await.unwrap();
    let taken = receive(&second, 1).await;
    for late in [Settlement::Ack, Settlement::Retry { after: Duration::ZERO }] {
        let answer = first.settle(&[(stuck[0].receipt, late)]).await.remove(0);
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::Stale);
    }
    let client = Client::connect().await;
    assert_eq!(client.pending(&stream).await, 1, "the late ack did not end the other's delivery");
    ack(&second, &taken).await;
    assert_eq!(client.pending(&stream).await, 0);
}

/// `XACK` asks nobody whose entry it is (seen on 7.0): the old owner's late ack took the entry from the new one, and when that
/// died it was lost. Here the script looks first.
#[tokio::test]
async fn a_late_ack_of_the_old_owner_does_nothing() {
    let stream = unique("late");
    let broker = member(&stream).await;
    publish(&stream, 0..2).await;
    let held = receive(&broker, 2).await;
    let client = Client::connect().await;
    let entry = held[0].origin.as_ref().unwrap().position.clone();
    // Another member takes it before this one has noticed anything.
    client.command(&["XCLAIM", &stream, "g", "other", "0", &entry]).await;
    let batch: Vec<_> = held.iter().map(|delivery| (delivery.receipt, Settlement::Ack)).collect();
    let answers = broker.settle(&batch).await;
    assert_eq!(answers[0].as_ref().unwrap_err().kind(), ErrorKind::Stale);
    assert!(answers[1].is_ok(), "its neighbour is acked: {answers:?}");
    assert_eq!(client.pending(&stream).await, 1);
}

/// Keeping is for what is ours: it takes nothing back from whoever has it now.
#[tokio::test]
async fn keeping_an_entry_does_not_take_it_back() {
    let stream = unique("keeping");
    let broker = member(&stream).await;
    publish(&stream, 0..2).await;
    let held = receive(&broker, 2).await;
    let client = Client::connect().await;
    let entry = held[0].origin.as_ref().unwrap().position.clone();
    client.command(&["XCLAIM", &stream, "g", "other", "0", &entry, "JUSTID"]).await;
    // Long enough that both are asked about. The other gives its signs of life, so that nobody may take over.
    for _ in 0..8 {
        sleep(TAKE_OVER / 10).await;
        assert_eq!(client.number(&["EVAL", KEPT_BY_OTHER, "1", &stream, &entry]).await, 1);
    }
    assert!(broker.settle(&[(held[0].receipt, Settlement::Ack)]).await[0].is_err());
    settle(&broker, held[1].receipt, Settlement::Ack).await;
}

const KEPT_BY_OTHER: &str = "
    local held = #redis.call('XPENDING', KEYS[1], 'g', '-', '+', 10, 'other')
    if held == 1 then redis.call('XCLAIM', KEYS[1], 'g', 'other', 0, ARGV[1], 'JUSTID') end
    return held";

/// apalis-dev/apalis#504: a restart with the same name hid or stole what was in flight.
#[tokio::test]
async fn restart_same_name_reclaims_without_stealing() {
    let stream = unique("name");
    let build = || {
        let builder = RedisBroker::builder(server(), stream.as_str(), "g").take_over_after(TAKE_OVER);
        builder.member("worker-0").build().unwrap()
    };
    let first = opened(build()).await;
    publish(&stream, 0..1).await;
    let running = receive(&first, 1).await;
    let twin = opened(build()).await;
    silence(&twin, TAKE_OVER * 2).await;
    drop((running, first));
    let again = receive(&twin, 1).await;
    ack(&twin, &again).await;
}

/// OpenZeppelin/openzeppelin-relayer#891: with fixed names, the new replica's sign of life kept the dead one's entries.
#[tokio::test]
async fn two_replicas_same_config_one_dies() {
    let stream = unique("replicas");
    let (first, second) = (member(&stream).await, member(&stream).await);
    publish(&stream, 0..1).await;
    let (dead, alive) = tokio::select! {
        _ = receive(&first, 1) => (first, second),
        _ = receive(&second, 1) => (second, first),
    };
    drop(dead);
    ack(&alive, &receive(&alive, 1).await).await;
}

/// A consumer that is paused with entries in its buffer gives them to others.
#[tokio::test]
async fn what_a_paused_consumer_read_ahead_goes_to_others() {
    let stream = unique("paused");
    let paused = member(&stream).await;
    // The read goes on after the `receive` that asked for it was dropped.
    let asked = tokio::time::timeout(Duration::from_millis(50), paused.receive(WANT)).await;
    assert!(asked.is_err());
    publish(&stream, 0..5).await;
    sleep(Duration::from_millis(200)).await;
    let other = member(&stream).await;
    let all = receive(&other, 5).await;
    assert!(all.iter().all(|delivery| delivery.count == Some(1)), "giving back does not count");
    ack(&other, &all).await;
}

/// redis-rs/redis-rs#851: a read that `select!` dropped swallowed its message.
#[tokio::test]
async fn cancelled_read_loses_nothing() {
    let stream = unique("cancelled");
    let broker = member(&stream).await;
    let publisher = RedisPublisher::new(server(), stream.as_str()).unwrap();
    let mut seen = Vec::new();
    for number in 0..50 {
        let sent = publisher.publish(vec![Outgoing::new(event(number))]);
        let arrived = tokio::select! {
            biased;
            arrived = broker.receive(WANT) => arrived.unwrap(),
            sent = sent => { sent.into_iter().for_each(|sent| sent.unwrap()); Vec::new() }
        };
        ack(&broker, &arrived).await;
        seen.extend(arrived.iter().map(id));
    }
    while let Ok(arrived) = tokio::time::timeout(TAKE_OVER * 2, broker.receive(WANT)).await {
        let arrived = arrived.unwrap();
        assert!(arrived.iter().all(|delivery| delivery.count == Some(1)), "none had to be taken over");
        ack(&broker, &arrived).await;
        seen.extend(arrived.iter().map(id));
    }
    seen.sort_unstable();
    // A send that was dropped may have been sent; what arrived is there once.
    assert!(seen.windows(2).all(|pair| pair[0] < pair[1]), "{seen:?}");
    let length = Client::connect().await.number(&["XLEN", &stream]).await;
    assert_eq!(seen.len(), usize::try_from(length).unwrap(), "everything on the stream arrived");
}

/// StackExchange/StackExchange.Redis#2475, redisson/redisson#3076: the client's timeout is shorter than BLOCK, and the first
/// message is swallowed. The client's default of 500 ms would be; ours is set to suit.
#[tokio::test]
async fn block_timeout_ordering() {
    let stream = unique("block");
    let broker = RedisBroker::builder(server(), stream.as_str(), "g").build().unwrap();
    let broker = opened(broker).await;
    silence(&broker, Duration::from_millis(2500)).await;
    publish(&stream, 0..1).await;
    let first = receive(&broker, 1).await;
    assert_eq!(first[0].count, Some(1), "not swallowed, and taken over later");
    assert_eq!(broker.trimmed(), 0);
    settle(&broker, first[0].receipt, Settlement::Ack).await;
}

/// The blocking read has a connection of its own: nothing waits behind it (seen: a PING behind BLOCK 1500 took 1.4 s).
#[tokio::test]
async fn nothing_waits_behind_a_blocking_read() {
    let stream = unique("behind");
    let broker = opened(RedisBroker::builder(server(), stream.as_str(), "g").build().unwrap()).await;
    publish(&stream, 0..10).await;
    let held = receive(&broker, 10).await;
    // Ten calls one after the other: behind reads of half a second they would take five.
    let settling = async {
        let begun = Instant::now();
        for delivery in &held {
            settle(&broker, delivery.receipt, Settlement::Ack).await;
        }
        assert!(begun.elapsed() < Duration::from_secs(2), "settling took {:?}", begun.elapsed());
    };
    tokio::select! {
        biased;
        arrived = broker.receive(WANT) => panic!("{arrived:?}"),
        () = settling => {}
    }
}
