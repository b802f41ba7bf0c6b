//! CloudEvents 1.0.2 on the wire: attribute names, the two content modes, and the limits, in one place for all adapters.
//!
//! An adapter turns what its client hands it into [`Headers`] and a body, and [`decode`] does the rest; [`encode`] and
//! [`encode_structured`] are the way back. What differs between brokers is data: a [`Convention`]. Reading never fails:
//! what does not read becomes a message with a [`Defect`], because it must reach the dead letters.
//! Where the specification leaves a choice the strict reading is taken; docs/wire.md lists every rule.

mod binary;
mod json;
mod structured;

use std::borrow::Cow;

use bytes::Bytes;

use crate::dead_letter;
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Attributes, Defect, Headers, Message, MessageLimits};

pub(crate) use json::{depth_exceeds as json_depth_exceeds, pointed_at};

/// Where a message holds its attributes on one kind of broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convention {
    /// The prefixes under which attributes are read.
    pub prefixes: &'static [&'static str],
    /// The prefix under which attributes are written; one of [`prefixes`](Self::prefixes).
    pub prefix: &'static str,
    /// The header that bears the content type. Where the broker has a property for it, the adapter moves it here.
    pub content_type: &'static str,
    /// As in the HTTP binding: names ignore case, values are percent-encoded.
    pub http: bool,
}

impl Convention {
    /// Kafka protocol binding 1.0.2: `ce_id`, `content-type`.
    pub const KAFKA: Self = Self { prefixes: &["ce_"], prefix: "ce_", content_type: "content-type", http: false };

    /// AMQP protocol binding 1.0.2, over AMQP 0.9.1: `cloudEvents_id`; `cloudEvents:` and `ce-` are read too.
    pub const RABBITMQ: Self = Self {
        prefixes: &["cloudEvents_", "cloudEvents:", "ce-"],
        prefix: "cloudEvents_",
        content_type: "content-type",
        http: false,
    };

    /// Fields of a Redis stream entry, named as on Kafka.
    pub const REDIS: Self = Self::KAFKA;

    /// Brokers in memory, named as on Kafka.
    pub const MEMORY: Self = Self::KAFKA;

    /// HTTP protocol binding 1.0.2: `ce-id`, names without regard to case, values percent-encoded.
    pub const HTTP: Self = Self { prefixes: &["ce-"], prefix: "ce-", content_type: "content-type", http: true };

    fn same(&self, a: &str, b: &str) -> bool {
        if self.http { a.eq_ignore_ascii_case(b) } else { a == b }
    }

    /// What a header is.
    fn role<'a>(&self, name: &'a str) -> Role<'a> {
        if self.same(name, self.content_type) {
            return Role::Attribute(CONTENT_TYPE);
        }
        let rest = |prefix: &&str| {
            let head = name.get(..prefix.len())?;
            self.same(head, prefix).then(|| &name[prefix.len()..])
        };
        let Some(name) = self.prefixes.iter().find_map(rest).filter(|name| !name.is_empty()) else {
            return Role::Other;
        };
        if self.same(name, SPEC_VERSION) {
            return Role::SpecVersion;
        }
        match NAMES.iter().position(|known| self.same(name, known)) {
            Some(index) => Role::Attribute(index),
            None => Role::Extension(name),
        }
    }

    /// Whether a header is one that has a place of its own in a [`Message`].
    fn is_attribute(&self, name: &str) -> bool {
        matches!(self.role(name), Role::Attribute(_) | Role::SpecVersion)
    }

    /// The text of an attribute as the value of its header.
    fn value(&self, text: &str) -> Bytes {
        if self.http { binary::percent_encode(text) } else { Bytes::copy_from_slice(text.as_bytes()) }
    }
}

/// What a header means under a [`Convention`].
enum Role<'a> {
    /// The attribute at this place in [`NAMES`].
    Attribute(usize),
    /// `specversion`.
    SpecVersion,
    /// An attribute that hapax does not know, by its name without the prefix.
    Extension(&'a str),
    /// No attribute.
    Other,
}

