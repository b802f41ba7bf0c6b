//! When there is nothing left to do: `--exit-when-idle`.
//!
//! Idle is not "nothing has arrived for a while": a worker that waits for its partitions, for a server that is away, or
//! for a retry that the broker keeps is not idle. So the time counts only while none of these is the case.

use std::time::Duration;

use hapax::{ConsumerHandle, Phase};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::brokers::Queue;

/// How often it is looked here.
const TICK: Duration = Duration::from_millis(50);
/// How often the broker is asked, at most.
const ASK: Duration = Duration::from_secs(1);

/// Resolves when for `idle` nothing has arrived and nothing was under way.
pub(crate) async fn idle(idle: Duration, consumer: &ConsumerHandle, queue: &Queue) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut delivered, mut since, mut asked) = (0, None, None);
    loop {
        ticks.tick().await;
        let seen = std::mem::replace(&mut delivered, consumer.statistics().delivered);
        if seen != delivered || !is_quiet(consumer, queue) {
            (since, asked) = (None, None);
            continue;
        }
        let quiet = since.get_or_insert_with(Instant::now).elapsed();
        // Asked when it becomes quiet, every second, and before it ends.
        if quiet >= idle || asked.is_none_or(|at: Instant| at.elapsed() >= ASK) {
            match queue.waiting().await {
                Ok(0) if quiet >= idle && seen == consumer.statistics().delivered => return,
                Ok(0) => asked = Some(Instant::now()),
                Ok(_) => (since, asked) = (None, None),
                Err(error) => {
                    tracing::warn!(%error, "it is not known whether retries wait at the broker");
                    (since, asked) = (None, None);
                }
            }
        }
    }
}

fn is_quiet(consumer: &ConsumerHandle, queue: &Queue) -> bool {
    let health = consumer.health();
    let takes_work = health.phase == Phase::Running && health.broker.up && queue.is_caught_up();
    takes_work && health.in_flight.events == 0
}
