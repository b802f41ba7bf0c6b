//! Groups, members and trimming: what exists is created or checked, what vanishes is told, and nothing pending is thrown away.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod broker;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use broker::{
    Client, TAKE_OVER, ack, id, letter, limits, member, opened, publish, receive, server, settle, silence, unique,
    until_trimmed,
};
use hapax::{Broker, ErrorKind, SessionState, Settlement};
use hapax_redis::redis::{Value, from_redis_value};
use hapax_redis::{MissingGroup, RedisBroker, Topology};

/// ag2ai/faststream#2976: groups created at `$` skipped earlier events.
#[tokio::test]
async fn new_group_policy_is_explicit() {
    let stream = unique("new");
    publish(&stream, 0..3).await;
    let broker = member(&stream).await;
    let all = receive(&broker, 3).await;
    assert_eq!(all.iter().map(id).collect::<Vec<_>>(), [0, 1, 2], "a new group starts at the first entry");
    ack(&broker, &all).await;
}

#[tokio::test]
async fn a_topology_that_is_only_checked_creates_nothing_and_names_the_commands() {
    let stream = unique("checked");
    let build = || {
        let builder = RedisBroker::builder(server(), stream.as_str(), "g").topology(Topology::Check);
        builder.build().unwrap()
    };
    let error = build().open(limits(TAKE_OVER)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
    let client = Client::connect().await;
    assert_eq!(client.number(&["EXISTS", &stream]).await, 0);
    let text = error.to_string();
    let commands: Vec<_> = text.split('`').filter(|part| part.starts_with("XGROUP")).collect();
    assert_eq!(commands.len(), 2, "{text}");
    for command in commands {
        client.command(&command.split(' ').collect::<Vec<_>>()).await;
    }
    publish(&stream, 0..1).await;
    let broker = opened(build()).await;
    ack(&broker, &receive(&broker, 1).await).await;
}

/// redis/redis#6576: a stream was evicted with its groups, and nobody said so. The default creates the group again at the first
/// entry, since `$` would lose; receipts of what was pending are stale.
#[tokio::test]
async fn nogroup_at_runtime_is_reported() {
    let stream = unique("nogroup");
    let broker = member(&stream).await;
    publish(&stream, 0..2).await;
    let held = receive(&broker, 2).await;
    let client = Client::connect().await;
    client.command(&["DEL", &stream]).await;
    publish(&stream, 2..4).await;
    let after = receive(&broker, 2).await;
    assert_eq!(after.iter().map(id).collect::<Vec<_>>(), [2, 3]);
    assert!(broker.groups_lost() >= 1, "it is counted");
    assert_eq!(held[0].session.state(), SessionState::Ended);
    assert_ne!(held[0].session.id(), after[0].session.id());
    let answer = broker.settle(&[(held[0].receipt, Settlement::Ack)]).await.remove(0);
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::Stale);
    ack(&broker, &after).await;
}

#[tokio::test]
async fn a_group_that_is_missing_is_waited_for_where_that_is_the_policy() {
    let stream = unique("fail");
    let builder = RedisBroker::builder(server(), stream.as_str(), "g").missing_group(MissingGroup::Fail);
    let broker = opened(builder.build().unwrap()).await;
    let client = Client::connect().await;
    client.command(&["DEL", &stream]).await;
    publish(&stream, 0..1).await;
    let error = tokio::time::timeout(Duration::from_secs(5), broker.receive(broker::WANT)).await.unwrap().unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("missing_group"), "{error}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(broker.groups_lost(), 1, "it is lost once, however often it is looked for");
    client.command(&["XGROUP", "CREATE", &stream, "g", "0"]).await;
    assert_eq!(receive(&broker, 1).await.len(), 1, "without a restart");
}

/// ThreeDotsLabs/watermill-redisstream#24: a member was deleted with what was pending for it, and that was lost.
#[tokio::test]
async fn never_delete_consumer_with_pending() {
    let stream = unique("members");
    let client = Client::connect().await;
    client.command(&["XGROUP", "CREATE", &stream, "g", "0", "MKSTREAM"]).await;
    publish(&stream, 0..2).await;
    client.command(&["XREADGROUP", "GROUP", "g", "holds-one", "COUNT", "1", "STREAMS", &stream, ">"]).await;
    client.command(&["XGROUP", "CREATECONSUMER", &stream, "g", "holds-none"]).await;
    // Both have been silent for longer than this by the time the broker looks.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let builder = RedisBroker::builder(server(), stream.as_str(), "g").take_over_after(Duration::from_millis(100));
    let tidy = builder.forget_members_after(Duration::from_millis(100)).build().unwrap();
    tidy.open(limits(TAKE_OVER)).await.unwrap();
    let gone = async {
        while names(&client, &stream).await.contains(&"holds-none".to_owned()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), gone).await.expect("the empty one is forgotten");
    assert!(names(&client, &stream).await.contains(&"holds-one".to_owned()));
    let all = receive(&tidy, 2).await;
    assert_eq!(all.len(), 2, "and what it held is delivered");
}

