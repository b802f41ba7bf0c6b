//! Brokers and stores that break on purpose: seeded, switchable, and honest about what they did.
//!
//! [`FaultyStore`] and [`FaultyBroker`] wrap any adapter. [`Faults`] says how often which fault strikes, one
//! [`FaultSwitch`] for both begins and ends outages, heals everything, and counts what was injected. The dice are drawn
//! in the order of the calls, so that under a paused clock a seed gives the same faults every time.

mod broker;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use hapax::{Error, ErrorKind, EventKey, Result};

pub use broker::FaultyBroker;
pub use store::FaultyStore;

/// How often which fault strikes: plain data, each rate from 0 (never) to 1 (always) a call or an item.
#[derive(Clone, Debug, PartialEq)]
pub struct Faults {
    /// Where the dice begin.
    pub seed: u64,
    /// An error before anything was done: [`ErrorKind::Unavailable`].
    pub refuse: f64,
    /// Done, but the answer is lost: [`ErrorKind::Unknown`].
    pub lose_reply: f64,
    /// A wait before the call, up to [`delay_max`](Self::delay_max).
    pub delay: f64,
    /// The longest such wait.
    pub delay_max: Duration,
    /// The call neither acts nor answers until it is dropped. Never strikes a receive, which may wait for ever anyway.
    pub hang: f64,
    /// A delivery whose message the broker delivers once more.
    pub duplicate: f64,
    /// A receive whose deliveries come in another order.
    pub reorder: f64,
}

impl Faults {
    /// No fault; set the rates that are wanted.
    pub const fn none(seed: u64) -> Self {
        Self {
            seed,
            refuse: 0.0,
            lose_reply: 0.0,
            delay: 0.0,
            delay_max: Duration::from_millis(500),
            hang: 0.0,
            duplicate: 0.0,
            reorder: 0.0,
        }
    }

    /// A swarm: the seed draws which faults are on, and how often each strikes, at most `rate_max`.
    pub fn swarm(seed: u64, rate_max: f64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut draw = || if rng.bool() { rng.f64() * rate_max } else { 0.0 };
        Self {
            refuse: draw(),
            lose_reply: draw(),
            delay: draw(),
            // A call that hangs costs a whole deadline: rarer than the others.
            hang: draw() / 4.0,
            duplicate: draw(),
            reorder: draw(),
            ..Self::none(seed)
        }
    }

    /// The switch for wrappers that share these faults.
    pub fn switch(self) -> FaultSwitch {
        let state = State {
            rng: fastrand::Rng::with_seed(self.seed),
            faults: self,
            healed: false,
            outage: false,
            rejected: BTreeSet::new(),
            injected: BTreeMap::new(),
        };
        FaultSwitch(Arc::new(Mutex::new(state)))
    }
}

/// Turns faults on and off for every wrapper that holds a clone of it.
#[derive(Clone, Debug)]
pub struct FaultSwitch(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    faults: Faults,
    rng: fastrand::Rng,
    healed: bool,
    outage: bool,
    rejected: BTreeSet<EventKey>,
    injected: BTreeMap<&'static str, u64>,
}

impl FaultSwitch {
    /// From here on every call is refused as [`ErrorKind::Unavailable`], until [`end_outage`](Self::end_outage).
    pub fn begin_outage(&self) {
        self.state().outage = true;
    }

    /// Calls are answered again.
    pub fn end_outage(&self) {
        self.state().outage = false;
    }

    /// Refuses, as [`ErrorKind::Rejected`] and for good, every batch of a store that holds this event.
    pub fn reject(&self, key: EventKey) {
        self.state().rejected.insert(key);
    }

    /// No fault strikes any more: no dice, no outage, nothing rejected.
    pub fn heal(&self) {
        let mut state = self.state();
        state.healed = true;
        state.outage = false;
        state.rejected.clear();
    }

    /// What was injected so far, by name.
    pub fn injected(&self) -> BTreeMap<&'static str, u64> {
        self.state().injected.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nobody panics while holding the faults")
    }

    /// Whether `fault` strikes now; counts it if so.
    fn strikes(&self, fault: &'static str, rate: impl Fn(&Faults) -> f64) -> bool {
        let mut state = self.state();
        let rate = rate(&state.faults);
        let strikes = !state.healed && rate > 0.0 && state.rng.f64() < rate;
        if strikes {
            *state.injected.entry(fault).or_default() += 1;
        }
        strikes
    }

    fn outage(&self, operation: &'static str) -> Result<()> {
        let mut state = self.state();
        if !state.outage {
            return Ok(());
        }
        *state.injected.entry("outage").or_default() += 1;
        Err(Error::new(ErrorKind::Unavailable, operation).because("injected: an outage"))
    }

    fn rejects(&self, operation: &'static str, mut keys: impl Iterator<Item = EventKey>) -> Result<()> {
        let mut state = self.state();
        if !keys.any(|key| state.rejected.contains(&key)) {
            return Ok(());
        }
        *state.injected.entry("reject").or_default() += 1;
        Err(Error::new(ErrorKind::Rejected, operation).because("injected: an item is refused for good"))
    }

    /// What can strike before a call: an outage, a hang, a wait, a refusal.
    pub(crate) async fn before(&self, operation: &'static str) -> Result<()> {
        self.outage(operation)?;
        if self.strikes("hang", |faults| faults.hang) {
            return std::future::pending().await;
        }
        if self.strikes("delay", |faults| faults.delay) {
            let wait = {
                let mut state = self.state();
                state.faults.delay_max.mul_f64(state.rng.f64())
            };
            tokio::time::sleep(wait).await;
        }
        if self.strikes("refuse", |faults| faults.refuse) {
            return Err(Error::new(ErrorKind::Unavailable, operation).because("injected: refused"));
        }
        Ok(())
    }

    /// What can strike behind a call that took place: its answer is lost.
    fn after<T>(&self, operation: &'static str, answer: Result<T>) -> Result<T> {
        if answer.is_ok() && self.strikes("lose-reply", |faults| faults.lose_reply) {
            return Err(Error::new(ErrorKind::Unknown, operation).because("injected: the answer was lost"));
        }
        answer
    }

    pub(crate) async fn around<T>(&self, operation: &'static str, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.before(operation).await?;
        self.after(operation, call.await)
    }
}
