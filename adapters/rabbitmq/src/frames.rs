//! The frames that settle, sent on the channel that delivered and on no other.
//!
//! Not through lapin's `Acker`: it hands each ack to a task of its own, and a `multiple` could overtake the single ack before
//! it, which the server answers by closing the channel. The channel is never recovered in place, so a frame of an ended
//! session fails there, as `Acker` would by answering `Ok(false)`: a lost ack either way.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use hapax::Result;
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicNackOptions, BasicRejectOptions};
use tokio::time::{Instant, timeout_at};

use crate::error;
use crate::lane::in_order;
use crate::shared::stale;
use crate::unsettled::Frame;

/// Whether a frame was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Written,
    /// The channel has ended: what the frame would have settled comes again.
    Lost,
    /// The connection takes no bytes.
    Unknown(Duration),
}

impl Sent {
    pub(crate) fn answer(&self) -> Result<()> {
        match self {
            Self::Written => Ok(()),
            Self::Lost => Err(stale()),
            Self::Unknown(patience) => Err(error::no_answer("settle", "a settlement", *patience)),
        }
    }
}

type Writing<'c> = Pin<Box<dyn Future<Output = Sent> + Send + 'c>>;

/// Sends the frames in order and says for each tag whether its frame was written.
pub(crate) async fn send(
    channel: &Channel,
    frames: &[(Frame, Vec<u64>)],
    deadline: Instant,
    patience: Duration,
) -> BTreeMap<u64, Sent> {
    let each = |(frame, _): &(Frame, _)| write(channel, *frame, deadline, patience);
    let writing: Vec<Writing<'_>> = frames.iter().map(each).collect();
    let sent = in_order(writing).await;
    frames.iter().zip(sent).flat_map(|((_, tags), sent)| tags.iter().map(move |tag| (*tag, sent))).collect()
}

fn write(channel: &Channel, frame: Frame, deadline: Instant, patience: Duration) -> Writing<'_> {
    Box::pin(async move {
        let writing = async {
            match frame {
                Frame::Ack { tag, multiple } => channel.basic_ack(tag, BasicAckOptions { multiple }).await,
                Frame::Reject { tag } => channel.basic_reject(tag, BasicRejectOptions { requeue: true }).await,
                Frame::GiveBack { tag } => {
                    channel.basic_nack(tag, BasicNackOptions { multiple: false, requeue: true }).await
                }
            }
        };
        match timeout_at(deadline, writing).await {
            Ok(Ok(())) => Sent::Written,
            Ok(Err(_)) => Sent::Lost,
            Err(_) => Sent::Unknown(patience),
        }
    })
}
