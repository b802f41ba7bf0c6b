//! Which event a message is: the ids that messages bear, and those that are taken from elsewhere on request.
//!
//! An id is never random, never folded (`123` and `0123` differ) and never a record key. Every way of taking one has a
//! domain of its own, so that ids of different ways cannot meet.

use std::borrow::Cow;

use crate::broker::Origin;
use crate::cloudevents::{check_length, is_text, json_depth_exceeds, pointed_at};
use crate::dead_letter;
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Defect, Message, MessageLimits};
use crate::store::{EventKey, Fingerprint, hex};

/// Where a consumer takes an event's id from. Several are tried in order; a message for which none finds an id goes to
/// the dead letters as [`Reason::MissingId`](crate::Reason::MissingId).
///
/// One that finds an id which cannot be one (not text, there twice, too long) is a defect of the message, and the next
/// is not tried: it would give one event two identities.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IdFrom {
    /// The CloudEvents attributes `source` and `id` together. The default.
    CloudEvents,
    /// A header by its exact name, which is no attribute's. Its value must be text; an empty one is no id.
    Header(Box<str>),
    /// A string (not empty) or an integer (as its exact text) in JSON data, by an RFC 6901 pointer.
    JsonPointer(Box<str>),
    /// Where the message stands at the broker, topic and partition included. Only where
    /// [`position_is_stable`](crate::Capabilities::position_is_stable): `build()` checks it. A message that is
    /// published twice is two events.
    Position,
    /// 32 hexadecimal characters over content type and data. Two events with equal data are one: the second vanishes.
    BodyHash,
}

impl IdFrom {
    /// The header `name`.
    pub fn header(name: impl Into<Box<str>>) -> Self {
        Self::Header(name.into())
    }

    /// The value at `pointer` in JSON data, such as `/order/id` (RFC 6901).
    pub fn json_pointer(pointer: impl Into<Box<str>>) -> Self {
        Self::JsonPointer(pointer.into())
    }

    /// Whether it can find anything at all; fails with [`ErrorKind::Configuration`].
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |why: String| Err(Error::new(ErrorKind::Configuration, "build").because(why));
        match self {
            Self::Header(name) if name.is_empty() => wrong("IdFrom::header needs a name".to_owned()),
            Self::Header(name) if dead_letter::is_reserved(name) => {
                wrong(format!("IdFrom::header({name:?}): headers of hapax itself are not believed; take another"))
            }
            Self::JsonPointer(pointer) if !is_pointer(pointer) => wrong(format!(
                "IdFrom::json_pointer({pointer:?}) is no RFC 6901 pointer: begin with `/`, write `~` as `~0` and a `/` \
                 within a name as `~1`"
            )),
            _ => Ok(()),
        }
    }

    fn find<'a>(
        &self,
        message: &'a Message,
        origin: Option<&Origin>,
        limits: &MessageLimits,
    ) -> Result<Option<Identity<'a>>, Defect> {
        match self {
            Self::CloudEvents => attributes(message, limits),
            Self::Header(name) => header(message, name, limits),
            Self::JsonPointer(pointer) => pointed(message, pointer, limits),
            Self::Position => origin.map(|origin| position(origin, limits)).transpose(),
            Self::BodyHash => {
                let hash = Fingerprint::of(message.attributes.content_type.as_deref(), &message.data);
                Ok(Some(Identity::extracted("body", None, &hex(hash.0))))
            }
        }
    }
}

/// What identifies an event: source and id of CloudEvents, or an extracted id with an empty source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity<'a> {
    pub(crate) source: Cow<'a, str>,
    /// Extracted ids are `domain:id` or `domain:where:id`, with `%` and `:` in *where* percent-encoded: part of the
    /// format of keys, so it never changes.
    pub(crate) id: Cow<'a, str>,
}

impl Identity<'_> {
    /// The event's key for `consumer`.
    pub(crate) fn key(&self, consumer: &str) -> EventKey {
        EventKey::of(consumer, &self.source, &self.id)
    }

    fn extracted(domain: &str, place: Option<&str>, id: &str) -> Self {
        let id = match place {
            Some(place) => format!("{domain}:{}:{id}", place.replace('%', "%25").replace(':', "%3A")),
            None => format!("{domain}:{id}"),
        };
        Self { source: Cow::Borrowed(""), id: Cow::Owned(id) }
    }
}

