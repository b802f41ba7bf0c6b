//! The checks of `build()`, pure: each fault with its code, why it matters, and the remedy as code.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::Choices;
use super::plan::{Plan, blocking_timeout};
use crate::broker::Capabilities;
use crate::event::{Otherwise, RouteInfo, Upcast, split_version};
use crate::fault::Fault;
use crate::guarantee::windows::{code, text};
use crate::guarantee::{Guarantee, Level};
use crate::identity::IdFrom;
use crate::retry::RetryPolicy;
use crate::settings::Settings;
use crate::store::StoreHealth;

/// Longest name of a consumer, in bytes.
const NAME_MAX: usize = 128;

/// What is chosen, by itself: name and numbers.
pub(super) fn choices(choices: &Choices) -> Vec<Fault> {
    let settings = &choices.settings;
    let mut faults = settings.faults();
    faults.extend(name(&choices.name));
    if settings.in_flight_max < settings.concurrency && settings.concurrency != Settings::CONCURRENCY {
        faults.push(Fault::new(
            "concurrency-beyond-in-flight",
            format!("concurrency is {}, in_flight_max is {}", settings.concurrency, settings.in_flight_max),
            "so many handlers can never run: there are not as many deliveries for them",
            format!(".concurrency({0}), or .in_flight_max({1})", settings.in_flight_max, settings.concurrency),
        ));
    }
    let third = settings.lease / 3;
    if settings.call_timeout > third && settings.call_timeout != Settings::CALL_TIMEOUT {
        faults.push(Fault::new(
            "call-timeout-beyond-lease",
            format!("call_timeout is {}, a third of the lease is {}", text(settings.call_timeout), text(third)),
            "leases are renewed at a third: a renewal without an answer must be given up in time for another",
            format!(".call_timeout({}), or .lease({})", code(third), code(settings.call_timeout.saturating_mul(3))),
        ));
    }
    if let Some(retry) = &choices.retry {
        faults.extend(retry.faults().into_iter().map(|text| policy(".retry(..)", &text)));
        if !settings.retry_is_default() {
            faults.push(Fault::new(
                "retry-twice",
                "there is a .retry(..) and one of attempts_max, delay, delay_factor, delay_max, jitter, retry_total_max",
                "the policy replaces these settings, so they would have no effect",
                ".retry(RetryPolicy::default().attempts_max(..)), or the settings alone",
            ));
        }
    }
    faults
}

fn policy(whose: &str, text: &str) -> Fault {
    let why = "such a policy never tries, or never ends";
    Fault::new("retry-invalid", format!("{whose}: {text}"), why, "RetryPolicy::default() and its methods")
}

fn name(name: &str) -> Option<Fault> {
    let is_good = |b: u8| b.is_ascii_alphanumeric() || b"_.:-".contains(&b);
    if (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(is_good) {
        return None;
    }
    Some(Fault::new(
        "name-invalid",
        format!(
            "the name {:?} is not 1 to {NAME_MAX} of A-Z a-z 0-9 _ . : -",
            name.chars().take(NAME_MAX).collect::<String>()
        ),
        "it is part of every record's key and of names at the broker, for good",
        "Consumer::builder(\"billing\", broker, store)",
    ))
}

/// Handlers and upcasts, by themselves.
pub(super) fn routes(infos: &[RouteInfo], otherwise: Option<Otherwise>, upcasts: &[Upcast]) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut seen = BTreeSet::new();
    for info in infos {
        faults.extend(event_type(info));
        faults.extend(own_settings(info));
        if !seen.insert(info.name()) {
            faults.push(Fault::new(
                "handler-twice",
                format!("{} has more than one handler", info.name()),
                "an event has one outcome; two handlers would share its record",
                "one handler that calls both, or a consumer of another name for the second",
            ));
        }
    }
    let has_any = infos.iter().any(|info| info.event.is_none());
    match (infos.is_empty(), has_any, otherwise) {
        (true, ..) => faults.push(Fault::new(
            "handler-missing",
            "there is no handler",
            "every message would be ignored or set aside",
            ".on(handler)",
        )),
        (false, false, None) => faults.push(Fault::new(
            "otherwise-missing",
            "it is not said what happens to types without a handler",
            "one of acking and setting aside is wrong for you, and only you know which",
            ".otherwise(Otherwise::Ignore), or .otherwise(Otherwise::DeadLetter), or .on_any(handler)",
        )),
        (false, true, Some(_)) => faults.push(Fault::new(
            "otherwise-and-any",
            "there are both .on_any(..) and .otherwise(..)",
            "every type has a handler, so the rule for types without one would have no effect",
            "one of the two",
        )),
        _ => {}
    }
    faults.extend(lifts(infos, upcasts));
    faults
}

