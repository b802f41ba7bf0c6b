//! Versions of an event: reading data of any known one into the newest, step by step.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;

use super::{Event, type_name};
use crate::cloudevents;
use crate::message::{Defect, Message};

/// Reads data of any known version into the newest.
pub(super) struct Decode<E> {
    upcasts: Vec<Upcast>,
    newest: PhantomData<fn() -> E>,
}

impl<E: Event> Decode<E> {
    pub(super) fn new(upcasts: Vec<Upcast>) -> Self {
        Self { upcasts: upcasts.into_iter().filter(|upcast| upcast.ty == E::TYPE).collect(), newest: PhantomData }
    }

    pub(super) fn read(&self, message: &Message, version: u32, json_depth_max: usize) -> Result<E, Defect> {
        if let Some(media) = message.attributes.content_type.as_deref().filter(|media| !cloudevents::is_json(media)) {
            return Err(Defect::undecodable(format!("datacontenttype {media:?} is not JSON; take it with on_any")));
        }
        if cloudevents::json_depth_exceeds(&message.data, json_depth_max) {
            return Err(Defect::beyond_limit(format!("data is nested deeper than json_depth_max = {json_depth_max}")));
        }
        // serde_json's texts tell line, column and what was expected; a wrong value's text they may quote is cut later.
        let unreadable = |e: serde_json::Error| {
            Defect::undecodable(format!("data does not read as {}: {}", type_name::<E>(), without_values(&e)))
        };
        if version == E::VERSION {
            return serde_json::from_slice(&message.data).map_err(unreadable);
        }
        let chain = self.chain(version).unwrap_or_default();
        let mut steps = chain.iter();
        let oldest = steps.next().ok_or_else(|| Defect::undecodable(format!("version {version} is not known")))?;
        let mut value = (oldest.lift)((oldest.decode)(&message.data).map_err(unreadable)?);
        for step in steps {
            value = (step.lift)(value);
        }
        match value.downcast::<E>() {
            Ok(event) => Ok(*event),
            Err(_) => {
                Err(Defect::undecodable(format!("no upcast from version {version} ends at {}", type_name::<E>())))
            }
        }
    }

    /// The upcasts from `version` to the newest, in order.
    pub(super) fn chain(&self, version: u32) -> Option<Vec<&Upcast>> {
        let mut chain = Vec::new();
        let mut at = version;
        while at != E::VERSION {
            let step = self.upcasts.iter().find(|upcast| upcast.from == at && upcast.to > at)?;
            at = step.to;
            chain.push(step);
        }
        (!chain.is_empty()).then_some(chain)
    }
}

/// Where and what kind, but never the offending value: payloads do not go into error texts.
fn without_values(error: &serde_json::Error) -> String {
    let kind = match error.classify() {
        serde_json::error::Category::Syntax => "not JSON",
        serde_json::error::Category::Eof => "JSON ends too early",
        serde_json::error::Category::Data => "another shape",
        serde_json::error::Category::Io => "not readable",
    };
    format!("{kind} at line {} column {}", error.line(), error.column())
}

/// One step from an older version to a newer one.
#[derive(Clone)]
pub(crate) struct Upcast {
    pub(crate) ty: &'static str,
    pub(crate) target: &'static str,
    pub(crate) from: u32,
    pub(crate) to: u32,
    decode: fn(&[u8]) -> serde_json::Result<Box<dyn Any + Send>>,
    lift: fn(Box<dyn Any + Send>) -> Box<dyn Any + Send>,
}

impl Upcast {
    pub(crate) fn new<A: Event, B: Event + From<A>>() -> Self {
        Self {
            ty: A::TYPE,
            target: B::TYPE,
            from: A::VERSION,
            to: B::VERSION,
            decode: |data| Ok(Box::new(serde_json::from_slice::<A>(data)?)),
            // A chain is built of matching versions of one type, so the downcast finds what the step before it made.
            lift: |older| match older.downcast::<A>() {
                Ok(older) => Box::new(B::from(*older)),
                Err(other) => other,
            },
        }
    }
}

impl fmt::Debug for Upcast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} v{} -> v{}", self.ty, self.from, self.to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct V1 {
        cents: i64,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct V2 {
        cents: i64,
        currency: String,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct V3 {
        amount: String,
    }
    impl Event for V1 {
        const TYPE: &'static str = "paid";
    }
    impl Event for V2 {
        const TYPE: &'static str = "paid";
        const VERSION: u32 = 2;
    }
    impl Event for V3 {
        const TYPE: &'static str = "paid";
        const VERSION: u32 = 3;
    }
    impl From<V1> for V2 {
        fn from(v: V1) -> Self {
            Self { cents: v.cents, currency: "EUR".into() }
        }
    }
    impl From<V2> for V3 {
        fn from(v: V2) -> Self {
            Self { amount: format!("{} {}", v.cents, v.currency) }
        }
    }

    #[test]
    fn an_old_version_is_lifted_step_by_step_and_a_newer_one_is_not_known() {
        let decode = Decode::<V3>::new(vec![Upcast::new::<V2, V3>(), Upcast::new::<V1, V2>()]);
        let message = Message::event("/s", "1", "paid").with_json(&V1 { cents: 5 }).expect("JSON");
        assert_eq!(decode.read(&message, 1, 64).expect("lifted"), V3 { amount: "5 EUR".into() });
        assert!(decode.chain(4).is_none());
        assert!(decode.read(&message, 4, 64).is_err());
    }

    #[test]
    fn an_error_text_never_quotes_the_payload() {
        let decode = Decode::<V1>::new(Vec::new());
        let message = Message::event("/s", "1", "paid").with_data("application/json", r#"{"cents":"s3cret"}"#);
        let defect = decode.read(&message, 1, 64).expect_err("another shape");
        assert!(!defect.detail.contains("s3cret"), "{defect}");
        assert!(defect.detail.contains("line 1"), "{defect}");
    }
}
