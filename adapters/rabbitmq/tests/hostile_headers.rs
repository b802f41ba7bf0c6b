//! Headers that no client library would write, sent by hand: whatever another client publishes, the process lives, the message
//! arrives, and it can be set aside. A message that ends the connection each time it is delivered would hold up the queue for
//! ever.

mod rabbit;

use std::time::Duration;

use hapax::{Broker, DefectKind, Settlement};
use hapax_rabbitmq::lapin::ExchangeKind;
use hapax_rabbitmq::lapin::options::{ExchangeDeclareOptions, QueueBindOptions};
use hapax_rabbitmq::lapin::types::FieldTable;
use rabbit::raw::{self, Raw};
use rabbit::{Rabbit, ids, letter, receive, settle, short};

/// Arrays in arrays, `depth` of them.
fn nested(tag: u8, depth: usize) -> Vec<u8> {
    let mut value = vec![b'V'];
    let mut lengths = Vec::with_capacity(depth);
    let mut length = 1;
    for _ in 0..depth {
        lengths.push(length);
        // A table has a name before each value.
        length += if tag == b'F' { 6 } else { 5 };
    }
    let mut out = Vec::with_capacity(length);
    for (at, length) in lengths.iter().rev().enumerate() {
        if tag == b'F' && at > 0 {
            out.push(0);
        }
        out.push(tag);
        let length = u32::try_from(*length + usize::from(tag == b'F')).expect("small");
        out.extend(length.to_be_bytes());
    }
    if tag == b'F' {
        out.push(0);
    }
    out.append(&mut value);
    out
}

/// Another client's message with these headers arrives with a defect, after it also something sound, and both end well.
async fn arrives_and_is_set_aside(headers: &[(&[u8], Vec<u8>)]) {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    let mut raw = Raw::connect(rabbit.url.expose()).await;
    raw.publish(&rabbit.queue, &raw::table(headers), b"body").await;
    let held = receive(&broker, 1).await.remove(0);
    assert_eq!(held.message.data, "body");
    let defect = held.message.defect().expect("it is beyond what is taken");
    assert_eq!(defect.kind, DefectKind::BeyondLimit, "{defect}");
    settle(&broker, held.receipt, Settlement::Retry { after: Duration::from_millis(500) }).await.expect("it waits");
    let held = receive(&broker, 1).await.remove(0);
    assert!(held.message.defect().is_some());
    settle(&broker, held.receipt, Settlement::Release { counted: true }).await.expect("it is released");
    let held = receive(&broker, 1).await.remove(0);
    settle(&broker, held.receipt, letter()).await.expect("it is set aside");
    rabbit.publish([7]).await;
    let sound = receive(&broker, 1).await.remove(0);
    assert_eq!((ids(std::slice::from_ref(&sound)), sound.session.id()), (vec!["7".into()], held.session.id()));
    settle(&broker, sound.receipt, Settlement::Ack).await.expect("it is acked");
    broker.close().await.expect("it closes");
    assert_eq!(rabbit.messages(&rabbit.dead()).await, Some(1));
    assert_eq!(rabbit.messages(&rabbit.queue).await, Some(0));
}

/// The client reads nested values by recursion, on a thread of 2 MiB; what overflows there ends the process. 26,000 levels fit
/// into a frame of 128 KiB, over which RabbitMQ 3.10 itself takes longer than these tests have.
#[tokio::test]
async fn arrays_nested_without_end_do_not_end_the_process() {
    arrives_and_is_set_aside(&[(b"deep", nested(b'A', 5_000))]).await;
}

#[tokio::test]
async fn tables_nested_without_end_do_not_end_the_process() {
    arrives_and_is_set_aside(&[(b"sound", raw::text(b"x")), (b"deep", nested(b'F', 4_000))]).await;
}

/// lapin takes texts as UTF-8 and ends the connection over any other.
#[tokio::test]
async fn a_name_that_is_no_utf_8_does_not_hold_up_the_queue() {
    arrives_and_is_set_aside(&[(b"sound", raw::text(b"x")), (b"\xe9t\xe9", raw::text(b"x"))]).await;
}

