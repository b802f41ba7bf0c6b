//! JSON read member by member without building values: exact texts, no member lost, duplicates seen.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// Whether JSON in `bytes` is nested deeper than `max`. Only looks at brackets outside strings, so it is fast and does
/// not recurse; says nothing about whether it is JSON.
pub(crate) fn depth_exceeds(bytes: &[u8], max: usize) -> bool {
    let mut depth = 0_usize;
    let mut rest = bytes.iter();
    while let Some(byte) = rest.next() {
        match byte {
            b'{' | b'[' => {
                depth += 1;
                if depth > max {
                    return true;
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b'"' => loop {
                match rest.next() {
                    Some(b'\\') => {
                        rest.next();
                    }
                    Some(b'"') | None => break,
                    Some(_) => {}
                }
            },
            _ => {}
        }
    }
    false
}

/// Hands every member of the object in `text` to `each`, in order; stops where `each` says no. `Err(None)`: it is not
/// one JSON object.
pub(super) fn members<'a, E>(
    text: &'a str,
    mut each: impl FnMut(Cow<'a, str>, &'a RawValue) -> Result<(), E>,
) -> Result<(), Option<E>> {
    let mut fault = None;
    let mut json = serde_json::Deserializer::from_str(text);
    let visited = json.deserialize_map(Object(|name, value| {
        each(name, value).map_err(|e| {
            fault = Some(e);
        })
    }));
    match visited.and_then(|()| json.end()) {
        Ok(()) => Ok(()),
        Err(_) => Err(fault),
    }
}

/// The text of a JSON string; `None` if it is another value.
pub(super) fn string(value: &RawValue) -> Option<Cow<'_, str>> {
    serde_json::Deserializer::from_str(value.get()).deserialize_str(Text).ok()
}

/// What an RFC 6901 pointer finds in the document: the exact text of the value. `None` where it is no JSON, the pointer
/// finds nothing, or a name on its way is there twice.
fn find<'a>(document: &'a str, pointer: &str) -> Option<&'a RawValue> {
    let mut value: &RawValue = serde_json::from_str(document).ok()?;
    for token in pointer.split('/').skip(1) {
        let token = token.replace("~1", "/").replace("~0", "~");
        value = if value.get().starts_with('{') { member(value, &token)? } else { element(value, &token)? };
    }
    Some(value)
}

/// The string or integer that an RFC 6901 pointer finds, an integer as its exact text.
pub(crate) fn pointed_at<'a>(document: &'a [u8], pointer: &str) -> Option<Cow<'a, str>> {
    let value = find(std::str::from_utf8(document).ok()?, pointer)?;
    let digits = value.get().strip_prefix('-').unwrap_or(value.get());
    if digits.bytes().all(|b| b.is_ascii_digit()) { Some(Cow::Borrowed(value.get())) } else { string(value) }
}

fn member<'a>(object: &'a RawValue, name: &str) -> Option<&'a RawValue> {
    let mut found = None;
    members(
        object.get(),
        |member, value| {
            if member == name && found.replace(value).is_some() { Err(()) } else { Ok(()) }
        },
    )
    .ok()?;
    found
}

fn element<'a>(array: &'a RawValue, token: &str) -> Option<&'a RawValue> {
    let canonical = token == "0" || (!token.starts_with('0') && token.bytes().all(|b| b.is_ascii_digit()));
    let index = token.parse().ok().filter(|_| canonical)?;
    serde_json::Deserializer::from_str(array.get()).deserialize_seq(Element(index)).ok()?
}

struct Object<F>(F);

impl<'de, F: FnMut(Cow<'de, str>, &'de RawValue) -> Result<(), ()>> Visitor<'de> for Object<F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key_seed(Text)? {
            (self.0)(name, map.next_value()?).map_err(|()| A::Error::custom("stopped"))?;
        }
        Ok(())
    }
}

/// The element at an index, the others unread.
struct Element(usize);

impl<'de> Visitor<'de> for Element {
    type Value = Option<&'de RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        let mut index = 0;
        while let Some(value) = seq.next_element()? {
            if index == self.0 {
                found = Some(value);
            }
            index += 1;
        }
        Ok(found)
    }
}

/// Text that is borrowed where it holds no escapes.
struct Text;

impl<'de> DeserializeSeed<'de> for Text {
    type Value = Cow<'de, str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Text {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_borrowed_str<E: serde::de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_brackets_outside_strings() {
        assert!(!depth_exceeds(b"[[]]", 2));
        assert!(depth_exceeds(b"[[]]", 1));
        assert!(!depth_exceeds(br#"["[[[[", "\"[[", "\\", []]"#, 2));
        assert!(depth_exceeds(br#"["\\", [{}]]"#, 2));
        assert!(!depth_exceeds(br#"[],[],[]"#, 1));
        assert!(!depth_exceeds(b"\"[[[ never closed", 1));
        assert!(depth_exceeds("[".repeat(1 << 20).as_bytes(), 64));
    }

    #[test]
    fn a_pointer_follows_rfc_6901() {
        let document = br#" {"foo": ["bar", "baz"], "": "empty", "a/b": "slash", "m~n": "tilde", "i": {"j": [7, -12]},
            "k\"l": "quote", "caf\u00e9": "accent"} "#;
        for (pointer, found) in [
            ("/foo/0", "bar"),
            ("/foo/1", "baz"),
            ("/", "empty"),
            ("/a~1b", "slash"),
            ("/m~0n", "tilde"),
            ("/i/j/1", "-12"),
            ("/k\"l", "quote"),
            ("/café", "accent"),
        ] {
            assert_eq!(pointed_at(document, pointer).as_deref(), Some(found), "{pointer}");
        }
        for pointer in ["/foo", "/foo/2", "/foo/01", "/foo/-", "/foo/+1", "/foo/", "/nothing", "/foo/0/x", "", "/i/j"] {
            assert_eq!(pointed_at(document, pointer), None, "{pointer}");
        }
        assert_eq!(pointed_at(b"\"whole\"", "").as_deref(), Some("whole"));
    }

    #[test]
    fn a_pointer_takes_strings_and_integers_and_nothing_else() {
        for value in ["1.0", "1e3", "true", "null", "{}", "[]"] {
            assert_eq!(pointed_at(format!("{{\"id\": {value}}}").as_bytes(), "/id"), None, "{value}");
        }
        let huge = "123456789012345678901234567890";
        assert_eq!(pointed_at(format!("{{\"id\": {huge}}}").as_bytes(), "/id").as_deref(), Some(huge));
    }

    #[test]
    fn a_pointer_finds_nothing_in_what_is_not_one_json_document() {
        for document in [&br#"{"id":"1"} x"#[..], br#"{"id":"1""#, b"", b"\xff", br#"{"id":"1","id":"2"}"#] {
            assert_eq!(pointed_at(document, "/id"), None);
        }
    }
}
