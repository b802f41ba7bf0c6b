//! `RedisBroker`: consumer groups on Redis Streams.
//!
//! | contract | here |
//! |---|---|
//! | open | `XGROUP CREATE .. 0 MKSTREAM`, or a check |
//! | receive | from a buffer that a task of its own fills: `XREADGROUP .. >` on a connection of its own; `XPENDING`, `XCLAIM` for what others lost |
//! | between | `XCLAIM .. JUSTID` keeps what is in hand ours, where the pending list says that it is |
//! | ack | a script: still ours? then `XACK`, many ids at once |
//! | release | a script: `XCLAIM` to the name `hapax.given-back`, idle for long, so that any member takes it at once |
//! | retry | a script: into a sorted set by due time, with `XACK`; moved into a stream of retries by whichever member looks first |
//! | dead letter | a script: `XADD` to the stream of dead letters with `XACK`, one step |
//! | close | everything pending for this member is given back |
//!
//! Limits: no order (members compete, retries come later); a session ends with `close` or with the group, not with a
//! connection, since the server's pending list belongs to the member; entries of the stream stay until their owner trims them
//! (or [`delete_done`](RedisBrokerBuilder::delete_done)); an entry of more than 3,000 fields is cut when it is dead-lettered.

mod builder;
mod consuming;
pub(crate) mod entry;
mod groups;
mod keeper;
mod outlook;
pub(crate) mod places;
mod reader;
mod scripts;
mod server;
mod settling;
mod table;

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use hapax::{Broker, Capabilities, Delivery, Durability, Error, ErrorKind, Limits, Receipt, Result, Settlement, Want};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use builder::Settings;
pub use builder::{MissingGroup, RedisBrokerBuilder, Topology, Trimmed};
pub(crate) use consuming::text;
use consuming::{BLOCK_MAX, Consuming, Counters, PARKING, Phase, TROUBLE_TOLD_EVERY};

use crate::connect::RedisServer;

/// Longest that `close` waits for each of its steps.
const CLOSE_STEP: Duration = Duration::from_secs(3);
/// Most entries of one call that gives back.
const GIVE_BACK_MAX: usize = 500;

/// One member of a consumer group on one or several Redis streams.
///
/// It consumes from [`open`](Broker::open) on. Dropping it without `close` is how a crash looks: what it held is taken over
/// by others when nobody kept it for [`take_over_after`](RedisBrokerBuilder::take_over_after).
///
/// ```no_run
/// use std::time::Duration;
/// use hapax_redis::{RedisBroker, RedisServer};
///
/// # fn main() -> hapax::Result<()> {
/// let server = RedisServer::at("redis://127.0.0.1:6379".parse()?)?;
/// let broker = RedisBroker::builder(server, "orders", "billing")
///     .take_over_after(Duration::from_secs(30))
///     .build()?;
/// # drop(broker);
/// # Ok(())
/// # }
/// ```
pub struct RedisBroker {
    settings: Arc<Settings>,
    sessions: Arc<AtomicU32>,
    counters: Arc<Counters>,
    opening: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

struct State {
    running: Option<Running>,
    durability: Durability,
}

/// What one `open` started.
struct Running {
    consuming: Arc<Consuming>,
    /// The reader and the keeper, until `close` awaits them.
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        self.consuming.advance(Phase::Closed);
        self.consuming.table().end();
    }
}

impl RedisBroker {
    /// A member of the group `group` on `stream`, with the defaults of [`RedisBrokerBuilder`]. The group's name is best the
    /// consumer's.
    pub fn builder(server: RedisServer, stream: impl Into<Box<str>>, group: impl Into<Box<str>>) -> RedisBrokerBuilder {
        RedisBrokerBuilder::new(server, stream.into(), group.into())
    }

    fn with(settings: Settings) -> Self {
        Self {
            settings: Arc::new(settings),
            sessions: Arc::new(AtomicU32::new(1)),
            counters: Arc::default(),
            opening: tokio::sync::Mutex::new(()),
            state: Mutex::new(State { running: None, durability: Durability::Lossy }),
        }
    }

    /// The streams of dead letters, one for each stream in the order they were named.
    pub fn dead_letter_streams(&self) -> Vec<&str> {
        self.settings.places.iter().map(|place| &*place.dead).collect()
    }

    /// The sorted sets in which retries wait for their time, one for each stream.
    pub fn due_sets(&self) -> Vec<&str> {
        self.settings.places.iter().map(|place| &*place.due).collect()
    }

    /// The streams into which due retries are moved, one for each stream; read by this group alone.
    pub fn retry_streams(&self) -> Vec<&str> {
        self.settings.places.iter().map(|place| &*place.again).collect()
    }

    /// How many entries were found trimmed away before they were processed.
    pub fn trimmed(&self) -> u64 {
        self.counters.trimmed.load(Ordering::Relaxed)
    }

