//! One lane of the way out: parcels over one channel, their confirms, and what came back.
//!
//! A confirm says that the server took charge, not that a queue has the message: one that no queue takes is returned and
//! *then* confirmed. lapin hands a returned message to whichever confirm comes next, so returned messages are told apart by
//! their route here, and one batch at a time is under way on a channel.

use std::collections::BTreeSet;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hapax::{Error, ErrorKind, Result};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation, Connection, PublisherConfirm};
use tokio::time::{Instant, timeout_at};

use crate::deadline::within;
use crate::error;

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

/// The channel while it is good, or why it is not (`None`: it is silent), and what is certain.
pub(crate) type Lane = (std::result::Result<Channel, Option<Error>>, Vec<(usize, Result<()>)>);

/// Sends parcels over one channel. Where the server closes it over one of them, that one is found by sending them one by one.
pub(crate) async fn send(
    connection: &Connection,
    channel: Option<Channel>,
    parcels: &[Parcel],
    these: Vec<usize>,
    deadline: Instant,
    patience: Duration,
) -> Lane {
    let (mut open, mut answers, mut alone) = (these, Vec::new(), false);
    let mut channel = match channel {
        Some(channel) => channel,
        None => match confirming(connection, patience).await {
            Ok(channel) => channel,
            Err(error) => return (Err(Some(error)), answers),
        },
    };
    while !open.is_empty() {
        let tried = if alone { &open[..1] } else { &open[..] };
        let (ended, heard) = attempt(&channel, parcels, tried, deadline).await;
        answers.extend(heard);
        let broken = match ended {
            Ended::Heard => None,
            // The channel is dropped with the confirms that may still come.
            Ended::Silent => return (Err(None), answers),
            Ended::Broken(broken) => Some(broken),
        };
        if let Some(broken) = broken {
            if error::soft(&broken).is_none() || !connection.status().connected() {
                return (Err(Some(error::of(&broken, "publish"))), answers);
            }
            if let [culprit] = *tried {
                answers.push((culprit, Err(refusal(&broken, &parcels[culprit]))));
            }
            alone = true;
            channel = match confirming(connection, patience).await {
                Ok(channel) => channel,
                Err(error) => return (Err(Some(error)), answers),
            };
        }
        open.retain(|at| !answers.iter().any(|(answered, _)| answered == at));
    }
    (Ok(channel), answers)
}

async fn confirming(connection: &Connection, patience: Duration) -> Result<Channel> {
    let channel = within(patience, "publish", "channel.open", connection.create_channel()).await?;
    within(patience, "publish", "confirm.select", channel.confirm_select(ConfirmSelectOptions::default())).await?;
    Ok(channel)
}

/// How an attempt ended.
enum Ended {
    /// With an answer for each parcel.
    Heard,
    /// At the deadline.
    Silent,
    /// With the channel.
    Broken(lapin::Error),
}

/// Sends these parcels and waits for their confirms. Answers what is certain, each for itself: one that is never confirmed must
/// not let its neighbours be sent again and again.
async fn attempt(
    channel: &Channel,
    parcels: &[Parcel],
    these: &[usize],
    deadline: Instant,
) -> (Ended, Vec<(usize, Result<()>)>) {
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
    let Ok(written) = timeout_at(deadline, in_order(sending)).await else { return (Ended::Silent, Vec::new()) };
    let confirms: Vec<PublisherConfirm> = match written.into_iter().collect() {
        Ok(confirms) => confirms,
        Err(broken) => return (Ended::Broken(broken), Vec::new()),
    };
    let (heard, certain) = confirmations(confirms, deadline).await;
    let returned: BTreeSet<_> = heard.iter().flatten().flatten().filter_map(returned_to).collect();
    let (mut answers, mut silent, mut broken) = (Vec::with_capacity(these.len()), false, None);
    for ((at, heard), certain) in these.iter().zip(heard).zip(certain) {
        let Parcel { exchange, routing_key, .. } = &parcels[*at];
        let why = match heard {
            Some(Ok(Confirmation::Nack(_))) => {
                (ErrorKind::Full, format!("queue `{routing_key}` refuses the message: it is full, or out of reach"))
            }
            Some(Ok(_)) if returned.contains(&(exchange.clone(), routing_key.clone())) => {
                let to = format!("exchange `{exchange}`, routing key `{routing_key}`");
                (ErrorKind::Unavailable, format!("no queue takes the message ({to})"))
            }
            Some(Ok(_)) if certain => {
                answers.push((*at, Ok(())));
                continue;
            }
            Some(Err(e)) => {
                broken = Some(e);
                continue;
            }
            Some(Ok(_)) | None => {
                silent = true;
                continue;
            }
        };
        answers.push((*at, Err(Error::new(why.0, "publish").because(why.1))));
    }
    let ended = match broken {
        Some(broken) => Ended::Broken(broken),
        None if silent => Ended::Silent,
        None => Ended::Heard,
    };
    (ended, answers)
}

/// Where a message that came back was to go.
fn returned_to(confirmation: &Confirmation) -> Option<(ShortString, ShortString)> {
    match confirmation {
        Confirmation::Ack(Some(message)) | Confirmation::Nack(Some(message)) => {
            Some((message.exchange.clone(), message.routing_key.clone()))
        }
        _ => None,
    }
}

/// What is heard of each until the deadline, and whether it is certain that it did not come back.
///
/// A returned message precedes its own confirm and rides on the first confirm after it, whosever that is. So once all
/// confirms are looked at *after* one was heard, its return is among what was heard.
async fn confirmations(
    mut confirms: Vec<PublisherConfirm>,
    deadline: Instant,
) -> (Vec<Option<lapin::Result<Confirmation>>>, Vec<bool>) {
    let mut heard: Vec<Option<lapin::Result<Confirmation>>> = confirms.iter().map(|_| None).collect();
    let mut look = |heard: &mut Vec<Option<lapin::Result<Confirmation>>>, cx: &mut Context<'_>| {
        let mut all = true;
        for (confirm, heard) in confirms.iter_mut().zip(heard.iter_mut()).filter(|(_, heard)| heard.is_none()) {
            match Pin::new(confirm).poll(cx) {
                Poll::Ready(confirmation) => *heard = Some(confirmation),
                Poll::Pending => all = false,
            }
        }
        if all { Poll::Ready(()) } else { Poll::Pending }
    };
    let all = timeout_at(deadline, poll_fn(|cx| look(&mut heard, cx))).await.is_ok();
    let certain: Vec<bool> = heard.iter().map(Option::is_some).collect();
    if !all {
        poll_fn(|cx| {
            let _ = look(&mut heard, cx);
            Poll::Ready(())
        })
        .await;
    }
    (heard, certain)
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

/// Polls all, in order, until each is done.
pub(crate) async fn in_order<F: Future + Unpin>(futures: Vec<F>) -> Vec<F::Output> {
    let mut under_way: Vec<(Option<F>, Option<F::Output>)> = futures.into_iter().map(|f| (Some(f), None)).collect();
    poll_fn(|cx| {
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
