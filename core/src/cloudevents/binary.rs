//! Binary mode: attributes are headers, the body is the data. Also the plain messages of producers that know nothing of
//! CloudEvents: without any prefixed header nothing is required, and ids come from another extractor.

use std::borrow::Cow;

use bytes::Bytes;

use super::{
    CONTENT_TYPE, Convention, Read, Role, SPEC_VERSION, SPEC_VERSION_TAKEN, attributes, fill, missing, other_headers,
    slots, spec_version_refused, twice,
};
use crate::message::{Attributes, Defect, Headers, Message, MessageLimits};

/// Allocates for the attributes it finds and for nothing else.
pub(super) fn read(message: &Message, convention: &Convention, limits: &MessageLimits) -> Result<Read, Defect> {
    let mut attributes = Attributes::default();
    let mut slots = slots(&mut attributes);
    let mut seen = [false; super::NAMES.len()];
    let mut is_event = false;
    let mut version_seen = false;
    for (name, value) in message.headers.iter() {
        match convention.role(name) {
            Role::Other => {}
            Role::Extension(_) => is_event = true,
            Role::SpecVersion => {
                if std::mem::replace(&mut version_seen, true) {
                    return Err(twice(SPEC_VERSION));
                }
                if &**value != SPEC_VERSION_TAKEN.as_bytes() {
                    return Err(spec_version_refused());
                }
            }
            Role::Attribute(index) => {
                if std::mem::replace(&mut seen[index], true) {
                    return Err(twice(super::NAMES[index]));
                }
                let is_content_type = convention.same(name, convention.content_type);
                is_event |= !is_content_type;
                let value = text(super::NAMES[index], value, convention.http && !is_content_type)?;
                fill(&mut slots, index, value, limits)?;
            }
        }
    }
    if is_event && !version_seen {
        return Err(missing(SPEC_VERSION));
    }
    Ok(Read { attributes, ..Read::default() })
}

/// The headers of `message`: those of its attributes first.
pub(super) fn headers(message: &Message, convention: &Convention) -> Headers {
    let mut headers = Headers::with_capacity(message.headers.len() + 8);
    if message.defect().is_none() {
        let set = attributes(&message.attributes).filter(|(name, value)| {
            // Empty is unset: see `fill`.
            *name != super::NAMES[CONTENT_TYPE] && !value.is_empty()
        });
        let is_extension = |name: &str| matches!(convention.role(name), Role::Extension(_));
        if set.clone().next().is_some() || message.headers.iter().any(|(name, _)| is_extension(name)) {
            headers.push(format!("{}{SPEC_VERSION}", convention.prefix), Bytes::from_static(b"1.0"));
        }
        for (name, value) in set {
            headers.push(format!("{}{name}", convention.prefix), convention.value(value));
        }
        if let Some(content_type) = message.attributes.content_type.as_deref().filter(|value| !value.is_empty()) {
            headers.push(convention.content_type, Bytes::copy_from_slice(content_type.as_bytes()));
        }
    }
    other_headers(message, convention, &mut headers, |_| true);
    headers
}

fn text<'a>(name: &str, value: &'a [u8], percent_encoded: bool) -> Result<Cow<'a, str>, Defect> {
    let not_text = || Defect::undecodable(format!("attribute `{name}` is not UTF-8"));
    let text = std::str::from_utf8(value).map_err(|_| not_text())?;
    if !percent_encoded || !text.contains(['%', '"']) {
        return Ok(Cow::Borrowed(text));
    }
    let bytes = percent_decode(text)
        .ok_or_else(|| Defect::undecodable(format!("attribute `{name}` is not percent-encoded as it should be")))?;
    String::from_utf8(bytes).map(Cow::Owned).map_err(|_| not_text())
}

/// HTTP protocol binding 1.0.2, section 3.1.3.2: quotes around the value come off, then one round of decoding.
fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let quoted = text.len() >= 2 && text.starts_with('"') && text.ends_with('"');
    let bytes = if quoted { &text.as_bytes()[1..text.len() - 1] } else { text.as_bytes() };
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut rest = bytes.iter();
    while let Some(&byte) = rest.next() {
        decoded.push(match byte {
            b'\\' if quoted => *rest.next()?,
            b'"' if quoted => return None,
            b'%' => {
                let mut digit = || char::from(*rest.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            byte => byte,
        });
    }
    Some(decoded)
}

/// The inverse: space, double quote, percent sign and everything outside printable ASCII as `%XX`.
pub(super) fn percent_encode(text: &str) -> Bytes {
    let mut encoded = Vec::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'!' | b'#'..=b'$' | b'&'..=b'~' => encoded.push(byte),
            byte => encoded.extend_from_slice(format!("%{byte:02X}").as_bytes()),
        }
    }
    encoded.into()
}
