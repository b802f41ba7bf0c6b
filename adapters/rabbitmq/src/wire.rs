//! Messages as AMQP 0.9.1 carries them: properties and a table of typed headers on one side, [`Headers`] and bytes on the
//! other.
//!
//! What belongs to RabbitMQ (`x-death`, `x-delivery-count`, ..) is taken off when a message arrives and never sent on. What
//! is sent again, to wait or to the dead letters, is the message as it came, with its native types.

use std::collections::BTreeMap;

use bytes::Bytes;
use hapax::cloudevents::{self, Convention};
use hapax::{DeadLetter, Defect, Error, ErrorKind, Headers, Message, MessageLimits, RESERVED_PREFIX, Result};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::screen;

/// The header that holds the property `message_id` of a message that is no CloudEvent.
pub(crate) const MESSAGE_ID: &str = "message-id";

const CONVENTION: Convention = Convention::RABBITMQ;
/// RabbitMQ's delivery mode of a message that is written to disk.
const PERSISTENT: u8 = 2;
/// Bytes of headers in a dead letter: one frame of 128 KiB holds them all, and the other properties take up to 2 KiB.
const DEAD_LETTER_HEADER_BYTES_MAX: usize = 100 * 1024;
/// How deep arrays and tables may be nested: deeper is a defect, and is not shown. Less than lapin is let read, so that nothing
/// that was cut there seems sound here.
const NESTING_MAX: usize = 16;

/// Headers that RabbitMQ writes. A copy of them on a new message would be a lie, or be refused.
fn is_of_server(name: &str) -> bool {
    let exact = ["x-death", "x-delivery-count", "x-acquired-count"];
    exact.contains(&name) || name.starts_with("x-first-death-") || name.starts_with("x-last-death-")
}

/// Headers by which a sender asks RabbitMQ for further queues (sender-selected distribution).
fn is_route(name: &str) -> bool {
    matches!(name, "CC" | "BCC")
}

fn is_reserved(name: &str) -> bool {
    name.get(..RESERVED_PREFIX.len()).is_some_and(|prefix| prefix.eq_ignore_ascii_case(RESERVED_PREFIX))
}

/// A message that arrived.
pub(crate) fn read(properties: &BasicProperties, body: Bytes, limits: &MessageLimits) -> Message {
    let table = properties.headers().as_ref().map(FieldTable::inner);
    let mut headers = Headers::with_capacity(table.map_or(0, |table| table.len()) + 1);
    let content_type = properties.content_type().as_ref().filter(|text| !text.as_str().is_empty());
    if let Some(text) = content_type {
        headers.push(CONVENTION.content_type, Bytes::copy_from_slice(text.as_str().as_bytes()));
    }
    for (name, value) in table.into_iter().flatten() {
        let name = name.as_str();
        // The property is where the content type belongs; a header of this name counts where there is none.
        let twice = content_type.is_some() && name == CONVENTION.content_type;
        if !twice && !is_of_server(name) {
            headers.push(name, bytes_of(value));
        }
    }
    if let Some(defect) = table.and_then(defect) {
        return Message::defective(headers, body, defect);
    }
    let mut message = cloudevents::decode(headers, body, &CONVENTION, limits);
    let foreign = message.attributes.id.is_none() && message.headers.get(MESSAGE_ID).is_none();
    if let Some(id) = properties.message_id().as_ref().filter(|id| foreign && !id.as_str().is_empty()) {
        message.headers.push(MESSAGE_ID, Bytes::copy_from_slice(id.as_str().as_bytes()));
    }
    message
}

/// What no sound message has: headers that were changed on their way in, or are nested deeper than is read.
fn defect(table: &BTreeMap<ShortString, AMQPValue>) -> Option<Defect> {
    if let Some(why) = table.get(screen::MARK) {
        let why = why.as_long_string().map(ToString::to_string).unwrap_or_default();
        let told = [
            ("nested", "values are nested too deeply"),
            ("text", "a name or a property is not UTF-8"),
            ("large", "they are too large for one frame"),
        ];
        let told: Vec<_> =
            told.iter().filter(|(word, _)| why.split(' ').any(|one| one == *word)).map(|(_, it)| *it).collect();
        return Some(Defect::beyond_limit(format!("the headers cannot be read as they are: {}", told.join(", "))));
    }
    let deep = table.iter().find(|(_, value)| nesting_exceeds(value, NESTING_MAX))?.0;
    Some(Defect::beyond_limit(format!("header `{deep}` is nested deeper than {NESTING_MAX} levels")))
}

/// Whether there are more levels of arrays and tables than so many.
fn nesting_exceeds(value: &AMQPValue, levels: usize) -> bool {
    let within = |inner: &AMQPValue| levels == 0 || nesting_exceeds(inner, levels - 1);
    match value {
        AMQPValue::FieldArray(array) => levels == 0 || array.as_slice().iter().any(within),
        AMQPValue::FieldTable(table) => levels == 0 || table.inner().values().any(within),
        _ => false,
    }
}