/// A type must read back as what it is written as: a version is a suffix of its own.
fn event_type(info: &RouteInfo) -> Option<Fault> {
    let (ty, version) = info.event?;
    (ty.is_empty() || version == 0 || split_version(ty).0 != ty).then(|| {
        Fault::new(
            "event-type-invalid",
            format!("Event::TYPE {ty:?} with VERSION {version}: TYPE is not empty and ends in no `.vN`, VERSION is 1 or more"),
            "the version travels as a suffix of the type, so no message would be found to be of this type",
            "const TYPE: &'static str = \"com.shop.order.placed\"; const VERSION: u32 = 2;",
        )
    })
}

fn own_settings(info: &RouteInfo) -> Vec<Fault> {
    let whose = format!("Route::on(..).retry(..) of {}", info.name());
    let policies = info.retry.iter().flat_map(|retry| retry.faults());
    let mut faults: Vec<_> = policies.map(|text| policy(&whose, &text)).collect();
    let alone = Settings { timeout: info.timeout, ..Settings::default() };
    faults.extend(alone.faults().into_iter().map(|fault| {
        let what = format!("Route::on(..) of {}: {}", info.name(), fault.what);
        Fault { what: what.into(), ..fault }
    }));
    faults
}

fn lifts(infos: &[RouteInfo], upcasts: &[Upcast]) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut steps: BTreeMap<(&str, u32), u32> = BTreeMap::new();
    for upcast in upcasts {
        let Upcast { ty, target, from, to, .. } = upcast;
        if ty != target {
            faults.push(Fault::new(
                "upcast-of-another-type",
                format!("an upcast leads from {ty} v{from} to {target} v{to}"),
                "an upcast lifts an older version of one type; other types have handlers of their own",
                "the same Event::TYPE on both, or .on(..) for the first",
            ));
        } else if from >= to {
            faults.push(Fault::new(
                "upcast-backwards",
                format!("an upcast of {ty} leads from v{from} to v{to}"),
                "chains of upcasts end because each step goes to a newer version",
                ".upcast::<Older, Newer>()",
            ));
        } else if steps.insert((ty, *from), *to).is_some() {
            faults.push(Fault::new(
                "upcast-twice",
                format!("{ty} v{from} has two upcasts"),
                "only one of them would be taken",
                "one .upcast::<..>() for each older version",
            ));
        }
    }
    let handled = |ty: &str| infos.iter().find_map(|info| info.event.filter(|(own, _)| *own == ty));
    for &(ty, from) in steps.keys() {
        let newest = handled(ty).map(|(_, version)| version);
        let mut end = from;
        while let Some(&next) = steps.get(&(ty, end)).filter(|_| end == from || Some(end) != newest) {
            end = next;
        }
        if newest != Some(end) {
            let there = newest.map_or("no handler".to_owned(), |version| format!("a handler for v{version}"));
            faults.push(Fault::new(
                "upcast-leads-nowhere",
                format!("upcasts lift {ty} v{from} to v{end}, but there is {there}"),
                "what was lifted would find no handler and go to the dead letters",
                "the missing step as .upcast::<..>(), or a handler for that version",
            ));
        }
    }
    faults
}

/// Where ids are taken from, against the broker.
pub(super) fn extractors(extractors: &[IdFrom], capabilities: &Capabilities) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (number, from) in extractors.iter().enumerate() {
        if let Err(error) = from.check() {
            let why = "it could never find an id, and every message would go to the dead letters";
            faults.push(Fault::new("id-from-invalid", error.to_string(), why, ".id_from(IdFrom::..) as the text says"));
        }
        let before = &extractors[..number];
        if before.contains(from) || before.contains(&IdFrom::BodyHash) {
            faults.push(Fault::new(
                "id-from-unreachable",
                format!(".id_from({from:?}) comes after one that leaves nothing to it"),
                "extractors are tried in order: IdFrom::BodyHash always finds an id, and none is tried twice",
                "IdFrom::BodyHash last, or without this one",
            ));
        }
    }
    if extractors.contains(&IdFrom::Position) && !capabilities.position_is_stable {
        faults.push(Fault::new(
            "position-not-stable",
            format!(".id_from(IdFrom::Position), but {} numbers a message anew when it comes again", capabilities.name),
            "a redelivery would be another event and run again",
            ".id_from(IdFrom::header(\"..\")), or .id_from(IdFrom::json_pointer(\"/..\"))",
        ));
    }
    faults
}

/// Transactional handlers against the store.
pub(super) fn transactions(
    infos: &[RouteInfo],
    settings: &Settings,
    health: &StoreHealth,
    publishes: bool,
) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut transactional = infos.iter().filter(|info| info.transactional).peekable();
    if transactional.peek().is_none() {
        return faults;
    }
    if publishes {
        faults.push(Fault::new(
            "publish-in-transaction",
            "there are both a transactional handler and a .publisher(..)",
            "what it publishes would be sent although its transaction may roll back; that needs an outbox, which is not \
             there yet",
            "Route::on(..) for handlers that publish, in a consumer of their own",
        ));
    }
    if !health.transactions_block_writes && health.transactions_max.is_some_and(|most| most < 2) {
        faults.push(Fault::new(
            "pool-too-small",
            format!("{} can open one connection, and a transactional handler takes it", health.name),
            "claims, renewals and records would wait for the handler, and its lease would end",
            "a pool of 3 connections or more",
        ));
    }
    if health.transactions_block_writes {
        let most = blocking_timeout(settings.lease);
        for info in transactional {
            let Some(timeout) = info.timeout.or(settings.timeout).filter(|timeout| *timeout > most) else { continue };
            faults.push(Fault::new(
                "tx-timeout-beyond-lease",
                format!(
                    "the timeout of {} is {}, two thirds of the lease are {}",
                    info.name(),
                    text(timeout),
                    text(most)
                ),
                format!(
                    "while its transaction is open {} writes nothing else, renewals included: the leases of others end",
                    health.name
                ),
                format!("Route::on_tx(..).timeout({}), or .lease({})", code(most), code(timeout * 3 / 2)),
            ));
        }
    }
    faults
}

