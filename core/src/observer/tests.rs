//! The default observer against a recorder of our own: every metric, its labels, and that no id becomes one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit,
    with_local_recorder,
};

use super::metrics::{ALL, Kind, ROUTES_MAX};
use super::*;

const CANARY: &str = "canary-4711";

/// Every series with its value: the sum of what was counted, set or recorded.
#[derive(Clone, Default)]
struct Ledger(Arc<Mutex<Book>>);

#[derive(Default)]
struct Book {
    series: BTreeMap<String, f64>,
    kinds: BTreeMap<String, Kind>,
    labels: Vec<(String, String)>,
    described: Vec<String>,
}

impl Ledger {
    fn get(&self, series: &str) -> Option<f64> {
        self.0.lock().unwrap().series.get(series).copied()
    }

    fn open(&self, key: &Key, kind: Kind) -> Arc<Line> {
        let mut book = self.0.lock().unwrap();
        let labels: Vec<_> = key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        let series = format!("{}{{{}}}", key.name(), labels.join(","));
        book.labels.extend(key.labels().map(|label| (label.key().to_owned(), label.value().to_owned())));
        book.kinds.insert(key.name().to_owned(), kind);
        book.series.entry(series.clone()).or_default();
        Arc::new(Line { ledger: self.clone(), series })
    }
}

struct Line {
    ledger: Ledger,
    series: String,
}

impl Line {
    fn change(&self, with: impl FnOnce(&mut f64)) {
        with(self.ledger.0.lock().unwrap().series.get_mut(&self.series).unwrap());
    }
}

impl CounterFn for Line {
    fn increment(&self, value: u64) {
        self.change(|sum| *sum += value as f64);
    }
    fn absolute(&self, _: u64) {
        unreachable!("counters only grow");
    }
}

impl GaugeFn for Line {
    fn increment(&self, value: f64) {
        self.change(|sum| *sum += value);
    }
    fn decrement(&self, value: f64) {
        self.change(|sum| *sum -= value);
    }
    fn set(&self, value: f64) {
        self.change(|sum| *sum = value);
    }
}

impl HistogramFn for Line {
    fn record(&self, value: f64) {
        self.change(|sum| *sum += value);
    }
}

impl Recorder for Ledger {
    fn describe_counter(&self, key: KeyName, _: Option<Unit>, _: SharedString) {
        self.0.lock().unwrap().described.push(key.as_str().to_owned());
    }
    fn describe_gauge(&self, key: KeyName, _: Option<Unit>, _: SharedString) {
        self.0.lock().unwrap().described.push(key.as_str().to_owned());
    }
    fn describe_histogram(&self, key: KeyName, _: Option<Unit>, _: SharedString) {
        self.0.lock().unwrap().described.push(key.as_str().to_owned());
    }
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.open(key, Kind::Counter))
    }
    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.open(key, Kind::Gauge))
    }
    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.open(key, Kind::Histogram))
    }
}

/// One of everything that can happen, with a canary wherever free text can be.
fn everything() -> Vec<Observed<'static>> {
    let took = Duration::from_millis(250);
    let mut all = vec![
        Observed::Received { events: 3, bytes: 700 },
        Observed::Ignored,
        Observed::TakenOver,
        Observed::Duplicate { of: Duplicate::Processed, ago: Some(Duration::from_secs(8)) },
        Observed::Duplicate { of: Duplicate::Held, ago: None },
        Observed::Duplicate { of: Duplicate::DeadLettered, ago: None },
        Observed::Retried { after: Duration::from_secs(2), counted: true },
        Observed::Retried { after: Duration::ZERO, counted: false },
        Observed::Waiting { wait: Duration::ZERO },
        Observed::LeaseLost,
        Observed::Fenced,
        Observed::Vanished,
        Observed::Conflict,
        Observed::BatchFailed { route: "order.placed", events: 5, error: CANARY },
        Observed::InFlight { events: 5, bytes: 900 },
        Observed::Lag { messages: 42 },
        Observed::Switch { open: true },
        Observed::Switch { open: false },
    ];
    all.extend(Verb::ALL.map(|verb| Observed::Called { verb, batch: 7, took, ok: true }));
    all.extend(HandlerEnd::ALL.map(|end| Observed::Handled { route: "order.placed", end, took }));
    all.extend(Reason::ALL.map(|reason| Observed::DeadLettered { reason, id: CANARY, error: CANARY }));
    all.extend([Side::Store, Side::Broker, Side::Publisher].map(|side| Observed::Reach {
        side,
        up: true,
        error: CANARY,
    }));
    all
}

