use std::time::{Duration, SystemTime};

use hapax::Reason;
use lapin::types::{ByteArray, DecimalValue, FieldArray};

use super::*;

const LIMITS: MessageLimits = MessageLimits::DEFAULT;

fn table(entries: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        table.insert((*name).into(), value.clone());
    }
    table
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

fn with(entries: &[(&str, AMQPValue)]) -> BasicProperties {
    BasicProperties::default().with_headers(table(entries))
}

fn letter() -> DeadLetter {
    DeadLetter {
        reason: Reason::Permanent,
        error: "no such order".into(),
        consumer: "billing".into(),
        attempts: 3,
        first: SystemTime::UNIX_EPOCH,
        last: SystemTime::UNIX_EPOCH + Duration::from_secs(2),
        origin: None,
        reopen: std::num::NonZeroU64::new(42),
    }
}

#[test]
fn typed_headers_read_as_the_text_that_people_would_write() {
    let nested = table(&[("a \"b\"", AMQPValue::LongInt(1)), ("c", AMQPValue::Void)]);
    let cases = [
        (text("as it is"), "as it is"),
        (AMQPValue::ShortString("short".into()), "short"),
        (AMQPValue::Boolean(true), "true"),
        (AMQPValue::ShortShortInt(-3), "-3"),
        (AMQPValue::LongLongInt(i64::MIN), "-9223372036854775808"),
        (AMQPValue::LongUInt(4_000_000_000), "4000000000"),
        (AMQPValue::Double(1.5), "1.5"),
        (AMQPValue::DecimalValue(DecimalValue { scale: 2, value: 1999 }), "1999e-2"),
        (AMQPValue::Timestamp(1_709_164_800), "2024-02-29T00:00:00Z"),
        (AMQPValue::Void, ""),
        (AMQPValue::FieldArray(FieldArray::from(vec![text("x"), AMQPValue::Boolean(false)])), "[\"x\",false]"),
        (AMQPValue::FieldTable(nested), "{\"a \\\"b\\\"\":1,\"c\":null}"),
    ];
    for (value, expected) in cases {
        let message = read(&with(&[("x-value", value.clone())]), Bytes::new(), &LIMITS);
        assert_eq!(message.headers.get_str("x-value"), Some(expected), "{value:?}");
    }
    let bytes = AMQPValue::ByteArray(ByteArray::from(vec![0, 255]));
    let message = read(&with(&[("x-value", bytes)]), Bytes::new(), &LIMITS);
    assert_eq!(message.headers.get("x-value").map(|value| &value[..]), Some(&[0, 255][..]));
}

#[test]
fn an_array_nested_deeper_than_anybody_writes_is_a_defect() {
    let nested =
        |levels: usize| (0..levels).fold(text("core"), |inner, _| AMQPValue::FieldArray(FieldArray::from(vec![inner])));
    let message = read(&with(&[("x-value", nested(NESTING_MAX))]), Bytes::new(), &LIMITS);
    assert_eq!(message.defect(), None);
    assert!(message.headers.get_str("x-value").unwrap().contains("core"), "nothing of it is left out");
    let message = read(&with(&[("x-value", nested(NESTING_MAX + 1))]), "body".into(), &LIMITS);
    assert_eq!(message.defect().map(|defect| defect.kind), Some(hapax::DefectKind::BeyondLimit));
    assert!(message.defect().unwrap().to_string().contains("x-value"), "{:?}", message.defect());
    assert_eq!(message.data, "body");
}

/// The mark of the screen is a defect, whoever set it, and no dead letter bears it.
#[test]
fn headers_that_were_mended_are_a_defect() {
    let properties = with(&[(screen::MARK, text("text large")), ("x-tenant", text("7"))]);
    let message = read(&properties, "body".into(), &LIMITS);
    let told = message.defect().expect("it is marked").to_string();
    assert!(told.contains("UTF-8") && told.contains("too large for one frame") && !told.contains("nested"), "{told}");
    assert!(again(&properties).headers().as_ref().unwrap().contains_key(screen::MARK), "it is one after a retry too");
    assert!(!set_aside(&properties, &letter()).headers().as_ref().unwrap().contains_key(screen::MARK));
}

#[test]
fn dates_are_those_of_the_calendar() {
    for (seconds, date) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_782_399, "2000-02-28T23:59:59Z"),
        (951_868_799, "2000-02-29T23:59:59Z"),
        (4_107_542_400, "2100-03-01T00:00:00Z"),
    ] {
        assert_eq!(rfc_3339(seconds), date);
    }
}

