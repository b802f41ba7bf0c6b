//! Structured mode: one JSON document bears attributes, extensions and data (JSON event format 1.0.2).
//!
//! The data is the exact text of the member `data`, never re-encoded, so that fingerprints do not depend on whose JSON
//! writer it was.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::Serializer as _;
use serde::ser::SerializeMap as _;
use serde_json::value::RawValue;

use super::{
    Convention, NAME_SHOWN_MAX, NAMES, REQUIRED, Read, Role, SPEC_VERSION, SPEC_VERSION_TAKEN, attributes, fill,
    headers_within, is_json, is_text, json, missing, other_headers, slots, spec_version_refused, twice,
};
use crate::dead_letter::cut;
use crate::error::{Error, ErrorKind, Result};
use crate::message::{Attributes, Defect, Headers, Message, MessageLimits};

const DATA: &str = "data";
const DATA_BASE64: &str = "data_base64";
const MEDIA_TYPE: &str = "application/cloudevents+json; charset=utf-8";

pub(super) fn read(message: &Message, convention: &Convention, limits: &MessageLimits) -> Result<Read, Defect> {
    let body = &message.data;
    // The document's own braces are not the data's: both modes take data of the same depth.
    if json::depth_exceeds(body, limits.json_depth_max.saturating_add(1)) {
        let max = limits.json_depth_max;
        return Err(Defect::beyond_limit(format!("the JSON is nested deeper than json_depth_max ({max})")));
    }
    let text = std::str::from_utf8(body).map_err(|_| Defect::undecodable("the document is not UTF-8"))?;
    if text.trim_start().starts_with('[') {
        return Err(Defect::undecodable("the document is a batch: send one event a message"));
    }
    let mut document = Document {
        body,
        convention,
        limits,
        headers: message.headers.len(),
        header_bytes: message.headers.bytes(),
        version_seen: false,
        seen: [false; NAMES.len()],
        attributes: Attributes::default(),
        extensions: Vec::new(),
        data: None,
        data_base64: None,
    };
    json::members(text, |name, value| document.member(&name, value))
        .map_err(|defect| defect.unwrap_or_else(|| Defect::undecodable("the document is not one JSON object")))?;
    document.finish()
}

/// What was read so far. Attributes and extensions count as headers, as they would in binary mode.
struct Document<'a> {
    body: &'a Bytes,
    convention: &'a Convention,
    limits: &'a MessageLimits,
    headers: usize,
    header_bytes: usize,
    version_seen: bool,
    seen: [bool; NAMES.len()],
    attributes: Attributes,
    extensions: Vec<(String, Bytes)>,
    data: Option<&'a RawValue>,
    data_base64: Option<Bytes>,
}

impl<'a> Document<'a> {
    fn member(&mut self, name: &str, value: &'a RawValue) -> Result<(), Defect> {
        match name {
            DATA => {
                if self.data.replace(value).is_some() {
                    return Err(Defect::undecodable("member `data` is there twice"));
                }
                return Ok(());
            }
            DATA_BASE64 => {
                if self.data_base64.is_some() {
                    return Err(Defect::undecodable("member `data_base64` is there twice"));
                }
                self.data_base64 = Some(binary_data(value)?);
                return Ok(());
            }
            _ => {}
        }
        self.headers += 1;
        self.header_bytes += name.len() + value.get().len();
        headers_within(self.headers, self.header_bytes, self.limits)?;
        if name == SPEC_VERSION {
            if std::mem::replace(&mut self.version_seen, true) {
                return Err(twice(SPEC_VERSION));
            }
            let taken = json::string(value).is_some_and(|version| version == SPEC_VERSION_TAKEN);
            return if taken { Ok(()) } else { Err(spec_version_refused()) };
        }
        match NAMES.iter().position(|known| *known == name) {
            Some(index) => self.attribute(index, value),
            None => self.extension(name, value),
        }
    }

    fn attribute(&mut self, index: usize, value: &RawValue) -> Result<(), Defect> {
        let name = NAMES[index];
        if std::mem::replace(&mut self.seen[index], true) {
            return Err(twice(name));
        }
        if value.get() == "null" {
            return Ok(());
        }
        let text =
            json::string(value).ok_or_else(|| Defect::undecodable(format!("attribute `{name}` is not a string")))?;
        fill(&mut slots(&mut self.attributes), index, text, self.limits)
    }

    fn extension(&mut self, name: &str, value: &'a RawValue) -> Result<(), Defect> {
        if name.is_empty() || !is_text(name) {
            return Err(Defect::undecodable("a member's name is empty or has a control character"));
        }
        let shown = || cut(name, NAME_SHOWN_MAX);
        let header = format!("{}{name}", self.convention.prefix);
        if self.extensions.iter().any(|(other, _)| *other == header) {
            return Err(twice(&shown()));
        }
        let text = match value.get().as_bytes().first() {
            Some(b'{' | b'[') => None,
            Some(b'"') => json::string(value),
            _ => Some(Cow::Borrowed(value.get())),
        };
        let text = text.ok_or_else(|| {
            Defect::undecodable(format!("attribute `{}` is neither text nor number nor boolean", shown()))
        })?;
        // A null is kept as a name without value until duplicates are ruled out.
        let value = if value.get() == "null" { Bytes::new() } else { self.convention.value(&text) };
        self.extensions.push((header, value));
        Ok(())
    }