/// How often the queue has delivered a message, from 1, as far as it tells.
pub(crate) fn deliveries(properties: &BasicProperties, redelivered: bool) -> Option<u32> {
    let table = properties.headers().as_ref();
    let before = table.and_then(|table| table.inner().get("x-delivery-count")).and_then(integer);
    match before {
        Some(before) => Some(u32::try_from(before).unwrap_or(u32::MAX).saturating_add(1)),
        None => (!redelivered).then_some(1),
    }
}

/// A message on its way out, in binary mode.
pub(crate) fn write(message: &Message) -> Result<(BasicProperties, Bytes)> {
    let (headers, body) = cloudevents::encode(message, &CONVENTION);
    let mut properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
    let mut table = FieldTable::default();
    for (name, value) in headers.iter() {
        if is_of_server(name) || table.contains_key(name) {
            continue;
        }
        if is_route(name) {
            return Err(rejected(format!("header `{name}` names further queues to RabbitMQ; take another name")));
        }
        let content_type = (name == CONVENTION.content_type).then(|| std::str::from_utf8(value).ok()).flatten();
        match content_type.map(short) {
            Some(Ok(text)) => properties = properties.with_content_type(text),
            Some(Err(_)) => return Err(rejected("the content type is longer than 255 bytes, AMQP takes no more")),
            None => {
                let name = short(name).map_err(|_| rejected("the name of a header is longer than 255 bytes"))?;
                table.insert(name, AMQPValue::LongString(value.to_vec().into()));
            }
        }
    }
    if let Some(Ok(id)) = message.attributes.id.as_deref().map(short) {
        properties = properties.with_message_id(id);
    }
    Ok((properties.with_headers(table), body))
}

/// The properties of a message that is sent again as it came.
pub(crate) fn again(properties: &BasicProperties) -> BasicProperties {
    let table = properties.headers().as_ref();
    let kept = table.into_iter().flat_map(|table| table.inner()).filter(|(name, _)| {
        let name = name.as_str();
        !is_of_server(name) && !is_route(name)
    });
    let kept: BTreeMap<_, _> = kept.map(|(name, value)| (name.clone(), value.clone())).collect();
    // Left out: `expiration` would let it vanish while it waits, `user_id` is refused from another user, and the cluster's id is
    // not ours to say.
    let mut copy = BasicProperties::default().with_delivery_mode(PERSISTENT).with_headers(kept.into());
    if let Some(value) = properties.content_type() {
        copy = copy.with_content_type(value.clone());
    }
    if let Some(value) = properties.content_encoding() {
        copy = copy.with_content_encoding(value.clone());
    }
    if let Some(value) = properties.priority() {
        copy = copy.with_priority(*value);
    }
    if let Some(value) = properties.correlation_id() {
        copy = copy.with_correlation_id(value.clone());
    }
    if let Some(value) = properties.reply_to() {
        copy = copy.with_reply_to(value.clone());
    }
    if let Some(value) = properties.message_id() {
        copy = copy.with_message_id(value.clone());
    }
    if let Some(value) = properties.timestamp() {
        copy = copy.with_timestamp(*value);
    }
    if let Some(value) = properties.kind() {
        copy = copy.with_type(value.clone());
    }
    if let Some(value) = properties.app_id() {
        copy = copy.with_app_id(value.clone());
    }
    copy
}

/// The properties of a dead letter: those of the message, and the headers that say why. The largest headers of the message
/// go where all together would not fit into a frame, which RabbitMQ answers by closing the connection.
pub(crate) fn set_aside(properties: &BasicProperties, letter: &DeadLetter) -> BasicProperties {
    let copy = again(properties);
    let mut table = copy.headers().as_ref().map(|table| table.inner().clone()).unwrap_or_default();
    table.retain(|name, _| !is_reserved(name.as_str()));
    let mut bytes: usize = table.iter().map(|(name, value)| weight(name, value)).sum();
    while bytes > DEAD_LETTER_HEADER_BYTES_MAX {
        let largest = table.iter().max_by_key(|(name, value)| weight(name, value)).map(|(name, _)| name.clone());
        let Some((name, value)) = largest.and_then(|name| table.remove_entry(&name)) else { break };
        bytes -= weight(&name, &value);
        tracing::warn!(header = name.as_str(), "a dead letter's headers are too large; one of them is left out");
    }
    for (name, value) in letter.headers().iter() {
        if let Ok(name) = short(name) {
            table.insert(name, AMQPValue::LongString(value.to_vec().into()));
        }
    }
    copy.with_headers(table.into())
}

/// How many bytes the headers take on the wire.
pub(crate) fn header_bytes(properties: &BasicProperties) -> usize {
    let table = properties.headers().as_ref();
    table.into_iter().flat_map(|table| table.inner()).map(|(name, value)| weight(name, value)).sum()
}