fn told(ledger: &Ledger, all: &[Observed<'_>]) {
    with_local_recorder(ledger, || {
        let telemetry = Telemetry::new("billing");
        for what in all {
            telemetry.observe(what);
        }
    });
}

#[test]
fn every_metric_is_counted_under_its_name_and_labels() {
    let ledger = Ledger::default();
    told(&ledger, &everything());
    for (series, value) in [
        ("hapax_deliveries_total{consumer=billing}", 3.0),
        ("hapax_delivered_bytes_total{consumer=billing}", 700.0),
        ("hapax_ignored_total{consumer=billing}", 1.0),
        ("hapax_handled_total{consumer=billing,route=order.placed,end=ok}", 1.0),
        ("hapax_handled_total{consumer=billing,route=order.placed,end=timed-out}", 1.0),
        ("hapax_handler_seconds{consumer=billing,route=order.placed}", 2.0),
        ("hapax_duplicates_total{consumer=billing,of=processed}", 1.0),
        ("hapax_duplicates_total{consumer=billing,of=held}", 1.0),
        ("hapax_duplicate_age_seconds{consumer=billing}", 8.0),
        ("hapax_retries_total{consumer=billing,counted=true}", 1.0),
        ("hapax_retries_total{consumer=billing,counted=false}", 1.0),
        ("hapax_retry_delay_seconds{consumer=billing}", 2.0),
        ("hapax_dead_letters_total{consumer=billing,reason=conflict}", 1.0),
        ("hapax_lease_takeovers_total{consumer=billing}", 1.0),
        ("hapax_waits_total{consumer=billing}", 1.0),
        ("hapax_leases_lost_total{consumer=billing}", 1.0),
        ("hapax_fenced_writes_total{consumer=billing}", 1.0),
        ("hapax_records_vanished_total{consumer=billing}", 1.0),
        ("hapax_conflicts_total{consumer=billing}", 1.0),
        ("hapax_batches_failed_total{consumer=billing}", 1.0),
        ("hapax_batch_size{consumer=billing,verb=claim}", 7.0),
        ("hapax_call_seconds{consumer=billing,verb=settle,ok=true}", 0.25),
        ("hapax_call_seconds{consumer=billing,verb=settle,ok=false}", 0.0),
        ("hapax_in_flight_events{consumer=billing}", 5.0),
        ("hapax_in_flight_bytes{consumer=billing}", 900.0),
        ("hapax_lag_messages{consumer=billing}", 42.0),
        ("hapax_store_up{consumer=billing}", 1.0),
        ("hapax_broker_up{consumer=billing}", 1.0),
        ("hapax_publisher_up{consumer=billing}", 1.0),
        ("hapax_switch_open{consumer=billing}", 0.0),
        ("hapax_switch_openings_total{consumer=billing}", 1.0),
    ] {
        assert_eq!(ledger.get(series), Some(value), "{series}");
    }
    let book = ledger.0.lock().unwrap();
    let listed: BTreeMap<_, _> = ALL.iter().map(|(name, kind, ..)| ((*name).to_owned(), *kind)).collect();
    assert_eq!(book.kinds, listed, "the list of metrics is the list that is registered");
}

#[test]
fn no_label_ever_holds_an_id_or_an_error_text() {
    let ledger = Ledger::default();
    told(&ledger, &everything());
    let book = ledger.0.lock().unwrap();
    for (label, value) in &book.labels {
        let allowed = match label.as_str() {
            "consumer" => value == "billing",
            "route" => value == "order.placed",
            "verb" => Verb::ALL.iter().any(|word| word.as_str() == value),
            "of" => Duplicate::ALL.iter().any(|word| word.as_str() == value),
            "end" => HandlerEnd::ALL.iter().any(|word| word.as_str() == value),
            "reason" => Reason::ALL.iter().any(|word| word.as_str() == value),
            "ok" | "counted" => value == "true" || value == "false",
            _ => false,
        };
        assert!(allowed, "{label}={value} is not from a closed list");
    }
    assert!(!book.series.keys().any(|series| series.contains(CANARY)));
}

#[test]
fn series_exist_from_the_start_so_that_the_first_fault_is_an_increase() {
    let ledger = Ledger::default();
    told(&ledger, &[]);
    assert_eq!(ledger.get("hapax_dead_letters_total{consumer=billing,reason=permanent}"), Some(0.0));
    assert_eq!(ledger.get("hapax_lag_messages{consumer=billing}"), None, "unknown is not nothing");
}

#[test]
fn handles_are_registered_once_and_not_looked_up_for_each_event() {
    let ledger = Ledger::default();
    with_local_recorder(&ledger, || {
        let telemetry = Telemetry::new("billing");
        for what in everything() {
            telemetry.observe(&what);
        }
        let registered = ledger.0.lock().unwrap().labels.len();
        for what in everything() {
            telemetry.observe(&what);
        }
        assert_eq!(ledger.0.lock().unwrap().labels.len(), registered);
    });
}

#[test]
fn routes_beyond_the_bound_share_one() {
    let ledger = Ledger::default();
    let handled = |route| Observed::Handled { route, end: HandlerEnd::Ok, took: Duration::ZERO };
    let names: Vec<&'static str> =
        (0..ROUTES_MAX + 2).map(|n| &*Box::leak(format!("type{n}").into_boxed_str())).collect();
    told(&ledger, &names.iter().map(|route| handled(route)).collect::<Vec<_>>());
    assert_eq!(ledger.get("hapax_handled_total{consumer=billing,route=type63,end=ok}"), Some(1.0));
    assert_eq!(ledger.get("hapax_handled_total{consumer=billing,route=type64,end=ok}"), None);
    assert_eq!(ledger.get("hapax_handled_total{consumer=billing,route=other,end=ok}"), Some(2.0));
}

#[test]
fn every_metric_is_described_and_stands_in_the_docs() {
    let ledger = Ledger::default();
    with_local_recorder(&ledger, describe);
    let described = ledger.0.lock().unwrap().described.clone();
    let docs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let page = std::fs::read_to_string(docs.join("metrics.md")).expect("docs/metrics.md");
    let alerts = std::fs::read_to_string(docs.join("alerts.yml")).expect("docs/alerts.yml");
    for (name, ..) in ALL {
        assert!(described.iter().any(|other| other == name), "{name} is not described");
        assert!(page.contains(&format!("`{name}`")), "{name} is missing in docs/metrics.md");
    }
    for word in alerts.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|w| w.starts_with("hapax_")) {
        let name = word.trim_end_matches("_sum").trim_end_matches("_count").trim_end_matches("_bucket");
        assert!(ALL.iter().any(|(known, ..)| *known == name), "docs/alerts.yml names {word}, which is no metric");
    }
}

