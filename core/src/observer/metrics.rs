//! The metrics of the default observer: names, labels, and the handles that are looked up once.
//!
//! Every label's values come from a closed list, but for the consumer's name and the route, which is the type of an
//! event that has a handler and is bounded by [`ROUTES_MAX`] as well.

use std::array;
use std::fmt;
use std::sync::OnceLock;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, SharedString, Unit, with_recorder};

use super::{Duplicate, HandlerEnd, Observed, Side, Verb};
use crate::dead_letter::Reason;

/// Most routes with metrics of their own; further ones share the route `other`.
pub const ROUTES_MAX: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// Every metric: name, kind, unit where the name bears one, description.
pub(super) const ALL: [(&str, Kind, Option<Unit>, &str); 27] = {
    use Kind::{Counter, Gauge, Histogram};
    [
        ("hapax_deliveries_total", Counter, None, "Deliveries received, duplicates and redeliveries included"),
        ("hapax_delivered_bytes_total", Counter, None, "Bytes of the deliveries received"),
        ("hapax_ignored_total", Counter, None, "Deliveries acked by rule, without a handler"),
        ("hapax_handled_total", Counter, None, "Runs of handlers, by route and how they ended"),
        ("hapax_duplicates_total", Counter, None, "Duplicates, by what they are a duplicate of"),
        ("hapax_duplicate_age_seconds", Histogram, Some(Unit::Seconds), "How long ago a duplicate's event had ended"),
        ("hapax_retries_total", Counter, None, "Failures that lead to another attempt, by whether it counts"),
        (
            "hapax_retry_delay_seconds",
            Histogram,
            Some(Unit::Seconds),
            "How long a failed event waits for its next attempt",
        ),
        ("hapax_waits_total", Counter, None, "Waits for an event that another holds or that is not due yet"),
        ("hapax_dead_letters_total", Counter, None, "Messages set aside, by reason"),
        ("hapax_lease_takeovers_total", Counter, None, "Claims granted after another's lease had ended"),
        ("hapax_leases_lost_total", Counter, None, "Leases that ended while the event was handled here"),
        ("hapax_fenced_writes_total", Counter, None, "Writes refused because another holds the event"),
        ("hapax_records_vanished_total", Counter, None, "Records gone before their outcome was written"),
        ("hapax_conflicts_total", Counter, None, "Ids that came with other data"),
        ("hapax_batches_failed_total", Counter, None, "Batches that failed as a whole; their events ran one by one"),
        ("hapax_batch_size", Histogram, None, "Items in one call to store, broker or publisher"),
        ("hapax_call_seconds", Histogram, Some(Unit::Seconds), "Time of one call to store, broker or publisher"),
        ("hapax_handler_seconds", Histogram, Some(Unit::Seconds), "Time of one run of a handler, by route"),
        ("hapax_in_flight_events", Gauge, None, "Deliveries received and not settled"),
        ("hapax_in_flight_bytes", Gauge, Some(Unit::Bytes), "Their bytes"),
        ("hapax_lag_messages", Gauge, None, "Messages that wait at the broker, where it tells"),
        ("hapax_store_up", Gauge, None, "1 if the last call to the store was answered"),
        ("hapax_broker_up", Gauge, None, "1 if the last call to the broker was answered"),
        ("hapax_publisher_up", Gauge, None, "1 if the last call to the publisher was answered, where there is one"),
        ("hapax_switch_open", Gauge, None, "1 while the kill switch is open: intake pauses and probes"),
        ("hapax_switch_openings_total", Counter, None, "How often the kill switch opened"),
    ]
};

/// Tells the installed recorder what each metric means. Call it once, after installing the recorder.
pub fn describe() {
    with_recorder(|recorder| {
        for (name, kind, unit, text) in ALL {
            let (name, text) = (KeyName::from_const_str(name), SharedString::const_str(text));
            match kind {
                Kind::Counter => recorder.describe_counter(name, unit, text),
                Kind::Gauge => recorder.describe_gauge(name, unit, text),
                Kind::Histogram => recorder.describe_histogram(name, unit, text),
            }
        }
    });
}

