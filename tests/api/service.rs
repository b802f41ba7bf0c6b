//! Around the handlers: settings, several consumers under one shutdown, what probes are told.

use std::sync::Arc;
use std::time::Duration;

use hapax::{Broker, Consumer, Context, Failure, Level, Message, ProcessedStore, Service, Settings};
use hapax_memory::{MemoryBroker, MemoryStore};

async fn greet(_: Arc<Message>, _: Context<()>) -> Result<(), Failure> {
    Ok(())
}

/// Broker and store chosen at run time.
async fn consumer(name: &str, broker: Arc<dyn Broker>, store: Arc<dyn ProcessedStore>, settings: Settings) -> Consumer {
    Consumer::builder(name, broker, store).settings(settings).on_any(greet).build().await.expect("it holds together")
}

#[tokio::test]
async fn a_service_runs_until_the_signal_and_reports_what_probes_ask() {
    let settings =
        Settings::from_vars("HAPAX", [("HAPAX_CONCURRENCY", "16"), ("HAPAX_LEASE", "45s"), ("PATH", "/bin")]);
    let settings = settings.expect("two settings");
    assert_eq!((settings.concurrency, settings.lease), (16, Duration::from_secs(45)));

    let (greetings, visits) = (MemoryBroker::new("greetings"), MemoryBroker::new("visits"));
    let store: Arc<dyn ProcessedStore> = Arc::new(MemoryStore::new());
    let greeter = consumer("greeter", Arc::new(greetings.another()), Arc::clone(&store), settings.clone()).await;
    let counter = consumer("counter", Arc::new(visits.another()), store, settings).await;
    let service = Service::new().add(greeter).add(counter);
    let handle = service.handle();
    assert!(!handle.ready(), "it takes no work yet");

    // As users write it: `service.run(hapax::shutdown_signal()).await?`.
    let running = tokio::spawn(service.run(hapax::shutdown_signal()));
    for broker in [&greetings, &visits] {
        broker.publisher().send(Message::event("https://shop.example", "1", "com.shop.visit")).await;
        broker.settled().await;
    }
    assert!(handle.live() && handle.ready());
    let report = serde_json::to_value(handle.report()).expect("it has a JSON form");
    assert_eq!(report["consumers"][1]["name"], "counter");
    assert_eq!(report["consumers"][1]["statistics"]["processed"], 1);

    handle.stop();
    running.await.expect("no panic").expect("it drains");
    assert!(!handle.ready(), "it has stopped");
}

#[tokio::test]
async fn a_level_that_cannot_be_had_is_refused_at_start() {
    let built = Consumer::builder("greeter", MemoryBroker::new("greetings"), MemoryStore::new())
        .on_any(greet)
        .require(Level::ExactlyOnceEffect)
        .build()
        .await;
    let faults = built.expect_err("a plain handler is L2");
    assert!(faults.has("level-below-required"), "{faults}");
}
