//! Message: what travels. The CloudEvents attributes, every other header byte for byte, and the data.
//!
//! A message that could not be decoded is a message too, with a [`Defect`]: it must reach the dead letters, so it cannot
//! be an error that somebody drops. Reading and writing the wire forms is [`cloudevents`](crate::cloudevents)' matter.

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU64;

use bytes::Bytes;

/// Headers as they travelled: names as text, values as bytes, in order, repeated names kept. The names that CloudEvents'
/// bindings give to its attributes take no memory of their own.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(Cow<'static, str>, Bytes)>);

impl Headers {
    /// No headers; allocates nothing.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// No headers yet, with room for `headers`.
    pub fn with_capacity(headers: usize) -> Self {
        Self(Vec::with_capacity(headers))
    }

    /// The first value under `name`. Names are compared byte for byte.
    pub fn get(&self, name: &str) -> Option<&Bytes> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value)
    }

    /// The first value under `name`, if it is UTF-8.
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Adds a header behind the others; an equal name stays beside it.
    pub fn push(&mut self, name: impl AsRef<str> + Into<Box<str>>, value: impl Into<Bytes>) {
        self.0.push((kept(name), value.into()));
    }

    /// Replaces every header under `name` by one.
    pub fn set(&mut self, name: &str, value: impl Into<Bytes>) {
        self.remove(name);
        self.push(name, value);
    }

    /// Removes every header under `name`.
    pub fn remove(&mut self, name: &str) {
        self.0.retain(|(n, _)| n != name);
    }

    /// Keeps the headers for which `keep` says so.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.0.retain(|(name, _)| keep(name));
    }

    /// Names and values in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Bytes)> {
        self.0.iter().map(|(name, value)| (&**name, value))
    }

    /// How many headers there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of all names and values together.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|(name, value)| name.len() + value.len()).sum()
    }
}

/// A header's name; those of attributes are there already.
fn kept(name: impl AsRef<str> + Into<Box<str>>) -> Cow<'static, str> {
    match crate::cloudevents::header_name(name.as_ref()) {
        Some(name) => Cow::Borrowed(name),
        None => Cow::Owned(name.into().into()),
    }
}

impl<N: AsRef<str> + Into<Box<str>>, V: Into<Bytes>> FromIterator<(N, V)> for Headers {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(headers: I) -> Self {
        Self(headers.into_iter().map(|(name, value)| (kept(name), value.into())).collect())
    }
}

impl fmt::Debug for Headers {
    /// Names only: values may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

/// The CloudEvents 1.0 attributes of a message and the extensions that hapax reads
/// (CloudEvents specification 1.0.2, sections "Context Attributes" and "Extension Context Attributes").
///
/// All are text and optional here, since messages without them exist; what is required is decided where it is used.
#[derive(Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attributes {
    /// `id`: with `source` it identifies the event.
    pub id: Option<Box<str>>,
    /// `source`: who produced it, a URI reference.
    pub source: Option<Box<str>>,
    /// `type`: what happened, with `.vN` behind it from version 2 on.
    pub ty: Option<Box<str>>,
    /// `subject`: what it is about, within the source.
    pub subject: Option<Box<str>>,
    /// `time`: when it happened, RFC 3339 text, not interpreted.
    pub time: Option<Box<str>>,
    /// `datacontenttype`: the media type of the data.
    pub content_type: Option<Box<str>>,
    /// `dataschema`: where the data's schema is.
    pub data_schema: Option<Box<str>>,
    /// Extension `correlationid`: shared by all messages of one conversation.
    pub correlation_id: Option<Box<str>>,
    /// Extension `causationid`: the id of the message that led to this one.
    pub causation_id: Option<Box<str>>,
    /// Extension `partitionkey`: the ordering key.
    pub partition_key: Option<Box<str>>,
    /// Extension `sequence`: the position within the source, as text.
    pub sequence: Option<Box<str>>,
    /// Extension `traceparent`: W3C trace context.
    pub traceparent: Option<Box<str>>,
    /// Extension `tracestate`: W3C trace context.
    pub tracestate: Option<Box<str>>,
}

impl fmt::Debug for Attributes {
    /// Only those that are set.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut all = f.debug_map();
        for (name, value) in crate::cloudevents::attributes(self) {
            all.entry(&name, &value);
        }
        all.finish()
    }
}

/// The id of an event within its source: not empty, at most `id_max` bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(Box<str>);

impl MessageId {
    /// Takes `id` as it is; `None` if it is empty.
    pub fn new(id: impl Into<Box<str>>) -> Option<Self> {
        let id = id.into();
        (!id.is_empty()).then_some(Self(id))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Why a message cannot be taken as an event: no handler sees it, it goes to the dead letters as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defect {
    /// What kind of fault it is.
    pub kind: DefectKind,
    /// What exactly, for people: names the attribute, the header or the limit, never a value.
    pub detail: Box<str>,
}

/// The kinds of [`Defect`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DefectKind {
    /// It does not read as the content mode or media type says.
    Undecodable,
    /// A limit of [`MessageLimits`] is exceeded; nothing behind the limit was decoded.
    BeyondLimit,
}

impl Defect {
    /// Does not read as it says it should.
    pub fn undecodable(detail: impl Into<Box<str>>) -> Self {
        Self { kind: DefectKind::Undecodable, detail: detail.into() }
    }

