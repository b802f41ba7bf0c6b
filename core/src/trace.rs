//! W3C trace context (Trace Context Level 1) without a tracing vendor: reads `traceparent`, derives the next one, and
//! opens the span of a handler's run.
//!
//! A run's span id derives from its event and fence: no random number is drawn, and what the run publishes names the
//! same parent as its span does.

use tracing::Span;
use tracing::field::Empty;

use crate::message::Message;
use crate::store::{Lease, digest};

/// What a valid `traceparent` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TraceParent<'a> {
    /// 32 lower-case hexadecimal characters, not all zero.
    pub(crate) trace_id: &'a str,
    /// 16 lower-case hexadecimal characters, not all zero.
    pub(crate) parent_id: &'a str,
    /// Whether the caller records this trace.
    pub(crate) sampled: bool,
}

/// Bytes of a version 00 `traceparent`; a later version may go on after a dash.
const LENGTH: usize = 55;

impl<'a> TraceParent<'a> {
    /// Reads one as sections 3.2 and 4.3 of the recommendation say; `None` where it is invalid, which means that
    /// `tracestate` is not to be used either.
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        let (head, tail) = text.split_at_checked(LENGTH)?;
        let mut parts = head.split('-');
        let (version, trace_id, parent_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let shaped = parts.next().is_none()
            && [(version, 2), (trace_id, 32), (parent_id, 16), (flags, 2)].iter().all(|(part, length)| {
                part.len() == *length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            });
        let known = match version {
            "00" => tail.is_empty(),
            "ff" => false,
            _ => tail.is_empty() || tail.starts_with('-'),
        };
        let named = [trace_id, parent_id].iter().all(|id| id.bytes().any(|b| b != b'0'));
        let sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
        (shaped && known && named).then_some(Self { trace_id, parent_id, sampled })
    }
}

/// The `traceparent` of what a span with this id sends: same trace, same sampling, unknown flags cleared. `None` if the
/// one it continues is invalid.
pub(crate) fn child(traceparent: &str, span_id: [u8; 8]) -> Option<String> {
    let parent = TraceParent::parse(traceparent)?;
    Some(format!("00-{}-{}-{:02x}", parent.trace_id, Id(span_id), u8::from(parent.sampled)))
}

/// The span id of one run of a handler: another for every grant of the event, never zero.
pub(crate) fn span_id(lease: &Lease) -> [u8; 8] {
    let bytes = digest(b"hapax span id 1", &[&lease.key.0, &lease.fence.get().to_le_bytes()]);
    let mut id = [0; 8];
    id.copy_from_slice(&bytes[..8]);
    if id == [0; 8] {
        id[7] = 1;
    }
    id
}

/// The span of one run of a handler. Where nobody listens it is one load of an atomic.
pub(crate) fn handler_span(consumer: &str, route: &'static str, message: &Message, lease: &Lease) -> Span {
    let attributes = &message.attributes;
    let span = tracing::info_span!(
        target: "hapax",
        "hapax.handle",
        otel.kind = "consumer",
        consumer,
        route,
        attempt = lease.attempt,
        messaging.message.id = attributes.id.as_deref().unwrap_or_default(),
        trace_id = Empty,
        parent_span_id = Empty,
        span_id = Empty,
    );
    if span.is_disabled() {
        return span;
    }
    if let Some(parent) = attributes.traceparent.as_deref().and_then(TraceParent::parse) {
        span.record("trace_id", parent.trace_id)
            .record("parent_span_id", parent.parent_id)
            .record("span_id", tracing::field::display(Id(span_id(lease))));
    }
    span
}

/// The span of one run of a batch handler: of no one trace, since each event comes with its own.
pub(crate) fn batch_span(consumer: &str, route: &'static str, events: usize) -> Span {
    tracing::info_span!(target: "hapax", "hapax.handle_batch", otel.kind = "consumer", consumer, route, events)
}

