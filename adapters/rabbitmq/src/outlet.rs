//! The way out: a connection of its own, confirms, and a look at what came back.
//!
//! RabbitMQ blocks connections that publish while it is short of memory or disk, so publishing never shares the consumer's
//! connection. A confirm says that the server took charge, not that a queue has the message: one that no queue takes is
//! returned and *then* confirmed. lapin hands a returned message to whichever confirm comes next, so returned messages
//! are told apart by their route here, and one batch at a time is under way.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use hapax::{Error, ErrorKind, Result};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionStatus};
use tokio::time::{Instant, sleep, timeout_at};

use crate::address::Address;
use crate::deadline::within;
use crate::places::{Place, Places};
use crate::settings::Topology;
use crate::{error, wire};

/// How often a blocked connection is looked at.
const BLOCKED_POLL: Duration = Duration::from_millis(50);
/// How long a connection may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// One message to send.
#[derive(Clone, Debug)]
pub(crate) struct Parcel {
    pub(crate) exchange: ShortString,
    pub(crate) routing_key: ShortString,
    pub(crate) properties: BasicProperties,
    pub(crate) body: Bytes,
    /// Whether it is an error that no queue takes it.
    pub(crate) mandatory: bool,
}

/// Publishes with confirms. Connects at first use and again after every loss.
pub(crate) struct Outlet {
    address: Arc<Address>,
    role: String,
    patience: Duration,
    /// Taken out while it is used: a call that is dropped half way leaves no channel with unheard confirms behind.
    link: tokio::sync::Mutex<Option<Link>>,
    /// Of the newest connection.
    status: Mutex<Option<ConnectionStatus>>,
    was_blocked: AtomicBool,
}

struct Link {
    connection: Connection,
    channel: Channel,
}

/// What became of one parcel; `None` while the channel's end has left it open.
type Answers = Vec<Option<Result<()>>>;

impl Outlet {
    pub(crate) fn new(address: Arc<Address>, role: String, patience: Duration) -> Self {
        let link = tokio::sync::Mutex::new(None);
        Self { address, role, patience, link, status: Mutex::new(None), was_blocked: AtomicBool::new(false) }
    }

    /// Sends all, in order; an answer for each when a queue has it, or why none has.
    pub(crate) async fn publish(&self, parcels: &[Parcel]) -> Vec<Result<()>> {
        if parcels.is_empty() {
            return Vec::new();
        }
        let mut answers: Answers = parcels.iter().map(|_| None).collect();
        let deadline = Instant::now() + self.patience;
        let sent = timeout_at(deadline, self.send(parcels, &mut answers)).await;
        let open = match sent {
            Ok(Ok(())) => Error::new(ErrorKind::Internal, "publish").because("a parcel was passed over"),
            Ok(Err(error)) => error,
            Err(_) => self.silence(),
        };
        let open = |answer: Option<Result<()>>| {
            answer.unwrap_or_else(|| Err(Error::new(open.kind(), "publish").because(open_text(&open))))
        };
        answers.into_iter().map(open).collect()
    }

    /// Creates or checks a queue over this connection.
    pub(crate) async fn ensure(&self, places: &Places, place: Place, topology: Topology) -> Result<()> {
        let mut slot = self.link.lock().await;
        let link = match slot.take().filter(Link::is_up) {
            Some(link) => link,
            None => self.connect().await?,
        };
        let ensured = places.ensure(&link.connection, [place], topology, self.patience).await;
        *slot = Some(link);
        ensured
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
        let channel = confirming(&connection, self.patience).await?;
        Ok(Link { connection, channel })
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

    async fn send(&self, parcels: &[Parcel], answers: &mut Answers) -> Result<()> {
        let mut slot = self.link.lock().await;
        if slot.as_ref().is_some_and(Link::is_up) {
            self.unblocked().await;
        }
        let mut link = match slot.take().filter(Link::is_up) {
            Some(link) => link,
            None => self.connect().await?,
        };
        let room = usize::try_from(link.connection.configuration().frame_max()).unwrap_or(usize::MAX);
        for (parcel, answer) in parcels.iter().zip(answers.iter_mut()) {
            // A header frame beyond the negotiated size ends the connection, and would end the next one too.
            if room != 0 && wire::header_bytes(&parcel.properties) + 2_304 > room {
                let why = format!("its headers do not fit into one frame of {room} bytes");
                *answer = Some(Err(Error::new(ErrorKind::Rejected, "publish").because(why)));
            }
        }
        let mut alone = false;
        loop {
            let open: Vec<usize> = (0..parcels.len()).filter(|at| answers[*at].is_none()).collect();
            let Some(first) = open.first().copied() else { break };
            let these = if alone { vec![first] } else { open };
            let Some(broken) = attempt(&link.channel, parcels, &these, answers).await else { continue };
            let soft = error::soft(&broken);
            if soft.is_none() || !link.connection.status().connected() {
                return Err(error::of(&broken, "publish"));
            }
            // The server closed the channel because of one parcel. Which one is found by sending them one by one.
            if these.len() == 1 {
                answers[these[0]] = Some(Err(refusal(&broken, &parcels[these[0]])));
            }
            alone = true;
            link.channel = confirming(&link.connection, self.patience).await?;
        }
        *slot = Some(link);
        Ok(())
    }
}

impl std::fmt::Debug for Outlet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outlet").field("address", &self.address).field("role", &self.role).finish_non_exhaustive()
    }
}