/// Every handle, one field a metric.
pub(super) struct Instruments {
    register: Register,
    deliveries: Counter,
    delivered_bytes: Counter,
    ignored: Counter,
    routes: Routes,
    duplicates: [Counter; Duplicate::ALL.len()],
    duplicate_age: Histogram,
    retries: [Counter; 2],
    retry_delay: Histogram,
    waits: Counter,
    dead_letters: [Counter; Reason::ALL.len()],
    takeovers: Counter,
    leases_lost: Counter,
    fenced: Counter,
    vanished: Counter,
    conflicts: Counter,
    batches_failed: Counter,
    batch_size: [Histogram; Verb::ALL.len()],
    call: [[Histogram; 2]; Verb::ALL.len()],
    in_flight_events: Gauge,
    in_flight_bytes: Gauge,
    /// Registered when first told, since a 0 would be a lie where the broker does not tell.
    lag: OnceLock<Gauge>,
    store_up: Gauge,
    broker_up: Gauge,
    /// Registered when first told: most consumers publish nothing.
    publisher_up: OnceLock<Gauge>,
    switch_open: Gauge,
    switch_openings: Counter,
}

impl fmt::Debug for Instruments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instruments").field("register", &self.register).finish_non_exhaustive()
    }
}

impl Instruments {
    pub(super) fn new(consumer: &str) -> Self {
        let register = Register { consumer: consumer.to_owned().into() };
        let of = |name, label, value| register.counter(name, &[(label, value)]);
        Self {
            deliveries: register.counter("hapax_deliveries_total", &[]),
            delivered_bytes: register.counter("hapax_delivered_bytes_total", &[]),
            ignored: register.counter("hapax_ignored_total", &[]),
            routes: Routes::new(),
            duplicates: Duplicate::ALL.map(|kind| of("hapax_duplicates_total", "of", kind.as_str())),
            duplicate_age: register.histogram("hapax_duplicate_age_seconds", &[]),
            retries: FALSE_TRUE.map(|counted| of("hapax_retries_total", "counted", counted)),
            retry_delay: register.histogram("hapax_retry_delay_seconds", &[]),
            waits: register.counter("hapax_waits_total", &[]),
            dead_letters: Reason::ALL.map(|reason| of("hapax_dead_letters_total", "reason", reason.as_str())),
            takeovers: register.counter("hapax_lease_takeovers_total", &[]),
            leases_lost: register.counter("hapax_leases_lost_total", &[]),
            fenced: register.counter("hapax_fenced_writes_total", &[]),
            vanished: register.counter("hapax_records_vanished_total", &[]),
            conflicts: register.counter("hapax_conflicts_total", &[]),
            batches_failed: register.counter("hapax_batches_failed_total", &[]),
            batch_size: Verb::ALL.map(|verb| register.histogram("hapax_batch_size", &[("verb", verb.as_str())])),
            call: Verb::ALL.map(|verb| {
                FALSE_TRUE.map(|ok| register.histogram("hapax_call_seconds", &[("verb", verb.as_str()), ("ok", ok)]))
            }),
            in_flight_events: register.gauge("hapax_in_flight_events"),
            in_flight_bytes: register.gauge("hapax_in_flight_bytes"),
            lag: OnceLock::new(),
            store_up: register.gauge("hapax_store_up"),
            broker_up: register.gauge("hapax_broker_up"),
            publisher_up: OnceLock::new(),
            switch_open: register.gauge("hapax_switch_open"),
            switch_openings: register.counter("hapax_switch_openings_total", &[]),
            register,
        }
    }