    /// Exceeds a limit.
    pub fn beyond_limit(detail: impl Into<Box<str>>) -> Self {
        Self { kind: DefectKind::BeyondLimit, detail: detail.into() }
    }
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

/// How large a message may be. Checked before anything is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageLimits {
    /// Most bytes of the body as it travelled.
    pub body_max: usize,
    /// Most headers.
    pub headers_max: usize,
    /// Most bytes of all header names and values together.
    pub header_bytes_max: usize,
    /// Most bytes of an id or a source.
    pub id_max: usize,
    /// Deepest nesting of JSON.
    pub json_depth_max: usize,
}

impl MessageLimits {
    /// 1 MiB, 64 headers, 8 KiB, 512 B, depth 64.
    pub const DEFAULT: Self =
        Self { body_max: 1 << 20, headers_max: 64, header_bytes_max: 8 << 10, id_max: 512, json_depth_max: 64 };
}

impl Default for MessageLimits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What travels: attributes, headers, data.
///
/// ```
/// use hapax::Message;
///
/// let message = Message::event("https://shop.example", "42", "com.shop.order.placed")
///     .with_subject("order/42")
///     .with_json(&serde_json::json!({"cents": 1200}))?;
/// assert_eq!(message.attributes.id.as_deref(), Some("42"));
/// assert_eq!(message.data.as_ref(), br#"{"cents":1200}"#);
/// # Ok::<(), hapax::Error>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// The CloudEvents attributes.
    pub attributes: Attributes,
    /// All headers that are no attribute, byte for byte.
    pub headers: Headers,
    /// The event's data. In structured mode the exact text of the `data` member, or the decoded `data_base64`.
    /// Where there is a defect: the body as it travelled.
    pub data: Bytes,
    pub(crate) defect: Option<Box<Defect>>,
    pub(crate) reopen: Option<NonZeroU64>,
}

impl Message {
    /// A message with the three attributes that make an event.
    pub fn event(source: impl Into<Box<str>>, id: impl Into<Box<str>>, ty: impl Into<Box<str>>) -> Self {
        let attributes = Attributes {
            id: Some(id.into()),
            source: Some(source.into()),
            ty: Some(ty.into()),
            ..Attributes::default()
        };
        Self { attributes, ..Self::default() }
    }

    /// A message that could not be decoded: `data` is the body as it travelled.
    pub fn defective(headers: Headers, data: Bytes, defect: Defect) -> Self {
        Self { headers, data, defect: Some(Box::new(defect)), ..Self::default() }
    }

    /// Reads one CloudEvent as a JSON document (structured mode): a line of a JSON Lines file.
    ///
    /// Never fails: what does not read is a message with a [`defect`](Self::defect).
    ///
    /// ```
    /// use hapax::{Message, MessageLimits};
    ///
    /// let line = r#"{"specversion":"1.0","id":"42","source":"/shop","type":"order.placed","data":{"cents": 1200}}"#;
    /// let message = Message::from_structured_json(line.into(), &MessageLimits::DEFAULT);
    /// assert!(message.defect().is_none());
    /// assert_eq!(message.data.as_ref(), br#"{"cents": 1200}"#);
    /// ```
    pub fn from_structured_json(document: Bytes, limits: &MessageLimits) -> Self {
        crate::cloudevents::decode_document(document, limits)
    }

    /// Sets the data and its media type.
    #[must_use]
    pub fn with_data(mut self, content_type: impl Into<Box<str>>, data: impl Into<Bytes>) -> Self {
        self.attributes.content_type = Some(content_type.into());
        self.data = data.into();
        self
    }

    /// Sets the data to `value` as JSON. Fails with [`ErrorKind::Rejected`](crate::ErrorKind::Rejected) where it has no
    /// JSON form.
    pub fn with_json<T: serde::Serialize + ?Sized>(self, value: &T) -> crate::Result<Self> {
        let data = serde_json::to_vec(value).map_err(|e| {
            crate::Error::new(crate::ErrorKind::Rejected, "encode").because("no JSON form").with_source(e)
        })?;
        Ok(self.with_data("application/json", data))
    }

    /// Sets the ordering key.
    #[must_use]
    pub fn with_partition_key(mut self, key: impl Into<Box<str>>) -> Self {
        self.attributes.partition_key = Some(key.into());
        self
    }

    /// Sets the subject.
    #[must_use]
    pub fn with_subject(mut self, subject: impl Into<Box<str>>) -> Self {
        self.attributes.subject = Some(subject.into());
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn with_header(mut self, name: impl AsRef<str> + Into<Box<str>>, value: impl Into<Bytes>) -> Self {
        self.headers.push(name, value);
        self
    }

    /// Why this message cannot be taken as an event, if it cannot.
    pub fn defect(&self) -> Option<&Defect> {
        self.defect.as_deref()
    }

    /// The reopen token, if this is a dead letter that was sent back.
    pub fn reopen(&self) -> Option<NonZeroU64> {
        self.reopen
    }

    /// Bytes it takes in flight: data and headers.
    pub fn bytes(&self) -> usize {
        self.data.len() + self.headers.bytes()
    }
}

impl fmt::Debug for Message {
    /// Attributes, header names, and the size of the data: never values or payloads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("attributes", &self.attributes)
            .field("headers", &self.headers)
            .field("data_bytes", &self.data.len())
            .field("defect", &self.defect)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_attributes_take_no_memory_of_their_own_and_read_like_any_other() {
        assert!(matches!(kept("ce_id".to_owned()), Cow::Borrowed("ce_id")));
        assert!(matches!(kept("x-tenant"), Cow::Owned(_)));
        let headers: Headers = [("ce_id", "1"), ("x-tenant", "7")].into_iter().collect();
        assert_eq!([headers.get_str("ce_id"), headers.get_str("x-tenant")], [Some("1"), Some("7")]);
    }
}
