//! What the settings leave open, decided from what broker, store and handlers are. Pure.

use std::time::Duration;

use crate::broker::{BrokerOrder, Capabilities, Limits};
use crate::event::RouteInfo;
use crate::guarantee::windows::text;
use crate::identity::IdFrom;
use crate::retry::RetryPolicy;
use crate::settings::{Order, Settings};
use crate::store::StoreHealth;

/// A delivery is kept ours for so long at least: it may wait for its turn, or for a store that is away.
const HELD_MIN: Duration = Duration::from_hours(1);

/// Transactions that are left to claims, renewals and records.
const TRANSACTIONS_LEFT: usize = 2;

/// The choices made.
pub(super) struct Plan {
    pub(super) capabilities: Capabilities,
    pub(super) health: StoreHealth,
    pub(super) settings: Settings,
    pub(super) order: Order,
    /// Retries wait here, since a delivery that comes again is overtaken.
    pub(super) in_place: bool,
    pub(super) timeout: Duration,
    pub(super) retry: RetryPolicy,
    pub(super) transactions_max: usize,
    pub(super) infos: Vec<RouteInfo>,
    /// What is said at start.
    pub(super) notes: Vec<String>,
}

impl Plan {
    pub(super) fn new(
        settings: &Settings,
        retry: Option<&RetryPolicy>,
        mut infos: Vec<RouteInfo>,
        capabilities: Capabilities,
        health: StoreHealth,
        extractors: &[IdFrom],
    ) -> Self {
        let mut notes = Vec::new();
        let mut settings = settings.clone();
        let order = order(&settings, &capabilities, &mut notes);
        let in_place = order == Order::PerKey && !capabilities.retry_keeps_order;
        let delay_max = delay_max(&settings, &capabilities, in_place);
        if settings.delay_max.is_none() && retry.is_none() && delay_max < Settings::DELAY_MAX {
            notes.push(format!(
                "delays grow up to {}: {}",
                text(delay_max),
                if in_place { "per key they are waited for here, within hold" } else { "the broker keeps none longer" }
            ));
        }
        let retry = retry.cloned().unwrap_or_else(|| settings.retry_policy(delay_max));
        if let Some(most) = capabilities.unsettled_max.filter(|most| *most < settings.in_flight_max) {
            notes.push(format!("in_flight_max is {most}: {} hands out no more", capabilities.name));
            settings.in_flight_max = most;
        }
        // Defaults give way to what was set; what was set is checked.
        if settings.call_timeout == Settings::CALL_TIMEOUT {
            // A call may wait behind a handler's transaction, and what waits is not unreachable.
            let most = if health.transactions_block_writes { settings.lease * 5 / 6 } else { settings.lease / 3 };
            settings.call_timeout = settings.call_timeout.min(most);
        }
        if settings.concurrency == Settings::CONCURRENCY {
            settings.concurrency = settings.concurrency.min(settings.in_flight_max);
        }
        let transactions_max = transactions_max(&settings, &health, &infos, &mut notes);
        let timeout = settings.timeout.unwrap_or(Settings::TIMEOUT);
        for info in &mut infos {
            let default = if info.transactional && health.transactions_block_writes {
                settings.timeout.unwrap_or(blocking_timeout(settings.lease))
            } else {
                timeout
            };
            info.timeout.get_or_insert(default);
            info.retry.get_or_insert_with(|| retry.clone());
        }
        notes.extend(health.trouble.iter().map(|trouble| format!("{} is in trouble: {trouble}", health.name)));
        if extractors.contains(&IdFrom::BodyHash) {
            notes.push(
                "IdFrom::BodyHash: two events with equal data are one event, and the second has no effect".into(),
            );
        }
        Self { capabilities, health, settings, order, in_place, timeout, retry, transactions_max, infos, notes }
    }

    /// The longest that one delivery can stay unsettled by its own doing: attempts and the delays waited for here.
    pub(super) fn held(&self, info: &RouteInfo) -> Duration {
        let timeout = info.timeout.unwrap_or(self.timeout);
        held(info.retry.as_ref().unwrap_or(&self.retry), timeout, self.settings.hold, self.in_place)
    }
}

/// The timeout of a transactional handler where its transaction holds up the renewal of every lease.
pub(super) fn blocking_timeout(lease: Duration) -> Duration {
    lease * 2 / 3
}

/// What the broker is told. It is opened before it can be asked, so this holds for any.
pub(super) fn limits(settings: &Settings, retry: Option<&RetryPolicy>, infos: &[RouteInfo]) -> Limits {
    let timeout = settings.timeout.unwrap_or(Settings::TIMEOUT);
    let retry = retry.cloned().unwrap_or_else(|| settings.retry_policy(Settings::DELAY_MAX));
    let each = infos
        .iter()
        .map(|info| held(info.retry.as_ref().unwrap_or(&retry), info.timeout.unwrap_or(timeout), settings.hold, true));
    Limits {
        events: settings.in_flight_max.max(1),
        bytes: settings.in_flight_bytes_max.max(1),
        held_max: each.max().unwrap_or_default().max(HELD_MIN),
        drain: settings.drain,
        message: settings.message_limits(),
    }
}

fn held(retry: &RetryPolicy, timeout: Duration, hold: Duration, in_place: bool) -> Duration {
    let (mut longest, mut stretch) = (timeout, timeout);
    // More attempts than the bound of attempts_max are a fault of their own.
    for attempt in 1..retry.attempts().min(1_000) {
        let delay = retry.delay(attempt, "", 1.0);
        stretch =
            if in_place || delay <= hold { stretch.saturating_add(delay).saturating_add(timeout) } else { timeout };
        longest = longest.max(stretch);
    }
    longest
}

fn order(settings: &Settings, capabilities: &Capabilities, notes: &mut Vec<String>) -> Order {
    settings.order.unwrap_or_else(|| {
        let (order, keeps) = match capabilities.order {
            BrokerOrder::None => (Order::Unordered, "keeps no order"),
            BrokerOrder::Key => (Order::PerKey, "keeps the order of a key"),
            BrokerOrder::Partition => (Order::PerKey, "keeps the order of a partition"),
        };
        notes.push(format!("order is {order}: {} {keeps}", capabilities.name));
        order
    })
}

/// The longest delay where none was set.
fn delay_max(settings: &Settings, capabilities: &Capabilities, in_place: bool) -> Duration {
    let bound = if in_place { settings.hold } else { capabilities.retry_max.max(settings.hold) };
    // Settings that are out of bounds are told elsewhere; here they must not divide by less than one.
    bound.div_f32(1.0 + settings.jitter.clamp(0.0, 1.0)).min(Settings::DELAY_MAX)
}

fn transactions_max(settings: &Settings, health: &StoreHealth, infos: &[RouteInfo], notes: &mut Vec<String>) -> usize {
    let most = match health.transactions_max {
        _ if health.transactions_block_writes => 1,
        Some(open) => open.saturating_sub(TRANSACTIONS_LEFT).max(1),
        None => usize::MAX,
    };
    let is_used = infos.iter().any(|info| info.transactional);
    if is_used && health.transactions_block_writes {
        notes.push(format!("transactional handlers run one at a time: {} has one writer", health.name));
    } else if is_used && most < settings.concurrency {
        notes.push(format!(
            "at most {most} transactional handlers run at once: the pool of {} is that small",
            health.name
        ));
    }
    most
}
