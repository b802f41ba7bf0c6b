//! What benchmarks share: messages, the no-op handler, a run that is measured, and the machine it ran on.

#![allow(clippy::disallowed_methods, reason = "benchmarks measure the real clock")]

pub mod allocated;
pub mod machine;
pub mod report;
pub mod settled;

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cpu_time::ProcessTime;
use hapax::{
    Claim, ClaimRequest, Consumer, ConsumerBuilder, Context, EventKey, Failure, Fingerprint, Level, Message, Order,
    Outcome, ProcessedStore, Settings,
};
use hapax_memory::MemoryBroker;

/// What one run is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Deliveries, all different events.
    pub events: usize,
    /// Handlers at once.
    pub concurrency: usize,
    /// Deliveries in flight.
    pub in_flight: usize,
    /// Most items of one call to store or broker.
    pub batch: usize,
    /// Bytes of data.
    pub bytes: usize,
    /// Ordering keys; 0 is unordered.
    pub keys: usize,
    /// How often the run looks whether it is over.
    pub look: Duration,
}

impl Plan {
    /// Unordered events of 256 bytes, with as many handlers and items of a batch as deliveries in flight.
    pub fn of(events: usize, in_flight: usize) -> Self {
        Self {
            events,
            concurrency: in_flight,
            in_flight,
            batch: in_flight.clamp(1, 1_024),
            bytes: 256,
            keys: 0,
            look: Duration::from_millis(1),
        }
    }

    /// The same with so many handlers at once.
    pub fn with_handlers(self, concurrency: usize) -> Self {
        Self { concurrency, ..self }
    }

    /// Events of `keys` keys in order.
    pub fn in_order(self, keys: usize) -> Self {
        Self { keys, ..self }
    }

    /// A message of this plan.
    pub fn message(&self, number: usize, data: &Bytes) -> Message {
        let message = Message::event("/bench", format!("{number:016}"), "bench.event");
        let message = message.with_data("application/octet-stream", data.clone());
        match self.keys {
            0 => message,
            keys => message.with_partition_key(format!("{}", number % keys)),
        }
    }

    /// The data of its messages.
    pub fn data(&self) -> Bytes {
        Bytes::from(vec![b'x'; self.bytes])
    }

    fn settings(&self) -> Settings {
        Settings {
            order: Some(if self.keys == 0 { Order::Unordered } else { Order::PerKey }),
            concurrency: self.concurrency,
            in_flight_max: self.in_flight,
            batch_max: self.batch,
            ..Settings::default()
        }
    }
}

/// What one run cost.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Events a second, by the wall clock.
    pub events_per_second: f64,
    /// Microseconds of CPU time an event, all threads.
    pub cpu_us: f64,
    /// Allocations an event; none where they are not counted.
    pub allocations: Option<f64>,
}

/// A handler that does nothing but await once: something that is not ready at first, and wakes it.
pub async fn noop(_: Arc<Message>, _: Context<()>) -> Result<(), Failure> {
    let mut is_ready = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut is_ready, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
    Ok(())
}

/// A topic that holds the plan's messages, numbered from `seen`.
pub fn topic(plan: &Plan, seen: usize) -> MemoryBroker {
    let broker = MemoryBroker::builder("bench").capacity(plan.events).ordered().build();
    let (publisher, data) = (broker.publisher(), plan.data());
    for number in seen..seen + plan.events {
        publisher.try_publish(&plan.message(number, &data)).expect("the topic holds the plan");
    }
    broker
}

/// Preloads a topic, then measures a consumer until it has processed everything. `with` gives it its handler.
pub async fn consume<T: ProcessedStore>(
    plan: &Plan,
    store: T,
    seen: usize,
    with: impl FnOnce(ConsumerBuilder<(), T>) -> ConsumerBuilder<(), T>,
) -> Cost {
    let builder = Consumer::builder("bench", topic(plan, seen), store).settings(plan.settings());
    let built = with(builder).require(Level::AtLeastOnce).build().await;
    let consumer = built.expect("the benchmark's settings are sound");
    let handle = consumer.handle();
    let (cpu, begun, before) = (ProcessTime::now(), Instant::now(), allocated::count());
    let running = tokio::spawn(consumer.run(std::future::pending()));
    while handle.statistics().processed < plan.events as u64 {
        tokio::time::sleep(plan.look).await;
    }
    let (took, cpu, after) = (begun.elapsed(), cpu.elapsed(), allocated::count());
    handle.stop();
    running.await.expect("no panic").expect("a clean stop");
    let per_event = |total: f64| total / plan.events as f64;
    Cost {
        events_per_second: plan.events as f64 / took.as_secs_f64(),
        cpu_us: per_event(cpu.as_secs_f64() * 1e6),
        allocations: before.zip(after).map(|(before, after)| per_event((after - before) as f64)),
    }
}

/// Fills a store with processed events that no plan uses.
pub async fn remember(store: &dyn ProcessedStore, events: usize) {
    let consumer = store.open("bench", Settings::RETENTION).await.expect("the store is open");
    for first in (0..events).step_by(1_024) {
        let requests: Vec<_> = (first..events.min(first + 1_024))
            .map(|number| ClaimRequest {
                consumer,
                key: EventKey::of("bench", "/remembered", &number.to_string()),
                fingerprint: Fingerprint::ANY,
                token: number as u128,
                reopen: None,
            })
            .collect();
        let claims = store.claim(&requests, Settings::LEASE).await.expect("granted");
        let outcomes: Vec<_> = claims
            .into_iter()
            .filter_map(|claim| match claim {
                Claim::Granted(lease, _) => Some((lease, Outcome::Processed)),
                _ => None,
            })
            .collect();
        store.record(&outcomes).await.expect("recorded");
    }
}
