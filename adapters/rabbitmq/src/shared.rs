//! What the broker and its supervisor share: the session, its deliveries, and who waits for them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use hapax::{Delivery, Error, ErrorKind, Limits, Origin, Receipt, Result, Session, SessionState, Want};
use lapin::Channel;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

use crate::address::Address;
use crate::frames;
use crate::settings::Settings;
use crate::unsettled::{Ending, Native, Table};
use crate::{link, wire};

/// What the supervisor is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Run,
    Stop,
    Close,
    #[cfg(test)]
    Panic,
}

pub(crate) struct Shared {
    pub(crate) address: Arc<Address>,
    pub(crate) settings: Settings,
    state: Mutex<State>,
    /// Wakes receives.
    arrivals: Notify,
    /// Frames that settle leave one group at a time: a tag is forgotten and its frame is queued in one turn, so that `multiple`
    /// of another turn cannot overtake it.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    phase: Phase,
    sessions: u32,
    current: Option<Current>,
    /// Why there is no session.
    trouble: Option<String>,
    /// The trouble was logged.
    told: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Closed,
    Open,
    /// The supervisor panicked.
    Broken,
    /// No new deliveries.
    Stopping,
    /// And what nobody has seen was given back.
    Stopped,
}

struct Current {
    id: u32,
    state: watch::Sender<SessionState>,
    session: Session,
    table: Table,
}

/// The answer to a receive.
pub(crate) enum Take {
    Some(Vec<Delivery>),
    Stopped,
    NotOpen,
    Broken,
    Nothing,
    /// Nothing, and no link either: why.
    OutOfReach(String),
}

