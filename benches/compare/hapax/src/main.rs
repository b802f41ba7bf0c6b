//! hapax at each level, as a user would build it: one consumer, one handler that does nothing or writes one row.

#![allow(clippy::disallowed_methods, reason = "benchmarks measure the real clock")]

mod brokers;
mod clocked;
mod effects;
mod remember;

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use compare_kit::{Arguments, Meter};
use hapax::{
    BoxError, Broker, Consumer, ConsumerBuilder, Context, Failure, Level, Message, Order, Otherwise, ProcessedStore,
    Settings,
};
use hapax_memory::MemoryStore;
use hapax_redis::{RedisServer, RedisStore};

use clocked::Clocks;
use effects::App;

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), BoxError> {
    let arguments = Arguments::parse();
    let clocks = arguments.stages.then(|| Arc::new(Clocks::new(arguments.events)));
    let app = Arc::new(App {
        meter: Meter::new(&arguments),
        insert: effects::insert(&arguments),
        clocks,
        stopped: arguments.stopped,
    });
    let broker = brokers::open(&arguments)?;
    let broker = match &app.clocks {
        Some(clocks) => Arc::new(clocked::Clocked { inner: broker, clocks: Arc::clone(clocks) }) as Arc<dyn Broker>,
        None => broker,
    };
    let (memory, level) = (arguments.store == "memory", arguments.level.as_deref().unwrap_or("L2"));
    match arguments.store.as_str() {
        "memory" => {
            let store = MemoryStore::builder().records_max(20_000_000).build();
            run(&arguments, app, broker, store, |builder| builder.on_any(count), memory).await
        }
        "redis" => {
            let server = RedisServer::at(hapax::SecretUrl::parse(&*arguments.store_url)?)?;
            let store = RedisStore::builder(server).prefix(&*arguments.group).connect().await?;
            run(&arguments, app, broker, store, |builder| builder.on_any(count), memory).await
        }
        "postgres" => {
            let store = effects::postgres(&arguments).await?;
            let with = |builder: ConsumerBuilder<App, _>| match level {
                "L4" => builder.on_any_tx(effects::postgres_row),
                "L4-batch" => builder.on_batch_tx(effects::postgres_rows),
                _ => builder.on_any(count),
            };
            run(&arguments, app, broker, store, with, memory).await
        }
        "sqlite" => {
            let store = effects::sqlite(&arguments).await?;
            let with = |builder: ConsumerBuilder<App, _>| match level {
                "L4" => builder.on_any_tx(effects::sqlite_row),
                "L4-batch" => builder.on_batch_tx(effects::sqlite_rows),
                _ => builder.on_any(count),
            };
            run(&arguments, app, broker, store, with, memory).await
        }
        other => Err(format!("there is no store {other}").into()),
    }
}

/// The handler without an effect.
async fn count(event: Arc<Message>, cx: Context<App>) -> Result<(), Failure> {
    let app = cx.state();
    app.started(&event);
    app.meter.handled(&event.data);
    if app.stopped {
        std::future::pending::<()>().await;
    }
    Ok(())
}

async fn run<T: ProcessedStore>(
    arguments: &Arguments,
    app: Arc<App>,
    broker: Arc<dyn Broker>,
    store: T,
    with: impl FnOnce(ConsumerBuilder<App, T>) -> ConsumerBuilder<App, T>,
    memory: bool,
) -> Result<(), BoxError> {
    if arguments.remember > 0 {
        remember::fill(arguments, &store).await?;
        app.meter.begin();
    }
    let settings = Settings {
        order: Some(if arguments.order == "key" { Order::PerKey } else { Order::Unordered }),
        concurrency: arguments.concurrency,
        in_flight_max: arguments.in_flight,
        batch_max: arguments.batch,
        ..Settings::default()
    };
    let builder = Consumer::builder("compared", broker, store).settings(settings).shared_state(Arc::clone(&app));
    // Batch handlers are for one type.
    let is_batch = arguments.level.as_deref() == Some("L4-batch");
    let builder = if is_batch { builder.otherwise(Otherwise::DeadLetter) } else { builder };
    let builder = if memory { builder.require(Level::AtLeastOnce) } else { builder };
    let consumer = with(builder).build().await?;
    let handle = consumer.handle();
    let running = tokio::spawn(consumer.run(std::future::pending()));
    if arguments.stopped {
        // As long as it takes for everything that can be in flight to be.
        tokio::time::sleep(Duration::from_secs(5)).await;
        app.meter.report();
        handle.stop_within(Duration::ZERO);
        running.await??;
        return effects::drop_all(arguments).await;
    }
    if arguments.until_idle {
        idle(&app.meter).await;
        handle.stop();
        running.await??;
        return effects::drop_all(arguments).await;
    }
    app.meter.all_handled().await;
    let settled = |events: u64| {
        let done = handle.statistics();
        done.processed + done.duplicates >= events
    };
    while !settled(arguments.messages.unwrap_or(arguments.events)) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    app.meter.report_with(effects::store_mib(arguments).await);
    if let Some(clocks) = &app.clocks {
        // The last settlements may be under way.
        tokio::time::sleep(Duration::from_millis(200)).await;
        clocks.report();
    }
    handle.stop();
    running.await??;
    effects::drop_all(arguments).await
}

/// Waits until nothing has come for some seconds, and tells how it stood at the last event.
async fn idle(meter: &Meter) {
    const QUIET: Duration = Duration::from_secs(3);
    const WAIT: Duration = Duration::from_secs(30);
    let (mut seen, mut since, mut told) = (0, Instant::now(), None);
    while since.elapsed() < if seen == 0 { WAIT } else { QUIET } {
        tokio::time::sleep(Duration::from_millis(10)).await;
        if meter.count() != seen {
            (seen, since) = (meter.count(), Instant::now());
            told = Some(meter.outcome(None));
        }
    }
    println!("{}", serde_json::to_string(&told.unwrap_or_default()).expect("figures have a JSON form"));
}