/// Tries `extractors` in order. `Ok(None)`: none found an id.
pub(crate) fn identify<'a>(
    message: &'a Message,
    origin: Option<&Origin>,
    extractors: &[IdFrom],
    limits: &MessageLimits,
) -> Result<Option<Identity<'a>>, Defect> {
    for extractor in extractors {
        if let Some(identity) = extractor.find(message, origin, limits)? {
            return Ok(Some(identity));
        }
    }
    Ok(None)
}

fn attributes<'a>(message: &'a Message, limits: &MessageLimits) -> Result<Option<Identity<'a>>, Defect> {
    let given = |value: &'a Option<Box<str>>| value.as_deref().filter(|text| !text.is_empty());
    let (Some(source), Some(id)) = (given(&message.attributes.source), given(&message.attributes.id)) else {
        return Ok(None);
    };
    check_length(format_args!("attribute `source`"), source, limits)?;
    check_length(format_args!("attribute `id`"), id, limits)?;
    Ok(Some(Identity { source: Cow::Borrowed(source), id: Cow::Borrowed(id) }))
}

fn header<'a>(message: &'a Message, name: &str, limits: &MessageLimits) -> Result<Option<Identity<'a>>, Defect> {
    let mut found = message.headers.iter().filter(|(other, _)| *other == name);
    let Some((_, value)) = found.next() else { return Ok(None) };
    if found.next().is_some() {
        return Err(Defect::undecodable(format!("header `{name}`, taken for the id, is there twice")));
    }
    if value.is_empty() {
        return Ok(None);
    }
    let id = std::str::from_utf8(value).ok().filter(|text| is_text(text));
    let id = id.ok_or_else(|| Defect::undecodable(format!("header `{name}`, taken for the id, is not text")))?;
    check_length(format_args!("header `{name}`, taken for the id,"), id, limits)?;
    Ok(Some(Identity::extracted("header", Some(name), id)))
}

fn pointed<'a>(message: &'a Message, pointer: &str, limits: &MessageLimits) -> Result<Option<Identity<'a>>, Defect> {
    if json_depth_exceeds(&message.data, limits.json_depth_max) {
        let max = limits.json_depth_max;
        return Err(Defect::beyond_limit(format!("the JSON is nested deeper than json_depth_max ({max})")));
    }
    let Some(id) = pointed_at(&message.data, pointer).filter(|id| !id.is_empty()) else { return Ok(None) };
    if !is_text(&id) {
        let why = format!("the value at `{pointer}`, taken for the id, has a control character");
        return Err(Defect::undecodable(why));
    }
    check_length(format_args!("the value at `{pointer}`, taken for the id,"), &id, limits)?;
    Ok(Some(Identity::extracted("json", Some(pointer), &id)))
}

fn position<'a>(origin: &Origin, limits: &MessageLimits) -> Result<Identity<'a>, Defect> {
    check_length(format_args!("the place at the broker"), &origin.place, limits)?;
    check_length(format_args!("the position at the broker"), &origin.position, limits)?;
    Ok(Identity::extracted("position", Some(&origin.place), &origin.position))
}

