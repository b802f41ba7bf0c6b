//! SQL with holes, and what may stand in them.
//!
//! Batches travel as one text in PostgreSQL's simple protocol (`line.rs` tells why), so values are written into it. What
//! is written is made of hexadecimal digits, decimal digits, commas, `NULL` and words of our own, whatever the input
//! was: nothing that comes from outside can end a literal.

use std::fmt::Write as _;

use hapax::ErrorKind;

use crate::error::Fault;

/// Longest name of a schema: PostgreSQL cuts longer ones.
const NAME_MAX: usize = 63;

/// A name that needs no quotes to mean itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Schema(Box<str>);

impl Schema {
    pub(crate) fn new(name: &str) -> Result<Self, Fault> {
        let starts_well = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_') && !name.starts_with("pg_");
        let is_plain = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
        if starts_well && is_plain && name.len() <= NAME_MAX {
            return Ok(Self(name.into()));
        }
        Err(Fault::new(
            ErrorKind::Configuration,
            format!(
                "schema {name:?} is refused: give a name of at most {NAME_MAX} characters a-z, 0-9 and _ that begins \
                 with a letter or _ and not with pg_"
            ),
        ))
    }

    pub(crate) fn name(&self) -> &str {
        &self.0
    }

    /// As it stands in SQL: quoted, since the name may be a word of the language.
    pub(crate) fn quoted(&self) -> String {
        format!("\"{}\"", self.0)
    }
}

/// A text with holes in curly brackets.
#[derive(Debug)]
pub(crate) struct Template(Vec<Part>);

#[derive(Debug)]
enum Part {
    Text(Box<str>),
    Hole(Box<str>),
}

impl Template {
    /// Takes out comments and superfluous white space, and fills what is the same in every message.
    pub(crate) fn new(sql: &str, constant: &[(&str, &str)]) -> Self {
        let mut text = tidy(sql);
        for (name, value) in constant {
            text = text.replace(&format!("{{{name}}}"), &tidy(value));
        }
        let mut parts = Vec::new();
        let mut rest = text.as_str();
        while let Some((at, name)) = next_hole(rest) {
            parts.push(Part::Text(rest[..at].into()));
            parts.push(Part::Hole(name.into()));
            rest = &rest[at + name.len() + 2..];
        }
        parts.push(Part::Text(rest.into()));
        Self(parts)
    }

    /// The text with its holes.
    pub(crate) fn source(&self) -> String {
        let part = |part: &Part| match part {
            Part::Text(text) => text.to_string(),
            Part::Hole(name) => format!("{{{name}}}"),
        };
        self.0.iter().map(part).collect()
    }

    /// Appends it to `out`; `fill` writes what belongs into the hole of that name.
    pub(crate) fn write(&self, out: &mut String, mut fill: impl FnMut(&str, &mut String)) {
        for part in &self.0 {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Hole(name) => fill(name, out),
            }
        }
    }
}

fn tidy(sql: &str) -> String {
    let lines = sql.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("--"));
    lines.collect::<Vec<_>>().join(" ")
}

/// A bracket around a name; one around anything else is text (PostgreSQL's arrays are written in such brackets).
fn next_hole(text: &str) -> Option<(usize, &str)> {
    text.match_indices('{').find_map(|(at, _)| {
        let (name, _) = text[at + 1..].split_once('}')?;
        let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        is_name.then_some((at, name))
    })
}

/// Writes the elements of an array.
pub(crate) fn list<T>(out: &mut String, items: impl IntoIterator<Item = T>, mut write: impl FnMut(&mut String, T)) {
    for (n, item) in items.into_iter().enumerate() {
        if n > 0 {
            out.push(',');
        }
        write(out, item);
    }
}

/// A `uuid`.
pub(crate) fn uuid(out: &mut String, bytes: [u8; 16]) {
    hex(out, &bytes);
}

/// A `uuid` that may as well be `NULL`.
pub(crate) fn quoted(out: &mut String, bytes: [u8; 16]) {
    out.push('\'');
    uuid(out, bytes);
    out.push('\'');
}

/// A whole number.
pub(crate) fn number(out: &mut String, number: i64) {
    // Writing to a text cannot fail.
    let _ = write!(out, "{number}");
}

/// Text as the hexadecimal digits of its UTF-8. A NUL, which PostgreSQL cannot keep, becomes U+FFFD.
pub(crate) fn text(out: &mut String, text: &str) {
    if text.contains('\0') {
        hex(out, text.replace('\0', "\u{fffd}").as_bytes());
    } else if text.is_empty() {
        out.push_str("\"\"");
    } else {
        hex(out, text.as_bytes());
    }
}

fn hex(out: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        out.push(char::from(DIGITS[usize::from(byte >> 4)]));
        out.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(template: &Template) -> String {
        let mut out = String::new();
        template.write(&mut out, |name, out| out.push_str(&name.to_uppercase()));
        out
    }

    #[test]
    fn holes_are_filled_and_brackets_of_arrays_stay() {
        let template =
            Template::new("-- a comment {keys}\nSELECT {frame}\n  FROM x('{{keys}}', '{1,2}')", &[("frame", "f()")]);
        assert_eq!(rendered(&template), "SELECT f() FROM x('{KEYS}', '{1,2}')");
    }

    #[test]
    fn no_text_can_end_a_literal() {
        let mut out = String::new();
        list(&mut out, ["'; drop table x --", "", "\0\\\"}{"], text);
        assert!(out.bytes().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b',' | b'"')), "{out}");
        assert_eq!(out.matches('"').count(), 2, "{out}");
    }

    #[test]
    fn a_schema_is_a_plain_name() {
        for name in ["public", "_hapax2", "select"] {
            assert_eq!(Schema::new(name).unwrap().name(), name);
        }
        for name in ["", "Public", "a-b", "1a", "a\"b", "pg_temp", "é", &"a".repeat(64)] {
            let error = Schema::new(name).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Configuration, "{name:?}");
        }
    }
}