/// Shown as 16 lower-case hexadecimal characters.
struct Id([u8; 8]);

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fmt::Debug;
    use std::num::NonZeroU64;
    use std::sync::{Arc, Mutex};

    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id as SpanId, Record};
    use tracing::{Event, Metadata, Subscriber};

    use super::*;
    use crate::context::Context;
    use crate::store::{ConsumerId, EventKey};

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn lease(fence: u64) -> Lease {
        let key = EventKey::of("billing", "/shop", "1");
        Lease { consumer: ConsumerId(1), key, fence: NonZeroU64::new(fence).unwrap(), attempt: 3 }
    }

    #[test]
    fn a_traceparent_is_read_as_the_recommendation_says() {
        let expected = TraceParent { trace_id: TRACE, parent_id: "00f067aa0ba902b7", sampled: true };
        assert_eq!(TraceParent::parse(GIVEN), Some(expected));
        let later = format!("cc{}-what-the-future-brings", &GIVEN[2..]);
        assert_eq!(TraceParent::parse(&later), Some(expected), "a later version is read as far as it is known");
        let unsampled = GIVEN.replace("-01", "-00");
        assert_eq!(TraceParent::parse(&unsampled).map(|parent| parent.sampled), Some(false));
    }

    #[test]
    fn an_invalid_traceparent_is_none_and_has_no_child() {
        let zero_trace = format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32));
        for bad in [
            "",
            "00",
            &GIVEN[..54],
            &format!("{GIVEN}-"),
            &format!("{GIVEN}0"),
            &GIVEN.to_uppercase(),
            &GIVEN.replace('-', "_"),
            &GIVEN.replacen("00-", "ff-", 1),
            &GIVEN.replacen("00-", "cc-", 1).replace("-01", "-01x"),
            &GIVEN.replace("00f067aa0ba902b7", "0000000000000000"),
            &GIVEN.replace("00f067aa0ba902b7", "00f067aa0ba902bg"),
            &GIVEN.replace("-01", "-+1"),
            &zero_trace,
            &format!("é{}", &GIVEN[1..]),
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0é",
        ] {
            assert_eq!(TraceParent::parse(bad), None, "{bad}");
            assert_eq!(child(bad, [1; 8]), None, "{bad}");
        }
    }

    #[test]
    fn a_child_keeps_trace_and_sampling_and_clears_unknown_flags() {
        let next = child(GIVEN, [0xab; 8]).unwrap();
        assert_eq!(next, format!("00-{TRACE}-abababababababab-01"));
        assert_eq!(child(&GIVEN.replace("-01", "-fe"), [1; 8]).unwrap(), format!("00-{TRACE}-0101010101010101-00"));
        assert!(TraceParent::parse(&next).is_some(), "it is valid itself");
    }

    #[test]
    fn every_run_of_an_event_has_a_span_id_of_its_own_and_the_same_run_the_same() {
        assert_eq!(span_id(&lease(7)), span_id(&lease(7)));
        assert_ne!(span_id(&lease(7)), span_id(&lease(8)));
    }

    #[derive(Clone, Default)]
    struct Fields(Arc<Mutex<BTreeMap<String, String>>>);

    impl Visit for Fields {
        fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
            self.0.lock().unwrap().insert(field.name().to_owned(), format!("{value:?}"));
        }
        fn record_str(&mut self, field: &Field, value: &str) {
            self.0.lock().unwrap().insert(field.name().to_owned(), value.to_owned());
        }
    }

    impl Subscriber for Fields {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            metadata.name() == "hapax.handle"
        }
        fn new_span(&self, span: &Attributes<'_>) -> SpanId {
            span.record(&mut self.clone());
            SpanId::from_u64(1)
        }
        fn record(&self, _: &SpanId, values: &Record<'_>) {
            values.record(&mut self.clone());
        }
        fn record_follows_from(&self, _: &SpanId, _: &SpanId) {}
        fn event(&self, _: &Event<'_>) {}
        fn enter(&self, _: &SpanId) {}
        fn exit(&self, _: &SpanId) {}
    }

    fn fields_of(message: &Message) -> BTreeMap<String, String> {
        let fields = Fields::default();
        tracing::subscriber::with_default(fields.clone(), || {
            handler_span("billing", "order.placed", message, &lease(7));
        });
        fields.0.lock().unwrap().clone()
    }

    #[test]
    fn the_span_of_a_run_names_event_and_trace() {
        let mut message = Message::event("/shop", "1", "order.placed");
        message.attributes.traceparent = Some(GIVEN.into());
        let seen = fields_of(&message);
        let of = |name: &str| seen.get(name).map(String::as_str);
        assert_eq!(of("otel.kind"), Some("consumer"));
        assert_eq!((of("consumer"), of("route"), of("attempt")), (Some("billing"), Some("order.placed"), Some("3")));
        assert_eq!(of("messaging.message.id"), Some("1"));
        assert_eq!((of("trace_id"), of("parent_span_id")), (Some(TRACE), Some("00f067aa0ba902b7")));
        assert_eq!(of("span_id"), Some(Id(span_id(&lease(7))).to_string().as_str()));
    }

    #[test]
    fn a_message_without_a_valid_trace_gets_a_span_without_one() {
        let mut message = Message::event("/shop", "1", "order.placed");
        message.attributes.traceparent = Some("not a trace".into());
        let seen = fields_of(&message);
        assert!(seen.contains_key("consumer") && !seen.contains_key("trace_id") && !seen.contains_key("span_id"));
    }

    #[derive(serde::Serialize, serde::Deserialize)]
    struct Billed;
    impl crate::event::Event for Billed {
        const TYPE: &'static str = "billed";
    }

    fn published_because_of(traceparent: &str) -> (Option<Box<str>>, Option<Box<str>>, Context<()>) {
        let mut message = Message::event("/shop", "1", "order.placed");
        message.attributes.traceparent = Some(traceparent.into());
        message.attributes.tracestate = Some("vendor=1".into());
        let cx = Context::test((), message);
        cx.publish(&Billed).send().unwrap();
        let sent = cx.published().remove(0).message.attributes.clone();
        (sent.traceparent, sent.tracestate, cx)
    }

    #[tokio::test]
    async fn what_a_handler_publishes_goes_on_with_the_trace_from_its_own_span() {
        let (parent, state, cx) = published_because_of(GIVEN);
        let (key, fence) = (EventKey::of("test", "/shop", "1"), NonZeroU64::new(cx.fence()).unwrap());
        let own = span_id(&Lease { consumer: ConsumerId(0), key, fence, attempt: 1 });
        assert_eq!(parent.as_deref(), Some(format!("00-{TRACE}-{}-01", Id(own)).as_str()));
        assert_eq!(state.as_deref(), Some("vendor=1"));
    }

    #[tokio::test]
    async fn a_tracestate_without_a_valid_traceparent_is_not_passed_on() {
        let (parent, state, _) = published_because_of("00-broken");
        assert_eq!((parent, state), (None, None));
    }
}