impl Link {
    fn is_up(&self) -> bool {
        self.connection.status().connected() && self.channel.status().connected()
    }
}

/// The text of an error without the operation before it.
fn open_text(error: &Error) -> String {
    let text = error.to_string();
    text.strip_prefix(&format!("{}: ", error.operation())).map(str::to_owned).unwrap_or(text)
}

async fn confirming(connection: &Connection, patience: Duration) -> Result<Channel> {
    let channel = within(patience, "publish", "channel.open", connection.create_channel()).await?;
    within(patience, "publish", "confirm.select", channel.confirm_select(ConfirmSelectOptions::default())).await?;
    Ok(channel)
}

/// Sends these parcels and waits for their confirms. Answers what is certain; what ended the channel comes back.
async fn attempt(
    channel: &Channel,
    parcels: &[Parcel],
    these: &[usize],
    answers: &mut Answers,
) -> Option<lapin::Error> {
    let mut sending: Vec<Pin<Box<dyn Future<Output = lapin::Result<_>> + Send + '_>>> = Vec::with_capacity(these.len());
    for at in these {
        let Parcel { exchange, routing_key, properties, body, mandatory } = &parcels[*at];
        let options = BasicPublishOptions { mandatory: *mandatory, ..BasicPublishOptions::default() };
        sending.push(Box::pin(channel.basic_publish(
            exchange.clone(),
            routing_key.clone(),
            options,
            body,
            properties.clone(),
        )));
    }
    // Each first poll puts the frames into lapin's queue, so the order is that of the batch.
    let mut confirms = Vec::with_capacity(these.len());
    for written in in_order(sending).await {
        match written {
            Ok(confirm) => confirms.push(confirm),
            Err(broken) => return Some(broken),
        }
    }
    let (mut heard, mut returned, mut broken) = (Vec::with_capacity(these.len()), BTreeSet::new(), None);
    for confirm in confirms {
        let confirmation = match confirm.await {
            Ok(confirmation) => confirmation,
            Err(e) => {
                broken = Some(e);
                break;
            }
        };
        let taken = !matches!(confirmation, Confirmation::Nack(_));
        if let Confirmation::Ack(Some(message)) | Confirmation::Nack(Some(message)) = confirmation {
            returned.insert((message.exchange.clone(), message.routing_key.clone()));
        }
        heard.push(taken);
    }
    // A channel that broke may have taken returned messages with it: then only refusals are certain.
    for (at, taken) in these.iter().zip(heard) {
        let Parcel { exchange, routing_key, .. } = &parcels[*at];
        if !taken {
            let why = format!("queue `{routing_key}` refuses the message: it is full, or out of reach");
            answers[*at] = Some(Err(Error::new(ErrorKind::Full, "publish").because(why)));
        } else if returned.contains(&(exchange.clone(), routing_key.clone())) {
            let why = format!("no queue takes the message (exchange `{exchange}`, routing key `{routing_key}`)");
            answers[*at] = Some(Err(Error::new(ErrorKind::Unavailable, "publish").because(why)));
        } else if broken.is_none() {
            answers[*at] = Some(Ok(()));
        }
    }
    broken
}

/// Polls all, in order, until each is done.
pub(crate) async fn in_order<F: Future + Unpin>(futures: Vec<F>) -> Vec<F::Output> {
    let mut under_way: Vec<(Option<F>, Option<F::Output>)> = futures.into_iter().map(|f| (Some(f), None)).collect();
    std::future::poll_fn(|cx| {
        let mut waiting = false;
        for (future, output) in &mut under_way {
            let Some(polled) = future.as_mut() else { continue };
            match Pin::new(polled).poll(cx) {
                Poll::Ready(done) => (*future, *output) = (None, Some(done)),
                Poll::Pending => waiting = true,
            }
        }
        if waiting { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    under_way.into_iter().filter_map(|(_, output)| output).collect()
}

/// What it means that the server closed the channel over one parcel.
fn refusal(broken: &lapin::Error, parcel: &Parcel) -> Error {
    let (kind, why) = match error::soft(broken) {
        // Somebody must change something, but not the message.
        Some(AMQPSoftError::NOTFOUND | AMQPSoftError::ACCESSREFUSED) => (ErrorKind::Unavailable, error::text(broken)),
        _ => (ErrorKind::Rejected, error::text(broken)),
    };
    let (exchange, key) = (&parcel.exchange, &parcel.routing_key);
    Error::new(kind, "publish").because(format!("exchange `{exchange}`, routing key `{key}`: {why}"))
}
