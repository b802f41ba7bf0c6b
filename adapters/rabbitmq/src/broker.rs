//! `RabbitBroker`: a consumer of one queue.
//!
//! | contract | RabbitMQ |
//! |---|---|
//! | open | queue.declare (or passive), basic.qos for the consumer, basic.consume |
//! | receive | basic.deliver, as many unsettled as `Limits` say |
//! | ack | basic.ack; with `multiple` for a contiguous done prefix |
//! | release, counted | basic.reject with requeue |
//! | release, uncounted | basic.nack with requeue (counted too before RabbitMQ 4.3) |
//! | retry | publish to the wait queue of the step, confirmed, then basic.ack |
//! | dead letter | publish to the dead letters, confirmed, then basic.ack |
//! | stop | basic.cancel, basic.nack of what nobody has seen |
//!
//! Limits: no order; delays are rounded up to steps; a crash between publish and ack leaves two copies, which the store
//! knows as one event; at most 2,000 unsettled; deliveries are counted by number and not by bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use hapax::{
    Broker, BrokerOrder, Capabilities, Delivery, Error, ErrorKind, Limits, Receipt, Result, SecretUrl, Settlement, Want,
};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use crate::address::Address;
use crate::lane::Parcel;
use crate::link::{self, GOODBYE, Link};
use crate::outlet::{Lanes, Outlet, again};
use crate::places::{Place, Places};
use crate::publisher::RabbitPublisher;
use crate::settings::{RabbitBrokerBuilder, Settings, Topology};
use crate::shared::{Order, Shared, no_link, stale};
use crate::unsettled::{Ending, Native};
use crate::wire;

/// How long receive waits for a lost link before it says so.
const OUTAGE_PATIENCE: Duration = Duration::from_secs(1);

/// A consumer of one queue of RabbitMQ, in one group. Consumers of a queue compete; to give every group each message, give
/// each a queue of its own and bind the queues to one exchange.
///
/// ```no_run
/// # async fn run() -> hapax::Result<()> {
/// use hapax_rabbitmq::RabbitBroker;
///
/// let url = "amqp://shop:secret@localhost/%2f".parse()?;
/// let broker = RabbitBroker::builder(url, "orders", "billing").build()?;
/// # let _ = broker;
/// # Ok(())
/// # }
/// ```
pub struct RabbitBroker {
    pub(crate) shared: Arc<Shared>,
    outlet: Outlet,
    /// For what goes to doubted places, so that nothing else waits for them.
    doubtful: Outlet,
    /// Places that did not take the last message: they may have been deleted, or have no leader.
    doubted: Mutex<BTreeSet<Place>>,
    running: Mutex<Option<Running>>,
}

