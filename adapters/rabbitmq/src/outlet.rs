//! The way out: a connection of its own, confirms, and a look at what came back.
//!
//! RabbitMQ blocks connections that publish while it is short of memory or disk, so publishing never shares the consumer's
//! connection. Nothing here is sent twice for a neighbour's sake: each parcel has an answer of its own.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use hapax::{Error, ErrorKind, Result};
use lapin::types::ShortString;
use lapin::{Channel, Connection, ConnectionStatus};
use tokio::time::{Instant, sleep, timeout_at};

use crate::address::Address;
use crate::lane::{self, Parcel, in_order};
use crate::link::GOODBYE;
use crate::places::{Place, Places};
use crate::settings::Topology;
use crate::{error, wire};

/// How often a blocked connection is looked at.
const BLOCKED_POLL: Duration = Duration::from_millis(50);
/// How many places are created at once.
const ENSURED_AT_ONCE: usize = 8;

/// Publishes with confirms. Connects at first use and again after every loss.
pub(crate) struct Outlet {
    address: Arc<Address>,
    role: String,
    lanes: Lanes,
    patience: Duration,
    /// Taken out while it is used: a call that is dropped half way leaves no channel with unheard confirms behind.
    link: tokio::sync::Mutex<Option<Link>>,
    /// Of the newest connection.
    status: Mutex<Option<ConnectionStatus>>,
    was_blocked: AtomicBool,
}

/// One connection, and a channel for each lane.
struct Link {
    connection: Connection,
    channels: BTreeMap<ShortString, Channel>,
}

/// Which parcels share a channel. RabbitMQ works through a channel in order, and one queue that does not answer, because it
/// has no leader, holds up what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lanes {
    /// All share one.
    One,
    /// A channel for each routing key: for places that are few and known.
    EachRoute,
}

/// What became of one parcel; `None` while the channel's end has left it open.
type Answers = Vec<Option<Result<()>>>;

impl Outlet {
    pub(crate) fn new(address: Arc<Address>, role: String, lanes: Lanes, patience: Duration) -> Self {
        let link = tokio::sync::Mutex::new(None);
        Self { address, role, lanes, patience, link, status: Mutex::new(None), was_blocked: AtomicBool::new(false) }
    }

    /// Sends all, in order; an answer for each when a queue has it, or why none has, a second after the deadline at the latest.
    pub(crate) async fn publish(&self, parcels: &[Parcel], deadline: Instant) -> Vec<Result<()>> {
        if parcels.is_empty() {
            return Vec::new();
        }
        let mut answers: Answers = parcels.iter().map(|_| None).collect();
        // Confirms are waited for until the deadline; what is beyond it would be a call that lapin never answers.
        let sent = timeout_at(deadline + GOODBYE, self.send(parcels, &mut answers, deadline)).await;
        let open = sent.unwrap_or_else(|_| self.silence());
        let open = |answer: Option<Result<()>>| {
            answer.unwrap_or_else(|| Err(Error::new(open.kind(), "publish").because(open_text(&open))))
        };
        answers.into_iter().map(open).collect()
    }

    /// Creates these places side by side; an answer for each by the deadline.
    pub(crate) async fn ensure(&self, places: &Places, which: &[Place], deadline: Instant) -> Vec<Result<()>> {
        let none = || Err(error::no_answer("settle", "queue.declare", self.patience));
        let mut answers: Vec<Result<()>> = which.iter().map(|_| none()).collect();
        let ensuring = async {
            let mut slot = self.link.lock().await;
            let link = match slot.take().filter(Link::is_up) {
                Some(link) => link,
                None => self.connect().await?,
            };
            let each = |(at, place): (usize, Place)| {
                let ensured = places.ensure(&link.connection, [place], Topology::Create, self.patience);
                async move { (at, ensured.await) }
            };
            let mut under_way =
                stream::iter(which.iter().copied().enumerate()).map(each).buffer_unordered(ENSURED_AT_ONCE);
            while let Ok(Some((at, ensured))) = timeout_at(deadline, under_way.next()).await {
                answers[at] = ensured;
            }
            drop(under_way);
            *slot = Some(link);
            Ok(())
        };
        match timeout_at(deadline, ensuring).await {
            Ok(Err(error)) => which.iter().map(|_| Err(again(&error))).collect(),
            Ok(Ok(())) | Err(_) => answers,
        }
    }

    /// Messages that wait in these places.
    pub(crate) async fn waiting(&self, places: &Places) -> Result<u64> {
        let mut slot = self.link.lock().await;
        let link = match slot.take().filter(Link::is_up) {
            Some(link) => link,
            None => self.connect().await?,
        };
        let waiting = places.waiting(&link.connection, self.patience).await;
        *slot = Some(link);
        waiting
    }

