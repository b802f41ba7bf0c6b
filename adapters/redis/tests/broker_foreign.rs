//! What others send, what others read: `redis-cli` on both sides, in both content modes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod broker;

use std::process::Command;

use broker::{Client, ack, event, id, member, receive, server, unique, url};
use hapax::{Broker, DefectKind, ErrorKind, Limits, MessageLimits, Outgoing, Publisher};
use hapax_redis::{RedisBroker, RedisPublisher};

fn redis_cli(words: &[&str]) -> String {
    let output = Command::new("redis-cli").args(["-u", &url()]).args(words).output().expect("redis-cli is installed");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

#[tokio::test]
async fn redis_cli_sends_in_binary_mode() {
    let stream = unique("binary");
    let broker = member(&stream).await;
    let fields = ["ce_specversion", "1.0", "ce_id", "7", "ce_source", "/cli", "ce_type", "com.example.sent"];
    let more = ["ce_subject", "a b", "content-type", "application/json", "x-tenant", "9", "data", r#"{"cents": 12}"#];
    let entry = redis_cli(&[&["XADD", &stream, "*"], &fields[..], &more[..]].concat());
    let arrived = receive(&broker, 1).await;
    let message = &arrived[0].message;
    assert_eq!(message.defect(), None);
    assert_eq!((id(&arrived[0]), message.attributes.ty.as_deref()), (7, Some("com.example.sent")));
    assert_eq!(message.attributes.content_type.as_deref(), Some("application/json"));
    assert_eq!((message.headers.get_str("x-tenant"), &message.data[..]), (Some("9"), &br#"{"cents": 12}"#[..]));
    let origin = arrived[0].origin.as_ref().unwrap();
    assert_eq!((&*origin.place, &*origin.position), (stream.as_str(), entry.as_str()));
    ack(&broker, &arrived).await;
}

#[tokio::test]
async fn redis_cli_sends_in_structured_mode() {
    let stream = unique("structured");
    let broker = member(&stream).await;
    let event = r#"{"specversion":"1.0","id":"8","source":"/cli","type":"com.example.sent","data":{"cents": 12}}"#;
    redis_cli(&["XADD", &stream, "*", "content-type", "application/cloudevents+json; charset=utf-8", "data", event]);
    let arrived = receive(&broker, 1).await;
    assert_eq!((arrived[0].message.defect(), id(&arrived[0])), (None, 8));
    assert_eq!(arrived[0].message.data, r#"{"cents": 12}"#);
    ack(&broker, &arrived).await;
}

/// An entry that is no CloudEvent arrives with its fields as headers: an id can be taken from one of them.
#[tokio::test]
async fn plain_fields_arrive_as_headers() {
    let stream = unique("plain");
    let broker = member(&stream).await;
    redis_cli(&["XADD", &stream, "*", "order", "17", "cents", "1200"]);
    let arrived = receive(&broker, 1).await;
    let message = &arrived[0].message;
    assert_eq!((message.defect(), message.attributes.id.as_deref()), (None, None));
    assert_eq!(message.headers.get_str("order"), Some("17"));
    assert!(broker.capabilities().position_is_stable, "or its place in the stream is its id");
    ack(&broker, &arrived).await;
}

#[tokio::test]
async fn redis_cli_reads_what_the_publisher_sent() {
    for structured in [false, true] {
        let stream = unique("read");
        let publisher = RedisPublisher::new(server(), "elsewhere").unwrap();
        let publisher = if structured { publisher.structured() } else { publisher };
        let answers = publisher.publish(vec![Outgoing::new(event(5)).to(stream.as_str())]).await;
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        let seen = redis_cli(&["XRANGE", &stream, "-", "+"]);
        let expected = if structured { r#""id":"5""# } else { "ce_id\n5" };
        assert!(seen.contains(expected) && seen.contains("content-type"), "{seen}");
    }
}

/// The limits hold before anything is decoded, and a message beyond them arrives to be set aside.
#[tokio::test]
async fn an_oversized_entry_arrives_as_a_defect() {
    let stream = unique("large");
    let broker = RedisBroker::builder(server(), stream.as_str(), "g").build().unwrap();
    let message = MessageLimits { body_max: 1000, headers_max: 5, ..MessageLimits::DEFAULT };
    broker.open(Limits { message, ..broker::limits(std::time::Duration::from_secs(60)) }).await.unwrap();
    let client = Client::connect().await;
    client.add(&stream, &[("ce_id", b"1"), ("data", &[b'x'; 1001])]).await;
    let many: Vec<_> = (0..6).map(|n| (["a", "b", "c", "d", "e", "f"][n], &b"v"[..])).collect();
    client.add(&stream, &many).await;
    client.add(&stream, &[("data", b"one"), ("data", b"two")]).await;
    let arrived = receive(&broker, 3).await;
    let kinds: Vec<_> = arrived.iter().map(|one| one.message.defect().map(|defect| defect.kind)).collect();
    assert_eq!(kinds, [Some(DefectKind::BeyondLimit), Some(DefectKind::BeyondLimit), Some(DefectKind::Undecodable)]);
    assert_eq!(arrived[0].message.data.len(), 1001, "as it travelled");
    ack(&broker, &arrived).await;
}

/// JasperFx/wolverine GH-3926: what can never be sent is told as that, and holds up nothing.
#[tokio::test]
async fn permanent_publish_error_is_permanent() {
    let stream = unique("rejected");
    let publisher = RedisPublisher::new(server(), stream.as_str()).unwrap();
    let client = Client::connect().await;
    let wrong = unique("wrong");
    client.command(&["SET", &wrong, "no stream"]).await;
    let batch = vec![
        Outgoing::new(event(1)),
        Outgoing::new(event(2).with_header("data", "taken")),
        Outgoing::new(event(3)).to("not a name"),
        Outgoing::new(event(4)).to(wrong.as_str()),
        Outgoing::new(event(5)),
    ];
    let answers = publisher.publish(batch).await;
    let kinds: Vec<_> = answers.iter().map(|answer| answer.as_ref().err().map(hapax::Error::kind)).collect();
    assert_eq!(kinds[..3], [None, Some(ErrorKind::Rejected), Some(ErrorKind::Rejected)]);
    assert!(answers[3].as_ref().is_err_and(|error| !error.is_retryable()), "{answers:?}");
    assert!(answers[4].is_ok());
    let sent = client.messages(&stream).await;
    assert_eq!(sent.iter().filter_map(|one| one.attributes.id.as_deref()).collect::<Vec<_>>(), ["1", "5"]);
}

#[tokio::test]
async fn many_are_sent_in_order_and_the_stream_is_kept_short_where_asked() {
    let stream = unique("order");
    let publisher = RedisPublisher::new(server(), stream.as_str()).unwrap();
    let answers = publisher.publish((0..2000).map(event).map(Outgoing::new).collect()).await;
    assert!(answers.len() == 2000 && answers.iter().all(Result::is_ok));
    let client = Client::connect().await;
    let sent = client.messages(&stream).await;
    assert!(sent.iter().enumerate().all(|(at, one)| one.attributes.id.as_deref() == Some(&at.to_string())));
    let short = publisher.keep_about(500);
    assert!(short.publish(vec![Outgoing::new(event(2000))]).await[0].is_ok());
    let length = client.number(&["XLEN", &stream]).await;
    assert!((500..1000).contains(&length), "{length}");
}
