//! What others send, with Debian's kcat: CloudEvents in binary and structured mode, plain JSON, tombstones, and headers
//! that no program of ours would write.

mod support;

use std::process::Stdio;

use hapax::{Broker, DefectKind};
use support::{Topic, ack, receive};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Runs kcat as a producer with this on its standard input: one message.
async fn kcat(topic: &Topic, arguments: &[&str], message: &[u8]) {
    let mut command = Command::new("kcat");
    // A delimiter that no message has.
    command.args(["-P", "-b", &topic.servers(), "-t", &topic.topic, "-D", "\u{1}"]).args(arguments);
    send(command, message).await;
}

async fn send(mut command: Command, message: &[u8]) {
    let running = command.stdin(Stdio::piped()).spawn();
    let mut running = running.expect("kcat is installed: apt-get install kcat");
    let mut input = running.stdin.take().expect("it is piped");
    input.write_all(message).await.expect("it reads");
    drop(input);
    assert!(running.wait().await.expect("it ends").success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_messages_arrive_in_every_mode() {
    let topic = Topic::new(1);
    let broker = topic.opened().await;
    let binary = [
        "-k",
        "customer 7",
        "-H",
        "ce_specversion=1.0",
        "-H",
        "ce_id=1",
        "-H",
        "ce_source=/shop",
        "-H",
        "ce_type=placed",
        "-H",
        "content-type=application/json",
        "-H",
        "x-tenant=7",
    ];
    kcat(&topic, &binary, br#"{"cents": 1200}"#).await;
    let document =
        br#"{"specversion":"1.0","id":"2","source":"/shop","type":"placed","partitionkey":"p","data":{"cents": 5}}"#;
    kcat(&topic, &["-H", "content-type=application/cloudevents+json; charset=utf-8"], document).await;
    kcat(&topic, &["-k", "customer 8"], br#"{"id": "3"}"#).await;
    kcat(&topic, &["-K", ":", "-Z"], b"customer 9:").await;
    let arrived = receive(&broker, 4).await;
    let [one, two, three] = [&arrived[0], &arrived[1], &arrived[2]].map(|delivery| &delivery.message);
    assert_eq!(one.attributes.id.as_deref(), Some("1"));
    assert_eq!(one.attributes.partition_key.as_deref(), Some("customer 7"));
    assert_eq!((one.headers.get_str("x-tenant"), &one.data[..]), (Some("7"), br#"{"cents": 1200}"#.as_slice()));
    assert_eq!((two.attributes.id.as_deref(), two.attributes.partition_key.as_deref()), (Some("2"), Some("p")));
    assert_eq!(&two.data[..], br#"{"cents": 5}"#);
    assert_eq!((three.attributes.id.as_deref(), three.attributes.partition_key.as_deref()), (None, Some("customer 8")));
    let tombstone = &arrived[3].message;
    assert_eq!((tombstone.attributes.partition_key.as_deref(), tombstone.data.len()), (Some("customer 9"), 0));
    assert!(arrived.iter().all(|delivery| delivery.message.defect().is_none()));
    ack(&broker, &arrived).await;
    broker.close().await.expect("it closes");
}

/// rdkafka 0.39 panics on such a name (`Headers::try_get`): one message of anybody would stop the consumer for good.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_name_that_is_not_utf8_is_a_defect_and_stops_nobody() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let topic = Topic::new(1);
    let broker = topic.opened().await;
    let mut command = Command::new("kcat");
    command
        .args(["-P", "-b", &topic.servers(), "-t", &topic.topic, "-H", "x-fine=1", "-H"])
        .arg(OsStr::from_bytes(b"\xff\xfe=1"));
    send(command, b"odd").await;
    topic.publish([1]).await;
    let arrived = receive_odd(&broker).await;
    let defect = arrived[0].message.defect().expect("it has a defect");
    assert_eq!(defect.kind, DefectKind::Undecodable);
    assert_eq!(&arrived[0].message.data[..], b"odd");
    assert_eq!(arrived[0].message.headers.get_str("x-fine"), Some("1"));
    assert_eq!(arrived[1].message.attributes.id.as_deref(), Some("1"));
    ack(&broker, &arrived).await;
    broker.close().await.expect("it closes");
}

async fn receive_odd(broker: &hapax_kafka::KafkaBroker) -> Vec<hapax::Delivery> {
    let mut all = Vec::new();
    while all.len() < 2 {
        let more = tokio::time::timeout(support::SOON, broker.receive(support::WANT)).await;
        all.extend(more.expect("soon").expect("the broker delivers"));
    }
    all
}
