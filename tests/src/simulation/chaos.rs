//! What strikes by the clock, until all is healed.

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use hapax::cloudevents::{Convention, encode};
use hapax::{DeadLetter, Event, Message, RESERVED_PREFIX};
use tokio::time::{Instant, sleep};

use super::World;
use super::events::Step;
use super::plan::{STRIKES, Strike};
use super::worker::Worker;
use crate::faulty::FaultSwitch;
use crate::ledger::What;

/// Strikes until the plan's time is over.
pub(super) async fn rage(world: &Arc<World>, workers: &[Arc<Worker>], mut rng: Rng) {
    let over = Instant::now() + world.plan.chaos.lasts;
    while Instant::now() < over {
        sleep(Duration::from_millis(rng.u64(1..world.plan.chaos.every_max_ms))).await;
        let weights = world.plan.chaos.weights;
        let total: u32 = weights.iter().sum();
        if total == 0 {
            continue;
        }
        let mut pick = rng.u32(..total);
        let chosen = STRIKES.into_iter().zip(weights).find(|(_, weight)| {
            let is_it = pick < *weight;
            pick = pick.saturating_sub(*weight);
            is_it
        });
        if let Some((strike, _)) = chosen {
            let worker = Arc::clone(&workers[rng.usize(..workers.len())]);
            one(world, workers, &worker, strike, &mut rng).await;
        }
    }
}

async fn one(world: &Arc<World>, workers: &[Arc<Worker>], worker: &Worker, strike: Strike, rng: &mut Rng) {
    let life = worker.now();
    let lease_ms = world.plan.settings.lease.as_millis() as u64;
    let outage = |name, switch: &FaultSwitch, ms: u64| {
        world.ledger.of(worker.number, 0).write(What::Fault { name });
        switch.begin_outage();
        let switch = switch.clone();
        tokio::spawn(async move {
            sleep(Duration::from_millis(ms)).await;
            switch.end_outage();
        });
    };
    match strike {
        Strike::Crash => life.iter().for_each(|life| life.kill()),
        Strike::Pause => {
            let wait = Duration::from_millis(rng.u64(1..lease_ms * 3));
            life.iter().for_each(|life| life.pause(wait));
        }
        Strike::Restart => life.iter().for_each(|life| life.stop()),
        Strike::StoreOutage => {
            let ms = rng.u64(1..lease_ms * 2);
            workers.iter().for_each(|worker| outage("store outage", &worker.store_faults, ms));
        }
        Strike::StoreOutageForOne => outage("store outage for one", &worker.store_faults, rng.u64(1..lease_ms * 2)),
        Strike::BrokerOutage => outage("broker outage", &worker.broker_faults, rng.u64(1..lease_ms * 2)),
        Strike::SessionEnds => {
            if let Some(broker) = life.and_then(|life| life.broker()) {
                world.ledger.of(worker.number, 0).write(What::Fault { name: "session ends" });
                broker.end_session();
            }
        }
        Strike::SessionDrains => {
            if let Some(broker) = life.and_then(|life| life.broker()) {
                world.ledger.of(worker.number, 0).write(What::Fault { name: "session drains" });
                broker.drain_session();
            }
        }
        Strike::DeliversAgain => {
            let position = rng.u64(1..=world.plan.arrivals.len() as u64);
            world.topics[worker.scope].redeliver(position);
        }
        Strike::Shuffle => world.topics[worker.scope].shuffle(rng.bool().then(|| rng.u64(..))),
        Strike::ClockStep => {
            let micros = rng.i64(-30_000_000..30_000_000);
            world.ledger.write(What::ClockStepped);
            world.back_ends.step_clock(micros);
            world.ledger.write(What::ClockStepped);
        }
        Strike::Redrive => {
            let mut rng = rng.fork();
            world.topics[worker.scope].redrive_where(|_, _| rng.bool());
        }
        Strike::SendAgain => {
            let letters = world.topics[worker.scope].dead_letters();
            if !letters.is_empty() {
                let (message, letter) = &letters[rng.usize(..letters.len())];
                send_again(world, message, letter, rng).await;
            }
        }
    }
}

/// An operator sends a copy of a dead letter, with its token, once or twice, and sometimes with other data.
async fn send_again(world: &World, message: &Message, letter: &DeadLetter, rng: &mut Rng) {
    let (mut headers, mut body) = encode(message, &Convention::MEMORY);
    headers.retain(|name| !name.starts_with(RESERVED_PREFIX));
    for (name, value) in letter.headers().iter() {
        headers.push(name, value.clone());
    }
    // Without a token there is no record to reopen: other data would be another event.
    let mendable = letter.reopen.is_some() && message.attributes.ty.as_deref() == Some(Step::TYPE);
    if mendable && rng.u8(..3) == 0 {
        body = super::mended(rng.u32(2_000..3_000)).into();
        world.remember(message, &body);
    }
    for _ in 0..rng.usize(1..=2) {
        world.publisher.send_wire(headers.clone(), body.clone()).await;
    }
}
