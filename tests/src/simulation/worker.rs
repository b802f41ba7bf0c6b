//! A worker: a process that consumes, dies or stands still at any of its polls, and is started again.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use fastrand::Rng;
use hapax::{Broker, Consumer, Error, Lease, Otherwise, Stepper};
use hapax_memory::MemoryBroker;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::World;
use super::events::{self, Process};
use super::network::{RemoteBroker, RemotePublisher, WorkerStore};
use super::plan::SCOPES;
use crate::faulty::{FaultSwitch, FaultyBroker, FaultyStore};
use crate::ledger::{Ledger, What, WitnessedBroker, WitnessedStore};

/// One worker over all its lives.
pub(super) struct Worker {
    pub(super) number: u32,
    /// Which consumer it is of.
    pub(super) scope: usize,
    pub(super) store_faults: FaultSwitch,
    pub(super) broker_faults: FaultSwitch,
    rng: Mutex<Rng>,
    now: Mutex<Option<Arc<Life>>>,
    ends: AtomicBool,
}

/// One of its lives.
#[derive(Debug)]
pub(super) struct Life {
    ledger: Ledger,
    broker: Weak<MemoryBroker>,
    shutdown: CancellationToken,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    killed: bool,
    over: bool,
    paused: bool,
    /// Polls of the process until it dies or stands still.
    dies_in: Option<u32>,
    pauses_in: Option<(u32, Duration)>,
    process: Option<Waker>,
    handlers: Vec<Waker>,
}

impl Life {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Dies at its next poll.
    pub(super) fn kill(&self) {
        self.state().killed = true;
        self.wake();
    }

    /// Stands still for so long, with its handlers.
    pub(super) fn pause(self: &Arc<Self>, wait: Duration) {
        let before = std::mem::replace(&mut self.state().paused, true);
        if before {
            return;
        }
        self.ledger.write(What::Paused);
        let life = Arc::clone(self);
        tokio::spawn(async move {
            sleep(wait).await;
            life.resume();
        });
    }

    pub(super) fn resume(&self) {
        let mut state = self.state();
        if std::mem::take(&mut state.paused) && !state.over {
            drop(state);
            self.ledger.write(What::Resumed);
            self.wake();
        }
    }

    /// Shuts down gracefully.
    pub(super) fn stop(&self) {
        self.shutdown.cancel();
    }

    pub(super) fn broker(&self) -> Option<Arc<MemoryBroker>> {
        self.broker.upgrade()
    }

    /// No more faults of its own.
    fn heal(&self) {
        let mut state = self.state();
        (state.dies_in, state.pauses_in) = (None, None);
        drop(state);
        self.resume();
    }

    fn wake(&self) {
        let mut state = self.state();
        let (process, handlers) = (state.process.take(), std::mem::take(&mut state.handlers));
        drop(state);
        process.into_iter().chain(handlers).for_each(Waker::wake);
    }

    /// Whether the process may be polled: `None` says that it is dead.
    fn poll_alive(self: &Arc<Self>, cx: &Context<'_>) -> Poll<Option<()>> {
        let mut state = self.state();
        if let Some(left) = &mut state.dies_in {
            *left = left.saturating_sub(1);
            state.killed |= *left == 0;
        }
        if state.killed {
            return Poll::Ready(None);
        }
        state.process = Some(cx.waker().clone());
        let pauses = state.pauses_in.as_mut().and_then(|(left, wait)| {
            *left = left.saturating_sub(1);
            (*left == 0).then_some(*wait)
        });
        if let Some(wait) = pauses {
            state.pauses_in = None;
            drop(state);
            self.pause(wait);
            return Poll::Pending;
        }
        if state.paused { Poll::Pending } else { Poll::Ready(Some(())) }
    }
}

/// Handlers stand still with their process.
impl Stepper for Life {
    fn before(&self, _: &Lease, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if !state.paused {
            return Poll::Ready(());
        }
        state.handlers.push(cx.waker().clone());
        Poll::Pending
    }

    fn after(&self, _: &Lease, _: bool) {}
}

/// How a life ended: `None` is a crash.
type End = Option<Result<(), Error>>;

impl Worker {
    pub(super) fn new(world: &World, rng: &mut Rng, number: u32, scope: usize) -> Self {
        Self {
            number,
            scope,
            store_faults: world.plan.faults(rng).switch(),
            broker_faults: world.plan.faults(rng).switch(),
            rng: Mutex::new(rng.fork()),
            now: Mutex::default(),
            ends: AtomicBool::new(false),
        }
    }

    /// Its life now, if it lives.
    pub(super) fn now(&self) -> Option<Arc<Life>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// No more faults, now and in later lives.
    pub(super) fn heal(&self) {
        self.store_faults.heal();
        self.broker_faults.heal();
        if let Some(life) = self.now() {
            life.heal();
        }
    }

    /// Ends gracefully and is not started again.
    pub(super) fn end(&self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(life) = self.now() {
            life.stop();
        }
    }