/// The supervisor, and how it is told.
struct Running {
    orders: watch::Sender<Order>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl RabbitBroker {
    /// A consumer of `queue`; `group` is in the names of its dead letters and wait queues, and is best the consumer's name.
    pub fn builder(url: SecretUrl, queue: impl Into<String>, group: impl Into<String>) -> RabbitBrokerBuilder {
        RabbitBrokerBuilder::new(url, queue.into(), group.into())
    }

    pub(crate) fn new(address: Address, settings: Settings) -> Self {
        let address = Arc::new(address);
        let outlet = |what: &str| {
            let role = format!("{what} {}", settings.places.group);
            Outlet::new(Arc::clone(&address), role, Lanes::EachRoute, settings.answer_timeout)
        };
        let (outlet, doubtful) = (outlet("retries and dead letters"), outlet("doubtful places"));
        let shared = Arc::new(Shared::new(address, settings));
        Self { shared, outlet, doubtful, doubted: Mutex::default(), running: Mutex::default() }
    }

    /// Creates every queue that the consumer may need, wait queues included; with [`Topology::Check`] looks whether they
    /// are there. Then disconnects. For a deployment step with more rights than the consumer has.
    pub async fn declare(&self) -> Result<()> {
        let settings = &self.shared.settings;
        let places = &settings.places;
        let connection = self.shared.address.connect(&format!("declare {}", places.group)).await?;
        let all = [Place::Work, Place::Dead].into_iter().chain(places.waits());
        let ensured = places.ensure(&connection, all, settings.topology, settings.answer_timeout).await;
        let _ = timeout(settings.answer_timeout, connection.close(200, "done".into())).await;
        ensured
    }

    /// Messages of this group that wait for the time of their retry at the server.
    pub async fn waiting_for_retry(&self) -> Result<u64> {
        let patience = self.shared.settings.answer_timeout;
        let counting = self.outlet.waiting(self.places());
        let none = || crate::error::no_answer("count", "queue.declare", patience);
        timeout(patience, counting).await.unwrap_or_else(|_| Err(none()))
    }

    /// A publisher to this consumer's queue over a connection of its own.
    pub fn publisher(&self) -> RabbitPublisher {
        let (address, patience) = (Arc::clone(&self.shared.address), self.shared.settings.answer_timeout);
        RabbitPublisher::to_queue(&self.places().work, address, patience)
    }

    fn places(&self) -> &Places {
        &self.shared.settings.places
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn doubted(&self) -> MutexGuard<'_, BTreeSet<Place>> {
        self.doubted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn order(&self, order: Order) {
        if let Some(running) = &*self.running() {
            running.orders.send_replace(order);
        }
    }

    /// The message as it came, on its way to another queue.
    fn parcel(&self, native: &Native, settlement: &Settlement) -> Result<(Place, Parcel)> {
        let refused = |why: String| Error::new(ErrorKind::Rejected, "settle").because(why);
        let (place, properties) = match settlement {
            Settlement::DeadLetter(letter) => (Place::Dead, wire::set_aside(&native.properties, letter)),
            Settlement::Retry { after } => {
                let step = self.places().step(*after).ok_or_else(|| {
                    refused(format!("a retry after {after:?} is beyond {:?}", self.places().longest_step()))
                })?;
                (Place::Wait(step), wire::again(&native.properties))
            }
            Settlement::Ack | Settlement::Release { .. } => return Err(refused("it is not sent anywhere".to_owned())),
        };
        let routing_key = wire::short(&self.places().name(place))?;
        let body = native.body.clone();
        Ok((place, Parcel { exchange: "".into(), routing_key, properties, body, mandatory: true }))
    }

    /// Publishes to wait queues and dead letters. What goes to places that took nothing the last time neither waits for the rest
    /// nor holds it up.
    async fn send(&self, parcels: &[(Place, Parcel)], deadline: Instant) -> Vec<Result<()>> {
        let doubted: BTreeSet<Place> = self.doubted().clone();
        let (doubtful, sound): (Vec<usize>, Vec<usize>) =
            (0..parcels.len()).partition(|at| doubted.contains(&parcels[*at].0));
        let (sound_sent, doubtful_sent) = tokio::join!(
            self.send_over(&self.outlet, parcels, &sound, deadline),
            self.send_again(parcels, &doubtful, deadline)
        );
        let mut answers: Vec<Result<()>> = parcels.iter().map(|_| Err(stale())).collect();
        for (at, answer) in sound_sent.into_iter().chain(doubtful_sent) {
            let place = parcels[at].0;
            match &answer {
                Ok(()) => drop(self.doubted().remove(&place)),
                // Its own fault.
                Err(error) if error.kind() == ErrorKind::Rejected => {}
                Err(_) => drop(self.doubted().insert(place)),
            }
            answers[at] = answer;
        }
        answers
    }

    async fn send_over(
        &self,
        outlet: &Outlet,
        parcels: &[(Place, Parcel)],
        these: &[usize],
        deadline: Instant,
    ) -> Vec<(usize, Result<()>)> {
        let batch: Vec<Parcel> = these.iter().map(|at| parcels[*at].1.clone()).collect();
        these.iter().copied().zip(outlet.publish(&batch, deadline).await).collect()
    }

    /// To doubted places: where hapax creates queues, one that was deleted is created first.
    async fn send_again(
        &self,
        parcels: &[(Place, Parcel)],
        these: &[usize],
        deadline: Instant,
    ) -> Vec<(usize, Result<()>)> {
        if these.is_empty() || self.shared.settings.topology == Topology::Check {
            return self.send_over(&self.doubtful, parcels, these, deadline).await;
        }
        let places: BTreeSet<Place> = these.iter().map(|at| parcels[*at].0).collect();
        let places: Vec<Place> = places.into_iter().collect();
        // Half of the time, so that the other half is left for those that are there again.
        let half = Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2;
        let ensured = self.doubtful.ensure(self.places(), &places, half).await;
        let missing: BTreeMap<Place, Error> =
            places.into_iter().zip(ensured).filter_map(|(place, answer)| Some((place, answer.err()?))).collect();
        let (lost, there): (Vec<usize>, Vec<usize>) =
            these.iter().partition(|at| missing.contains_key(&parcels[**at].0));
        let mut answers = self.send_over(&self.doubtful, parcels, &there, deadline).await;
        answers.extend(lost.into_iter().filter_map(|at| Some((at, Err(again(missing.get(&parcels[at].0)?))))));
        answers
    }

    /// Ends deliveries at the server, and notes what became of each.
    async fn finish(
        &self,
        session: u32,
        endings: Vec<(usize, (u64, Ending))>,
        deadline: Instant,
    ) -> Vec<(usize, Result<()>)> {
        let (places, frames): (Vec<usize>, Vec<_>) = endings.into_iter().unzip();
        places.into_iter().zip(self.shared.finish(session, &frames, deadline).await).collect()
    }

    /// Places messages elsewhere, then acks those that were placed.
    async fn place(
        &self,
        session: u32,
        outgoing: Vec<(usize, u64, (Place, Parcel))>,
        deadline: Instant,
    ) -> Vec<(usize, Result<()>)> {
        let parcels: Vec<_> = outgoing.iter().map(|(_, _, parcel)| parcel.clone()).collect();
        let (mut placed, mut answers) = (Vec::new(), Vec::new());
        for ((at, tag, _), sent) in outgoing.into_iter().zip(self.send(&parcels, deadline).await) {
            match sent {
                Ok(()) => placed.push((at, (tag, Ending::Ack))),
                Err(error) => answers.push((at, Err(error))),
            }
        }
        // Only now: acked first, a crash would lose the message. What was placed is worth a little more time.
        answers.extend(self.finish(session, placed, deadline.max(Instant::now() + GOODBYE)).await);
        answers
    }
}

#[async_trait]
impl Broker for RabbitBroker {
    async fn open(&self, limits: Limits) -> Result<()> {
        self.close().await?;
        let link = Link::connect(&self.shared.address, &self.shared.settings, &limits).await?;
        self.shared.opened();
        let session = self.shared.begin(link.channel.clone());
        let (orders, told) = watch::channel(Order::Run);
        let task = tokio::spawn(link::supervise(Arc::clone(&self.shared), link, session, limits, told));
        *self.running() = Some(Running { orders, task });
        Ok(())
    }

    async fn receive(&self, want: Want) -> Result<Vec<Delivery>> {
        let told_after = Instant::now() + OUTAGE_PATIENCE;
        loop {
            // Listening before looking: from its creation on it misses no change. What is taken is returned without another
            // await, so a dropped future has taken nothing.
            let changed = self.shared.changed();
            match self.shared.take(want).ready() {
                Ok(answer) => return answer,
                Err(None) => changed.await,
                Err(Some(why)) => {
                    if timeout_at(told_after, changed).await.is_err() {
                        return Err(no_link(&why));
                    }
                }
            }
        }
    }

    async fn settle(&self, batch: &[(Receipt, Settlement)]) -> Vec<Result<()>> {
        let deadline = Instant::now() + self.shared.settings.answer_timeout;
        let mut answers: Vec<Result<()>> = batch.iter().map(|_| Err(stale())).collect();
        let (mut endings, mut outgoing) = (Vec::new(), Vec::new());
        let mut seen = BTreeSet::new();
        let mut session = 0;
        for (at, (receipt, settlement)) in batch.iter().enumerate() {
            // A receipt that is held is of the one session that lives; the same one twice is stale the second time.
            let Some(native) = self.shared.find(*receipt).filter(|_| seen.insert(*receipt)) else { continue };
            session = receipt.session;
            let ending = match settlement {
                Settlement::Ack => Ending::Ack,
                Settlement::Release { counted: true } => Ending::Reject,
                Settlement::Release { counted: false } => Ending::GiveBack,
                Settlement::Retry { .. } | Settlement::DeadLetter(_) => {
                    match self.parcel(&native, settlement) {
                        Ok(parcel) => outgoing.push((at, receipt.position, parcel)),
                        Err(error) => answers[at] = Err(error),
                    }
                    continue;
                }
            };
            endings.push((at, (receipt.position, ending)));
        }
        // What needs no other queue does not wait for one.
        let (finished, placed) =
            tokio::join!(self.finish(session, endings, deadline), self.place(session, outgoing, deadline));
        for (at, answer) in finished.into_iter().chain(placed) {
            answers[at] = answer;
        }
        answers
    }

    async fn stop(&self) -> Result<()> {
        self.shared.stopping();
        self.order(Order::Stop);
        let patience = self.shared.settings.answer_timeout;
        let deadline = Instant::now() + patience;
        loop {
            let changed = self.shared.changed();
            if !self.shared.is_stopping() || timeout_at(deadline, changed).await.is_err() {
                return Ok(());
            }
        }
    }

    async fn close(&self) -> Result<()> {
        self.shared.closed();
        let running = self.running().take();
        if let Some(mut running) = running {
            running.orders.send_replace(Order::Close);
            let patience = self.shared.settings.answer_timeout;
            // Too slow a goodbye ends with the task's: `Running` aborts it.
            let _ = timeout(patience, &mut running.task).await;
        }
        self.shared.end_any();
        tokio::join!(self.outlet.close(), self.doubtful.close());
        self.doubted().clear();
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        let settings = &self.shared.settings;
        let mut capabilities = Capabilities::none("rabbitmq");
        capabilities.order = BrokerOrder::None;
        capabilities.retry_keeps_order = false;
        capabilities.retry_max = settings.places.longest_step();
        capabilities.deliveries_max = Some(settings.places.delivery_limit);
        capabilities.unsettled_max = Some(usize::from(settings.prefetch_max));
        capabilities.hold_max = Some(settings.consumer_timeout);
        capabilities.dead_letter_in_one_step = false;
        capabilities.settle_fenced = true;
        capabilities.position_is_stable = false;
        capabilities.durability = settings.durability;
        capabilities
    }
}

impl fmt::Debug for RabbitBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitBroker")
            .field("address", &self.shared.address)
            .field("queue", &self.places().work)
            .field("group", &self.places().group)
            .finish_non_exhaustive()
    }
}