/// Reads a message as it arrived: limits, then the headers of hapax itself, then the content mode.
///
/// Never fails. What does not read keeps its headers and body as they travelled, with a [`Defect`] that names the
/// attribute, header or limit. Headers under [`RESERVED_PREFIX`](crate::RESERVED_PREFIX) are taken off whatever happens and count for no limit,
/// so that a dead letter that was within the limits is so when it comes back; its reopen token is kept.
///
/// ```
/// use hapax::cloudevents::{Convention, decode};
/// use hapax::{Headers, MessageLimits};
///
/// let headers: Headers = [("ce_specversion", "1.0"), ("ce_id", "42"), ("x-tenant", "7")].into_iter().collect();
/// let message = decode(headers, "{}".into(), &Convention::KAFKA, &MessageLimits::DEFAULT);
/// assert_eq!(message.attributes.id.as_deref(), Some("42"));
/// assert_eq!(message.headers.len(), 1);
/// ```
pub fn decode(headers: Headers, body: Bytes, convention: &Convention, limits: &MessageLimits) -> Message {
    let mut message = Message { headers, data: body, ..Message::default() };
    dead_letter::take_off(&mut message);
    match read(&message, convention, limits) {
        Ok(read) => accept(&mut message, read, convention),
        Err(defect) => message.defect = Some(Box::new(defect)),
    }
    message
}

/// Reads one JSON document in structured mode that came without headers: a line of a JSON Lines file.
pub(crate) fn decode_document(document: Bytes, limits: &MessageLimits) -> Message {
    let mut message = Message { data: document, ..Message::default() };
    let convention = &Convention::MEMORY;
    match within(&message, limits).and_then(|()| structured::read(&message, convention, limits)) {
        Ok(read) => accept(&mut message, read, convention),
        Err(defect) => message.defect = Some(Box::new(defect)),
    }
    message
}

/// What a content mode found. `data` and `extensions` only where they are elsewhere than in the message as it came.
#[derive(Default)]
struct Read {
    attributes: Attributes,
    data: Option<Bytes>,
    extensions: Vec<(String, Bytes)>,
}

fn read(message: &Message, convention: &Convention, limits: &MessageLimits) -> Result<Read, Defect> {
    within(message, limits)?;
    match Mode::of(message, convention)? {
        Mode::Binary => binary::read(message, convention, limits),
        Mode::Structured => structured::read(message, convention, limits),
    }
}

fn accept(message: &mut Message, read: Read, convention: &Convention) {
    message.headers.retain(|name| !convention.is_attribute(name));
    for (name, value) in read.extensions {
        message.headers.set(&name, value);
    }
    message.attributes = read.attributes;
    if let Some(data) = read.data {
        message.data = data;
    }
}

/// The limits on what travelled, before anything is decoded.
fn within(message: &Message, limits: &MessageLimits) -> Result<(), Defect> {
    if message.data.len() > limits.body_max {
        return Err(Defect::beyond_limit(format!("the body is larger than body_max ({} bytes)", limits.body_max)));
    }
    headers_within(message.headers.len(), message.headers.bytes(), limits)
}

fn headers_within(headers: usize, bytes: usize, limits: &MessageLimits) -> Result<(), Defect> {
    if headers > limits.headers_max {
        return Err(Defect::beyond_limit(format!("there are more headers than headers_max ({})", limits.headers_max)));
    }
    if bytes > limits.header_bytes_max {
        let max = limits.header_bytes_max;
        return Err(Defect::beyond_limit(format!("the headers are larger than header_bytes_max ({max} bytes)")));
    }
    Ok(())
}

enum Mode {
    Binary,
    Structured,
}

impl Mode {
    /// Decided by the content type alone, as the bindings say.
    fn of(message: &Message, convention: &Convention) -> Result<Self, Defect> {
        let mut found = message.headers.iter().filter(|(name, _)| convention.same(name, convention.content_type));
        let Some((name, value)) = found.next() else { return Ok(Self::Binary) };
        if found.next().is_some() {
            return Err(Defect::undecodable(format!("header `{name}` is there twice")));
        }
        let value = std::str::from_utf8(value)
            .map_err(|_| Defect::undecodable(format!("header `{}` is not UTF-8", convention.content_type)))?;
        let Some(format) = cloudevents_format(value) else { return Ok(Self::Binary) };
        if format.eq_ignore_ascii_case("+json") {
            Ok(Self::Structured)
        } else if format.get(..6).is_some_and(|start| start.eq_ignore_ascii_case("-batch")) {
            Err(Defect::undecodable("batch mode is not taken: send one event a message"))
        } else {
            let format = dead_letter::cut(format.trim_start_matches('+'), NAME_SHOWN_MAX);
            Err(Defect::undecodable(format!("event format `{format}` is not taken: send JSON or binary mode")))
        }
    }
}