    /// How often the group was found missing while it was consumed.
    pub fn groups_lost(&self) -> u64 {
        self.counters.groups_lost.load(Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn consuming(&self) -> Option<Arc<Consuming>> {
        self.state().running.as_ref().map(|running| Arc::clone(&running.consuming))
    }
}

#[async_trait]
impl Broker for RedisBroker {
    async fn open(&self, limits: Limits) -> Result<()> {
        let _alone = self.opening.lock().await;
        let before = self.state().running.take();
        if let Some(before) = before.filter(|before| !before.tasks.is_empty()) {
            // One that was not closed: what it held is given back first.
            let _unreachable = close(before, self.settings.member.is_none()).await;
        }
        let settings = Arc::clone(&self.settings);
        let consuming =
            Arc::new(Consuming::new(settings, limits, Arc::clone(&self.sessions), Arc::clone(&self.counters)));
        let durability = server::examine(&consuming.link, &self.settings.places[0]).await?;
        groups::prepare(&consuming.link, &self.settings).await?;
        let tasks = vec![
            tokio::spawn(reader::Reader::new(Arc::clone(&consuming)).run()),
            tokio::spawn(keeper::run(Arc::clone(&consuming))),
        ];
        let mut state = self.state();
        state.durability = durability;
        state.running = Some(Running { consuming, tasks });
        Ok(())
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        let Some(c) = self.consuming() else {
            return Err(Error::new(ErrorKind::Configuration, "receive").because("`open` comes first"));
        };
        let mut told = Instant::now() + TROUBLE_TOLD_EVERY;
        loop {
            // Listening before looking: from its creation on, `notified` misses no `notify_waiters`. What `take` hands out is
            // returned without another await, so a dropped future has taken nothing.
            let arrived = c.arrivals.notified();
            if c.phase() != Phase::Running {
                return Ok(Vec::new());
            }
            let deliveries = c.table().take(want, Instant::now());
            if !deliveries.is_empty() {
                return Ok(deliveries);
            }
            if let Some(error) = c.trouble(Instant::now() >= told) {
                return Err(error);
            }
            // What waits and was not handed out waits for room.
            if c.table().waiting() == 0 {
                c.want(want.events);
            }
            tokio::select! {
                biased;
                () = arrived => {}
                () = tokio::time::sleep_until(told) => {
                    if !c.trouble_known() {
                        told = Instant::now() + TROUBLE_TOLD_EVERY;
                    }
                }
            }
        }
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        match self.consuming() {
            Some(c) => settling::settle(&c, batch).await,
            None => {
                let stale = || Err(Error::new(ErrorKind::Stale, "settle").because("the session has ended"));
                batch.iter().map(|_| stale()).collect()
            }
        }
    }

    async fn stop(&self) -> Result<()> {
        if let Some(c) = self.consuming() {
            c.advance(Phase::Stopped);
        }
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        let _alone = self.opening.lock().await;
        let running = {
            let mut state = self.state();
            let Some(running) = state.running.as_mut().filter(|running| !running.tasks.is_empty()) else {
                return Ok(());
            };
            let tasks = std::mem::take(&mut running.tasks);
            Running { consuming: Arc::clone(&running.consuming), tasks }
        };
        close(running, self.settings.member.is_none()).await
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::none("redis");
        capabilities.retry_max = settling::RETRY_MAX;
        capabilities.dead_letter_in_one_step = true;
        capabilities.settle_fenced = true;
        capabilities.position_is_stable = true;
        capabilities.durability = self.state().durability;
        capabilities.redelivery_horizon = self.settings.redelivery_horizon;
        capabilities
    }

    fn lag(&self) -> Option<u64> {
        let lag = self.consuming()?.lag.load(Ordering::Relaxed);
        (lag != u64::MAX).then_some(lag)
    }
}

/// Ends the tasks, the session, and then, when nothing of ours is under way any more, gives back what is pending.
async fn close(mut running: Running, forget: bool) -> Result<()> {
    let c = Arc::clone(&running.consuming);
    c.advance(Phase::Closed);
    for task in &mut running.tasks {
        // A reader that blocks ends by itself. One whose server is gone is dropped with its connection.
        if timeout(BLOCK_MAX + CLOSE_STEP, &mut *task).await.is_err() {
            task.abort();
        }
    }
    c.table().end();
    let give_back = async {
        for source in &c.sources {
            let most = GIVE_BACK_MAX.to_string();
            let forget = if forget { "forget" } else { "keep" };
            let mut from = "-".to_owned();
            loop {
                let arguments = [&*c.settings.group, &*c.member, PARKING, forget, &most, &from];
                let reply = c.link.run("close", &c.scripts.give_back, &[&*source.key], &arguments).await?;
                let Some(last) = entry::entry_id(reply) else { break };
                from = format!("({last}");
            }
        }
        Ok(())
    };
    match timeout(CLOSE_STEP, give_back).await {
        Ok(Err(error)) if consuming::is_no_group(&error) => Ok(()),
        Ok(given_back) => given_back,
        Err(_) => Err(Error::new(ErrorKind::Unavailable, "close")
            .because("the server does not answer: what is pending is taken over by others in its time")),
    }
}

impl fmt::Debug for RedisBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisBroker")
            .field("server", &self.settings.server)
            .field("streams", &self.settings.places.iter().map(|place| &*place.stream).collect::<Vec<_>>())
            .field("group", &self.settings.group)
            .finish_non_exhaustive()
    }
}
