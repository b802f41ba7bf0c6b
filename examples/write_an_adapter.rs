//! An adapter: a broker of one's own on a page, proved by the conformance suite that every adapter passes.
//!
//! | contract | here |
//! |---|---|
//! | receive | the front of a queue |
//! | ack | forgotten |
//! | release, end of a session | back to the front |
//! | retry | a list with times |
//! | dead letter | another list |
//!
//! Limits: lives as long as the process; does not look at `Limits::bytes` and `Limits::held_max`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use hapax::cloudevents::{Convention, decode, encode};
use hapax::{
    Broker, Capabilities, Delivery, Error, ErrorKind, Headers, Limits, Message, MessageLimits, Outgoing, Publisher,
    RESERVED_PREFIX, Receipt, Result, Session, SessionState, Settlement, Want,
};
use hapax_testkit::conformance::{BrokerFixture, Clock, broker as suite};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until};

/// The "server": what clients share.
#[derive(Default)]
struct Queue {
    kept: Mutex<Kept>,
    changed: Notify,
}

#[derive(Default)]
struct Kept {
    ready: VecDeque<Entry>,
    later: Vec<(Instant, Entry)>,
    dead: Vec<Entry>,
    sessions: u32,
}

/// A message as it travels, and how often it was delivered.
#[derive(Clone)]
struct Entry {
    headers: Headers,
    body: Bytes,
    count: u32,
}

/// The client: one consumer of the queue.
struct QueueBroker {
    queue: Arc<Queue>,
    open: Mutex<Option<Open>>,
}

/// One session: its limits, and what it holds, by the position in the receipt.
struct Open {
    limits: Limits,
    state: watch::Sender<SessionState>,
    session: Session,
    held: BTreeMap<u64, Entry>,
    position: u64,
    stopped: bool,
}

fn lock<T>(cell: &Mutex<T>) -> MutexGuard<'_, T> {
    cell.lock().unwrap_or_else(PoisonError::into_inner)
}

impl QueueBroker {
    /// What can be delivered now; `Err` says until when to wait at most.
    fn take(&self, want: Want) -> std::result::Result<Result<Vec<Delivery>>, Option<Instant>> {
        let (mut open, mut kept) = (lock(&self.open), lock(&self.queue.kept));
        let Some(open) = open.as_mut() else {
            return Ok(Err(Error::new(ErrorKind::Configuration, "receive").because("`open` comes first")));
        };
        if open.stopped {
            return Ok(Ok(Vec::new()));
        }
        let now = Instant::now();
        let due: Vec<_> = kept.later.extract_if(.., |(time, _)| *time <= now).collect();
        kept.ready.extend(due.into_iter().map(|(_, entry)| entry));
        let (mut deliveries, mut bytes) = (Vec::new(), 0);
        while deliveries.len() < want.events && open.held.len() < open.limits.events {
            let fits = |entry: &mut Entry| deliveries.is_empty() || bytes + entry.body.len() <= want.bytes;
            let Some(mut entry) = kept.ready.pop_front_if(fits) else { break };
            entry.count += 1;
            bytes += entry.body.len();
            open.position += 1;
            // Decoding never fails: what does not read is a message with a defect, which finds its way to the dead letters.
            let message = decode(entry.headers.clone(), entry.body.clone(), &Convention::MEMORY, &open.limits.message);
            deliveries.push(Delivery {
                receipt: Receipt { session: open.session.id(), partition: 0, position: open.position },
                session: open.session.clone(),
                message: Arc::new(message),
                count: Some(entry.count),
                origin: None,
            });
            open.held.insert(open.position, entry);
        }
        if deliveries.is_empty() { Err(kept.later.iter().map(|(time, _)| *time).min()) } else { Ok(Ok(deliveries)) }
    }

    fn settle_one(&self, receipt: Receipt, settlement: &Settlement) -> Result<()> {
        let (mut open, mut kept) = (lock(&self.open), lock(&self.queue.kept));
        let live = open
            .as_mut()
            .filter(|open| open.session.id() == receipt.session && open.session.state() != SessionState::Ended);
        let open = live.ok_or_else(|| Error::new(ErrorKind::Stale, "settle").because("its session has ended"))?;
        // Settled before: repeating it has no second effect.
        let Some(mut entry) = open.held.remove(&receipt.position) else { return Ok(()) };
        match settlement {
            Settlement::Ack => {}
            Settlement::Release { counted } => {
                entry.count -= u32::from(!counted);
                kept.ready.push_front(entry);
            }
            Settlement::Retry { after } => kept.later.push((Instant::now() + *after, entry)),
            Settlement::DeadLetter(letter) => {
                letter.mark(&mut entry.headers);
                kept.dead.push(entry);
            }
        }
        Ok(())
    }