/// What stands behind `application/cloudevents` in a content type, without parameters.
fn cloudevents_format(content_type: &str) -> Option<&str> {
    const MEDIA_TYPE: &str = "application/cloudevents";
    let media_type = media_type(content_type);
    let start = media_type.get(..MEDIA_TYPE.len())?;
    start.eq_ignore_ascii_case(MEDIA_TYPE).then(|| &media_type[MEDIA_TYPE.len()..])
}

fn media_type(content_type: &str) -> &str {
    content_type.split(';').next().unwrap_or_default().trim()
}

/// Whether a content type declares JSON: `*/json` or `*/*+json` (JSON event format 1.0.2, section 3.1.1).
pub(crate) fn is_json(content_type: &str) -> bool {
    let Some((_, subtype)) = media_type(content_type).split_once('/') else { return false };
    let suffix = subtype.rsplit('+').next().unwrap_or(subtype);
    suffix.eq_ignore_ascii_case("json")
}

/// Writes a message in binary mode: attributes as headers behind the convention's prefix, then all other headers byte
/// for byte, the data as the body.
///
/// Reads back as it was. Headers that would read as an attribute, or that are reserved, are not written: attributes
/// have their own place, and a reopen token is written as such. A defective message goes out as it came. An event whose
/// *data* is a CloudEvent in some event format is written in structured mode, since its content type says so in binary
/// mode.
pub fn encode(message: &Message, convention: &Convention) -> (Headers, Bytes) {
    let nests = message.attributes.content_type.as_deref().and_then(cloudevents_format).is_some();
    match nests.then(|| encode_structured(message, convention)) {
        Some(Ok(structured)) => structured,
        Some(Err(_)) | None => (binary::headers(message, convention), message.data.clone()),
    }
}

/// Writes a message in structured mode: one JSON document, and the other headers beside it.
///
/// Data that is JSON (or text, where the content type is not JSON) is the member `data`, exact to the byte; everything
/// else is `data_base64`. Fails with [`ErrorKind::Rejected`] without id, source and type, or with an attribute that
/// CloudEvents does not allow.
pub fn encode_structured(message: &Message, convention: &Convention) -> Result<(Headers, Bytes)> {
    let rejected = |why: &str| Error::new(ErrorKind::Rejected, "encode").because(why.to_owned());
    if let Some(defect) = message.defect() {
        return Err(rejected(&defect.detail));
    }
    for (name, value) in attributes(&message.attributes) {
        check_text(name, value).map_err(|defect| rejected(&defect.detail))?;
    }
    for (index, value) in values(&message.attributes).into_iter().enumerate().take(REQUIRED) {
        if value.as_deref().unwrap_or_default().is_empty() {
            return Err(rejected(&missing(NAMES[index]).detail));
        }
    }
    structured::write(message, convention)
}

/// Writes what stays a header in both modes. `keep` says which of those that are no attribute.
fn other_headers(message: &Message, convention: &Convention, to: &mut Headers, keep: impl Fn(&str) -> bool) {
    for (name, value) in message.headers.iter() {
        let taken = dead_letter::is_reserved(name) || (message.defect().is_none() && convention.is_attribute(name));
        if !taken && keep(name) {
            to.push(name, value.clone());
        }
    }
    if let Some(token) = message.reopen {
        to.push(dead_letter::REOPEN, token.to_string());
    }
}

const SPEC_VERSION: &str = "specversion";
const SPEC_VERSION_TAKEN: &str = "1.0";
/// Longest part of a foreign name in a text for people.
const NAME_SHOWN_MAX: usize = 64;

/// The attributes' names behind a prefix, in the order of [`values`] and [`slots`]; the first [`REQUIRED`] make an event.
macro_rules! names {
    ($prefix:literal) => {
        names!($prefix: "id" "source" "type" "subject" "time" "datacontenttype" "dataschema" "correlationid"
            "causationid" "partitionkey" "sequence" "traceparent" "tracestate")
    };
    ($prefix:literal: $($name:literal)*) => { [$(concat!($prefix, $name)),*] };
}

