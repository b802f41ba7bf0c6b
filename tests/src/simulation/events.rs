//! The events of a simulation, which say themselves what their handler does, and that handler.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fastrand::Rng;
use hapax::{Context, Event, EventKey, Failure, Item, Outcomes, Stop};
use serde::{Deserialize, Serialize};

use super::network::Tx;
use super::worker::Life;
use crate::ledger::Ledger;

/// Where all messages of a simulation come from.
pub(super) const SOURCE: &str = "/simulation";
/// A type without a handler, acked by rule.
pub(super) const IGNORED: &str = "sim.ignored";

/// An event; what its handler does is said in it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Step {
    pub(super) n: u32,
    pub(super) act: Act,
    /// How long the handler takes before its effect, and after it.
    pub(super) before_ms: u64,
    pub(super) after_ms: u64,
    /// A handler that fails does so behind its effect.
    pub(super) halfway: bool,
}

impl Event for Step {
    const TYPE: &'static str = "sim.step";
}

/// What handlers publish.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Derived {
    of: u32,
}

impl Event for Derived {
    const TYPE: &'static str = "sim.derived";
}

/// What a handler does; `times` counts its starts over all workers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Act {
    Ok,
    Fails {
        times: u32,
        after_ms: Option<u64>,
    },
    Permanent,
    Panics {
        times: u32,
    },
    NotYet {
        times: u32,
        after_ms: u64,
    },
    Unavailable {
        times: u32,
    },
    /// Takes its process with it.
    Kills {
        times: u32,
    },
    /// Longer than a lease, and sometimes than its timeout.
    Slow {
        ms: u64,
    },
    Publishes {
        events: u32,
    },
}

impl Step {
    pub(super) fn draw(rng: &mut Rng, n: u32, publishes: bool) -> Self {
        let times = 1 + rng.u32(..3);
        let act = match rng.u8(..20) {
            0..=2 => Act::Fails { times, after_ms: rng.bool().then(|| rng.u64(..4_000)) },
            3 => Act::Fails { times: 100, after_ms: None },
            4 => Act::Permanent,
            5 => Act::Panics { times },
            6 => Act::NotYet { times: times * 2, after_ms: rng.u64(1..5_000) },
            7 => Act::Unavailable { times },
            8 => Act::Kills { times },
            9..=10 => Act::Slow { ms: rng.u64(3_000..20_000) },
            11..=12 if publishes => Act::Publishes { events: times },
            _ => Act::Ok,
        };
        let mut wait_ms = || if rng.bool() { 0 } else { rng.u64(..200) };
        let (before_ms, after_ms) = (wait_ms(), wait_ms());
        Self { n, act, before_ms, after_ms, halfway: rng.bool() }
    }
}

/// What a handler sees: whose process it runs in, and how often each event was started anywhere.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) life: Arc<Life>,
    pub(super) ledger: Ledger,
    pub(super) starts: Arc<Mutex<BTreeMap<EventKey, u32>>>,
}

/// A start of a handler; dropped before it returned, it was cut off.
struct Start<'a> {
    process: &'a Process,
    key: EventKey,
    fence: u64,
    attempt: u32,
    /// Which start of this event it is, from 1.
    number: u32,
    returned: bool,
}

impl<'a> Start<'a> {
    fn of(cx: &'a Context<Process>) -> Self {
        let (process, attributes) = (cx.state(), &cx.message().attributes);
        let text = |value: &'a Option<Box<str>>| value.as_deref().unwrap_or_default();
        let key = EventKey::of(cx.consumer(), text(&attributes.source), text(&attributes.id));
        process.ledger.started(key, cx.attempt(), cx.fence(), &cx.idempotency_key());
        let mut starts = process.starts.lock().unwrap_or_else(PoisonError::into_inner);
        let number = starts.entry(key).or_default();
        *number += 1;
        Self { process, key, fence: cx.fence(), attempt: cx.attempt(), number: *number, returned: false }
    }

    fn returned(mut self, result: Result<(), Failure>) -> Result<(), Failure> {
        self.returned = true;
        self.process.ledger.returned(self.key, self.fence, result.is_ok());
        result
    }
}