    fn finish(mut self) -> Result<Read, Defect> {
        if !self.version_seen {
            return Err(missing(SPEC_VERSION));
        }
        let required = super::values(&self.attributes).into_iter().take(REQUIRED);
        if let Some((index, _)) = required.enumerate().find(|(_, value)| value.is_none()) {
            return Err(missing(NAMES[index]));
        }
        self.extensions.retain(|(_, value)| !value.is_empty());
        let data = match (self.data, self.data_base64.take()) {
            (Some(_), Some(_)) => {
                return Err(Defect::undecodable("members `data` and `data_base64` are both there"));
            }
            (None, data) => data.unwrap_or_default(),
            (Some(value), None) => self.json_data(value)?,
        };
        Ok(Read { attributes: self.attributes, data: Some(data), extensions: self.extensions })
    }

    /// JSON stays the text it is, without a content type it is JSON; other media types are the content of a string
    /// (section 3.1.2).
    fn json_data(&mut self, value: &'a RawValue) -> Result<Bytes, Defect> {
        let content_type = self.attributes.content_type.get_or_insert_with(|| "application/json".into());
        if is_json(content_type) {
            return Ok(self.body.slice_ref(value.get().as_bytes()));
        }
        match json::string(value) {
            Some(Cow::Borrowed(text)) => Ok(self.body.slice_ref(text.as_bytes())),
            Some(Cow::Owned(text)) => Ok(Bytes::from(text)),
            None => Err(Defect::undecodable("member `data` is not a string, although `datacontenttype` is not JSON")),
        }
    }
}

fn binary_data(value: &RawValue) -> Result<Bytes, Defect> {
    let text = json::string(value).ok_or_else(|| Defect::undecodable("member `data_base64` is not a string"))?;
    let data = BASE64.decode(&*text).map_err(|_| Defect::undecodable("member `data_base64` is not base64"))?;
    Ok(data.into())
}

/// The document and the headers beside it. The caller has checked the attributes.
pub(super) fn write(message: &Message, convention: &Convention) -> Result<(Headers, Bytes)> {
    let mut body = Vec::with_capacity(message.data.len() + 256);
    document(message, convention, &mut body)
        .map_err(|e| Error::new(ErrorKind::Internal, "encode").because("no JSON form").with_source(e))?;
    let mut headers = Headers::with_capacity(message.headers.len() + 2);
    headers.push(convention.content_type, Bytes::from_static(MEDIA_TYPE.as_bytes()));
    let is_member = |name: &str| extension(message, convention, name).is_some();
    other_headers(message, convention, &mut headers, |name| !is_member(name));
    Ok((headers, body.into()))
}

fn document(message: &Message, convention: &Convention, body: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    let mut json = serde_json::Serializer::new(body);
    let mut map = json.serialize_map(None)?;
    map.serialize_entry(SPEC_VERSION, SPEC_VERSION_TAKEN)?;
    for (name, value) in attributes(&message.attributes).filter(|(_, value)| !value.is_empty()) {
        map.serialize_entry(name, value)?;
    }
    for (name, _) in message.headers.iter() {
        if let Some((name, value)) = extension(message, convention, name) {
            map.serialize_entry(name, value)?;
        }
    }
    match data(message) {
        Data::None => {}
        Data::Json(value) => map.serialize_entry(DATA, value)?,
        Data::Text(text) => map.serialize_entry(DATA, text)?,
        Data::Binary => map.serialize_entry(DATA_BASE64, &BASE64.encode(&message.data))?,
    }
    map.end()
}

/// A header that becomes a member: an extension's, there once, as text. Others stay headers beside the document.
fn extension<'a>(message: &'a Message, convention: &Convention, header: &'a str) -> Option<(&'a str, &'a str)> {
    let Role::Extension(name) = convention.role(header) else { return None };
    let named = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) && name != DATA;
    let reads_back = convention.prefix.len() + name.len() == header.len() && header.starts_with(convention.prefix);
    let once = message.headers.iter().filter(|(other, _)| *other == header).count() == 1;
    let value = message.headers.get_str(header).filter(|value| !value.is_empty())?;
    let plain = !convention.http || convention.value(value) == value;
    (named && reads_back && once && plain && is_text(value)).then_some((name, value))
}

enum Data<'a> {
    None,
    Json(&'a RawValue),
    Text(&'a str),
    Binary,
}

/// How the data is written so that exactly its bytes are read again.
fn data(message: &Message) -> Data<'_> {
    if message.data.is_empty() {
        return Data::None;
    }
    let Ok(text) = std::str::from_utf8(&message.data) else { return Data::Binary };
    match message.attributes.content_type.as_deref().map(is_json) {
        None => Data::Binary,
        Some(false) => Data::Text(text),
        Some(true) => match serde_json::from_str::<&RawValue>(text) {
            // White space around it would be lost.
            Ok(value) if value.get().len() == text.len() => Data::Json(value),
            _ => Data::Binary,
        },
    }
}