    fn draw<T>(&self, draw: impl FnOnce(&mut Rng) -> T) -> T {
        draw(&mut self.rng.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lives until it is told to end. Answers what went wrong in a graceful end.
    pub(super) async fn run(self: Arc<Self>, world: Arc<World>) -> Vec<Error> {
        let mut errors = Vec::new();
        for incarnation in 0.. {
            if self.ends.load(Ordering::Relaxed) {
                break;
            }
            let ledger = world.ledger.of(self.number, incarnation);
            let end = self.live(&world, &ledger).await;
            match end {
                None => ledger.write(What::Crashed),
                Some(Ok(())) => {}
                // The session ends with the worker, whatever `close` is answered.
                Some(Err(error)) if error.is_retryable() => {}
                Some(Err(error)) => errors.push(error),
            }
            let wait = self.draw(|rng| Duration::from_millis(rng.u64(1..1_500)));
            sleep(wait).await;
        }
        errors
    }

    async fn live(&self, world: &Arc<World>, ledger: &Ledger) -> End {
        let (life, consumer) = self.begin(world, ledger).await?;
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&life));
        // Either may have come while it was built.
        if world.is_healed() {
            life.heal();
        }
        if self.ends.load(Ordering::Relaxed) {
            life.stop();
        }
        let handle = consumer.handle();
        let end = {
            let shutdown = life.shutdown.clone();
            let run = pin!(consumer.run(async move { shutdown.cancelled().await }));
            Mortal { life: &life, run }.await
        };
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = None;
        life.state().over = true;
        let left = handle.health().in_flight.events;
        // What could not be given back in time is as after a crash.
        end.filter(|_| left == 0)
    }

    /// A process starts: tries until broker and store answer.
    async fn begin(&self, world: &Arc<World>, ledger: &Ledger) -> Option<(Arc<Life>, Consumer)> {
        loop {
            let memory = Arc::new(world.topics[self.scope].another());
            let life = Arc::new(self.life(world, ledger, &memory));
            let built = self.build(world, &life, memory, ledger).await;
            match built {
                Ok(consumer) => return Some((life, consumer)),
                // Only an outage keeps it from starting.
                Err(why) if why.contains("injected") || why.contains("no answer") => {}
                Err(why) => panic!("seed {}: the consumer is refused: {why}", world.plan.seed),
            }
            sleep(Duration::from_millis(500)).await;
            if self.ends.load(Ordering::Relaxed) {
                return None;
            }
        }
    }

    fn life(&self, world: &World, ledger: &Ledger, memory: &Arc<MemoryBroker>) -> Life {
        let chaos = &world.plan.chaos;
        let lease_ms = world.plan.settings.lease.as_millis() as u64;
        let healed = world.is_healed();
        let state = self.draw(|rng| {
            // Log-uniform: many die young, some grow old.
            let mut polls = || 1u32 << rng.u32(2..11);
            let (dies, pauses) = (polls(), polls());
            State {
                dies_in: (chaos.dies_at_polls && !healed).then(|| rng.u32(1..=dies)),
                pauses_in: (chaos.pauses_at_polls && !healed)
                    .then(|| (rng.u32(1..=pauses), Duration::from_millis(rng.u64(1..lease_ms * 2)))),
                ..State::default()
            }
        });
        Life {
            ledger: ledger.clone(),
            broker: Arc::downgrade(memory),
            shutdown: CancellationToken::new(),
            state: Mutex::new(state),
        }
    }

    async fn build(
        &self,
        world: &Arc<World>,
        life: &Arc<Life>,
        memory: Arc<MemoryBroker>,
        ledger: &Ledger,
    ) -> Result<Consumer, String> {
        let publisher = memory.publisher();
        let network = Arc::clone(&world.network);
        let remote = RemoteBroker { inner: world.back_ends.broker(memory), network: Arc::clone(&network) };
        let faulty = FaultyBroker::new(Arc::new(remote), self.broker_faults.clone());
        let faulty = faulty.duplicating(Arc::new(publisher.clone()));
        let scope = SCOPES[self.scope];
        let broker: Arc<dyn Broker> = Arc::new(WitnessedBroker::new(Arc::new(faulty), scope, ledger.clone()));

        let remote = world.remote_store();
        let faulty = FaultyStore::new(Arc::new(remote.clone()), self.store_faults.clone());
        let calls = Arc::new(WitnessedStore::new(Arc::new(faulty), ledger.clone()));
        let store = WorkerStore { calls, remote, faults: self.store_faults.clone(), ledger: ledger.clone() };

        let process = Process { life: Arc::clone(life), ledger: ledger.clone(), starts: Arc::clone(&world.starts) };
        let out = Arc::new(RemotePublisher {
            inner: publisher,
            network,
            faults: self.broker_faults.clone(),
            ledger: ledger.clone(),
            scopes: world.scopes(),
        });
        let builder = Consumer::builder(scope, broker, store)
            .state(process)
            .settings(world.plan.settings.clone())
            .otherwise(Otherwise::Ignore)
            .observer(Arc::new(()))
            .seed(self.draw(|rng| rng.u64(..)));
        let builder = match (world.plan.transactional, world.plan.batched) {
            (true, false) => builder.on_tx(events::step_tx),
            (true, true) => builder.on_batch_tx(events::steps_tx),
            (false, batched) => {
                let builder = if batched { builder.on_batch(events::steps) } else { builder.on(events::step) };
                builder.on(events::derived).publisher(Arc::clone(&out))
            }
        };
        let stepper: Arc<dyn Stepper> = Arc::clone(life) as Arc<dyn Stepper>;
        builder.under_test(stepper, out).build().await.map_err(|error| error.to_string())
    }
}

/// A process that can be ended or stopped between any two of its polls.
struct Mortal<'a, F> {
    life: &'a Arc<Life>,
    run: Pin<&'a mut F>,
}

impl<F: Future<Output = Result<(), Error>>> Future for Mortal<'_, F> {
    type Output = End;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        match self.life.poll_alive(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Ready(Some(())) => self.run.as_mut().poll(cx).map(Some),
        }
    }
}