impl Shared {
    pub(crate) fn new(address: Arc<Address>, settings: Settings) -> Self {
        Self { address, settings, state: Mutex::default(), arrivals: Notify::new(), turn: tokio::sync::Mutex::new(()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves at the next change that a receive may care for. Made before looking, it misses none.
    pub(crate) fn changed(&self) -> impl Future<Output = ()> + '_ {
        self.arrivals.notified()
    }

    pub(crate) fn opened(&self) {
        let mut state = self.lock();
        (state.phase, state.trouble, state.told) = (Phase::Open, None, false);
    }

    pub(crate) fn stopping(&self) {
        let mut state = self.lock();
        state.phase = match state.phase {
            Phase::Open => Phase::Stopping,
            // Nobody is left who would do more.
            Phase::Broken => Phase::Stopped,
            phase => phase,
        };
        drop(state);
        self.arrivals.notify_waiters();
    }

    /// The supervisor panicked: there will be no session until the broker is opened again.
    pub(crate) fn broke(&self) {
        let mut state = self.lock();
        state.phase = match state.phase {
            Phase::Open => Phase::Broken,
            Phase::Stopping => Phase::Stopped,
            phase => phase,
        };
        drop(state);
        tracing::error!(queue = self.settings.places.work, "RabbitMQ: the supervisor panicked; nothing is consumed");
        self.arrivals.notify_waiters();
    }

    pub(crate) fn stopped(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Stopping {
            state.phase = Phase::Stopped;
        }
        drop(state);
        self.arrivals.notify_waiters();
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.lock().phase == Phase::Stopping
    }

    pub(crate) fn closed(&self) {
        self.lock().phase = Phase::Closed;
        self.arrivals.notify_waiters();
    }

    /// A new session on this channel; its number.
    pub(crate) fn begin(&self, channel: Channel) -> u32 {
        let mut state = self.lock();
        state.sessions += 1;
        let id = state.sessions;
        let (sender, receiver) = watch::channel(SessionState::Live);
        let session = Session::new(id, receiver);
        state.current = Some(Current { id, state: sender, session, table: Table::new(channel) });
        (state.trouble, state.told) = (None, false);
        id
    }

    /// The session is over: its receipts are stale, and nothing of it is handed out any more.
    pub(crate) fn end(&self, session: u32, lost: Option<&str>) {
        let mut state = self.lock();
        if let Some(ended) = state.current.take_if(|current| current.id == session) {
            ended.state.send_replace(SessionState::Ended);
        }
        if let Some(why) = lost {
            state.trouble = Some(why.to_owned());
            state.told = true;
            tracing::warn!(queue = self.settings.places.work, session, why, "RabbitMQ: a session was lost");
        }
        drop(state);
        self.arrivals.notify_waiters();
    }

    /// Whatever session there is, is over.
    pub(crate) fn end_any(&self) {
        let current = self.lock().current.as_ref().map(|current| current.id);
        if let Some(session) = current {
            self.end(session, None);
        }
    }

    /// A try to connect failed. Logged once, as long as the reason is the same.
    pub(crate) fn out_of_reach(&self, error: &Error) {
        let mut state = self.lock();
        let why = error.to_string();
        let new = !state.told || state.trouble.as_deref() != Some(&why);
        if new {
            tracing::warn!(queue = self.settings.places.work, error = %why, "RabbitMQ is out of reach; trying again");
        }
        (state.trouble, state.told) = (Some(why), true);
    }

    pub(crate) fn arrived(&self, session: u32, delivery: lapin::message::Delivery, limits: &Limits) {
        let lapin::message::Delivery { delivery_tag, redelivered, properties, data, acker, .. } = delivery;
        // Dead on arrival: it comes again in the next session.
        if !acker.usable() {
            return;
        }
        let body = Bytes::from(data);
        let message = wire::read(&properties, body.clone(), &limits.message);
        let mut state = self.lock();
        if let Some(current) = state.current.as_mut().filter(|current| current.id == session) {
            current.table.arrived(delivery_tag, Native { acker, properties, body, redelivered }, message);
        }
        drop(state);
        self.arrivals.notify_waiters();
    }

    pub(crate) fn take(&self, want: Want) -> Take {
        let mut state = self.lock();
        match state.phase {
            Phase::Closed => return Take::NotOpen,
            Phase::Broken => return Take::Broken,
            Phase::Stopping | Phase::Stopped => return Take::Stopped,
            Phase::Open => {}
        }
        let Some(current) = state.current.as_mut() else {
            let why = state.trouble.clone().unwrap_or_else(|| "there is no connection".to_owned());
            return Take::OutOfReach(why);
        };
        let taken = current.table.take(want);
        if taken.is_empty() {
            return Take::Nothing;
        }
        let deliveries = taken.into_iter().map(|(arrival, native)| Delivery {
            receipt: Receipt { session: current.id, partition: 0, position: arrival.tag },
            session: current.session.clone(),
            message: arrival.message,
            count: wire::deliveries(&native.properties, native.redelivered),
            origin: Some(Arc::new(Origin {
                place: self.settings.places.work.as_str().into(),
                position: format!("{}.{}", current.id, arrival.tag).into(),
            })),
        });
        Take::Some(deliveries.collect())
    }

    /// The channel of the session that lives.
    #[cfg(test)]
    pub(crate) fn channel(&self) -> Option<Channel> {
        self.lock().current.as_ref().map(|current| current.table.channel.clone())
    }

    /// The delivery of a receipt, if it is held.
    pub(crate) fn find(&self, receipt: Receipt) -> Option<Arc<Native>> {
        let state = self.lock();
        let current = state.current.as_ref().filter(|current| current.id == receipt.session)?;
        if receipt.partition == 0 { current.table.find(receipt.position).cloned() } else { None }
    }

    /// Ends deliveries of a session at the server; an answer for each by the deadline.
    pub(crate) async fn finish(&self, session: u32, endings: &[(u64, Ending)], deadline: Instant) -> Vec<Result<()>> {
        if endings.is_empty() {
            return Vec::new();
        }
        let patience = self.settings.answer_timeout;
        let Ok(turn) = timeout_at(deadline, self.turn.lock()).await else {
            return endings.iter().map(|_| frames::Sent::Unknown(patience).answer()).collect();
        };
        let (channel, sent) = {
            let mut state = self.lock();
            let Some(current) = state.current.as_mut().filter(|current| current.id == session) else {
                return endings.iter().map(|_| Err(stale())).collect();
            };
            (current.table.channel.clone(), current.table.end(endings))
        };
        // No await between forgetting the tags and the first poll of their frames, which queues them.
        let answers = frames::send(&channel, &sent, deadline, patience).await;
        drop(turn);
        endings.iter().map(|(tag, _)| answers.get(tag).map_or_else(|| Err(stale()), frames::Sent::answer)).collect()
    }

    /// Gives back what arrived and was handed to nobody.
    pub(crate) async fn give_back_arrivals(&self, session: u32) {
        let tags = {
            let mut state = self.lock();
            let current = state.current.as_mut().filter(|current| current.id == session);
            current.map(|current| current.table.give_back_arrivals()).unwrap_or_default()
        };
        let endings: Vec<_> = tags.into_iter().map(|tag| (tag, Ending::GiveBack)).collect();
        // What fails here comes back when the channel closes.
        let deadline = Instant::now() + self.settings.answer_timeout;
        let _ = self.finish(session, &endings, deadline).await;
    }
}

impl Take {
    /// The answer where there is one at once.
    pub(crate) fn ready(self) -> Result<Result<Vec<Delivery>>, Option<String>> {
        match self {
            Self::Some(deliveries) => Ok(Ok(deliveries)),
            Self::Stopped => Ok(Ok(Vec::new())),
            Self::NotOpen => Ok(Err(Error::new(ErrorKind::Configuration, "receive").because("`open` comes first"))),
            Self::Broken => Ok(Err(Error::new(ErrorKind::Internal, "receive")
                .because("the task that consumes from RabbitMQ panicked (see the log); open the broker again"))),
            Self::Nothing => Err(None),
            Self::OutOfReach(why) => Err(Some(why)),
        }
    }
}

/// The receipt's session has ended, or it was settled.
pub(crate) fn stale() -> Error {
    Error::new(ErrorKind::Stale, "settle")
        .because("the delivery was settled, or its session has ended and it comes again")
}

/// What receive answers while there is no link.
pub(crate) fn no_link(why: &str) -> Error {
    link::out_of_reach(why)
}