/// The lines that are logged, each as `LEVEL field=value ..`.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Lines {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "hapax"
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = event.metadata().level().to_string();
        event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            line.push_str(&format!(" {field}={value:?}"));
        });
        self.0.lock().unwrap().push(line);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

fn logged(all: &[Observed<'_>]) -> Vec<String> {
    let lines = Lines::default();
    tracing::subscriber::with_default(lines.clone(), || {
        let telemetry = Telemetry::new("billing");
        all.iter().for_each(|what| telemetry.observe(what));
    });
    std::mem::take(&mut lines.0.lock().unwrap())
}

#[test]
fn an_event_that_succeeds_logs_nothing() {
    let took = Duration::from_millis(1);
    let life = [
        Observed::Received { events: 1, bytes: 10 },
        Observed::Called { verb: Verb::Claim, batch: 1, took, ok: true },
        Observed::Handled { route: "order.placed", end: HandlerEnd::Ok, took },
        Observed::Called { verb: Verb::Settle, batch: 1, took, ok: true },
        Observed::Duplicate { of: Duplicate::Processed, ago: Some(took) },
        Observed::InFlight { events: 0, bytes: 0 },
    ];
    assert_eq!(logged(&life), Vec::<String>::new());
}

#[test]
fn a_dead_letter_is_logged_with_what_a_search_needs() {
    let lines = logged(&[Observed::DeadLettered { reason: Reason::Permanent, id: CANARY, error: "no such card" }]);
    assert_eq!(lines.len(), 1);
    for part in ["WARN", "consumer=\"billing\"", "reason=\"permanent\"", CANARY, "no such card"] {
        assert!(lines[0].contains(part), "{part} is missing in {}", lines[0]);
    }
}

#[test]
fn a_lost_connection_is_logged_without_its_credentials_and_a_regained_one_as_information() {
    let error = "connect redis://user:canary-4711@cache failed";
    let lines = logged(&[
        Observed::Reach { side: Side::Store, up: false, error },
        Observed::Reach { side: Side::Store, up: true, error: "" },
    ]);
    assert!(lines[0].starts_with("WARN") && lines[0].contains("redis://***@cache"), "{}", lines[0]);
    assert!(!lines[0].contains(CANARY));
    assert!(lines[1].starts_with("INFO"), "{}", lines[1]);
}

#[test]
fn words_and_indices_of_labels_agree() {
    assert!(Verb::ALL.iter().enumerate().all(|(at, word)| *word as usize == at));
    assert!(Duplicate::ALL.iter().enumerate().all(|(at, word)| *word as usize == at));
    assert!(HandlerEnd::ALL.iter().enumerate().all(|(at, word)| *word as usize == at));
    assert!(Reason::ALL.iter().enumerate().all(|(at, word)| *word as usize == at));
}

#[test]
fn observers_compose_in_order() {
    let (first, second, third) = (counting(), counting(), counting());
    let tell = |seen: &Arc<AtomicUsize>| {
        let seen = Arc::clone(seen);
        move |_: &Observed<'_>| {
            seen.fetch_add(1, Ordering::SeqCst);
        }
    };
    let many: Vec<Arc<dyn Observer>> = vec![Arc::new(tell(&second)), Arc::new((tell(&third), ()))];
    let all: Arc<dyn Observer> = Arc::new((tell(&first), many));
    all.observe(&Observed::Ignored);
    assert_eq!([first, second, third].map(|seen| seen.load(Ordering::SeqCst)), [1, 1, 1]);
}

fn counting() -> Arc<AtomicUsize> {
    Arc::default()
}
