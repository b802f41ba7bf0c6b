//! From lines to deliveries: each line travels as a structured CloudEvent, with its number in a header.

use std::collections::HashMap;
use std::io;

use hapax::{EventKey, Fingerprint, Headers, Message, MessageLimits};
use hapax_memory::MemoryBroker;
use tokio::sync::mpsc;

use crate::CONSUMER;
use crate::lines::Line;
use crate::report::Report;

/// The header that bears the line's number. No extension of an event can be called so: those have no hyphen.
pub(crate) const LINE: &str = "line-number";

/// Publishes every line, waiting where the broker is full, and waits until each was dealt with.
pub(crate) async fn feed(
    mut lines: mpsc::Receiver<io::Result<Line>>,
    broker: &MemoryBroker,
    report: &Report,
) -> Result<(), String> {
    let (publisher, mut under_way) = (broker.publisher(), UnderWay::default());
    while let Some(line) = lines.recv().await {
        let Line { number, bytes } = line.map_err(|error| format!("the events cannot be read further: {error}"))?;
        let message = Message::from_structured_json(bytes.clone().into(), &MessageLimits::DEFAULT);
        if under_way.must_end_before(&message) {
            broker.settled().await;
            under_way = UnderWay::default();
            under_way.must_end_before(&message);
        }
        let headers = [("content-type", "application/cloudevents+json".to_owned()), (LINE, number.to_string())];
        publisher.send_wire(Headers::from_iter(headers), bytes).await;
        report.published();
    }
    broker.settled().await;
    Ok(())
}

/// Events that may not have ended yet. Workers overtake each other, and of two lines with one id and other data the first
/// is to be the event: the second waits until the first has ended.
#[derive(Default)]
struct UnderWay(HashMap<EventKey, Fingerprint>);

impl UnderWay {
    /// Beyond this, all are waited for, so that the list stays bounded.
    const EVENTS_MAX: usize = 10_000;

    fn must_end_before(&mut self, message: &Message) -> bool {
        let attributes = &message.attributes;
        let (Some(source), Some(id)) = (&attributes.source, &attributes.id) else { return false };
        let data = Fingerprint::of(attributes.content_type.as_deref(), &message.data);
        let known = *self.0.entry(EventKey::of(CONSUMER, source, id)).or_insert(data);
        !known.agrees(data) || self.0.len() > Self::EVENTS_MAX
    }
}