    pub(super) fn observe(&self, what: &Observed<'_>) {
        match *what {
            Observed::Received { events, bytes } => {
                self.deliveries.increment(events as u64);
                self.delivered_bytes.increment(bytes as u64);
            }
            Observed::Ignored => self.ignored.increment(1),
            Observed::Called { verb, batch, took, ok } => {
                self.batch_size[verb as usize].record(batch as f64);
                self.call[verb as usize][usize::from(ok)].record(took);
            }
            Observed::TakenOver => self.takeovers.increment(1),
            Observed::Duplicate { of, ago } => {
                self.duplicates[of as usize].increment(1);
                if let Some(ago) = ago {
                    self.duplicate_age.record(ago);
                }
            }
            Observed::Handled { route, end, took } => self.routes.handled(&self.register, route, end, took),
            Observed::Retried { after, counted } => {
                self.retries[usize::from(counted)].increment(1);
                self.retry_delay.record(after);
            }
            Observed::Waiting { .. } => self.waits.increment(1),
            Observed::DeadLettered { reason, .. } => self.dead_letters[reason as usize].increment(1),
            Observed::LeaseLost => self.leases_lost.increment(1),
            Observed::Fenced => self.fenced.increment(1),
            Observed::Vanished => self.vanished.increment(1),
            Observed::Conflict => self.conflicts.increment(1),
            Observed::BatchFailed { .. } => self.batches_failed.increment(1),
            Observed::InFlight { events, bytes } => {
                self.in_flight_events.set(events as f64);
                self.in_flight_bytes.set(bytes as f64);
            }
            Observed::Lag { messages } => {
                self.lag.get_or_init(|| self.register.gauge("hapax_lag_messages")).set(messages as f64);
            }
            Observed::Reach { side, up, .. } => self.reach(side).set(f64::from(u8::from(up))),
            Observed::Switch { open } => {
                self.switch_open.set(f64::from(u8::from(open)));
                self.switch_openings.increment(u64::from(open));
            }
        }
    }

    fn reach(&self, side: Side) -> &Gauge {
        match side {
            Side::Store => &self.store_up,
            Side::Broker => &self.broker_up,
            Side::Publisher => self.publisher_up.get_or_init(|| self.register.gauge("hapax_publisher_up")),
        }
    }
}

const FALSE_TRUE: [&str; 2] = ["false", "true"];

/// Makes handles that all bear the consumer's name.
#[derive(Debug)]
struct Register {
    consumer: SharedString,
}

impl Register {
    fn counter(&self, name: &'static str, labels: &[(&'static str, &'static str)]) -> Counter {
        with_recorder(|recorder| recorder.register_counter(&self.key(name, labels), &METADATA))
    }

    fn gauge(&self, name: &'static str) -> Gauge {
        with_recorder(|recorder| recorder.register_gauge(&self.key(name, &[]), &METADATA))
    }

    fn histogram(&self, name: &'static str, labels: &[(&'static str, &'static str)]) -> Histogram {
        with_recorder(|recorder| recorder.register_histogram(&self.key(name, labels), &METADATA))
    }

    fn key(&self, name: &'static str, labels: &[(&'static str, &'static str)]) -> Key {
        let consumer = Label::new("consumer", self.consumer.clone());
        let further = labels.iter().map(|(label, value)| Label::from_static_parts(label, value));
        Key::from_parts(name, std::iter::once(consumer).chain(further).collect::<Vec<_>>())
    }
}

static METADATA: Metadata<'static> = Metadata::new("hapax", Level::INFO, Some(module_path!()));

/// The handles of each route: found by a short walk without a lock, registered when a route is first seen.
struct Routes {
    slots: Box<[OnceLock<Route>]>,
    other: OnceLock<Route>,
}

struct Route {
    name: &'static str,
    ends: [Counter; HandlerEnd::ALL.len()],
    seconds: Histogram,
}

impl Routes {
    fn new() -> Self {
        Self { slots: (0..ROUTES_MAX).map(|_| OnceLock::new()).collect(), other: OnceLock::new() }
    }

    fn handled(&self, register: &Register, name: &'static str, end: HandlerEnd, took: Duration) {
        let route = self.find(register, name);
        route.ends[end as usize].increment(1);
        route.seconds.record(took);
    }

    fn find(&self, register: &Register, name: &'static str) -> &Route {
        for slot in &self.slots {
            // Another thread may fill the free slot first, with another route: then walk on.
            let route = slot.get_or_init(|| Route::new(register, name));
            if std::ptr::eq(route.name, name) || route.name == name {
                return route;
            }
        }
        self.other.get_or_init(|| Route::new(register, "other"))
    }
}

impl Route {
    fn new(register: &Register, name: &'static str) -> Self {
        Self {
            name,
            ends: array::from_fn(|end| {
                let end = HandlerEnd::ALL[end].as_str();
                register.counter("hapax_handled_total", &[("route", name), ("end", end)])
            }),
            seconds: register.histogram("hapax_handler_seconds", &[("route", name)]),
        }
    }
}
