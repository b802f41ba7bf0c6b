//! CloudEvents 1.0 on the wire: attribute names and the two content modes, in one place for all adapters.

use crate::message::Attributes;

/// Names and values of the attributes that are set, by their names in the specification.
pub fn attributes(attributes: &Attributes) -> impl Iterator<Item = (&'static str, &str)> {
    let a = attributes;
    [
        ("id", &a.id),
        ("source", &a.source),
        ("type", &a.ty),
        ("subject", &a.subject),
        ("time", &a.time),
        ("datacontenttype", &a.content_type),
        ("dataschema", &a.data_schema),
        ("correlationid", &a.correlation_id),
        ("causationid", &a.causation_id),
        ("partitionkey", &a.partition_key),
        ("sequence", &a.sequence),
        ("traceparent", &a.traceparent),
        ("tracestate", &a.tracestate),
    ]
    .into_iter()
    .filter_map(|(name, value)| value.as_deref().map(|value| (name, value)))
}