/// Delays and numbers against the broker.
pub(super) fn limits(plan: &Plan) -> Vec<Fault> {
    let (settings, capabilities) = (&plan.settings, &plan.capabilities);
    let mut faults = Vec::new();
    if let Some(most) = capabilities.unsettled_max.filter(|most| *most < settings.concurrency) {
        faults.push(Fault::new(
            "concurrency-beyond-broker",
            format!(
                "concurrency is {}, but {} hands out {most} deliveries at once",
                settings.concurrency, capabilities.name
            ),
            "so many handlers can never run",
            format!(".concurrency({most}), or more unsettled deliveries at the broker"),
        ));
    }
    for (name, retry) in delays(plan) {
        let longest = retry.longest_delay();
        // Shares of floating-point numbers: less than a millisecond is no difference.
        let exceeds = |bound: Duration| longest > bound.saturating_add(Duration::from_millis(1));
        let fitting = |bound: Duration| code(bound.div_f32(2.0));
        if plan.in_place && exceeds(settings.hold) {
            faults.push(Fault::new(
                "retry-overtaken",
                format!(
                    "order is per key, and {name} can wait {}: longer than hold = {}",
                    text(longest),
                    text(settings.hold)
                ),
                format!(
                    "a longer delay is spent at the broker, and {} would deliver later events of the key before it",
                    capabilities.name
                ),
                format!(
                    ".delay_max({}), or .hold({}), or .order(Order::Unordered)",
                    fitting(settings.hold),
                    code(longest)
                ),
            ));
        } else if !plan.in_place && exceeds(settings.hold) && exceeds(capabilities.retry_max) {
            faults.push(Fault::new(
                "retry-beyond-broker",
                format!(
                    "{name} can wait {}, but {} keeps a retry {} at most and hold is {}",
                    text(longest),
                    capabilities.name,
                    text(capabilities.retry_max),
                    text(settings.hold)
                ),
                "the delivery would come back before its time, again and again",
                format!(
                    ".delay_max({}), or .hold({})",
                    fitting(capabilities.retry_max.max(settings.hold)),
                    code(longest)
                ),
            ));
        }
    }
    if let Some(most) = capabilities.hold_max {
        for info in &plan.infos {
            let held = plan.held(info);
            if held > most {
                faults.push(Fault::new(
                    "held-beyond-broker",
                    format!(
                        "attempts of {} and the delays between them can take {} unsettled, but {} allows {}",
                        info.name(),
                        text(held),
                        capabilities.name,
                        text(most)
                    ),
                    "the broker takes such a delivery away while its handler runs",
                    "a shorter .timeout(..) or .hold(..), fewer .attempts_max(..), or more time at the broker",
                ));
            }
        }
    }
    faults
}

/// Each retry policy once: the consumer's, and handlers' own.
fn delays(plan: &Plan) -> Vec<(String, &RetryPolicy)> {
    let mut all = vec![("a retry".to_owned(), &plan.retry)];
    for info in &plan.infos {
        if let Some(retry) = info.retry.as_ref().filter(|retry| **retry != plan.retry) {
            all.push((format!("a retry of {}", info.name()), retry));
        }
    }
    if plan.infos.len() + 1 == all.len() && all.len() > 1 {
        all.remove(0);
    }
    all
}

/// What is promised against what is required.
pub(super) fn levels(guarantee: &Guarantee, required: Level) -> Vec<Fault> {
    let below = guarantee.handlers.iter().filter(|handler| handler.level < required);
    let low = guarantee.level();
    below
        .map(|handler| {
            let (why, remedy) = if handler.level == Level::AtLeastOnce {
                (
                    format!(
                        "records in {} do not live as long as messages in {}: after a crash effects repeat",
                        guarantee.store, guarantee.broker
                    ),
                    "a durable store".to_owned(),
                )
            } else {
                (
                    "the handler's effects can repeat in windows that this level excludes".to_owned(),
                    ".on_tx(handler), or Route::on(handler).effects(Effects::keyed(..))".to_owned(),
                )
            };
            Fault::new(
                "level-below-required",
                format!("{} is {}, required is {required}", handler.route, handler.level),
                why,
                format!("{remedy}, or .require(Level::{low:?})"),
            )
        })
        .collect()
}
