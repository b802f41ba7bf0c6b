//! What a seed means: settings, events and faults, drawn before anything runs, so that a plan can be printed.

use std::time::Duration;

use fastrand::Rng;
use hapax::{Message, Settings};

use super::events::{Act, IGNORED, SOURCE, Step};
use crate::faulty::Faults;

/// The consumers by name, each with a group of its own.
pub(super) const SCOPES: [&str; 2] = ["billing", "audit"];

/// Everything that a seed draws.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    /// Workers of the first consumer; it has three.
    pub(super) workers: u32,
    /// Workers of the second consumer, which is not always there.
    pub(super) others: u32,
    pub(super) ordered: bool,
    pub(super) transactional: bool,
    /// Whether the handler takes many events at once.
    pub(super) batched: bool,
    pub(super) settings: Settings,
    pub(super) arrivals: Vec<Arrival>,
    pub(super) chaos: Chaos,
}

/// A message that is sent.
#[derive(Clone, Debug)]
pub(super) struct Arrival {
    pub(super) at: Duration,
    pub(super) message: Message,
}

/// How often what happens; a fault that is off has weight 0.
#[derive(Clone, Debug)]
pub(super) struct Chaos {
    /// For how long there are faults.
    pub(super) lasts: Duration,
    /// The longest time between two of them.
    pub(super) every_max_ms: u64,
    /// The longest way of a call, one way.
    pub(super) latency_max_ms: u64,
    /// How often a call to the store arrives after its caller has given up.
    pub(super) late: f64,
    /// How often a call fails, by itself.
    pub(super) rate_max: f64,
    /// Whether workers die and stand still at any of their polls, beside what happens by the clock.
    pub(super) dies_at_polls: bool,
    pub(super) pauses_at_polls: bool,
    pub(super) weights: [u32; STRIKES.len()],
}

/// What strikes by the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Strike {
    Crash,
    Pause,
    Restart,
    StoreOutage,
    StoreOutageForOne,
    BrokerOutage,
    SessionEnds,
    SessionDrains,
    DeliversAgain,
    Shuffle,
    ClockStep,
    Redrive,
    SendAgain,
}

pub(super) const STRIKES: [Strike; 13] = [
    Strike::Crash,
    Strike::Pause,
    Strike::Restart,
    Strike::StoreOutage,
    Strike::StoreOutageForOne,
    Strike::BrokerOutage,
    Strike::SessionEnds,
    Strike::SessionDrains,
    Strike::DeliversAgain,
    Strike::Shuffle,
    Strike::ClockStep,
    Strike::Redrive,
    Strike::SendAgain,
];

fn millis(rng: &mut Rng, range: std::ops::RangeInclusive<u64>) -> Duration {
    Duration::from_millis(rng.u64(range))
}

impl Plan {
    pub(super) fn draw(seed: u64) -> Self {
        // Mixed, so that neighbouring seeds are not alike.
        let mut rng = Rng::with_seed(seed ^ 0x9e37_79b9_7f4a_7c15);
        let ordered = rng.u8(..4) == 0;
        let transactional = rng.u8(..4) == 0;
        let others = if ordered { 0 } else { rng.u32(0..=2) };
        let settings = settings(&mut rng);
        let chaos = chaos(&mut rng, ordered);
        let arrivals = arrivals(&mut rng, ordered, transactional, chaos.lasts);
        // Drawn apart, so that seeds from before there were batches mean what they meant.
        let batched = Rng::with_seed(!seed).u8(..3) == 0;
        Self { seed, workers: 3, others, ordered, transactional, batched, settings, arrivals, chaos }
    }

    /// The call faults of one worker: a swarm of its own.
    pub(super) fn faults(&self, rng: &mut Rng) -> Faults {
        let mut faults = Faults::swarm(rng.u64(..), self.chaos.rate_max);
        // Each delivery of a copy may bring another: above this share there would be no end of them.
        faults.duplicate = faults.duplicate.min(0.1);
        if self.ordered {
            faults.reorder = 0.0;
        }
        faults
    }
}

