//! Entries of a stream: how they come out of a reply, and how they read as messages.
//!
//! The field `data` is the body, every other field a header. Replies are read by hand: the client's own types keep fields in
//! a hash map, which loses their order and what is there twice.

use std::fmt;

use bytes::Bytes;
use hapax::cloudevents::{Convention, decode};
use hapax::{Defect, Headers, Message, MessageLimits, RESERVED_PREFIX};
use redis::Value;

/// The field that holds the body.
pub(crate) const DATA: &str = "data";

/// The id of an entry: milliseconds and a number within them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct EntryId(pub(crate) u64, pub(crate) u64);

impl EntryId {
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let (ms, number) = std::str::from_utf8(text).ok()?.split_once('-')?;
        Some(Self(ms.parse().ok()?, number.parse().ok()?))
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0, self.1)
    }
}

/// Names and values as they travelled.
pub(super) type Fields = Vec<(Vec<u8>, Vec<u8>)>;

/// An entry as a reply holds it. Without fields it was trimmed away while it was pending.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: EntryId,
    pub(super) fields: Option<Fields>,
    /// How often it was delivered, this time included.
    pub(super) count: u32,
}

/// The items of a reply that is an array; empty for everything else.
pub(super) fn items(value: Value) -> Vec<Value> {
    match value {
        Value::Array(items) | Value::Set(items) => items,
        _ => Vec::new(),
    }
}

pub(super) fn bytes(value: Value) -> Option<Vec<u8>> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.into_bytes()),
        _ => None,
    }
}

pub(super) fn number(value: &Value) -> Option<i64> {
    match value {
        Value::Int(number) => Some(*number),
        Value::BulkString(text) => std::str::from_utf8(text).ok()?.parse().ok(),
        Value::SimpleString(text) => text.parse().ok(),
        _ => None,
    }
}

pub(super) fn entry_id(value: Value) -> Option<EntryId> {
    EntryId::parse(&bytes(value)?)
}

/// `[id, fields]` or `[id, fields, count]`. `None` where it is neither.
pub(super) fn entry(value: Value) -> Option<Entry> {
    let mut parts = items(value).into_iter();
    let id = entry_id(parts.next()?)?;
    let fields = match parts.next()? {
        Value::Nil | Value::Boolean(false) => None,
        Value::Map(pairs) => {
            Some(pairs.into_iter().filter_map(|(name, value)| Some((bytes(name)?, bytes(value)?))).collect())
        }
        flat => Some(pairs(items(flat))),
    };
    let count = parts.next().and_then(|count| number(&count)).unwrap_or(1);
    Some(Entry { id, fields, count: u32::try_from(count).unwrap_or(u32::MAX).max(1) })
}

fn pairs(flat: Vec<Value>) -> Fields {
    let mut flat = flat.into_iter();
    let mut fields = Vec::with_capacity(flat.len() / 2);
    while let (Some(name), Some(value)) = (flat.next(), flat.next()) {
        if let (Some(name), Some(value)) = (bytes(name), bytes(value)) {
            fields.push((name, value));
        }
    }
    fields
}

/// The reply of `XREADGROUP`: the streams that had something, each with its entries. A map in RESP3.
pub(super) fn streams(reply: Value) -> Vec<(Vec<u8>, Vec<Entry>)> {
    let named = |name: Value, entries: Value| {
        Some((bytes(name)?, items(entries).into_iter().filter_map(entry).collect::<Vec<_>>()))
    };
    match reply {
        Value::Map(pairs) => pairs.into_iter().filter_map(|(name, entries)| named(name, entries)).collect(),
        reply => items(reply)
            .into_iter()
            .filter_map(|pair| {
                let mut pair = items(pair).into_iter();
                named(pair.next()?, pair.next()?)
            })
            .collect(),
    }
}

/// What a retried entry bears in front of its own fields: where it first stood, and how often it had been delivered. Read in
/// the stream of retries only, where nobody else writes.
pub(super) struct Again {
    pub(super) origin: EntryId,
    pub(super) count: u32,
}

pub(super) fn take_again(fields: &mut Fields) -> Option<Again> {
    let [(from, origin), (counted, count), ..] = fields.as_slice() else { return None };
    if from != b"hapax-from" || counted != b"hapax-count" {
        return None;
    }
    let origin = EntryId::parse(origin)?;
    let count = std::str::from_utf8(count).ok()?.parse().ok()?;
    fields.drain(..2);
    Some(Again { origin, count })
}

