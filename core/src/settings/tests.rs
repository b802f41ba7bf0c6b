//! Settings read from text, files and the environment as they are documented.

use super::*;
use crate::fault::BuildError;

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn every_setting_has_its_name_in_the_list() {
    let text = serde_json::to_string(&Settings::default()).expect("settings serialise");
    let mut positions = Vec::new();
    for name in Settings::NAMES {
        positions.push(text.find(&format!("\"{name}\":")).unwrap_or_else(|| panic!("{name} is no field")));
    }
    assert!(positions.is_sorted(), "in the order of the fields");
    let fields = serde_json::from_str::<serde_json::Map<_, _>>(&text).expect("an object");
    assert_eq!(fields.len(), Settings::NAMES.len());
}

#[test]
fn what_was_written_reads_back_the_same() {
    let settings = Settings {
        order: Some(Order::PerKey),
        timeout: Some(Duration::from_millis(1_500)),
        retention: Duration::from_hours(24 * 30),
        body_max: 3 << 20,
        jitter: 0.1,
        ..Settings::default()
    };
    let text = serde_json::to_string(&settings).expect("settings serialise");
    assert_eq!(serde_json::from_str::<Settings>(&text).expect("and read back"), settings);
}

#[test]
fn durations_read_as_text_or_seconds_and_sizes_as_text_or_bytes() {
    let text = r#"{"lease":"1m 15s","hold":2,"delay":0.25,"timeout":"8d","delay_max":null,"order":"unordered",
        "in_flight_bytes_max":"64MiB","id_max":100}"#;
    let settings: Settings = serde_json::from_str(text).expect("settings");
    assert_eq!((settings.lease, settings.hold, settings.delay), (seconds(75), seconds(2), Duration::from_millis(250)));
    assert_eq!((settings.timeout, settings.delay_max), (Some(Duration::from_hours(192)), None));
    assert_eq!((settings.in_flight_bytes_max, settings.id_max), (64 << 20, 100));
    assert_eq!(settings.order, Some(Order::Unordered));
    for wrong in [r#"{"lease":"soon"}"#, r#"{"lease":-1}"#, r#"{"lease":"30"}"#, r#"{"body_max":"1Mb"}"#] {
        let error = serde_json::from_str::<Settings>(wrong).expect_err(wrong).to_string();
        assert!(error.contains("such as"), "{wrong}: {error}");
    }
}

#[test]
fn an_unknown_name_in_a_file_is_refused_with_the_known_ones() {
    let error = serde_json::from_str::<Settings>(r#"{"leese":"30s"}"#).expect_err("unknown").to_string();
    assert!(error.contains("leese") && error.contains("`lease`"), "{error}");
}

#[test]
fn the_environment_reads_as_settings_and_other_variables_are_left_alone() {
    let vars = [
        ("HAPAX_LEASE", "45s"),
        ("HAPAX_CONCURRENCY", "16"),
        ("HAPAX_ORDER", "per-key"),
        ("HAPAX_DELAY_MAX", "90"),
        ("HAPAX_JITTER", "0.5"),
        ("HAPAX_BODY_MAX", "2MiB"),
        ("HAPAXLEASE", "nonsense"),
        ("PATH", "/bin"),
    ];
    let expected = Settings {
        lease: seconds(45),
        concurrency: 16,
        order: Some(Order::PerKey),
        delay_max: Some(seconds(90)),
        jitter: 0.5,
        body_max: 2 << 20,
        ..Settings::default()
    };
    assert_eq!(Settings::from_vars("HAPAX", vars).expect("settings"), expected);
    assert_eq!(Settings::from_vars("OTHER", vars).expect("settings"), Settings::default());
}

#[test]
fn every_fault_of_the_environment_is_told_at_once_with_the_nearest_name() {
    let vars = [
        ("HAPAX_LEESE", "45s"),
        ("HAPAX_DATABASE_PASSWORD", "s3cret"),
        ("HAPAX_CONCURRENCY", "many"),
        ("HAPAX_JITTER", ""),
        ("HAPAX_HOLD", "inf"),
    ];
    let error = Settings::from_vars("HAPAX", vars).expect_err("faults");
    let codes: Vec<_> = error.faults.iter().map(|fault| fault.code).collect();
    let (invalid, unknown) = ("setting-invalid", "setting-unknown");
    assert_eq!(codes, [invalid, unknown, invalid, invalid, unknown]);
    let text = error.to_string();
    assert!(text.contains("HAPAX_LEESE is no setting; the nearest is HAPAX_LEASE"), "{text}");
    assert!(!text.contains("s3cret"), "the value of a foreign variable is not told: {text}");
}

#[test]
fn defaults_are_within_their_bounds_and_each_bound_is_told_with_its_setting() {
    assert_eq!(Settings::default().faults(), []);
    let absurd = Settings {
        concurrency: 0,
        in_flight_max: 0,
        in_flight_bytes_max: 0,
        batch_max: 0,
        lease: Duration::ZERO,
        timeout: Some(Duration::ZERO),
        attempts_max: 0,
        delay: Duration::from_hours(25),
        delay_factor: f32::NAN,
        delay_max: Some(Duration::ZERO),
        jitter: 1.5,
        retry_total_max: Some(Duration::ZERO),
        hold: Duration::MAX,
        crashes_max: 1_001,
        not_yet_max: Duration::MAX,
        retention: Duration::ZERO,
        switch_share: 0.0,
        switch_events_min: 0,
        switch_window: Duration::ZERO,
        switch_probe: Duration::ZERO,
        drain: Duration::MAX,
        call_timeout: Duration::ZERO,
        body_max: 0,
        headers_max: usize::MAX,
        header_bytes_max: usize::MAX,
        id_max: 0,
        json_depth_max: 128,
        error_text_max: usize::MAX,
        order: None,
    };
    let faults = BuildError { faults: absurd.faults() };
    for name in Settings::NAMES.iter().filter(|name| **name != "order") {
        let told = faults.faults.iter().any(|fault| fault.what.starts_with(&format!("{name} is ")));
        assert!(told, "{name} has no bound: {faults}");
    }
}
