//! What benchmarks share: messages, the no-op handler, and a run that is measured.

#![allow(clippy::disallowed_methods, reason = "benchmarks measure the real clock")]

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cpu_time::ProcessTime;
use hapax::{
    Claim, ClaimRequest, EventKey, Fingerprint, Outcome,
    Consumer, Context, Failure, Level, Message, Order, ProcessedStore, Settings,
};
use hapax_memory::MemoryBroker;

/// What one run is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Deliveries, all different events.
    pub events: usize,
    /// Deliveries in flight, and handlers at once.
    pub in_flight: usize,
    /// Bytes of data.
    pub bytes: usize,
    /// Ordering keys; 0 is unordered.
    pub keys: usize,
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

#[cfg(feature = "count-allocations")]
#[global_allocator]
static COUNTED: &stats_alloc::StatsAlloc<std::alloc::System> = &stats_alloc::INSTRUMENTED_SYSTEM;

fn allocations() -> Option<usize> {
    #[cfg(feature = "count-allocations")]
    return Some(COUNTED.stats().allocations);
    #[cfg(not(feature = "count-allocations"))]
    None
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

/// A message of a plan.
pub fn message(plan: &Plan, number: usize, data: &Bytes) -> Message {
    let message = Message::event("/bench", format!("{number:016}"), "bench.event");
    let message = message.with_data("application/octet-stream", data.clone());
    match plan.keys {
        0 => message,
        keys => message.with_partition_key(format!("{}", number % keys)),
    }
}

/// The settings of a plan.
pub fn settings(plan: &Plan) -> Settings {
    Settings {
        order: Some(if plan.keys == 0 { Order::Unordered } else { Order::PerKey }),
        concurrency: plan.in_flight,
        in_flight_max: if plan.keys == 0 { plan.in_flight } else { 4 * plan.in_flight },
        batch_max: plan.in_flight.clamp(1, 1_024),
        ..Settings::default()
    }
}

/// Preloads a topic, then measures a consumer until it has processed everything.
pub async fn consume(plan: &Plan, store: impl ProcessedStore, seen: usize) -> Cost {
    let broker = MemoryBroker::builder("bench").capacity(plan.events).ordered().build();
    let publisher = broker.publisher();
    let data = Bytes::from(vec![b'x'; plan.bytes]);
    for number in seen..seen + plan.events {
        publisher.try_publish(&message(plan, number, &data)).expect("the topic holds the plan");
    }
    let consumer = Consumer::builder("bench", broker, store)
        .settings(settings(plan))
        .on_any(noop)
        .require(Level::AtLeastOnce)
        .build()
        .await
        .expect("the benchmark's settings are sound");
    let handle = consumer.handle();
    let (cpu, begun, before) = (ProcessTime::now(), Instant::now(), allocations());
    let running = tokio::spawn(consumer.run(std::future::pending()));
    while handle.statistics().processed < plan.events as u64 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (took, cpu, after) = (begun.elapsed(), cpu.elapsed(), allocations());
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
            .filter_map(|claim| if let Claim::Granted(lease, _) = claim { Some((lease, Outcome::Processed)) } else { None })
            .collect();
        store.record(&outcomes).await.expect("recorded");
    }
}