/// RabbitMQ looks at no routing key of a message, and every binding of a fanout exchange takes it; lapin ends the connection
/// over a key that is no UTF-8.
#[tokio::test]
async fn a_routing_key_that_is_no_utf_8_does_not_hold_up_the_queue() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    let connection = rabbit.connection().await;
    let channel = connection.create_channel().await.expect("a channel");
    let options = ExchangeDeclareOptions { auto_delete: true, ..ExchangeDeclareOptions::default() };
    let (exchange, table) = (short(&format!("{}.all", rabbit.queue)), FieldTable::default());
    channel
        .exchange_declare(exchange.clone(), ExchangeKind::Fanout, options, table.clone())
        .await
        .expect("an exchange");
    let bound =
        channel.queue_bind(short(&rabbit.queue), exchange.clone(), "".into(), QueueBindOptions::default(), table);
    bound.await.expect("a binding");
    let mut raw = Raw::connect(rabbit.url.expose()).await;
    raw.publish_with(exchange.as_str(), b"\xe9t\xe9", 0, &raw::table(&[(b"sound", raw::text(b"x"))]), b"body").await;
    rabbit.publish([7]).await;
    let mut held = receive(&broker, 2).await;
    let (neighbour, foreign) = (held.remove(1), held.remove(0));
    assert_eq!((&foreign.message.data[..], foreign.message.headers.get_str("sound")), (&b"body"[..], Some("x")));
    assert_eq!(
        (foreign.session.id(), ids(std::slice::from_ref(&neighbour))),
        (neighbour.session.id(), vec!["7".into()])
    );
    settle(&broker, neighbour.receipt, Settlement::Ack).await.expect("it is acked");
    settle(&broker, foreign.receipt, Settlement::Retry { after: Duration::from_millis(500) }).await.expect("it waits");
    let again = receive(&broker, 1).await.remove(0);
    settle(&broker, again.receipt, letter()).await.expect("it is set aside");
    broker.close().await.expect("it closes");
    assert_eq!((rabbit.messages(&rabbit.queue).await, rabbit.messages(&rabbit.dead()).await), (Some(0), Some(1)));
    connection.close(200, "done".into()).await.expect("it closes");
}

/// RabbitMQ adds its count of deliveries, and sends a frame that is larger than what was agreed; lapin ends the connection.
#[tokio::test]
async fn a_header_that_fills_the_frame_does_not_hold_up_the_queue() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    let mut raw = Raw::connect(rabbit.url.expose()).await;
    let room = raw.frame_max - 8 - 14 - 4 - 6 - 5;
    raw.publish(&rabbit.queue, &raw::table(&[(b"large", raw::text(&vec![b'x'; room]))]), b"body").await;
    let first = receive(&broker, 1).await.remove(0);
    settle(&broker, first.receipt, Settlement::Release { counted: true }).await.expect("it is released");
    let held = receive(&broker, 1).await.remove(0);
    assert_eq!(held.message.defect(), first.message.defect(), "it is what it was at first");
    assert_eq!(held.message.headers.get_str("large"), first.message.headers.get_str("large"));
    settle(&broker, held.receipt, letter()).await.expect("it is set aside");
    broker.close().await.expect("it closes");
    assert_eq!(rabbit.peek(&rabbit.dead()).await[0].data, b"body");
}

/// What people write is far above the bound, and is read as it was.
#[tokio::test]
async fn what_people_nest_is_read_as_it_was() {
    let rabbit = Rabbit::fresh();
    let broker = rabbit.opened().await;
    let mut raw = Raw::connect(rabbit.url.expose()).await;
    raw.publish(&rabbit.queue, &raw::table(&[(b"nested", nested(b'A', 4))]), b"body").await;
    let held = receive(&broker, 1).await.remove(0);
    assert_eq!((held.message.defect(), held.message.headers.get_str("nested")), (None, Some("[[[[null]]]]")));
    broker.close().await.expect("it closes");
}
