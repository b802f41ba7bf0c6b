//! Levels and windows for every combination of broker, store and handler.

use std::time::Duration;

use super::windows::{Facts, compute};
use super::*;
use crate::broker::{BrokerOrder, Capabilities, Durability};
use crate::event::{Effects, RouteInfo};
use crate::fault::Fault;
use crate::retry::RetryPolicy;
use crate::settings::{Order, Settings};
use crate::store::StoreHealth;

const DAY: Duration = Duration::from_hours(24);
const DURABILITIES: [Durability; 3] = [Durability::Process, Durability::Lossy, Durability::Durable];

struct Case {
    capabilities: Capabilities,
    health: StoreHealth,
    settings: Settings,
    order: Order,
    route: RouteInfo,
}

impl Case {
    fn new(broker: Durability, store: Durability, transactional: bool, effects: Effects) -> Self {
        let mut capabilities = Capabilities::none("broker");
        capabilities.durability = broker;
        capabilities.redelivery_horizon = Some(7 * DAY);
        capabilities.dead_letter_in_one_step = true;
        let retry = Some(RetryPolicy::default());
        let timeout = Some(Settings::TIMEOUT);
        let route = RouteInfo { event: Some(("paid", 1)), transactional, batched: false, effects, timeout, retry };
        let health = StoreHealth::new("store", "1", store);
        Self { capabilities, health, settings: Settings::default(), order: Order::Unordered, route }
    }

    fn durable(transactional: bool, effects: Effects) -> Self {
        Self::new(Durability::Durable, Durability::Durable, transactional, effects)
    }

    fn compute(&self, allowed: &[Window]) -> (Guarantee, Vec<Fault>) {
        let facts = Facts {
            consumer: "billing",
            capabilities: &self.capabilities,
            health: &self.health,
            settings: &self.settings,
            order: self.order,
            routes: std::slice::from_ref(&self.route),
            notes: Vec::new(),
        };
        compute(facts, allowed)
    }

    fn windows(&self) -> Vec<Window> {
        let (guarantee, _) = self.compute(&[]);
        Window::ALL.into_iter().filter(|window| guarantee.is_open(*window)).collect()
    }

    fn codes(&self, allowed: &[Window]) -> Vec<&'static str> {
        self.compute(allowed).1.into_iter().map(|fault| fault.code).collect()
    }
}

#[test]
fn every_mode_has_its_declared_level() {
    let keyed = Effects::keyed(30 * DAY);
    for broker in DURABILITIES {
        for store in DURABILITIES {
            let is_short = store == Durability::Process && broker > Durability::Process;
            for (transactional, effects, own) in [
                (false, Effects::Undeclared, Level::Deduplicated),
                (false, keyed, Level::EffectivelyOnce),
                (true, Effects::Undeclared, Level::ExactlyOnceEffect),
                (true, keyed, Level::ExactlyOnceEffect),
            ] {
                let expected = if is_short { Level::AtLeastOnce } else { own };
                let (guarantee, _) = Case::new(broker, store, transactional, effects).compute(&[]);
                assert_eq!(guarantee.level(), expected, "{broker:?} {store:?} {transactional} {effects:?}");
                assert_eq!(guarantee.handler("paid").map(|handler| handler.level), Some(expected));
            }
        }
    }
}

#[test]
fn mark_before_is_never_default() {
    for broker in DURABILITIES {
        for store in DURABILITIES {
            for transactional in [false, true] {
                for evicts in [false, true] {
                    let mut case = Case::new(broker, store, transactional, Effects::Undeclared);
                    case.health.evicts = evicts;
                    assert!(case.compute(&[]).0.level() > Level::AtMostOnce);
                }
            }
        }
    }
}

#[test]
fn a_consumer_is_as_good_as_its_lowest_handler() {
    let keyed = Case::durable(false, Effects::keyed(30 * DAY)).compute(&[]).0;
    let plain = Case::durable(false, Effects::Undeclared).compute(&[]).0;
    let both = Guarantee { handlers: [keyed.handlers, plain.handlers].concat(), ..keyed };
    assert_eq!(both.level(), Level::Deduplicated);
}

#[test]
fn a_transactional_handler_has_no_window_of_its_own_and_a_plain_one_declares_three() {
    assert_eq!(Case::durable(true, Effects::Undeclared).windows(), [Window::ProducerTwice]);
    assert_eq!(
        Case::durable(false, Effects::Undeclared).windows(),
        [Window::CrashAfterEffect, Window::LeaseLost, Window::FailedHalfway, Window::ProducerTwice]
    );
    assert_eq!(Case::durable(false, Effects::Undeclared).codes(&[]), [""; 0]);
}

#[test]
fn keys_that_outlive_redelivery_close_every_window_of_the_handler() {
    assert_eq!(Case::durable(false, Effects::keyed(7 * DAY)).windows(), [Window::ProducerTwice]);
}

