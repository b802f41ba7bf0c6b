//! The consuming link, and the task that keeps it: connect, declare, consume, pass on, and all of it again after every kind of
//! loss.
//!
//! One link is one connection, one channel, one consumer, one session. Nothing of it is mended: a channel error, the end of
//! the stream (the server cancelled the consumer because its queue went), an error in the stream, a lost connection and a
//! channel that is closed without the stream saying so all end the session and begin a new one from the connection on.

use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use futures_util::StreamExt;
use hapax::{Error, ErrorKind, Limits, Result};
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, Consumer};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::address::Address;
use crate::deadline::within;
use crate::places::Place;
use crate::settings::Settings;
use crate::shared::{Order, Shared};
use crate::{error, wire};

/// How often the channel is looked at, beside what the stream tells.
const LOOK: Duration = Duration::from_millis(500);
/// The longest wait between two tries to connect.
const RECONNECT_MAX: Duration = Duration::from_secs(2);
/// How long a connection may take to say goodbye.
pub(crate) const GOODBYE: Duration = Duration::from_secs(1);

pub(crate) struct Link {
    pub(crate) connection: Connection,
    pub(crate) channel: Channel,
    consumer: Consumer,
    tag: ShortString,
}

/// Why a link is no more.
enum End {
    /// As ordered.
    Closed,
    /// Lost, and why.
    Lost(String),
}

impl Link {
    /// Connects, creates or checks what is needed, and consumes.
    pub(crate) async fn connect(address: &Address, settings: &Settings, limits: &Limits) -> Result<Self> {
        let (places, patience) = (&settings.places, settings.answer_timeout);
        let connection = address.connect(&format!("consumer {}", places.group)).await?;
        let linked = async {
            // The wait queues too, and not at their first use: what is created just before a node is killed is lost with what is
            // in it (docs/rabbitmq.md).
            let needed = [Place::Work, Place::Dead].into_iter().chain(places.waits());
            places.ensure(&connection, needed, settings.topology, patience).await?;
            let channel = within(patience, "open", "channel.open", connection.create_channel()).await?;
            let prefetch = u16::try_from(limits.events).unwrap_or(u16::MAX).clamp(1, settings.prefetch_max);
            // Before the consumer and for each consumer: quorum queues refuse a prefetch for the whole channel.
            let qos = channel.basic_qos(prefetch, BasicQosOptions { global: false });
            within(patience, "open", "basic.qos", qos).await?;
            let tag = wire::short(&format!("hapax-{:016x}", fastrand::u64(..)))?;
            let queue = wire::short(&places.work)?;
            let consuming =
                channel.basic_consume(queue, tag.clone(), BasicConsumeOptions::default(), FieldTable::default());
            let consumer = within(patience, "open", "basic.consume", consuming).await.map_err(|e| {
                Error::new(e.kind(), "open").because(format!("queue `{}` cannot be consumed: {e}", places.work))
            })?;
            Ok((channel, consumer, tag))
        };
        match linked.await {
            Ok((channel, consumer, tag)) => Ok(Self { connection, channel, consumer, tag }),
            Err(error) => {
                let _ = timeout(GOODBYE, connection.close(200, "done".into())).await;
                Err(error)
            }
        }
    }

    fn is_up(&self) -> bool {
        self.connection.status().connected() && self.channel.status().connected()
    }

    /// Explicitly, so that the server delivers again at once and lapin's thread does not outlive the runtime.
    async fn close(self) {
        if self.connection.status().connected() {
            let _ = timeout(GOODBYE, self.connection.close(200, "done".into())).await;
        }
    }
}

/// However the supervisor ends, no session outlives it and no receive waits for it.
struct Watch(Arc<Shared>);

impl Drop for Watch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.broke();
        }
        self.0.end_any();
    }
}