/// A member with a generated name leaves none behind when it is closed.
#[tokio::test]
async fn close_leaves_no_empty_member_behind() {
    let stream = unique("leaves");
    let broker = member(&stream).await;
    publish(&stream, 0..2).await;
    let held = receive(&broker, 2).await;
    ack(&broker, &held[..1]).await;
    let client = Client::connect().await;
    assert_eq!(names(&client, &stream).await.len(), 1);
    broker.close().await.unwrap();
    assert_eq!(names(&client, &stream).await, ["hapax.given-back"], "what was given back is kept under this name");
    assert_eq!(client.pending(&stream).await, 1);
}

async fn names(client: &Client, stream: &str) -> Vec<String> {
    let Value::Array(infos) = client.command(&["XINFO", "CONSUMERS", stream, "g"]).await else { panic!("a list") };
    let name = |info: Value| {
        let Value::Array(info) = info else { panic!("a list") };
        from_redis_value(info[1].clone()).unwrap()
    };
    infos.into_iter().map(name).collect()
}

/// ThreeDotsLabs/watermill-redisstream#38: a trimmed entry went round in the pending list for ever (retry count 1427).
#[tokio::test]
async fn deleted_entry_in_pel_is_cleared_and_reported() {
    let stream = unique("trimmed");
    let victim = member(&stream).await;
    publish(&stream, 0..3).await;
    let held = receive(&victim, 3).await;
    drop((victim, held));
    let client = Client::connect().await;
    assert_eq!(client.number(&["XTRIM", &stream, "MAXLEN", "0"]).await, 3);
    assert_eq!(client.pending(&stream).await, 3, "trimming leaves the pending list alone");
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&told);
    let builder = RedisBroker::builder(server(), stream.as_str(), "g").take_over_after(TAKE_OVER);
    let builder = builder.on_trimmed(move |trimmed| heard.lock().unwrap().push(trimmed.stream.clone()));
    let broker = opened(builder.build().unwrap()).await;
    until_trimmed(&broker, 3).await;
    silence(&broker, TAKE_OVER).await;
    assert_eq!(broker.trimmed(), 3);
    assert_eq!(*told.lock().unwrap(), vec![stream.clone().into_boxed_str(); 3]);
    assert_eq!(client.pending(&stream).await, 0);
}

/// What is trimmed away while a handler has it is in its hands alone: it is acked, retried and set aside like any other.
#[tokio::test]
async fn an_entry_trimmed_in_hand_is_still_settled() {
    let stream = unique("in-hand");
    let broker = member(&stream).await;
    publish(&stream, 0..8).await;
    let held = receive(&broker, 8).await;
    let client = Client::connect().await;
    client.command(&["XTRIM", &stream, "MAXLEN", "0"]).await;
    let settle_four = async |four: &[hapax::Delivery]| {
        settle(&broker, four[0].receipt, Settlement::Ack).await;
        settle(&broker, four[1].receipt, Settlement::Retry { after: Duration::ZERO }).await;
        settle(&broker, four[2].receipt, Settlement::Release { counted: false }).await;
        settle(&broker, four[3].receipt, Settlement::DeadLetter(letter())).await;
    };
    settle_four(&held[..4]).await;
    // By now the keeper has asked, and knows.
    tokio::time::sleep(TAKE_OVER).await;
    settle_four(&held[4..]).await;
    let mut back = receive(&broker, 4).await;
    back.sort_by_key(id);
    assert_eq!(back.iter().map(id).collect::<Vec<_>>(), [1, 2, 5, 6]);
    for delivery in &back {
        assert_eq!(delivery.message, held[id(delivery)].message);
        assert_eq!(delivery.origin, held[id(delivery)].origin, "where it stood first");
    }
    let letters = client.messages(broker.dead_letter_streams()[0]).await;
    assert_eq!(letters.iter().map(|one| &one.data[..]).collect::<Vec<_>>(), [b"3", b"7"], "letters hold the data");
    assert!(letters.iter().all(|one| one.attributes.id.is_some() && one.headers.get_str("hapax-reason").is_some()));
    ack(&broker, &back).await;
}

/// It is left on the pending list while it is in hand; the sweep of its own holder neither reports nor loses it.
#[tokio::test]
async fn an_entry_trimmed_in_hand_is_not_reported_by_its_holder() {
    let stream = unique("in-hand-long");
    let broker = member(&stream).await;
    publish(&stream, 0..2).await;
    let held = receive(&broker, 2).await;
    let client = Client::connect().await;
    client.command(&["XTRIM", &stream, "MAXLEN", "0"]).await;
    silence(&broker, TAKE_OVER * 3).await;
    assert_eq!(broker.trimmed(), 0);
    settle(&broker, held[0].receipt, Settlement::DeadLetter(letter())).await;
    settle(&broker, held[1].receipt, Settlement::Retry { after: Duration::ZERO }).await;
    let letters = client.messages(broker.dead_letter_streams()[0]).await;
    assert_eq!(letters.iter().map(|one| &one.data[..]).collect::<Vec<_>>(), [b"0"]);
    let back = receive(&broker, 1).await;
    assert_eq!(id(&back[0]), 1);
    ack(&broker, &back).await;
    assert_eq!(client.pending(&stream).await, 0);
}