    /// Says goodbye; the next call connects again.
    pub(crate) async fn close(&self) {
        if let Some(link) = self.link.lock().await.take() {
            // Explicitly, so that lapin's thread does not outlive the runtime.
            let _ = tokio::time::timeout(GOODBYE, link.connection.close(200, "done".into())).await;
        }
    }

    async fn connect(&self) -> Result<Link> {
        let connection = self.address.connect(&self.role).await?;
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection.status().clone());
        Ok(Link { connection, channels: BTreeMap::new() })
    }

    fn is_blocked(&self) -> bool {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(ConnectionStatus::blocked)
    }

    /// Why no answer came in time.
    fn silence(&self) -> Error {
        if self.is_blocked() {
            let why = "RabbitMQ blocks publishers: it is short of memory or disk (rabbitmqctl list_alarms)";
            return Error::new(ErrorKind::Unavailable, "publish").because(why);
        }
        error::no_answer("publish", "basic.publish", self.patience)
    }

    /// Waits until publishing is allowed again; told in the log once.
    async fn unblocked(&self) {
        while self.is_blocked() {
            if !self.was_blocked.swap(true, Ordering::Relaxed) {
                tracing::warn!(address = %self.address, "RabbitMQ blocks publishers; retries and dead letters wait");
            }
            sleep(BLOCKED_POLL).await;
        }
        if self.was_blocked.swap(false, Ordering::Relaxed) {
            tracing::info!(address = %self.address, "RabbitMQ takes messages again");
        }
    }

    /// Sends and notes what became of each; answers what is true of those that it leaves open.
    async fn send(&self, parcels: &[Parcel], answers: &mut Answers, deadline: Instant) -> Error {
        let mut slot = self.link.lock().await;
        if slot.as_ref().is_some_and(Link::is_up) && timeout_at(deadline, self.unblocked()).await.is_err() {
            return self.silence();
        }
        let mut link = match slot.take().filter(Link::is_up) {
            Some(link) => link,
            None => match self.connect().await {
                Ok(link) => link,
                Err(error) => return error,
            },
        };
        let room = usize::try_from(link.connection.configuration().frame_max()).unwrap_or(usize::MAX);
        for (parcel, answer) in parcels.iter().zip(answers.iter_mut()) {
            // A header frame beyond the negotiated size ends the connection, and would end the next one too.
            if room != 0 && wire::header_bytes(&parcel.properties) + 2_304 > room {
                let why = format!("its headers do not fit into one frame of {room} bytes");
                *answer = Some(Err(Error::new(ErrorKind::Rejected, "publish").because(why)));
            }
        }
        let mut lanes: BTreeMap<ShortString, Vec<usize>> = BTreeMap::new();
        for (at, parcel) in parcels.iter().enumerate().filter(|(at, _)| answers[*at].is_none()) {
            let lane = match self.lanes {
                Lanes::One => ShortString::default(),
                Lanes::EachRoute => parcel.routing_key.clone(),
            };
            lanes.entry(lane).or_default().push(at);
        }
        let mut running = Vec::with_capacity(lanes.len());
        for (key, these) in lanes {
            let channel = link.channels.remove(&key).filter(|channel| channel.status().connected());
            let (connection, patience) = (&link.connection, self.patience);
            running.push(Box::pin(async move {
                (key, lane::send(connection, channel, parcels, these, deadline, patience).await)
            }));
        }
        let (mut trouble, mut alive) = (None, false);
        for (key, (channel, heard)) in in_order(running).await {
            match channel {
                Ok(channel) => {
                    alive = true;
                    link.channels.insert(key, channel);
                }
                Err(error) => trouble = trouble.or(error),
            }
            for (at, answer) in heard {
                answers[at] = Some(answer);
            }
        }
        // A link of which nothing was heard may be half dead.
        if alive && link.is_up() {
            *slot = Some(link);
        }
        trouble.unwrap_or_else(|| self.silence())
    }
}

impl std::fmt::Debug for Outlet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outlet").field("address", &self.address).field("role", &self.role).finish_non_exhaustive()
    }
}

impl Link {
    fn is_up(&self) -> bool {
        self.connection.status().connected()
    }
}

/// The same error for another item.
pub(crate) fn again(error: &Error) -> Error {
    Error::new(error.kind(), "settle").because(error.to_string())
}

/// The text of an error without the operation before it.
fn open_text(error: &Error) -> String {
    let text = error.to_string();
    text.strip_prefix(&format!("{}: ", error.operation())).map(str::to_owned).unwrap_or(text)
}
