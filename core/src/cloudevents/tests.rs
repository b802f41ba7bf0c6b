//! Every rule of docs/wire.md about reading and writing, and that what is written reads back.

use std::num::NonZeroU64;

use super::*;
use crate::message::DefectKind;
use crate::store::Fingerprint;

const LIMITS: MessageLimits = MessageLimits::DEFAULT;
const ALL: [Convention; 4] = [Convention::KAFKA, Convention::RABBITMQ, Convention::REDIS, Convention::HTTP];

fn headers<V: Into<Bytes> + Clone>(list: &[(&str, V)]) -> Headers {
    list.iter().map(|(name, value)| (*name, value.clone())).collect()
}

fn kafka<V: Into<Bytes> + Clone>(list: &[(&str, V)], body: &'static str) -> Message {
    decode(headers(list), Bytes::from_static(body.as_bytes()), &Convention::KAFKA, &LIMITS)
}

fn structured(document: &str) -> Message {
    let headers = headers(&[("content-type", "application/cloudevents+json")]);
    decode(headers, Bytes::copy_from_slice(document.as_bytes()), &Convention::KAFKA, &LIMITS)
}

/// An event's document with `more` members.
fn document(more: &str) -> String {
    format!(r#"{{"specversion":"1.0","id":"42","source":"/shop","type":"placed"{more}}}"#)
}

#[track_caller]
fn defect(message: &Message) -> &str {
    let defect = message.defect().expect("no defect");
    assert_eq!(defect.kind, DefectKind::Undecodable);
    &defect.detail
}

#[track_caller]
fn beyond(message: &Message) -> &str {
    let defect = message.defect().expect("no defect");
    assert_eq!(defect.kind, DefectKind::BeyondLimit);
    &defect.detail
}

fn full() -> Message {
    let mut message = Message::event("/shop", "42", "placed").with_subject("order/42").with_partition_key("k");
    let a = &mut message.attributes;
    a.time = Some("2026-01-01T00:00:00Z".into());
    a.data_schema = Some("/schema".into());
    a.correlation_id = Some("c".into());
    a.causation_id = Some("u".into());
    a.sequence = Some("7".into());
    a.traceparent = Some("00-1-2-01".into());
    a.tracestate = Some("a=b".into());
    message.with_json(&serde_json::json!({"cents": 1200})).unwrap()
}

#[test]
fn every_attribute_has_one_place() {
    let mut filled = Attributes::default();
    for (slot, name) in slots(&mut filled).into_iter().zip(NAMES) {
        *slot = Some(name.into());
    }
    assert_eq!(attributes(&filled).filter(|(name, value)| name == value).count(), NAMES.len());
    assert_eq!(filled.ty.as_deref(), Some("type"));
    assert_eq!(filled.content_type.as_deref(), Some(NAMES[CONTENT_TYPE]));
}

// Binary mode.

#[test]
fn each_convention_is_written_as_its_binding_says() {
    for (convention, id, content_type) in [
        (Convention::KAFKA, "ce_id", "content-type"),
        (Convention::REDIS, "ce_id", "content-type"),
        (Convention::MEMORY, "ce_id", "content-type"),
        (Convention::RABBITMQ, "cloudEvents_id", "content-type"),
        (Convention::HTTP, "ce-id", "content-type"),
    ] {
        let (headers, body) = encode(&full(), &convention);
        assert_eq!(headers.get_str(id), Some("42"));
        assert_eq!(headers.get_str(content_type), Some("application/json"));
        assert_eq!(headers.get_str(&format!("{}specversion", convention.prefix)), Some("1.0"));
        assert!(!headers.iter().any(|(name, _)| name.ends_with("datacontenttype")));
        assert_eq!(body, full().data);
        assert!(convention.prefixes.contains(&convention.prefix));
    }
}

#[test]
fn rabbitmq_reads_three_prefixes() {
    for prefix in ["cloudEvents_", "cloudEvents:", "ce-"] {
        let headers: Headers =
            [(format!("{prefix}specversion"), "1.0"), (format!("{prefix}id"), "42")].into_iter().collect();
        let message = decode(headers, Bytes::new(), &Convention::RABBITMQ, &LIMITS);
        assert_eq!(message.attributes.id.as_deref(), Some("42"), "{prefix}");
        assert!(message.headers.is_empty());
    }
}

#[test]
fn a_message_without_attributes_is_plain_and_no_defect() {
    let message = kafka(&[("x-id", "7"), ("ce_", "no name"), ("content-type", "text/plain")], "hello");
    assert_eq!(message.defect(), None);
    assert_eq!(message.attributes.content_type.as_deref(), Some("text/plain"));
    assert_eq!(attributes(&message.attributes).count(), 1);
    assert_eq!(message.headers, headers(&[("x-id", "7"), ("ce_", "no name")]));
    let (written, _) = encode(&message, &Convention::KAFKA);
    assert!(written.get("ce_specversion").is_none());
}

/// Bug 51 of semantics.md section 4: header names re-cased, values re-encoded.
#[test]
fn headers_byte_exact() {
    let junk: Vec<u8> = (0..=255).collect();
    let list = [
        ("X-Tenant", &b"7"[..]),
        ("x-tenant", b"8"),
        ("x-tenant", b""),
        ("", b"no name"),
        ("ce_", b"only a prefix"),
        ("CE_ID", b"not an attribute here"),
        ("ce_myExt", &junk),
        ("ce_specversion", b"1.0"),
        ("Content-Type", b"not one on Kafka"),
    ]
    .map(|(name, value)| (name, Bytes::copy_from_slice(value)));
    let message = kafka(&list, "data");
    assert_eq!(message.defect(), None);
    let mut kept = headers(&list);
    kept.remove("ce_specversion");
    assert_eq!(message.headers, kept);
    let (written, body) = encode(&message, &Convention::KAFKA);
    assert_eq!(decode(written, body, &Convention::KAFKA, &LIMITS), message);
}

#[test]
fn a_binary_message_that_does_not_read_says_which_attribute() {
    let v = ("ce_specversion", "1.0");
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[("ce_id", "1")], "attribute `specversion` is missing"),
        (&[("ce_anything", "1")], "attribute `specversion` is missing"),
        (&[("ce_specversion", "0.3"), ("ce_id", "1")], "attribute `specversion` is not 1.0"),
        (&[("ce_specversion", "1.0.2")], "attribute `specversion` is not 1.0"),
        (&[v, v], "attribute `specversion` is there twice"),
        (&[v, ("ce_id", "1"), ("ce_id", "1")], "attribute `id` is there twice"),
        (&[v, ("ce_datacontenttype", "a/b"), ("content-type", "a/b")], "attribute `datacontenttype` is there twice"),
        (&[("content-type", "a/b"), ("content-type", "a/b")], "header `content-type` is there twice"),
        (&[v, ("ce_id", "")], "attribute `id` is empty"),
        (&[v, ("ce_source", "")], "attribute `source` is empty"),
        (&[v, ("ce_type", "")], "attribute `type` is empty"),
        (&[v, ("ce_id", "a\0b")], "attribute `id` has a control character"),
        (&[v, ("ce_source", "a\nb")], "attribute `source` has a control character"),
        (&[v, ("ce_type", "a\u{85}b")], "attribute `type` has a control character"),
        (&[v, ("ce_subject", "a\u{FFFE}b")], "attribute `subject` has a control character"),
    ];
    for (list, why) in cases {
        let message = kafka(list, "body");
        assert_eq!(defect(&message), *why);
        assert_eq!(message.headers, headers(list), "headers as they came");
        assert_eq!(message.data, "body");
        assert_eq!(message.attributes, Attributes::default());
    }
}

