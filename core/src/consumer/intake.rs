//! Intake: the receive loop. Takes as much as there is room for, in events and in bytes, and nothing while the consumer
//! is paused, the store is out of reach, or the kill switch is open.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use backon::ExponentialBackoff;
use tokio::time::{Duration, Instant, Sleep, sleep};

use super::calls::delays;
use crate::broker::{Broker, Delivery, Want};
use crate::error::{Error, Result};

type Receiving = Pin<Box<dyn Future<Output = Result<Vec<Delivery>>> + Send>>;

/// The longest wait between two tries to receive: a server that is back is seen soon.
const RECEIVE_RETRY_MAX: Duration = Duration::from_secs(1);

/// The receive loop of one consumer.
pub(super) struct Intake {
    broker: Arc<dyn Broker>,
    receiving: Option<Receiving>,
    /// A receive was begun, and nobody has asked about it yet.
    has_begun: bool,
    /// The last receive failed, and none has reached the broker since.
    failed: bool,
    /// When the receive after a failure began.
    receiving_since: Instant,
    /// A receive that waits for so long has reached it.
    reached_after: Duration,
    pausing: Option<Pin<Box<Sleep>>>,
    waits: ExponentialBackoff,
    stopped: bool,
}

/// What intake has to tell.
pub(super) enum Arrived {
    /// Deliveries.
    Deliveries(Vec<Delivery>),
    /// Nothing yet, but after a failure the broker is reached again.
    Reached,
    /// The broker will deliver nothing more.
    Stopped,
    /// Receiving failed; it is tried again if that can help.
    Failed(Error),
}

impl Intake {
    /// `reached_after` is how long a call to the broker may take: it tells waiting for deliveries from waiting for the
    /// broker.
    pub(super) fn new(broker: Arc<dyn Broker>, reached_after: Duration) -> Self {
        Self {
            broker,
            receiving: None,
            has_begun: false,
            receiving_since: Instant::now(),
            failed: false,
            reached_after,
            pausing: None,
            waits: delays(RECEIVE_RETRY_MAX),
            stopped: false,
        }
    }

    /// Receives up to `room`; `None` means that nothing may be taken now: a receive under way is dropped, which loses
    /// nothing.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, room: Option<Want>) -> Poll<Arrived> {
        let Some(want) = room.filter(|_| !self.stopped) else {
            self.receiving = None;
            return Poll::Pending;
        };
        if let Some(pausing) = &mut self.pausing {
            std::task::ready!(pausing.as_mut().poll(cx));
            self.pausing = None;
        }
        let receiving = self.receiving.get_or_insert_with(|| {
            let broker = Arc::clone(&self.broker);
            self.has_begun = true;
            if self.failed {
                self.receiving_since = Instant::now();
            }
            Box::pin(async move { broker.receive(want).await })
        });
        let Poll::Ready(result) = receiving.as_mut().poll(cx) else {
            if self.failed && self.receiving_since.elapsed() >= self.reached_after {
                self.failed = false;
                return Poll::Ready(Arrived::Reached);
            }
            return Poll::Pending;
        };
        self.receiving = None;
        self.failed = result.is_err();
        Poll::Ready(match result {
            Ok(deliveries) if deliveries.is_empty() => {
                self.stopped = true;
                Arrived::Stopped
            }
            Ok(deliveries) => {
                self.waits = delays(RECEIVE_RETRY_MAX);
                Arrived::Deliveries(deliveries)
            }
            Err(error) => {
                let wait = self.waits.next().unwrap_or(RECEIVE_RETRY_MAX);
                self.pausing = Some(Box::pin(sleep(wait)));
                Arrived::Failed(error)
            }
        })
    }

    /// Whether the broker was asked since the last call, and has not answered.
    pub(super) fn has_asked(&mut self) -> bool {
        std::mem::take(&mut self.has_begun) && self.receiving.is_some()
    }
}
