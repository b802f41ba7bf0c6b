//! The calculation: levels and open windows from capabilities, health, settings and handlers. Pure.
//!
//! A window that contradicts what was asked for carries the fault that refuses it; the builder raises it unless the
//! window is allowed by name.

use std::time::Duration;

use super::{Guarantee, HandlerGuarantee, Level, OpenWindow, Window};
use crate::broker::{BrokerOrder, Capabilities, Durability};
use crate::event::{Effects, RouteInfo};
use crate::fault::Fault;
use crate::retry::RetryPolicy;
use crate::settings::{Order, Settings};
use crate::store::StoreHealth;

/// What is known when a consumer is built, with every open choice made.
pub(crate) struct Facts<'a> {
    pub(crate) consumer: &'a str,
    pub(crate) capabilities: &'a Capabilities,
    pub(crate) health: &'a StoreHealth,
    pub(crate) settings: &'a Settings,
    pub(crate) order: Order,
    /// With the timeout and the retry policy that hold for each.
    pub(crate) routes: &'a [RouteInfo],
    pub(crate) notes: Vec<String>,
}

/// A window that is open, for whom, and the fault that refuses it if it must be allowed by name.
pub(crate) struct Finding {
    route: Option<usize>,
    open: OpenWindow,
    refused: Option<Fault>,
}

/// What holds, and what must be allowed by name.
pub(crate) fn compute(facts: Facts<'_>, allowed: &[Window]) -> (Guarantee, Vec<Fault>) {
    let mut findings = store(&facts);
    findings.extend(broker(&facts));
    findings.push(finding(Window::ProducerTwice, "ids are the producers' own, and nobody here can tell"));
    for (number, route) in facts.routes.iter().enumerate() {
        findings.extend(handler(&facts, route).into_iter().map(|found| Finding { route: Some(number), ..found }));
    }
    let mut refused = Vec::new();
    let (mut common, mut own): (Vec<_>, Vec<Vec<_>>) = (Vec::new(), facts.routes.iter().map(|_| Vec::new()).collect());
    for found in findings {
        if let Some(fault) = found.refused.filter(|_| !allowed.contains(&found.open.window)) {
            refused.push(fault);
        }
        match found.route {
            Some(number) => own[number].push(found.open),
            None => common.push(found.open),
        }
    }
    let handlers = facts.routes.iter().zip(own).map(|(route, windows)| HandlerGuarantee {
        route: route.name(),
        level: level(&facts, route),
        windows,
    });
    let guarantee = Guarantee {
        consumer: facts.consumer.to_owned(),
        broker: facts.capabilities.name,
        store: facts.health.name,
        handlers: handlers.collect(),
        windows: common,
        notes: facts.notes,
    };
    (guarantee, refused)
}

/// No combination is [`Level::AtMostOnce`]: nothing here is marked before it ran.
fn level(facts: &Facts<'_>, route: &RouteInfo) -> Level {
    if dies_before_the_broker(facts) {
        Level::AtLeastOnce
    } else if route.transactional {
        Level::ExactlyOnceEffect
    } else if matches!(route.effects, Effects::Keyed(_)) {
        Level::EffectivelyOnce
    } else {
        Level::Deduplicated
    }
}

/// The store forgets with its process what the broker still knows.
fn dies_before_the_broker(facts: &Facts<'_>) -> bool {
    facts.health.durability == Durability::Process && facts.capabilities.durability > Durability::Process
}

fn finding(window: Window, why: impl Into<String>) -> Finding {
    Finding { route: None, open: OpenWindow { window, why: why.into() }, refused: None }
}

impl Finding {
    fn refused(self, fault: Fault) -> Self {
        Self { refused: Some(fault), ..self }
    }
}

fn store(facts: &Facts<'_>) -> Vec<Finding> {
    let (health, capabilities, settings) = (facts.health, facts.capabilities, facts.settings);
    let mut findings = Vec::new();
    if dies_before_the_broker(facts) {
        let why = format!(
            "{} keeps records as long as its process, {} keeps messages longer",
            health.name, capabilities.name
        );
        findings.push(finding(Window::StoreLoss, why));
    }
    if health.evicts {
        let why = format!("{} may drop records to make room", health.name);
        findings.push(finding(Window::StoreLoss, why.clone()).refused(Fault::new(
            "store-evicts",
            why,
            "an event whose record was dropped runs again, at any time and unseen",
            "set the store to refuse writes when it is full (Redis: maxmemory-policy noeviction), or \
             .allow(Window::StoreLoss)",
        )));
    }
    if health.durability == Durability::Lossy && capabilities.durability == Durability::Durable {
        findings.push(finding(Window::LastSecond, format!("{} answers before it wrote through", health.name)));
    }
    if health.loses_on_failover {
        findings.push(finding(Window::Failover, format!("{} answers before its replicas confirmed", health.name)));
    }
    match capabilities.redelivery_horizon {
        None => findings.push(finding(
            Window::Forgotten,
            format!(
                "{} has no bound on how late it delivers again; records are kept {}",
                capabilities.name,
                text(settings.retention)
            ),
        )),
        Some(horizon) if settings.retention < horizon => {
            let why = format!(
                "retention is {}, but {} can deliver again for {}",
                text(settings.retention),
                capabilities.name,
                text(horizon)
            );
            findings.push(finding(Window::Forgotten, why.clone()).refused(Fault::new(
                "retention-lt-horizon",
                why,
                "an event that comes back after its record was swept runs again as if it were new",
                format!(".retention({}) or longer, or .allow(Window::Forgotten)", code(horizon)),
            )));
        }
        Some(_) => {}
    }
    findings
}