fn weight(name: &ShortString, value: &AMQPValue) -> usize {
    fn of(value: &AMQPValue) -> usize {
        // A tag; texts, arrays and tables have a length of four bytes besides.
        1 + match value {
            AMQPValue::Void => 0,
            AMQPValue::Boolean(_) | AMQPValue::ShortShortInt(_) | AMQPValue::ShortShortUInt(_) => 1,
            AMQPValue::ShortInt(_) | AMQPValue::ShortUInt(_) => 2,
            AMQPValue::LongInt(_) | AMQPValue::LongUInt(_) | AMQPValue::Float(_) => 4,
            AMQPValue::DecimalValue(_) => 5,
            AMQPValue::LongLongInt(_) | AMQPValue::Double(_) | AMQPValue::Timestamp(_) => 8,
            AMQPValue::ShortString(text) => 1 + text.as_str().len(),
            AMQPValue::LongString(text) => 4 + text.len(),
            AMQPValue::ByteArray(bytes) => 4 + bytes.len(),
            AMQPValue::FieldArray(array) => 4 + array.as_slice().iter().map(of).sum::<usize>(),
            AMQPValue::FieldTable(table) => {
                4 + table.inner().iter().map(|(name, value)| weight(name, value)).sum::<usize>()
            }
        }
    }
    name.as_str().len() + 1 + of(value)
}

/// A text as AMQP's short string, at most 255 bytes.
pub(crate) fn short(text: &str) -> Result<ShortString> {
    ShortString::try_new(text).map_err(|_| rejected("a text is longer than 255 bytes"))
}

fn rejected(why: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Rejected, "publish").because(why)
}

fn integer(value: &AMQPValue) -> Option<i64> {
    Some(match value {
        AMQPValue::ShortShortInt(n) => i64::from(*n),
        AMQPValue::ShortShortUInt(n) => i64::from(*n),
        AMQPValue::ShortInt(n) => i64::from(*n),
        AMQPValue::ShortUInt(n) => i64::from(*n),
        AMQPValue::LongInt(n) => i64::from(*n),
        AMQPValue::LongUInt(n) => i64::from(*n),
        AMQPValue::LongLongInt(n) => *n,
        _ => return None,
    })
}

/// The value of a header as bytes: texts and byte arrays as they are, numbers in decimals, truth as `true` and `false`, a
/// time in RFC 3339, nothing as the empty text, arrays and tables as JSON.
fn bytes_of(value: &AMQPValue) -> Bytes {
    match value {
        AMQPValue::LongString(text) => Bytes::copy_from_slice(text.as_bytes()),
        AMQPValue::ByteArray(bytes) => Bytes::copy_from_slice(bytes.as_slice()),
        AMQPValue::ShortString(text) => Bytes::copy_from_slice(text.as_str().as_bytes()),
        AMQPValue::Void => Bytes::new(),
        AMQPValue::FieldArray(_) | AMQPValue::FieldTable(_) => {
            let mut text = String::new();
            json(value, 0, &mut text);
            Bytes::from(text)
        }
        scalar => Bytes::from(text_of(scalar)),
    }
}

fn text_of(scalar: &AMQPValue) -> String {
    match scalar {
        AMQPValue::Boolean(truth) => truth.to_string(),
        AMQPValue::Float(number) => number.to_string(),
        AMQPValue::Double(number) => number.to_string(),
        AMQPValue::DecimalValue(number) => format!("{}e-{}", number.value, number.scale),
        AMQPValue::Timestamp(seconds) => rfc_3339(*seconds),
        number => integer(number).map(|number| number.to_string()).unwrap_or_default(),
    }
}

fn json(value: &AMQPValue, depth: usize, out: &mut String) {
    match value {
        _ if depth > NESTING_MAX => out.push_str("null"),
        AMQPValue::FieldArray(array) => {
            out.push('[');
            for (at, value) in array.as_slice().iter().enumerate() {
                out.push_str(if at == 0 { "" } else { "," });
                json(value, depth + 1, out);
            }
            out.push(']');
        }
        AMQPValue::FieldTable(table) => {
            out.push('{');
            for (at, (name, value)) in table.inner().iter().enumerate() {
                out.push_str(if at == 0 { "" } else { "," });
                quote(name.as_str(), out);
                out.push(':');
                json(value, depth + 1, out);
            }
            out.push('}');
        }
        AMQPValue::Void => out.push_str("null"),
        AMQPValue::Boolean(_) => out.push_str(&text_of(value)),
        scalar => match integer(scalar) {
            Some(number) => out.push_str(&number.to_string()),
            None => quote(&String::from_utf8_lossy(&bytes_of(scalar)), out),
        },
    }
}

fn quote(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Seconds since 1970 in UTC. Days to a date as in Howard Hinnant's "chrono-compatible low-level date algorithms".
fn rfc_3339(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3_600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests;