/// Keeps the link until it is told to close it.
pub(crate) async fn supervise(
    shared: Arc<Shared>,
    first: Link,
    session: u32,
    limits: Limits,
    mut orders: watch::Receiver<Order>,
) {
    let _watch = Watch(Arc::clone(&shared));
    let (mut link, mut session) = (first, session);
    loop {
        let end = pump(&shared, &mut link, session, &limits, &mut orders).await;
        // The session ends before the connection does: what comes again must not meet a session that looks alive.
        let lost = match &end {
            End::Closed => None,
            End::Lost(why) => Some(why.as_str()),
        };
        shared.end(session, lost);
        link.close().await;
        if matches!(end, End::Closed) || *orders.borrow() != Order::Run {
            return;
        }
        match reconnect(&shared, &limits, &mut orders).await {
            Some((next, number)) => (link, session) = (next, number),
            None => return,
        }
    }
}

/// Passes deliveries on until the link ends.
async fn pump(
    shared: &Shared,
    link: &mut Link,
    session: u32,
    limits: &Limits,
    orders: &mut watch::Receiver<Order>,
) -> End {
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stopped = false;
    loop {
        let order = *orders.borrow_and_update();
        if order == Order::Close {
            return End::Closed;
        }
        #[cfg(test)]
        assert!(order != Order::Panic, "as ordered");
        if order == Order::Stop && !stopped {
            stopped = true;
            stop(shared, link, session, limits).await;
        }
        tokio::select! {
            biased;
            changed = orders.changed() => {
                if changed.is_err() {
                    return End::Closed;
                }
            }
            next = link.consumer.next(), if !stopped => match next {
                Some(Ok(delivery)) => shared.arrived(session, delivery, limits),
                Some(Err(e)) => return End::Lost(error::text(&e)),
                None => return End::Lost("RabbitMQ cancelled the consumer: its queue was deleted or moved".to_owned()),
            },
            _ = look.tick() => {
                if !link.is_up() {
                    return End::Lost("the channel is closed".to_owned());
                }
            }
        }
    }
}

/// No further deliveries; those that nobody has seen go back.
async fn stop(shared: &Shared, link: &mut Link, session: u32, limits: &Limits) {
    let patience = shared.settings.answer_timeout;
    let cancelling = link.channel.basic_cancel(link.tag.clone(), BasicCancelOptions::default());
    if within(patience, "stop", "basic.cancel", cancelling).await.is_ok() {
        // What the server sent before it heard of the cancellation is in lapin's buffer; the stream ends behind it.
        while let Ok(Some(Ok(delivery))) = timeout(GOODBYE, link.consumer.next()).await {
            shared.arrived(session, delivery, limits);
        }
    }
    shared.give_back_arrivals(session).await;
    shared.stopped();
}

/// Tries until there is a link again; `None` when there is to be none.
async fn reconnect(shared: &Shared, limits: &Limits, orders: &mut watch::Receiver<Order>) -> Option<(Link, u32)> {
    let mut waits = delays();
    loop {
        if *orders.borrow_and_update() != Order::Run {
            shared.stopped();
            return None;
        }
        let connected = tokio::select! {
            biased;
            changed = orders.changed() => {
                changed.ok()?;
                continue;
            }
            connected = Link::connect(&shared.address, &shared.settings, limits) => connected,
        };
        match connected {
            Ok(link) => {
                let session = shared.begin(link.channel.clone());
                tracing::info!(queue = shared.settings.places.work, session, "RabbitMQ is reached again");
                return Some((link, session));
            }
            Err(error) => shared.out_of_reach(&error),
        }
        let wait = waits.next().unwrap_or(RECONNECT_MAX);
        tokio::select! {
            biased;
            changed = orders.changed() => changed.ok()?,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

fn delays() -> ExponentialBackoff {
    let delays = ExponentialBuilder::new().with_min_delay(Duration::from_millis(50)).with_max_delay(RECONNECT_MAX);
    delays.with_factor(2.0).with_jitter().without_max_times().build()
}

/// What receive answers while there is no link.
pub(crate) fn out_of_reach(why: &str) -> Error {
    Error::new(ErrorKind::Unavailable, "receive").because(format!("RabbitMQ is out of reach: {why}"))
}

#[cfg(test)]
mod tests;