#[test]
fn keys_shorter_than_redelivery_are_declared_and_shorter_than_the_attempts_refused() {
    let day = Case::durable(false, Effects::keyed(DAY));
    assert!(day.windows().contains(&Window::KeyForgotten));
    assert_eq!(day.codes(&[]), [""; 0]);
    let minute = Case::durable(false, Effects::keyed(Duration::from_secs(60)));
    assert_eq!(minute.codes(&[]), ["key-forgotten"]);
    assert_eq!(minute.codes(&[Window::KeyForgotten]), [""; 0]);
    let mut unbounded = Case::durable(false, Effects::keyed(365 * DAY));
    unbounded.capabilities.redelivery_horizon = None;
    assert!(unbounded.windows().contains(&Window::KeyForgotten));
}

#[test]
fn retention_shorter_than_redelivery_is_refused_unless_it_is_allowed_and_stays_listed() {
    let mut case = Case::durable(true, Effects::Undeclared);
    case.settings.retention = 6 * DAY;
    assert_eq!(case.codes(&[]), ["retention-lt-horizon"]);
    assert_eq!(case.codes(&[Window::Forgotten]), [""; 0]);
    assert!(case.compute(&[Window::Forgotten]).0.is_open(Window::Forgotten));
    case.capabilities.redelivery_horizon = None;
    assert_eq!((case.codes(&[]), case.windows().contains(&Window::Forgotten)), (vec![], true), "only declared");
}

#[test]
fn what_a_store_may_lose_is_told() {
    let mut case = Case::durable(true, Effects::Undeclared);
    case.health.durability = Durability::Lossy;
    case.health.loses_on_failover = true;
    let windows = case.windows();
    assert!(windows.contains(&Window::LastSecond) && windows.contains(&Window::Failover), "{windows:?}");
    assert_eq!(case.codes(&[]), [""; 0]);
    case.health.evicts = true;
    assert_eq!(case.codes(&[]), ["store-evicts"]);
    assert_eq!(case.codes(&[Window::StoreLoss]), [""; 0]);
}

#[test]
fn order_over_competing_consumers_is_refused_unless_it_is_allowed() {
    let mut case = Case::durable(true, Effects::Undeclared);
    case.order = Order::PerKey;
    assert_eq!(case.codes(&[]), ["order-not-kept"]);
    assert_eq!(case.codes(&[Window::Overtaken]), [""; 0]);
    case.capabilities.order = BrokerOrder::Key;
    assert_eq!(case.codes(&[]), [""; 0]);
    assert_eq!(case.windows(), [Window::DeadLetterOvertaken, Window::ProducerTwice]);
}

#[test]
fn a_broker_that_counts_must_count_further_than_the_attempts() {
    let mut case = Case::durable(true, Effects::Undeclared);
    case.capabilities.deliveries_max = Some(12);
    assert_eq!(case.codes(&[]), ["broker-deliveries-max"], "10 attempts and 3 crashes need 13");
    assert_eq!(case.codes(&[Window::BrokerLimit]), [""; 0]);
    case.capabilities.deliveries_max = Some(13);
    assert_eq!((case.codes(&[]), case.windows().contains(&Window::BrokerLimit)), (vec![], true), "only declared");
}

#[test]
fn two_steps_to_a_dead_letter_can_place_it_twice() {
    let mut case = Case::durable(true, Effects::Undeclared);
    case.capabilities.dead_letter_in_one_step = false;
    assert!(case.windows().contains(&Window::DeadLetterTwice));
}

#[test]
fn the_report_names_consumer_level_handler_and_windows_and_serialises() {
    let (guarantee, _) = Case::durable(false, Effects::Undeclared).compute(&[]);
    let text = guarantee.to_string();
    for part in ["billing: Deduplicated (L2) over broker and store", "handler paid", "window CrashAfterEffect"] {
        assert!(text.contains(part), "{text}");
    }
    let json = serde_json::to_value(&guarantee).expect("it serialises");
    assert_eq!(json["handlers"][0]["level"], "Deduplicated");
    assert_eq!(json["handlers"][0]["windows"][0]["window"], "CrashAfterEffect");
}

#[test]
fn every_window_has_a_section_in_the_docs() {
    let docs = include_str!("../../../docs/guarantees.md");
    for window in Window::ALL {
        let heading = format!("\n### `{window}`\n");
        let (_, text) = docs.split_once(&heading).unwrap_or_else(|| panic!("{window} has no section"));
        let section = text.split("\n### ").next().unwrap_or_default();
        for part in ["**When**", "**What happens**", "**Closed by**"] {
            assert!(section.contains(part), "{window} lacks {part}");
        }
        assert!(window.as_str().chars().all(|c| c == '-' || c.is_ascii_lowercase()));
        assert!(!window.what().is_empty() && !window.closed_by().is_empty());
    }
    let sections = docs.matches("\n### `").count();
    assert_eq!(sections, Window::ALL.len(), "no section without a window");
}