    fn end_session(&self) {
        if let Some(open) = &mut *lock(&self.open) {
            open.stopped = true;
            open.state.send_replace(SessionState::Ended);
            let mut kept = lock(&self.queue.kept);
            std::mem::take(&mut open.held).into_values().rev().for_each(|entry| kept.ready.push_front(entry));
        }
        self.queue.changed.notify_waiters();
    }
}

#[async_trait]
impl Broker for QueueBroker {
    async fn open(&self, limits: Limits) -> Result<()> {
        self.end_session();
        let (state, receiver) = watch::channel(SessionState::Live);
        let mut kept = lock(&self.queue.kept);
        kept.sessions += 1;
        let session = Session::new(kept.sessions, receiver);
        drop(kept);
        let held = BTreeMap::new();
        *lock(&self.open) = Some(Open { limits, state, session, held, position: 0, stopped: false });
        Ok(())
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        loop {
            // Listening before looking. What `take` hands out is returned without another await: a dropped future has
            // taken nothing.
            let changed = self.queue.changed.notified();
            match self.take(want) {
                Ok(answer) => return answer,
                Err(None) => changed.await,
                Err(Some(time)) => tokio::select! {
                    () = changed => {}
                    () = sleep_until(time) => {}
                },
            }
        }
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        let answers = batch.iter().map(|(receipt, settlement)| self.settle_one(*receipt, settlement)).collect();
        self.queue.changed.notify_waiters();
        answers
    }

    async fn stop(&self) -> Result<()> {
        if let Some(open) = &mut *lock(&self.open) {
            open.stopped = true;
        }
        self.queue.changed.notify_waiters();
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        self.end_session();
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::none("queue");
        capabilities.retry_max = Duration::from_hours(24);
        capabilities.dead_letter_in_one_step = true;
        capabilities.settle_fenced = true;
        capabilities
    }
}

impl Drop for QueueBroker {
    fn drop(&mut self) {
        self.end_session();
    }
}

struct QueuePublisher(Arc<Queue>);

#[async_trait]
impl Publisher for QueuePublisher {
    async fn publish(&self, batch: Vec<Outgoing>) -> Vec<Result<()>> {
        let entries = batch.iter().map(|outgoing| encode(&outgoing.message, &Convention::MEMORY));
        let entries: Vec<_> = entries.map(|(headers, body)| Entry { headers, body, count: 0 }).collect();
        lock(&self.0.kept).ready.extend(entries);
        self.0.changed.notify_waiters();
        batch.iter().map(|_| Ok(())).collect()
    }
}

/// What the suite needs: fresh consumers of one queue, and a look behind it.
struct QueueFixture(Arc<Queue>);

#[async_trait]
impl BrokerFixture for QueueFixture {
    const CLOCK: Clock = Clock::Paused;
    const UNIT: Duration = Duration::from_millis(100);

    async fn broker(&self) -> Arc<dyn Broker> {
        Arc::new(QueueBroker { queue: Arc::clone(&self.0), open: Mutex::default() })
    }

    async fn publisher(&self) -> Arc<dyn Publisher> {
        Arc::new(QueuePublisher(Arc::clone(&self.0)))
    }

    async fn publish_undecodable(&self) -> Bytes {
        let (headers, body) = ([("content-type", "application/cloudevents+json")], Bytes::from_static(b"{"));
        lock(&self.0.kept).ready.push_back(Entry {
            headers: headers.into_iter().collect(),
            body: body.clone(),
            count: 0,
        });
        body
    }

    async fn dead_letters(&self) -> Vec<Message> {
        let stored = |Entry { headers, body, .. }: &Entry| {
            let mut message = decode(headers.clone(), body.clone(), &Convention::MEMORY, &MessageLimits::DEFAULT);
            let ours = headers.iter().filter(|(name, _)| name.starts_with(RESERVED_PREFIX));
            ours.for_each(|(name, value)| message.headers.push(name, value.clone()));
            message
        };
        lock(&self.0.kept).dead.iter().map(stored).collect()
    }

    async fn redrive(&self) {
        let mut kept = lock(&self.0.kept);
        let dead = std::mem::take(&mut kept.dead);
        kept.ready.extend(dead);
    }
}

/// In a package of its own this is one line in a test: `hapax_testkit::broker_conformance!(QueueFixture::fresh());`
fn main() {
    let cases = suite::cases::<QueueFixture>();
    for case in &cases {
        hapax_testkit::conformance::run(case.name, QueueFixture::CLOCK, async {
            (case.run)(&QueueFixture(Arc::default())).await;
        });
        println!("{} ... ok", case.name);
    }
    println!("{} clauses hold", cases.len());
}