impl Drop for Start<'_> {
    fn drop(&mut self) {
        if !self.returned {
            self.process.ledger.returned(self.key, self.fence, false);
        }
    }
}

/// The handler of [`Step`], its effect seen at once.
pub(super) async fn step(step: Step, cx: Context<Process>) -> Result<(), Failure> {
    let start = Start::of(&cx);
    let effect = || start.process.ledger.effect(start.key, start.attempt, start.fence);
    let result = act(&step, &cx, start.number, &effect).await;
    start.returned(result)
}

/// The same in a transaction: its effect is seen when it was committed.
pub(super) async fn step_tx(step: Step, tx: Tx, cx: Context<Process>) -> Result<(), Failure> {
    let start = Start::of(&cx);
    let effect = || tx.write(start.key);
    let result = act(&step, &cx, start.number, &effect).await;
    start.returned(result)
}

/// The handler of many [`Step`]s at once: each does its own, one after the other.
pub(super) async fn steps(batch: Vec<Item<Step, Process>>) -> Result<Outcomes, Failure> {
    let effect = |start: &Start<'_>| start.process.ledger.effect(start.key, start.attempt, start.fence);
    one_after_the_other(&batch, effect).await
}

/// The same in a transaction for all.
pub(super) async fn steps_tx(batch: Vec<Item<Step, Process>>, tx: Tx) -> Result<Outcomes, Failure> {
    one_after_the_other(&batch, |start| tx.write(start.key)).await
}

/// Some events fail the whole batch, the first time that they are in one. None has returned before all have.
async fn one_after_the_other(
    batch: &[Item<Step, Process>],
    effect: impl Fn(&Start<'_>) + Sync,
) -> Result<Outcomes, Failure> {
    let mut outcomes = Vec::new();
    for item in batch {
        // Nothing stops one event of a batch for itself, so each looks whether its lease is lost.
        if item.cx.stopped() == Some(Stop::LeaseLost) {
            outcomes.push((None, Err(Failure::retryable("its lease is lost"))));
            continue;
        }
        let start = Start::of(&item.cx);
        let outcome = act(&item.event, &item.cx, start.number, &|| effect(&start)).await;
        if item.event.n % 7 == 0 && start.number == 1 {
            return Err(Failure::retryable("the whole batch"));
        }
        outcomes.push((Some(start), outcome));
    }
    let told = |(start, outcome): (Option<Start<'_>>, _)| match start {
        Some(start) => start.returned(outcome),
        None => outcome,
    };
    Ok(outcomes.into_iter().map(told).collect())
}

/// The handler of what was published.
pub(super) async fn derived(_: Derived, cx: Context<Process>) -> Result<(), Failure> {
    let start = Start::of(&cx);
    start.process.ledger.effect(start.key, start.attempt, start.fence);
    start.returned(Ok(()))
}

async fn act(step: &Step, cx: &Context<Process>, number: u32, effect: &(impl Fn() + Sync)) -> Result<(), Failure> {
    wait(step.before_ms).await;
    let fail = |failure: Failure| {
        if step.halfway {
            effect();
        }
        Err(failure)
    };
    match step.act {
        Act::Fails { times, after_ms } if number <= times => {
            let failure = Failure::retryable("not this time");
            return fail(match after_ms {
                Some(ms) => failure.after(Duration::from_millis(ms)),
                None => failure,
            });
        }
        Act::Permanent => return fail(Failure::permanent("never")),
        // Unwinds like a panic, without the noise of one.
        Act::Panics { times } if number <= times => std::panic::resume_unwind(Box::new("injected")),
        Act::NotYet { times, after_ms } if number <= times => {
            return fail(Failure::not_yet("too early", Duration::from_millis(after_ms)));
        }
        Act::Unavailable { times } if number <= times => return fail(Failure::unavailable("down")),
        Act::Kills { times } if number <= times => {
            cx.state().life.kill();
            return std::future::pending().await;
        }
        Act::Slow { ms } => wait(ms).await,
        Act::Publishes { events } => {
            for event in 0..events {
                cx.publish(&Derived { of: step.n }).step(&event.to_string()).send()?;
            }
        }
        _ => {}
    }
    effect();
    wait(step.after_ms).await;
    Ok(())
}

async fn wait(ms: u64) {
    if ms > 0 {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
}