#[test]
fn attributes_read_under_all_three_prefixes_and_from_typed_values() {
    for prefix in ["cloudEvents_", "cloudEvents:", "ce-"] {
        let header = |name: &str| format!("{prefix}{name}");
        let (version, id, source) = (header("specversion"), header("id"), header("source"));
        let (ty, time) = (header("type"), header("time"));
        let properties = with(&[
            (&version, text("1.0")),
            (&id, AMQPValue::LongLongInt(42)),
            (&source, text("/shop")),
            (&ty, text("order.placed")),
            (&time, AMQPValue::Timestamp(0)),
        ])
        .with_content_type("application/json".into())
        .with_message_id("of another".into());
        let message = read(&properties, "{}".into(), &LIMITS);
        assert_eq!(message.attributes.id.as_deref(), Some("42"), "{prefix}");
        assert_eq!(message.attributes.time.as_deref(), Some("1970-01-01T00:00:00Z"));
        assert_eq!(message.attributes.content_type.as_deref(), Some("application/json"));
        assert_eq!(message.headers.len(), 0, "message_id is no header of a CloudEvent: {:?}", message.headers);
    }
}

#[test]
fn the_property_message_id_is_a_header_of_messages_without_an_id() {
    let properties = with(&[]).with_message_id("m-7".into());
    let message = read(&properties, "{}".into(), &LIMITS);
    assert_eq!(message.headers.get_str(MESSAGE_ID), Some("m-7"));
    let own = with(&[(MESSAGE_ID, text("own"))]).with_message_id("m-7".into());
    assert_eq!(read(&own, "{}".into(), &LIMITS).headers.get_str(MESSAGE_ID), Some("own"));
}

#[test]
fn structured_mode_is_told_by_the_property() {
    let body = r#"{"specversion":"1.0","id":"42","source":"/shop","type":"placed","data":{"cents": 1}}"#;
    let properties = BasicProperties::default().with_content_type("application/cloudevents+json; charset=utf-8".into());
    let message = read(&properties, body.into(), &LIMITS);
    assert_eq!(message.defect(), None);
    assert_eq!(message.attributes.id.as_deref(), Some("42"));
    assert_eq!(message.data.as_ref(), br#"{"cents": 1}"#);
}

#[test]
fn a_content_type_in_both_places_is_the_property() {
    let properties = with(&[("content-type", text("text/html"))]).with_content_type("text/plain".into());
    let message = read(&properties, "x".into(), &LIMITS);
    assert_eq!((message.defect(), message.attributes.content_type.as_deref()), (None, Some("text/plain")));
}

/// Bugs 49 and 50 of semantics.md section 4 (MassTransit/MassTransit#4676, BrighterCommand/Brighter@ac6e10301): counts and
/// headers of the broker itself went out again with a message.
#[test]
fn attempt_headers_not_propagated() {
    let deaths = AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::FieldTable(table(&[("count", text("1"))]))]));
    let properties = with(&[
        ("x-death", deaths),
        ("x-first-death-queue", text("orders.billing.retry.1s")),
        ("x-last-death-reason", text("expired")),
        ("x-delivery-count", AMQPValue::LongLongInt(3)),
        ("x-acquired-count", AMQPValue::LongLongInt(4)),
        ("x-tenant", text("7")),
    ]);
    let message = read(&properties, Bytes::new(), &LIMITS);
    assert_eq!(message.headers.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["x-tenant"]);
    for copy in [again(&properties), set_aside(&properties, &letter())] {
        let names: Vec<_> = copy.headers().as_ref().unwrap().inner().keys().map(|name| name.as_str()).collect();
        assert!(names.contains(&"x-tenant"), "{names:?}");
        assert!(!names.iter().any(|name| is_of_server(name)), "{names:?}");
    }
    let sent = Message::default().with_header("x-delivery-count", "3").with_header("x-tenant", "7");
    let (properties, _) = write(&sent).unwrap();
    assert_eq!(properties.headers().as_ref().unwrap().inner().len(), 1);
}

/// Bugs 50 and 51 of semantics.md section 4 (BrighterCommand/Brighter@b5db68fc9).
#[test]
fn headers_byte_exact() {
    let entries = [
        ("X-Case", text("Kept")),
        ("x-number", AMQPValue::LongInt(7)),
        ("x-flag", AMQPValue::Boolean(true)),
        ("x-bytes", AMQPValue::ByteArray(ByteArray::from(vec![0, 255]))),
    ];
    let properties = with(&entries)
        .with_content_type("application/json".into())
        .with_content_encoding("gzip".into())
        .with_correlation_id("c".into())
        .with_reply_to("answers".into())
        .with_message_id("m".into())
        .with_timestamp(5)
        .with_type("t".into())
        .with_app_id("a".into())
        .with_priority(3);
    assert_eq!(again(&properties), properties.with_delivery_mode(PERSISTENT));
}