const NAMES: [&str; 13] = names!("");

/// The name of a header that a binding gives to an attribute, if it is one: such names take no memory of their own.
pub(crate) fn header_name(name: &str) -> Option<&'static str> {
    const OTHERS: [&str; 3] = ["content-type", "ce_specversion", "cloudEvents_specversion"];
    const KAFKA: [&str; 13] = names!("ce_");
    const RABBITMQ: [&str; 13] = names!("cloudEvents_");
    let known: &[&'static str] = if name.starts_with(Convention::KAFKA.prefix) {
        &KAFKA
    } else if name.starts_with(Convention::RABBITMQ.prefix) {
        &RABBITMQ
    } else {
        &[]
    };
    known.iter().chain(&OTHERS).copied().find(|known| *known == name)
}

const REQUIRED: usize = 3;
const CONTENT_TYPE: usize = 5;

fn values(a: &Attributes) -> [&Option<Box<str>>; 13] {
    [
        &a.id,
        &a.source,
        &a.ty,
        &a.subject,
        &a.time,
        &a.content_type,
        &a.data_schema,
        &a.correlation_id,
        &a.causation_id,
        &a.partition_key,
        &a.sequence,
        &a.traceparent,
        &a.tracestate,
    ]
}

fn slots(a: &mut Attributes) -> [&mut Option<Box<str>>; 13] {
    [
        &mut a.id,
        &mut a.source,
        &mut a.ty,
        &mut a.subject,
        &mut a.time,
        &mut a.content_type,
        &mut a.data_schema,
        &mut a.correlation_id,
        &mut a.causation_id,
        &mut a.partition_key,
        &mut a.sequence,
        &mut a.traceparent,
        &mut a.tracestate,
    ]
}

/// Names and values of the attributes that are set, by their names in the specification.
pub fn attributes(attributes: &Attributes) -> impl Iterator<Item = (&'static str, &str)> + Clone {
    NAMES.into_iter().zip(values(attributes)).filter_map(|(name, value)| value.as_deref().map(|value| (name, value)))
}

/// Takes the text of the attribute at `index`: required ones must not be empty, optional ones are unset by emptiness.
fn fill(
    slots: &mut [&mut Option<Box<str>>; 13],
    index: usize,
    value: Cow<'_, str>,
    limits: &MessageLimits,
) -> Result<(), Defect> {
    let name = NAMES[index];
    if value.is_empty() && index < REQUIRED {
        return Err(Defect::undecodable(format!("attribute `{name}` is empty")));
    }
    check_text(name, &value)?;
    if matches!(name, "id" | "source") {
        check_length(format_args!("attribute `{name}`"), &value, limits)?;
    }
    *slots[index] = (!value.is_empty()).then(|| value.into());
    Ok(())
}

/// An id or a source is at most `id_max` bytes.
pub(crate) fn check_length(what: std::fmt::Arguments<'_>, id: &str, limits: &MessageLimits) -> Result<(), Defect> {
    if id.len() > limits.id_max {
        return Err(Defect::beyond_limit(format!("{what} is longer than id_max ({} bytes)", limits.id_max)));
    }
    Ok(())
}

fn check_text(name: &str, value: &str) -> Result<(), Defect> {
    if is_text(value) {
        return Ok(());
    }
    Err(Defect::undecodable(format!("attribute `{name}` has a control character")))
}

/// Whether every character is allowed in a CloudEvents String: no controls, no noncharacters (specification 1.0.2,
/// "Type System").
pub(crate) fn is_text(value: &str) -> bool {
    let refused = |c: char| c.is_control() || matches!(c, '\u{FDD0}'..='\u{FDEF}') || (c as u32) & 0xFFFE == 0xFFFE;
    value.bytes().all(|b| matches!(b, 0x20..=0x7E)) || !value.chars().any(refused)
}

fn missing(name: &str) -> Defect {
    Defect::undecodable(format!("attribute `{name}` is missing"))
}

fn twice(name: &str) -> Defect {
    Defect::undecodable(format!("attribute `{name}` is there twice"))
}

fn spec_version_refused() -> Defect {
    Defect::undecodable(format!("attribute `{SPEC_VERSION}` is not {SPEC_VERSION_TAKEN}"))
}

#[cfg(test)]
mod tests;