fn is_pointer(pointer: &str) -> bool {
    let escaped = pointer.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']));
    escaped && (pointer.is_empty() || pointer.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: MessageLimits = MessageLimits::DEFAULT;

    fn origin(place: &str, position: &str) -> Origin {
        Origin { place: place.into(), position: position.into() }
    }

    fn json(data: &str) -> Message {
        Message::default().with_data("application/json", data.to_owned())
    }

    fn found(message: &Message, extractor: &IdFrom) -> Option<(String, String)> {
        identify(message, None, std::slice::from_ref(extractor), &LIMITS)
            .unwrap()
            .map(|identity| (identity.source.into_owned(), identity.id.into_owned()))
    }

    fn extracted(message: &Message, extractor: &IdFrom) -> Option<String> {
        found(message, extractor).map(|(source, id)| {
            assert_eq!(source, "", "an extracted id has no source");
            id
        })
    }

    fn fault(message: &Message, extractor: &IdFrom) -> Defect {
        identify(message, None, std::slice::from_ref(extractor), &LIMITS).unwrap_err()
    }

    #[test]
    fn source_and_id_identify_an_event_and_are_borrowed() {
        let message = Message::event("/shop", "42", "placed");
        let identity = identify(&message, None, &[IdFrom::CloudEvents], &LIMITS).unwrap().unwrap();
        assert!(matches!((&identity.source, &identity.id), (Cow::Borrowed("/shop"), Cow::Borrowed("42"))));
        assert_eq!(identity.key("billing"), EventKey::of("billing", "/shop", "42"));
    }

    #[test]
    fn an_id_without_a_source_or_an_empty_one_is_none() {
        let mut message = Message::event("/shop", "42", "placed");
        message.attributes.source = None;
        assert_eq!(found(&message, &IdFrom::CloudEvents), None);
        assert_eq!(found(&Message::event("/shop", "", "placed"), &IdFrom::CloudEvents), None);
        assert_eq!(found(&Message::event("", "42", "placed"), &IdFrom::CloudEvents), None);
    }

    #[test]
    fn ids_are_never_folded() {
        let id = IdFrom::header("x-id");
        let ids = ["123", "0123", " 123", "123 ", "ABC", "abc"];
        let ids: std::collections::BTreeSet<_> =
            ids.map(|v| extracted(&Message::default().with_header("x-id", v), &id).unwrap()).into_iter().collect();
        assert_eq!(ids.len(), 6);
    }

    #[test]
    fn an_empty_header_is_no_id() {
        assert_eq!(extracted(&Message::default().with_header("x-id", ""), &IdFrom::header("x-id")), None);
        assert_eq!(extracted(&Message::default(), &IdFrom::header("x-id")), None);
    }

    #[test]
    fn a_header_is_found_by_its_exact_name() {
        let message = Message::default().with_header("x-id", "7");
        assert_eq!(extracted(&message, &IdFrom::header("x-id")).as_deref(), Some("header:x-id:7"));
        assert_eq!(extracted(&message, &IdFrom::header("X-Id")), None);
    }

    #[test]
    fn a_header_that_cannot_be_an_id_is_a_defect_and_the_next_is_not_tried() {
        let ways = [IdFrom::header("x-id"), IdFrom::BodyHash];
        let cases = [
            (Message::default().with_header("x-id", &b"\xff"[..]), "header `x-id`, taken for the id, is not text"),
            (Message::default().with_header("x-id", "a\0b"), "header `x-id`, taken for the id, is not text"),
            (
                Message::default().with_header("x-id", "1").with_header("x-id", "1"),
                "header `x-id`, taken for the id, is there twice",
            ),
        ];
        for (message, why) in cases {
            assert_eq!(identify(&message, None, &ways, &LIMITS).unwrap_err(), Defect::undecodable(why));
        }
    }

    #[test]
    fn ids_that_are_too_long_are_beyond_the_limit() {
        let long = "x".repeat(LIMITS.id_max + 1);
        let too_long = |what: &str| Defect::beyond_limit(format!("{what} is longer than id_max (512 bytes)"));
        assert_eq!(fault(&Message::event("/shop", &*long, "placed"), &IdFrom::CloudEvents), too_long("attribute `id`"));
        assert_eq!(
            fault(&Message::event(&*long, "42", "placed"), &IdFrom::CloudEvents),
            too_long("attribute `source`")
        );
        let message = Message::default().with_header("x-id", long.clone());
        assert_eq!(fault(&message, &IdFrom::header("x-id")), too_long("header `x-id`, taken for the id,"));
        let message = json(&format!("{{\"id\":\"{long}\"}}"));
        assert_eq!(fault(&message, &IdFrom::json_pointer("/id")), too_long("the value at `/id`, taken for the id,"));
        let at = origin(&long, "1");
        let refused = identify(&Message::default(), Some(&at), &[IdFrom::Position], &LIMITS).unwrap_err();
        assert_eq!(refused, too_long("the place at the broker"));
        let exact = "x".repeat(LIMITS.id_max);
        assert!(found(&Message::event("/shop", exact, "placed"), &IdFrom::CloudEvents).is_some());
    }

    #[test]
    fn a_pointer_takes_strings_and_integers_as_they_stand() {
        let id = IdFrom::json_pointer("/order/id");
        assert_eq!(extracted(&json(r#"{"order":{"id":"a7"}}"#), &id).as_deref(), Some("json:/order/id:a7"));
        assert_eq!(extracted(&json(r#"{"order":{"id":-12}}"#), &id).as_deref(), Some("json:/order/id:-12"));
        let huge = r#"{"order":{"id":123456789012345678901234567890}}"#;
        assert_eq!(extracted(&json(huge), &id).as_deref(), Some("json:/order/id:123456789012345678901234567890"));
        for none in [r#"{"order":{"id":""}}"#, r#"{"order":{"id":1.5}}"#, r#"{"order":{"id":null}}"#, "{}", "no json"] {
            assert_eq!(extracted(&json(none), &id), None, "{none}");
        }
    }

    #[test]
    fn a_pointer_into_json_that_is_too_deep_is_beyond_the_limit() {
        let deep = format!("{}{}", "[".repeat(65), "]".repeat(65));
        assert_eq!(
            fault(&json(&deep), &IdFrom::json_pointer("/id")),
            Defect::beyond_limit("the JSON is nested deeper than json_depth_max (64)")
        );
    }

    #[test]
    fn a_pointed_id_with_a_control_character_is_a_defect() {
        assert_eq!(
            fault(&json(r#"{"id":"a\u0000b"}"#), &IdFrom::json_pointer("/id")),
            Defect::undecodable("the value at `/id`, taken for the id, has a control character")
        );
    }

    /// Partition and offset alone would make events of two topics one.
    #[test]
    fn a_position_includes_its_topic_and_partition() {
        let message = Message::default();
        let at = |place, position| {
            let origin = origin(place, position);
            identify(&message, Some(&origin), &[IdFrom::Position], &LIMITS).unwrap().unwrap().id.into_owned()
        };
        assert_eq!(at("orders/3", "17"), "position:orders/3:17");
        assert_ne!(at("orders/3", "17"), at("refunds/3", "17"));
        assert_ne!(at("orders/3", "17"), at("orders/4", "17"));
        assert_ne!(at("a:b", "c"), at("a", "b:c"));
        assert_eq!(extracted(&message, &IdFrom::Position), None);
    }

    #[test]
    fn a_body_hash_covers_content_type_and_raw_bytes() {
        let hash = |message: &Message| extracted(message, &IdFrom::BodyHash).unwrap();
        let one = hash(&json(r#"{"a":1}"#));
        assert!(one.strip_prefix("body:").is_some_and(|h| h.len() == 32 && h.bytes().all(|b| b.is_ascii_hexdigit())));
        assert_eq!(one, hash(&json(r#"{"a":1}"#)));
        assert_ne!(one, hash(&json(r#"{"a": 1}"#)));
        assert_ne!(one, hash(&Message::default().with_data("text/plain", r#"{"a":1}"#)));
    }

    #[test]
    fn ids_of_different_ways_never_meet() {
        let message = json(r#"{"a":"1","b":"1"}"#)
            .with_header("a", "1")
            .with_header("b", "1")
            .with_header("/a", "1")
            .with_header("a:b", "c")
            .with_header("a%3Ab", "c");
        let ways = [
            IdFrom::header("a"),
            IdFrom::header("b"),
            IdFrom::header("/a"),
            IdFrom::header("a:b"),
            IdFrom::header("a%3Ab"),
            IdFrom::json_pointer("/a"),
            IdFrom::json_pointer("/b"),
            IdFrom::BodyHash,
        ];
        let ids: std::collections::BTreeSet<_> = ways.iter().map(|way| extracted(&message, way).unwrap()).collect();
        assert_eq!(ids.len(), ways.len());
        let split = Message::default().with_header("a", "b:c");
        assert!(!ids.contains(&extracted(&split, &IdFrom::header("a")).unwrap()));
    }

    #[test]
    fn extractors_are_tried_in_order() {
        let ways = [IdFrom::CloudEvents, IdFrom::header("x-id"), IdFrom::json_pointer("/id")];
        let id = |message: &Message| identify(message, None, &ways, &LIMITS).unwrap().map(|i| i.id.into_owned());
        let all = json(r#"{"id":"3"}"#).with_header("x-id", "2");
        assert_eq!(id(&all).as_deref(), Some("header:x-id:2"));
        assert_eq!(id(&json(r#"{"id":"3"}"#)).as_deref(), Some("json:/id:3"));
        assert_eq!(id(&json("{}")), None);
    }

    #[test]
    fn a_way_that_cannot_find_anything_is_a_configuration_error() {
        let wrong = [
            IdFrom::header(""),
            IdFrom::header("Hapax-Reopen"),
            IdFrom::json_pointer("id"),
            IdFrom::json_pointer("/a~2"),
        ];
        for way in wrong {
            assert_eq!(way.check().unwrap_err().kind(), ErrorKind::Configuration, "{way:?}");
        }
        for way in [IdFrom::CloudEvents, IdFrom::header("x"), IdFrom::json_pointer("/a~0~1"), IdFrom::json_pointer("")]
        {
            assert!(way.check().is_ok(), "{way:?}");
        }
    }
}
