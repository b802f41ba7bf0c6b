//! The keeper: keeps what is in hand ours while handlers run, gives back what waits for a consumer that takes nothing, tidies
//! the list of members, and hears what waits. A task of its own, since the reader blocks.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hapax::{Result, Settlement};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::consuming::{Consuming, Phase, is_no_group};
use super::entry::{EntryId, entry_id, items, number};
use super::settling;
use super::table::Key;

/// Most entries of one call.
const BEAT_MAX: usize = 500;
/// How often it is asked what waits.
const WAITING_EVERY: Duration = Duration::from_secs(1);
/// How often members are tidied up.
const FORGET_EVERY: Duration = Duration::from_secs(600);

pub(super) async fn run(c: Arc<Consuming>) {
    let mut ticks = interval((c.keep_every() / 3).max(Duration::from_millis(10)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut waiting_at, mut forget_at) = (Instant::now(), Instant::now());
    let mut phase = c.phase.subscribe();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = phase.wait_for(|phase| *phase == Phase::Closed) => return,
        }
        if let Err(error) = keep(&c).await {
            // The reader finds out by itself, and creates the group again or says why not.
            if is_no_group(&error) {
                c.want(1);
            }
            tracing::debug!(%error, "entries could not be kept");
            continue;
        }
        give_up_waiting(&c).await;
        let now = Instant::now();
        if now >= waiting_at {
            waiting_at = now + WAITING_EVERY;
            match hear_waiting(&c).await {
                Ok(lag) => c.lag.store(lag.unwrap_or(u64::MAX), Ordering::Relaxed),
                Err(_) => c.lag.store(u64::MAX, Ordering::Relaxed),
            }
        }
        if now >= forget_at {
            forget_at = now + FORGET_EVERY;
            if let Err(error) = forget(&c).await {
                tracing::debug!(%error, "members could not be tidied up");
            }
        }
    }
}

async fn keep(c: &Consuming) -> Result<()> {
    let keys = c.table().to_keep(c.keep_every(), Instant::now());
    for of_one in keys.chunk_by(|a, b| a.0 == b.0) {
        for some in of_one.chunks(BEAT_MAX) {
            beat(c, some).await?;
        }
    }
    Ok(())
}

async fn beat(c: &Consuming, keys: &[Key]) -> Result<()> {
    let source = keys[0].0;
    let mut arguments = vec![c.settings.group.to_string(), c.member.to_string()];
    arguments.extend(keys.iter().map(|(_, id)| id.to_string()));
    let at = Instant::now();
    let reply = c.link.run("keep", &c.scripts.beat, &[&*c.sources[source].key], &arguments).await?;
    let mut lists = items(reply).into_iter().map(|list| items(list).into_iter().filter_map(entry_id));
    let lost: Vec<EntryId> = lists.next().into_iter().flatten().collect();
    let trimmed: Vec<EntryId> = lists.next().into_iter().flatten().collect();
    let keyed = |ids: &[EntryId]| ids.iter().map(|id| (source, *id)).collect::<Vec<_>>();
    c.table().kept(keys, &keyed(&lost), &keyed(&trimmed), at);
    if !lost.is_empty() {
        tracing::warn!(stream = %c.sources[source].key, entries = lost.len(), "entries in hand became another's");
    }
    if !trimmed.is_empty() {
        tracing::warn!(stream = %c.sources[source].key, entries = trimmed.len(), "entries were trimmed away while in hand");
    }
    Ok(())
}

/// A consumer that is paused takes nothing out of the buffer: others shall have it.
async fn give_up_waiting(c: &Arc<Consuming>) {
    if c.demand() > 0 {
        return;
    }
    let waiting = c.table().stale_waiting(c.keep_every(), Instant::now());
    if !waiting.is_empty() {
        let release = |(receipt, _)| (receipt, Settlement::Release { counted: false });
        settling::settle_own(c, waiting.into_iter().map(release).collect()).await;
    }
}

async fn hear_waiting(c: &Consuming) -> Result<Option<u64>> {
    let mut sum = Some(0);
    for place in &c.settings.places {
        let keys = [&*place.stream, &*place.again, &*place.due];
        let reply = items(c.link.run("lag", &c.scripts.waiting, &keys, &[&*c.settings.group]).await?);
        let told = |at: usize| reply.get(at).and_then(number).and_then(|number| u64::try_from(number).ok());
        sum = sum.zip(told(0)).zip(told(1)).map(|((sum, lag), due)| sum + lag + due);
    }
    Ok(sum)
}

async fn forget(c: &Consuming) -> Result<()> {
    let idle = c.settings.forget_after.as_millis().to_string();
    for source in &c.sources {
        c.link.run("keep", &c.scripts.forget, &[&*source.key], &[&*c.settings.group, &*c.member, &idle]).await?;
    }
    Ok(())
}