fn settings(rng: &mut Rng) -> Settings {
    let lease = millis(rng, 3_000..=9_000);
    let hold = millis(rng, 200..=2_000);
    let in_flight_max = rng.usize(4..=48);
    Settings {
        lease,
        hold,
        in_flight_max,
        call_timeout: millis(rng, 200..=lease.as_millis() as u64 / 3),
        concurrency: rng.usize(1..=in_flight_max.min(12)),
        batch_max: rng.usize(1..=16),
        timeout: Some(millis(rng, 500..=15_000)),
        attempts_max: rng.u32(1..=5),
        crashes_max: rng.u32(0..=3),
        delay: millis(rng, 10..=150),
        delay_factor: 1.0 + 2.0 * rng.f32(),
        not_yet_max: millis(rng, 2_000..=30_000),
        switch_events_min: rng.u32(5..=40),
        switch_window: Duration::from_secs(10),
        switch_probe: millis(rng, 500..=4_000),
        drain: millis(rng, 0..=5_000),
        ..Settings::default()
    }
}

fn chaos(rng: &mut Rng, ordered: bool) -> Chaos {
    let mut weights = [0; STRIKES.len()];
    for (weight, strike) in weights.iter_mut().zip(STRIKES) {
        if rng.bool() && !(ordered && strike == Strike::Shuffle) {
            *weight = rng.u32(1..=10);
        }
    }
    Chaos {
        lasts: millis(rng, 5_000..=30_000),
        every_max_ms: rng.u64(200..=4_000),
        latency_max_ms: rng.u64(0..=20),
        late: if rng.u8(..3) == 0 { 0.1 * rng.f64() } else { 0.0 },
        rate_max: if rng.u8(..4) == 0 { 0.0 } else { 0.3 * rng.f64() },
        dies_at_polls: rng.bool(),
        pauses_at_polls: rng.u8(..3) == 0,
        weights,
    }
}

fn arrivals(rng: &mut Rng, ordered: bool, transactional: bool, lasts: Duration) -> Vec<Arrival> {
    let mut arrivals = Vec::new();
    for n in 0..rng.u32(3..=24) {
        let at = millis(rng, 0..=lasts.as_millis() as u64 * 2 / 3);
        let ty = match rng.u8(..24) {
            0 => IGNORED,
            1 => "sim.step.v2",
            _ => "sim.step",
        };
        let step = Step::draw(rng, n, !transactional);
        let mut message = Message::event(SOURCE, n.to_string(), ty);
        message.headers.push("sent-by", n.to_string());
        if ordered && rng.u8(..8) > 0 {
            message = message.with_partition_key(rng.u8(..3).to_string());
        }
        let data = |step: &Step| serde_json::to_vec(step).expect("a step has a JSON form");
        // What does not decode has no record under its id: other data beside it would be another event.
        let decodes = rng.u8(..24) > 0;
        let message = if decodes {
            message.with_data("application/json", data(&step))
        } else {
            message.with_data("application/json", r#"{"n":"no number"}"#)
        };
        let mut copies = Vec::new();
        while copies.len() < 4 && rng.u8(..3) == 0 {
            let mut copy = message.clone();
            if decodes && rng.u8(..6) == 0 {
                let other = Step { n: n + 1_000, act: Act::Ok, ..step.clone() };
                copy = copy.with_data("application/json", data(&other));
            }
            copies.push(Arrival { at: at + millis(rng, 0..=3_000), message: copy });
        }
        if rng.u8(..24) == 0 {
            let mut nameless = message.clone();
            nameless.attributes.id = None;
            copies.push(Arrival { at, message: nameless });
        }
        arrivals.push(Arrival { at, message });
        arrivals.append(&mut copies);
    }
    arrivals.sort_by_key(|arrival| arrival.at);
    arrivals
}