#[test]
fn attributes_that_are_not_utf8_are_a_defect() {
    let not_text = |name| kafka(&[("ce_specversion", &b"1.0"[..]), (name, b"\xff")], "");
    assert_eq!(defect(&not_text("ce_subject")), "attribute `subject` is not UTF-8");
    assert_eq!(defect(&not_text("content-type")), "header `content-type` is not UTF-8");
    assert_eq!(defect(&kafka(&[("ce_specversion", &b"\xff"[..])], "")), "attribute `specversion` is not 1.0");
}

#[test]
fn two_prefixes_for_one_attribute_are_a_duplicate() {
    let list = [("ce-specversion", "1.0"), ("ce-id", "1"), ("cloudEvents:id", "2")];
    let message = decode(headers(&list), Bytes::new(), &Convention::RABBITMQ, &LIMITS);
    assert_eq!(defect(&message), "attribute `id` is there twice");
}

#[test]
fn an_empty_optional_attribute_is_unset() {
    let message = kafka(&[("ce_specversion", "1.0"), ("ce_partitionkey", ""), ("content-type", "")], "");
    assert_eq!((message.defect(), attributes(&message.attributes).count()), (None, 0));
    assert_eq!(attributes(&structured(&document(r#","subject":"""#)).attributes).count(), 3);
}

#[test]
fn kafka_values_are_not_percent_decoded() {
    let message = kafka(&[("ce_specversion", "1.0"), ("ce_id", "a%20b")], "");
    assert_eq!(message.attributes.id.as_deref(), Some("a%20b"));
}

#[test]
fn http_values_are_percent_decoded_once_and_names_ignore_case() {
    for (value, text) in [
        ("a%20b", "a b"),
        ("%2520", "%20"),
        ("Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),
        ("\"quoted %41\"", "quoted A"),
        ("\"a \\\" b\"", "a \" b"),
        ("plain", "plain"),
    ] {
        let list = [("Ce-SpecVersion", "1.0"), ("CE-Id", value), ("Content-Type", "text/plain")];
        let message = decode(headers(&list), Bytes::new(), &Convention::HTTP, &LIMITS);
        assert_eq!(message.attributes.id.as_deref(), Some(text), "{:?}", message.defect());
        assert_eq!(message.attributes.content_type.as_deref(), Some("text/plain"));
        assert!(message.headers.is_empty());
    }
    for (value, why) in [
        ("%", "attribute `id` is not percent-encoded as it should be"),
        ("%4", "attribute `id` is not percent-encoded as it should be"),
        ("%zz", "attribute `id` is not percent-encoded as it should be"),
        ("\"a\"b\"", "attribute `id` is not percent-encoded as it should be"),
        ("%FF", "attribute `id` is not UTF-8"),
        ("a%00", "attribute `id` has a control character"),
    ] {
        let list = [("ce-specversion", "1.0"), ("ce-id", value)];
        assert_eq!(defect(&decode(headers(&list), Bytes::new(), &Convention::HTTP, &LIMITS)), why, "{value}");
    }
    let (written, _) = encode(&Message::event("/é", "a \"%\"", "t"), &Convention::HTTP);
    assert_eq!((written.get_str("ce-id"), written.get_str("ce-source")), (Some("a%20%22%25%22"), Some("/%C3%A9")));
}

// Content modes.

#[test]
fn structured_mode_is_known_by_its_media_type() {
    let modes = [
        "application/cloudevents+json",
        "Application/CloudEvents+JSON",
        "application/cloudevents+json; charset=utf-8",
        " application/cloudevents+json ;x=y",
    ];
    for content_type in modes {
        let body = document(r#","data":1"#);
        let message = decode(headers(&[("content-type", content_type)]), body.into(), &Convention::KAFKA, &LIMITS);
        assert_eq!((message.defect(), &message.data[..]), (None, &b"1"[..]), "{content_type}");
        assert!(message.headers.is_empty());
    }
}

#[test]
fn batches_and_other_formats_are_a_defect() {
    for (content_type, why) in [
        ("application/cloudevents-batch+json", "batch mode is not taken: send one event a message"),
        ("application/CLOUDEVENTS-BATCH+json; x=y", "batch mode is not taken: send one event a message"),
        ("application/cloudevents+avro", "event format `avro` is not taken: send JSON or binary mode"),
        ("application/cloudevents+protobuf", "event format `protobuf` is not taken: send JSON or binary mode"),
        ("application/cloudevents", "event format `` is not taken: send JSON or binary mode"),
    ] {
        assert_eq!(defect(&kafka(&[("content-type", content_type)], "[]")), why);
    }
}

#[test]
fn a_document_is_read_attribute_by_attribute() {
    let text = r#" {"specversion":"1.0","id":"42","source":"/shop","type":"placed","subject":"s","time":"t",
        "datacontenttype":"application/json","dataschema":"d","correlationid":"c","causationid":"u","partitionkey":"p",
        "sequence":"7","traceparent":"tp","tracestate":"ts","data":{ "cents" : 12.00 }} "#;
    let message = structured(text);
    assert_eq!(message.defect(), None);
    assert_eq!(attributes(&message.attributes).count(), NAMES.len());
    assert_eq!(message.data, r#"{ "cents" : 12.00 }"#, "the exact text");
}

#[test]
fn extensions_of_a_document_become_headers_as_text() {
    let more = r#","text":"a\u00e9","int":-5,"float":1.50,"flag":true,"bin":"AAE=","none":null,"iD":"x""#;
    let message = structured(&document(more));
    assert_eq!(message.defect(), None);
    let expected = [
        ("ce_text", "aé"),
        ("ce_int", "-5"),
        ("ce_float", "1.50"),
        ("ce_flag", "true"),
        ("ce_bin", "AAE="),
        ("ce_iD", "x"),
    ];
    assert_eq!(message.headers, headers(&expected));
    let (written, body) = encode(&message, &Convention::KAFKA);
    assert_eq!(decode(written, body, &Convention::KAFKA, &LIMITS), message);
}

#[test]
fn a_null_attribute_is_unset() {
    let message = structured(&document(r#","subject":null"#));
    assert_eq!((message.defect(), message.attributes.subject.as_deref()), (None, None));
    let text = r#"{"specversion":"1.0","id":null,"source":"/shop","type":"placed"}"#;
    assert_eq!(defect(&structured(text)), "attribute `id` is missing");
}

#[test]
fn a_document_that_does_not_read_says_what_is_wrong() {
    let cases = [
        ("", "the document is not one JSON object"),
        ("null", "the document is not one JSON object"),
        ("{", "the document is not one JSON object"),
        ("\u{feff}{}", "the document is not one JSON object"),
        (" [{}]", "the document is a batch: send one event a message"),
        ("{}", "attribute `specversion` is missing"),
        (r#"{"specversion":"1.1"}"#, "attribute `specversion` is not 1.0"),
        (r#"{"specversion":1.0}"#, "attribute `specversion` is not 1.0"),
        (r#"{"specversion":null}"#, "attribute `specversion` is not 1.0"),
        (r#"{"specversion":"1.0","source":"s","type":"t"}"#, "attribute `id` is missing"),
        (r#"{"specversion":"1.0","id":"1","type":"t"}"#, "attribute `source` is missing"),
        (r#"{"specversion":"1.0","id":"1","source":"s"}"#, "attribute `type` is missing"),
        (r#"{"specversion":"1.0","id":""}"#, "attribute `id` is empty"),
        (r#"{"specversion":"1.0","source":""}"#, "attribute `source` is empty"),
        (r#"{"specversion":"1.0","type":""}"#, "attribute `type` is empty"),
        (r#"{"specversion":"1.0","id":1}"#, "attribute `id` is not a string"),
        (r#"{"id":"a\u0000"}"#, "attribute `id` has a control character"),
        (r#"{"id":"\ud800"}"#, "attribute `id` is not a string"),
        (r#"{"":1}"#, "a member's name is empty or has a control character"),
        (r#"{"a\u0007b":1}"#, "a member's name is empty or has a control character"),
    ];
    for (text, why) in cases {
        let message = structured(text);
        assert_eq!(defect(&message), why, "{text}");
        assert_eq!(message.data, text, "the body as it came");
        assert_eq!(message.headers.len(), 1, "headers as they came");
    }
    let cases = [
        (r#","id":"42""#, "attribute `id` is there twice"),
        (r#","\u0069d":"42""#, "attribute `id` is there twice"),
        (r#","subject":null,"subject":"s""#, "attribute `subject` is there twice"),
        (r#","specversion":"1.0""#, "attribute `specversion` is there twice"),
        (r#","x":null,"x":1"#, "attribute `x` is there twice"),
        (r#","data":1,"data":1"#, "member `data` is there twice"),
        (r#","data_base64":"","data_base64":"""#, "member `data_base64` is there twice"),
        (r#","data":null,"data_base64":"""#, "members `data` and `data_base64` are both there"),
        (r#","data_base64":1"#, "member `data_base64` is not a string"),
        (r#","data_base64":null"#, "member `data_base64` is not a string"),
        (r#","data_base64":"AA""#, "member `data_base64` is not base64"),
        (r#","data_base64":"AB==""#, "member `data_base64` is not base64"),
        (r#","data_base64":"_-8=""#, "member `data_base64` is not base64"),
        (r#","data_base64":"AA==\n""#, "member `data_base64` is not base64"),
        (r#","subject":{}"#, "attribute `subject` is not a string"),
        (r#","time":7"#, "attribute `time` is not a string"),
        (r#","ext":{"a":1}"#, "attribute `ext` is neither text nor number nor boolean"),
        (r#","ext":[]"#, "attribute `ext` is neither text nor number nor boolean"),
        (
            r#","datacontenttype":"text/xml","data":{}"#,
            "member `data` is not a string, although `datacontenttype` is not JSON",
        ),
        (r#"} {"id":"2""#, "the document is not one JSON object"),
        (r#","data":{"a":1,}"#, "the document is not one JSON object"),
    ];
    for (more, why) in cases {
        assert_eq!(defect(&structured(&document(more))), why, "{more}");
    }
    let list = headers(&[("content-type", "application/cloudevents+json")]);
    let message = decode(list, Bytes::from_static(b"{\"id\":\"\xff\"}"), &Convention::KAFKA, &LIMITS);
    assert_eq!(defect(&message), "the document is not UTF-8");
}

#[test]
fn data_is_what_its_content_type_says() {
    let data = |more: &str| {
        let message = structured(&document(more));
        assert_eq!(message.defect(), None, "{more}");
        (message.data, message.attributes.content_type.map(String::from))
    };
    let json = Some("application/json".to_owned());
    assert_eq!(data(r#","data":{"b":1, "a":2}"#), (r#"{"b":1, "a":2}"#.into(), json.clone()));
    assert_eq!(data(r#","data":null"#), ("null".into(), json.clone()));
    assert_eq!(data(r#","data":"a\n""#), (r#""a\n""#.into(), json));
    let typed = |ty: &str| (format!(r#","datacontenttype":"{ty}","data":"a\nb""#), Some(ty.to_owned()));
    for ty in ["application/json", "text/json;charset=utf-8", "application/vnd.shop+JSON"] {
        assert_eq!(data(&typed(ty).0), (r#""a\nb""#.into(), typed(ty).1));
    }
    for ty in ["text/plain", "application/xml", "application/jsonx", "json"] {
        assert_eq!(data(&typed(ty).0), ("a\nb".into(), typed(ty).1));
    }
    assert_eq!(data(r#","data_base64":"AAH/""#), (Bytes::from_static(b"\x00\x01\xff"), None));
    assert_eq!(data(""), (Bytes::new(), None));
}

#[test]
fn a_string_of_plain_text_and_json_data_are_not_copied() {
    let body = Bytes::from(document(r#","data":{"a":1}"#));
    let message = Message::from_structured_json(body.clone(), &LIMITS);
    assert!(body.as_ptr_range().contains(&message.data.as_ptr()));
}

/// Bug 18 of semantics.md section 4: the identity of a body must not depend on the order of its keys.
#[test]
fn fingerprint_uses_raw_bytes() {
    let of = |data: &str| {
        let message = structured(&document(&format!(",\"data\":{data}")));
        Fingerprint::of(message.attributes.content_type.as_deref(), &message.data)
    };
    assert_eq!(of(r#"{"a":1,"b":2}"#), of(r#"{"a":1,"b":2}"#));
    assert_ne!(of(r#"{"a":1,"b":2}"#), of(r#"{"b":2,"a":1}"#));
    assert_ne!(of(r#"{"a":1}"#), of(r#"{"a": 1}"#));
    assert_ne!(of("1.0"), of("1.00"));
}

#[test]
fn attribute_headers_beside_a_document_give_way_to_it() {
    let list = [
        ("content-type", "application/cloudevents+json"),
        ("ce_id", "other"),
        ("ce_specversion", "9"),
        ("ce_ext", "old"),
        ("x", "y"),
    ];
    let body = document(r#","ext":"new""#);
    let message = decode(headers(&list), body.into(), &Convention::KAFKA, &LIMITS);
    assert_eq!(message.attributes.id.as_deref(), Some("42"));
    assert_eq!(message.headers, headers(&[("x", "y"), ("ce_ext", "new")]));
}

#[test]
fn a_line_of_json_is_an_event() {
    let line = document(r#","data":{"cents":1},"tenant":"7""#) + "\r\n";
    let message = Message::from_structured_json(line.into(), &LIMITS);
    assert_eq!(message.defect(), None);
    assert_eq!(message.headers, headers(&[("ce_tenant", "7")]));
    let broken = Message::from_structured_json(Bytes::from_static(b"not json"), &LIMITS);
    assert_eq!((defect(&broken), &broken.data[..]), ("the document is not one JSON object", &b"not json"[..]));
    let small = MessageLimits { body_max: 4, ..LIMITS };
    let large = Message::from_structured_json(Bytes::from_static(b"{    }"), &small);
    assert_eq!(beyond(&large), "the body is larger than body_max (4 bytes)");
}

// Limits.

#[test]
fn limits_are_checked_before_anything_is_decoded() {
    let list = [("content-type", "application/cloudevents+json"), ("x", "0123456789")];
    let limited = |limits: MessageLimits| decode(headers(&list), "{broken".into(), &Convention::KAFKA, &limits);
    let body = limited(MessageLimits { body_max: 6, ..LIMITS });
    assert_eq!(beyond(&body), "the body is larger than body_max (6 bytes)");
    let count = limited(MessageLimits { headers_max: 1, ..LIMITS });
    assert_eq!(beyond(&count), "there are more headers than headers_max (1)");
    let bytes = limited(MessageLimits { header_bytes_max: 50, ..LIMITS });
    assert_eq!(beyond(&bytes), "the headers are larger than header_bytes_max (50 bytes)");
    assert_eq!((bytes.headers.len(), &bytes.data[..]), (2, &b"{broken"[..]));
    let batch = headers(&[("content-type", "application/cloudevents-batch+json")]);
    let batch = decode(batch, "[{}]".into(), &Convention::KAFKA, &MessageLimits { body_max: 3, ..LIMITS });
    assert_eq!(beyond(&batch), "the body is larger than body_max (3 bytes)");
    let exact = MessageLimits { body_max: 7, headers_max: 2, header_bytes_max: 51, ..LIMITS };
    assert_eq!(defect(&limited(exact)), "the document is not one JSON object");
}

#[test]
fn ids_and_sources_are_bounded_in_both_modes() {
    let long = "x".repeat(LIMITS.id_max + 1);
    for name in ["id", "source"] {
        let why = format!("attribute `{name}` is longer than id_max (512 bytes)");
        let message = kafka(&[("ce_specversion", "1.0"), (&format!("ce_{name}"), &*long.clone().leak())], "");
        assert_eq!(beyond(&message), why);
        assert_eq!(beyond(&structured(&format!(r#"{{"specversion":"1.0","{name}":"{long}"}}"#))), why);
    }
    let exact = "x".repeat(LIMITS.id_max);
    let text = format!(r#"{{"specversion":"1.0","id":"{exact}","source":"{exact}","type":"t"}}"#);
    assert_eq!(structured(&text).defect(), None);
}

#[test]
fn data_may_be_as_deep_as_json_depth_max_and_no_deeper() {
    let deep = |depth: usize| document(&format!(",\"data\":{}{}", "[".repeat(depth), "]".repeat(depth)));
    assert_eq!(structured(&deep(LIMITS.json_depth_max)).defect(), None);
    let message = structured(&deep(LIMITS.json_depth_max + 1));
    assert_eq!(beyond(&message), "the JSON is nested deeper than json_depth_max (64)");
    assert_eq!(beyond(&structured(&"[".repeat(1 << 19))), "the JSON is nested deeper than json_depth_max (64)");
}

#[test]
fn members_of_a_document_count_as_headers() {
    let many: String = (0..64).map(|i| format!(",\"x{i}\":1")).collect();
    assert_eq!(beyond(&structured(&document(&many))), "there are more headers than headers_max (64)");
    let large = format!(",\"subject\":\"{}\"", "x".repeat(LIMITS.header_bytes_max));
    assert_eq!(beyond(&structured(&document(&large))), "the headers are larger than header_bytes_max (8192 bytes)");
}

#[test]
fn no_detail_holds_a_value() {
    let secret = "s3cr3t";
    let messages = [
        structured(&document(&format!(",\"ext\":{{\"{secret}\":1}}"))),
        structured(&document(&format!(",\"data\":{secret}"))),
        structured(&format!(r#"{{"specversion":"{secret}"}}"#)),
        kafka(&[("ce_specversion", secret)], ""),
        kafka(&[("ce_specversion", "1.0"), ("ce_id", "s3cr3t\n")], ""),
    ];
    for message in messages {
        assert!(!defect(&message).contains(secret), "{message:?}");
    }
    let name = "x".repeat(500);
    assert!(defect(&structured(&document(&format!(",\"{name}\":[]")))).len() < 150);
}

// What is reserved.

#[test]
fn the_reopen_token_is_kept_in_every_mode_and_with_every_defect() {
    let token = ("hapax-reopen", "42");
    let messages = [
        kafka(&[token, ("hapax-reason", "permanent")], "plain"),
        kafka(&[token, ("ce_specversion", "1.0"), ("ce_id", "1")], ""),
        kafka(&[token, ("ce_id", "no version")], ""),
        kafka(&[token, ("content-type", "application/cloudevents-batch+json")], "[]"),
        decode(
            headers(&[("content-type", "application/cloudevents+json"), token]),
            document("").into(),
            &Convention::KAFKA,
            &LIMITS,
        ),
    ];
    for message in messages {
        assert_eq!(message.reopen(), NonZeroU64::new(42), "{message:?}");
        assert!(!message.headers.iter().any(|(name, _)| name.starts_with("hapax-")));
        let (written, body) = encode(&message, &Convention::KAFKA);
        assert_eq!(decode(written, body, &Convention::KAFKA, &LIMITS), message);
    }
}

#[test]
fn a_dead_letter_of_a_message_at_the_limits_is_within_them_when_it_comes_back() {
    let limits = MessageLimits { headers_max: 3, header_bytes_max: 30, ..LIMITS };
    let mut list = headers(&[("ce_specversion", "1.0"), ("ce_id", "1"), ("x", "y")]);
    list.push("hapax-error", "x".repeat(512));
    list.push("hapax-reopen", "7");
    let message = decode(list, Bytes::new(), &Convention::KAFKA, &limits);
    assert_eq!((message.defect(), message.reopen()), (None, NonZeroU64::new(7)));
}

#[test]
fn headers_that_would_read_as_something_else_are_not_written() {
    let message = Message::event("/shop", "42", "placed")
        .with_header("ce_id", "forged")
        .with_header("content-type", "forged")
        .with_header("ce_specversion", "forged")
        .with_header("Hapax-Reopen", "1")
        .with_header("x", "y");
    for (written, body) in
        [encode(&message, &Convention::KAFKA), encode_structured(&message, &Convention::KAFKA).unwrap()]
    {
        assert!(!written.iter().any(|(name, _)| dead_letter::is_reserved(name)), "{written:?}");
        let back = decode(written, body, &Convention::KAFKA, &LIMITS);
        assert_eq!(back, Message::event("/shop", "42", "placed").with_header("x", "y"));
    }
}

// Writing.

#[test]
fn structured_writing_needs_an_event() {
    let refused = |message: &Message| {
        let error = encode_structured(message, &Convention::KAFKA).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected);
        error.to_string()
    };
    assert_eq!(refused(&Message::default()), "encode: attribute `id` is missing");
    assert_eq!(refused(&Message::event("", "1", "t")), "encode: attribute `source` is missing");
    assert_eq!(refused(&Message::event("s", "1", "")), "encode: attribute `type` is missing");
    assert_eq!(refused(&Message::event("s", "a\0", "t")), "encode: attribute `id` has a control character");
    let defective = Message::defective(Headers::new(), Bytes::new(), Defect::undecodable("broken"));
    assert_eq!(refused(&defective), "encode: broken");
}

#[test]
fn a_document_is_written_as_the_format_says() {
    let message = full().with_header("ce_ext", "e").with_header("x", "y");
    let (written, body) = encode_structured(&message, &Convention::RABBITMQ).unwrap();
    assert_eq!(written.get_str("content-type"), Some("application/cloudevents+json; charset=utf-8"));
    assert!(written.get("ce_ext").is_some(), "no extension under this convention");
    let value: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(value["specversion"], "1.0");
    assert_eq!(value["data"]["cents"], 1200);
    let (written, body) = encode_structured(&message, &Convention::KAFKA).unwrap();
    let value: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(value["ext"], "e");
    assert_eq!(written.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["content-type", "x"]);
}

#[test]
fn a_defective_message_goes_out_as_it_came() {
    let list = [("ce_id", "1"), ("content-type", "a/b"), ("ce_id", "2"), ("X", "y")];
    let message = kafka(&list, "body");
    assert!(message.defect().is_some());
    assert_eq!(encode(&message, &Convention::KAFKA), (headers(&list), "body".into()));
}

#[test]
fn an_event_whose_data_is_an_event_reads_back() {
    let inner = document("");
    for content_type in ["application/cloudevents+json", "application/cloudevents+avro"] {
        let message = Message::event("/outer", "1", "forwarded").with_data(content_type, inner.clone());
        let (written, body) = encode(&message, &Convention::KAFKA);
        assert_eq!(decode(written, body, &Convention::KAFKA, &LIMITS), message);
    }
    let raw = Message::default().with_data("application/cloudevents+json", inner);
    let (written, body) = encode(&raw, &Convention::KAFKA);
    assert_eq!(decode(written, body, &Convention::KAFKA, &LIMITS).attributes.id.as_deref(), Some("42"));
}

/// Generated messages: what is written in either mode reads back, under every convention.
#[test]
fn what_is_written_reads_back() {
    let mut rng = fastrand::Rng::with_seed(0x000C_E102);
    let limits = MessageLimits { header_bytes_max: 1 << 20, ..LIMITS };
    let (mut binary, mut documents) = (0, 0);
    for round in 0..20_000 {
        let message = any_message(&mut rng);
        let convention = ALL[round % ALL.len()];
        let (written, body) = encode(&message, &convention);
        let mut back = decode(written, body, &convention, &limits);
        if cloudevents_format(message.attributes.content_type.as_deref().unwrap_or_default()).is_some() {
            sort_extensions_back(&mut back, &message);
        }
        assert!(back == message, "{convention:?}\n{message:?}\n{back:?}");
        binary += 1;
        let Ok((written, body)) = encode_structured(&message, &convention) else { continue };
        let mut back = decode(written, body, &convention, &limits);
        sort_extensions_back(&mut back, &message);
        assert!(back == message, "{convention:?}\n{message:?}\n{back:?}");
        documents += 1;
    }
    assert!(binary == 20_000 && documents > 3_000, "{binary} {documents}");
}

/// The members of a document come behind the headers beside it; all else must be as it was.
#[track_caller]
fn sort_extensions_back(back: &mut Message, message: &Message) {
    let sorted = |headers: &Headers| {
        let mut all: Vec<_> = headers.iter().map(|(name, value)| (name.to_owned(), value.clone())).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    assert_eq!(sorted(&back.headers), sorted(&message.headers));
    back.headers = message.headers.clone();
}

fn any_message(rng: &mut fastrand::Rng) -> Message {
    const TEXTS: [&str; 8] = ["1", "0123", "a b", "é😀", "%41", "\"q\"", "{\"a\":1}", "a\\u0000"];
    const TYPES: [&str; 6] =
        ["application/json", "text/plain", "a/b+json; x=y", "image/png", "application/cloudevents+json", "odd"];
    const BODIES: [&[u8]; 9] = [
        b"",
        b"null",
        b"{\"a\": 1.00}",
        b" {}\n",
        b"{",
        b"text",
        b"\"\\ud83d\\ude00\"",
        b"\xff\0",
        "\u{85}é".as_bytes(),
    ];
    const NAMES_OF_HEADERS: [&str; 9] =
        ["x", "X", "", "ce_ext1", "cloudEvents_ext2", "ce-ext3", "ce-data", "ce_Odd name", "cloudEvents:ext4"];
    const VALUES: [&[u8]; 7] = [b"", b"v", b"\xff\0\n", b"%20", "é".as_bytes(), b"a b", b"\"q\""];
    let mut message = Message { data: Bytes::from_static(rng.choice(BODIES).unwrap()), ..Message::default() };
    let event = rng.bool();
    for (index, slot) in slots(&mut message.attributes).into_iter().enumerate() {
        if (event && index < REQUIRED) || rng.u8(..4) == 0 {
            let texts = if index == CONTENT_TYPE { &TYPES[..] } else { &TEXTS[..] };
            *slot = rng.choice(texts).map(|text| (*text).into());
        }
    }
    for _ in 0..rng.usize(..5) {
        message.headers.push(*rng.choice(&NAMES_OF_HEADERS).unwrap(), Bytes::from_static(rng.choice(VALUES).unwrap()));
    }
    message.reopen = NonZeroU64::new(rng.u64(..3));
    let whole =
        [&message.attributes.id, &message.attributes.source, &message.attributes.ty].iter().all(|a| a.is_some());
    // Without id, source and type, such a content type says that the body is a document.
    if !whole && message.attributes.content_type.as_deref().and_then(cloudevents_format).is_some() {
        message.attributes.content_type = None;
    }
    message
}

#[test]
fn names_that_the_bindings_write_are_known() {
    for convention in [Convention::KAFKA, Convention::RABBITMQ] {
        for name in NAMES.into_iter().chain([SPEC_VERSION]) {
            let name = format!("{}{name}", convention.prefix);
            assert_eq!(header_name(&name), Some(&*name));
        }
        assert_eq!(header_name(convention.content_type), Some(convention.content_type));
    }
    for foreign in ["", "c", "ce_", "ce_tenant", "ce-id", "cloudEvents_x", "id", "x-tenant"] {
        assert_eq!(header_name(foreign), None);
    }
}