fn broker(facts: &Facts<'_>) -> Vec<Finding> {
    let (capabilities, settings) = (facts.capabilities, facts.settings);
    let mut findings = Vec::new();
    if facts.order == Order::PerKey {
        if capabilities.order == BrokerOrder::None {
            let why = format!("order is per key, but {} hands one key to several consumers at once", capabilities.name);
            findings.push(finding(Window::Overtaken, why.clone()).refused(Fault::new(
                "order-not-kept",
                why,
                "two consumers run events of one key at the same time, in any order; lanes order one process only",
                ".order(Order::Unordered), or a broker that orders by key, or .allow(Window::Overtaken)",
            )));
        }
        let why = "order is per key, and what follows a dead letter does not wait for it";
        findings.push(finding(Window::DeadLetterOvertaken, why));
    }
    if !capabilities.dead_letter_in_one_step {
        let why =
            format!("{} sets aside and acks in two steps; a crash between them repeats the first", capabilities.name);
        findings.push(finding(Window::DeadLetterTwice, why));
    }
    if let Some(most) = capabilities.deliveries_max {
        let attempts = facts.routes.iter().filter_map(|route| route.retry.as_ref()).map(RetryPolicy::attempts).max();
        let needed = u64::from(attempts.unwrap_or(1)) + u64::from(settings.crashes_max);
        let found =
            finding(Window::BrokerLimit, format!("{} takes a message away after {most} deliveries", capabilities.name));
        findings.push(if u64::from(most) >= needed {
            found
        } else {
            found.refused(Fault::new(
                "broker-deliveries-max",
                format!(
                    "{} takes a message away after {most} deliveries; attempts_max and crashes_max together need {needed}",
                    capabilities.name
                ),
                "the broker sets aside or drops an event that has attempts left, and its record does not know",
                format!(
                    "a limit of {needed} or more at the broker, or fewer .attempts_max(..) and .crashes_max(..), or \
                     .allow(Window::BrokerLimit)"
                ),
            ))
        });
    }
    findings
}

fn handler(facts: &Facts<'_>, route: &RouteInfo) -> Vec<Finding> {
    if route.transactional {
        return Vec::new();
    }
    let Effects::Keyed(kept) = route.effects else {
        return vec![
            finding(
                Window::CrashAfterEffect,
                "the effect is not in the store's transaction and carries no declared key",
            ),
            finding(Window::LeaseLost, "no fence is declared to be checked where the effect takes place"),
            finding(Window::FailedHalfway, "steps are not declared to carry keys"),
        ];
    };
    let attempts = route.retry.as_ref().map_or(Duration::ZERO, |retry| {
        let runs = route.timeout.unwrap_or(Settings::TIMEOUT).saturating_mul(retry.attempts());
        retry.longest_total().saturating_add(runs)
    });
    if kept < attempts {
        let why = format!(
            "callees of {} keep keys for {}, but its attempts alone can take {}",
            route.name(),
            text(kept),
            text(attempts)
        );
        return vec![finding(Window::KeyForgotten, why.clone()).refused(Fault::new(
            "key-forgotten",
            why,
            "a later attempt repeats calls that the callee has forgotten: the declared level does not hold",
            format!(
                "callees that keep keys longer: Effects::keyed({}), or fewer attempts: .retry(..), or \
                 .allow(Window::KeyForgotten)",
                code(attempts)
            ),
        ))];
    }
    let horizon = facts.capabilities.redelivery_horizon;
    if horizon.is_none_or(|horizon| kept < horizon) {
        let back = match horizon {
            Some(horizon) => format!("for {}", text(horizon)),
            None => "without a bound".to_owned(),
        };
        let why = format!(
            "keys are kept for {}; after an outage {} delivers again {back}",
            text(kept),
            facts.capabilities.name
        );
        return vec![finding(Window::KeyForgotten, why)];
    }
    Vec::new()
}

/// A duration for people, in whole milliseconds: `8days`, `1m 15s`.
pub(crate) fn text(duration: Duration) -> String {
    humantime::format_duration(rounded_up(duration)).to_string()
}

/// A duration as code.
pub(crate) fn code(duration: Duration) -> String {
    let duration = rounded_up(duration);
    match duration.subsec_millis() {
        0 => format!("Duration::from_secs({})", duration.as_secs()),
        _ => format!("Duration::from_millis({})", duration.as_millis()),
    }
}

/// Remedies must suffice, so nothing is rounded down.
fn rounded_up(duration: Duration) -> Duration {
    Duration::from_millis(u64::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX))
}