/// Its holder died with the only copy: that is reported, and not lost in silence.
#[tokio::test]
async fn an_entry_trimmed_in_the_hand_of_one_that_died_is_reported() {
    let stream = unique("in-hand-dead");
    let victim = member(&stream).await;
    publish(&stream, 0..1).await;
    let held = receive(&victim, 1).await;
    let client = Client::connect().await;
    client.command(&["XTRIM", &stream, "MAXLEN", "0"]).await;
    // The keeper has asked by now.
    tokio::time::sleep(TAKE_OVER).await;
    drop((victim, held));
    let other = member(&stream).await;
    until_trimmed(&other, 1).await;
    silence(&other, TAKE_OVER).await;
    assert_eq!((other.trimmed(), client.pending(&stream).await), (1, 0));
}

/// Another member's sweeps do not take it from a holder that lives.
#[tokio::test]
async fn an_entry_trimmed_in_hand_stays_its_holders_while_others_sweep() {
    let stream = unique("in-hand-swept");
    let first = member(&stream).await;
    publish(&stream, 0..2).await;
    let held = receive(&first, 2).await;
    let other = member(&stream).await;
    let client = Client::connect().await;
    client.command(&["XTRIM", &stream, "MAXLEN", "0"]).await;
    silence(&other, TAKE_OVER * 2).await;
    settle(&first, held[0].receipt, Settlement::DeadLetter(letter())).await;
    settle(&first, held[1].receipt, Settlement::Release { counted: true }).await;
    let letters = client.messages(first.dead_letter_streams()[0]).await;
    assert_eq!(letters.iter().map(|one| &one.data[..]).collect::<Vec<_>>(), [b"0"]);
    assert_eq!(client.pending(&stream).await, 0);
}

/// Its holder closed with the only copy, unsettled: that is reported too, by whoever takes it over, and the rest is given back.
#[tokio::test]
async fn an_entry_trimmed_in_the_hand_of_one_that_closes_is_reported() {
    let stream = unique("in-hand-closed");
    let first = member(&stream).await;
    publish(&stream, 0..2).await;
    let held = receive(&first, 2).await;
    let client = Client::connect().await;
    client.command(&["XTRIM", &stream, "MAXLEN", "1"]).await;
    // Its own sweeps come and go.
    tokio::time::sleep(TAKE_OVER * 2).await;
    first.close().await.expect("it closes");
    drop(held);
    let other = member(&stream).await;
    let back = receive(&other, 1).await;
    assert_eq!(id(&back[0]), 1);
    ack(&other, &back).await;
    until_trimmed(&other, 1).await;
    silence(&other, TAKE_OVER).await;
    assert_eq!((other.trimmed(), client.pending(&stream).await), (1, 0));
}

#[tokio::test]
async fn several_streams_are_read_by_one_member() {
    let streams = [unique("many-a"), unique("many-b"), unique("many-c")];
    let builder = RedisBroker::builder(server(), streams[0].as_str(), "g");
    let broker = opened(builder.and(streams[1].as_str()).and(streams[2].as_str()).build().unwrap()).await;
    for stream in &streams {
        publish(stream, 0..5).await;
    }
    let all = receive(&broker, 15).await;
    for stream in &streams {
        let of_this = all.iter().filter(|delivery| *delivery.origin.as_ref().unwrap().place == **stream);
        assert_eq!(of_this.map(id).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    }
    settle(&broker, all[0].receipt, Settlement::DeadLetter(letter())).await;
    assert_eq!(broker.dead_letter_streams().len(), 3);
    ack(&broker, &all[1..]).await;
}

#[tokio::test]
async fn entries_are_deleted_when_done_where_that_is_asked_for() {
    let stream = unique("deleted");
    let builder = RedisBroker::builder(server(), stream.as_str(), "g").delete_done();
    let broker = opened(builder.build().unwrap()).await;
    publish(&stream, 0..4).await;
    let all = receive(&broker, 4).await;
    ack(&broker, &all[..3]).await;
    assert_eq!(Client::connect().await.number(&["XLEN", &stream]).await, 1);
    assert_eq!(broker.trimmed(), 0);
}

/// The lag counts what was not delivered and what waits for its time.
#[tokio::test]
async fn lag_counts_what_waits() {
    let stream = unique("lag");
    let broker = member(&stream).await;
    publish(&stream, 0..1).await;
    let held = receive(&broker, 1).await;
    settle(&broker, held[0].receipt, Settlement::Retry { after: Duration::from_secs(60) }).await;
    publish(&stream, 1..4).await;
    let heard = async {
        while broker.lag() != Some(4) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), heard).await.unwrap_or_else(|_| panic!("{:?}", broker.lag()));
}