/// The message in these fields. Never fails: what does not read arrives with a defect.
pub(super) fn message(fields: Fields, limits: &MessageLimits) -> Message {
    let mut headers = Headers::with_capacity(fields.len());
    let mut data = None;
    let mut defect = None;
    for (name, value) in fields {
        if name == DATA.as_bytes() {
            if data.is_none() {
                data = Some(Bytes::from(value));
                continue;
            }
            defect.get_or_insert("field `data` is there twice");
        }
        match String::from_utf8(name) {
            Ok(name) => headers.push(name, value),
            Err(name) => {
                defect.get_or_insert("the name of a field is not UTF-8");
                headers.push(String::from_utf8_lossy(name.as_bytes()).into_owned(), value);
            }
        }
    }
    let data = data.unwrap_or_default();
    match defect {
        None => decode(headers, data, &Convention::REDIS, limits),
        // A body beyond the limit is that in the first place, as everywhere.
        Some(_) if data.len() > limits.body_max => decode(headers, data, &Convention::REDIS, limits),
        Some(defect) => {
            headers.retain(|name| !name.get(..6).is_some_and(|start| start.eq_ignore_ascii_case(RESERVED_PREFIX)));
            Message::defective(headers, data, Defect::undecodable(defect))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    fn field(name: &[u8], value: &[u8]) -> (Vec<u8>, Vec<u8>) {
        (name.to_vec(), value.to_vec())
    }

    #[test]
    fn an_id_is_read_and_written_exactly() {
        let id = EntryId::parse(b"1714000000000-18446744073709551615").unwrap();
        assert_eq!(id, EntryId(1_714_000_000_000, u64::MAX));
        assert_eq!(id.to_string(), "1714000000000-18446744073709551615");
        assert_eq!([EntryId::parse(b"17"), EntryId::parse(b"-"), EntryId::parse(b"a-1")], [None; 3]);
    }

    #[test]
    fn a_reply_reads_the_same_in_both_protocols() {
        let entries = || {
            Value::Array(vec![
                Value::Array(vec![text("1-0"), Value::Array(vec![text("a"), text("1"), text("a"), text("2")])]),
                Value::Array(vec![text("2-0"), Value::Nil]),
            ])
        };
        let resp2 = Value::Array(vec![Value::Array(vec![text("s"), entries()])]);
        let resp3 = Value::Map(vec![(text("s"), entries())]);
        for reply in [resp2, resp3] {
            let streams = streams(reply);
            assert_eq!(streams[0].0, b"s");
            let [first, trimmed] = &streams[0].1[..] else { panic!("two entries") };
            assert_eq!(first.fields.as_deref(), Some(&[field(b"a", b"1"), field(b"a", b"2")][..]));
            assert_eq!((trimmed.id, trimmed.fields.is_none()), (EntryId(2, 0), true));
        }
    }

    /// "evil server": short and odd replies are read as nothing, never with a panic.
    #[test]
    fn a_reply_that_makes_no_sense_is_nothing() {
        for odd in [Value::Nil, Value::Int(7), text("x"), Value::Array(vec![Value::Array(vec![text("s")])])] {
            assert!(streams(odd.clone()).is_empty(), "{odd:?}");
            assert!(entry(odd).is_none());
        }
    }

    #[test]
    fn the_body_is_the_field_data_and_the_rest_are_headers() {
        let fields = vec![field(b"ce_id", b"1"), field(b"data", b"{}"), field(b"x", b"\xff")];
        let message = message(fields, &MessageLimits::DEFAULT);
        assert_eq!(message.data, "{}");
        assert_eq!(message.headers.get("x").map(|value| &value[..]), Some(&b"\xff"[..]));
    }

    #[test]
    fn two_bodies_or_a_name_that_is_no_text_are_a_defect() {
        let twice = message(vec![field(b"data", b"1"), field(b"data", b"2")], &MessageLimits::DEFAULT);
        assert_eq!((twice.defect().is_some(), twice.data), (true, Bytes::from("1")));
        let odd = message(vec![field(b"\xff", b"1"), field(b"data", b"2")], &MessageLimits::DEFAULT);
        assert_eq!((odd.defect().is_some(), odd.data), (true, Bytes::from("2")));
    }

    #[test]
    fn a_retried_entry_tells_its_origin_and_an_ordinary_one_has_none() {
        let mut fields = vec![field(b"hapax-from", b"5-1"), field(b"hapax-count", b"2"), field(b"data", b"x")];
        let again = take_again(&mut fields).unwrap();
        assert_eq!((again.origin, again.count, fields.len()), (EntryId(5, 1), 2, 1));
        assert!(take_again(&mut fields).is_none());
    }
}