#[test]
fn a_message_that_waits_or_is_dead_neither_expires_nor_claims_a_user_nor_asks_for_more_queues() {
    let array = AMQPValue::FieldArray(FieldArray::from(vec![text("elsewhere")]));
    let properties =
        with(&[("CC", array)]).with_expiration("60000".into()).with_user_id("shop".into()).with_delivery_mode(1);
    for copy in [again(&properties), set_aside(&properties, &letter())] {
        assert_eq!((copy.expiration(), copy.user_id()), (&None, &None));
        assert_eq!(copy.delivery_mode(), &Some(PERSISTENT));
        assert!(!copy.headers().as_ref().unwrap().contains_key("CC"));
    }
    let error = write(&Message::default().with_header("CC", "elsewhere")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Rejected);
}

#[test]
fn a_dead_letter_bears_one_token_and_no_forged_header_of_ours() {
    let properties = with(&[("HAPAX-Reopen", text("1")), ("hapax-reason", text("forged")), ("x-tenant", text("7"))]);
    let dead = set_aside(&properties, &letter());
    let table = dead.headers().as_ref().unwrap();
    assert!(!table.contains_key("HAPAX-Reopen"));
    assert_eq!(table.inner().get("hapax-reopen"), Some(&text("42")));
    assert_eq!(table.inner().get("hapax-reason"), Some(&text("permanent")));
    assert_eq!(table.inner().get("x-tenant"), Some(&text("7")));
}

#[test]
fn a_dead_letter_whose_headers_fill_the_frame_leaves_out_the_largest() {
    let properties = with(&[
        ("x-large", text(&"l".repeat(70_000))),
        ("x-middle", text(&"m".repeat(50_000))),
        ("x-small", text("s")),
    ]);
    let dead = set_aside(&properties, &letter());
    assert!(header_bytes(&dead) < 120_000);
    let table = dead.headers().as_ref().unwrap();
    assert!(!table.contains_key("x-large") && table.contains_key("x-middle") && table.contains_key("x-small"));
    assert!(table.contains_key("hapax-reason"));
}

#[test]
fn what_is_written_reads_back() {
    let sent = Message::event("/shop", "42", "order.placed")
        .with_data("application/json", "{}")
        .with_header("x-binary", vec![0, 159, 255])
        .with_header("x-empty", "");
    let (properties, body) = write(&sent).unwrap();
    assert_eq!(properties.message_id().as_ref().map(ShortString::as_str), Some("42"));
    assert_eq!(properties.content_type().as_ref().map(ShortString::as_str), Some("application/json"));
    assert_eq!(read(&properties, body, &LIMITS), sent);
}

#[test]
fn what_amqp_cannot_carry_is_rejected_and_not_cut() {
    let long = "n".repeat(256);
    assert_eq!(write(&Message::default().with_header(long.clone(), "v")).unwrap_err().kind(), ErrorKind::Rejected);
    assert_eq!(write(&Message::default().with_data(long, "v")).unwrap_err().kind(), ErrorKind::Rejected);
}

#[test]
fn deliveries_are_counted_from_one_where_the_queue_counts() {
    let counted = |count: i64| with(&[("x-delivery-count", AMQPValue::LongLongInt(count))]);
    assert_eq!(deliveries(&with(&[]), false), Some(1));
    assert_eq!(deliveries(&counted(1), true), Some(2));
    assert_eq!(deliveries(&counted(i64::MAX), true), Some(u32::MAX));
    assert_eq!(deliveries(&counted(-1), true), Some(u32::MAX));
    assert_eq!(deliveries(&with(&[]), true), None, "a classic queue does not count");
}

/// What is thought larger than it is waits for ever, since no retry of it is sent.
#[test]
fn headers_weigh_what_they_take_on_the_wire() {
    let many = AMQPValue::FieldArray(vec![AMQPValue::Boolean(true); 10_000].into());
    let scalars = AMQPValue::FieldArray(
        vec![
            AMQPValue::Void,
            AMQPValue::ShortInt(1),
            AMQPValue::LongInt(1),
            AMQPValue::LongLongInt(1),
            AMQPValue::Timestamp(1),
        ]
        .into(),
    );
    let text = AMQPValue::LongString(b"12345".to_vec().into());
    let mut table = FieldTable::default();
    for (name, value) in [("many", many), ("scalars", scalars), ("text", text)] {
        table.insert(name.into(), value);
    }
    let expected = (5 + 5 + 20_000) + (8 + 5 + 1 + 3 + 5 + 9 + 9) + (5 + 5 + 5);
    assert_eq!(header_bytes(&BasicProperties::default().with_headers(table)), expected);
}
