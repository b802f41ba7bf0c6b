//! RustStream on Kafka, which has no deduplication: one subscriber with tracked commits, as its quick start shows it. Its
//! handlers take decoded messages, so that it reads the payload as JSON, which the others leave alone.

use std::sync::OnceLock;

use clap::Parser;
use compare_kit::{Arguments, Meter};
use ruststream_rdkafka::prelude::*;
use serde::Deserialize;

static MEASURED: OnceLock<(Arguments, Meter)> = OnceLock::new();

fn measured() -> &'static (Arguments, Meter) {
    MEASURED.get_or_init(|| {
        let arguments = Arguments::parse();
        let meter = Meter::new(&arguments);
        (arguments, meter)
    })
}

#[derive(Debug, Deserialize)]
struct Measured {
    sent: String,
}

#[subscriber(
    KafkaTopic::new(measured().0.topic.as_str())
        .group(measured().0.group.as_str())
        .start(StartOffset::Earliest)
        .commit(Commit::Tracked)
)]
async fn count(event: &Measured) -> HandlerOutcome {
    measured().1.handled_at(event.sent.parse().unwrap_or_default());
    HandlerOutcome::ack()
}

fn app() -> impl App {
    let broker = KafkaBroker::new([measured().0.url.trim_start_matches("kafka://")]);
    RustStream::new(AppInfo::new("measured", "0.0.0")).with_broker(broker, |b| {
        b.include(count);
    })
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let meter = &measured().1;
    app()
        .run_until(async move {
            meter.all_handled().await;
            meter.report();
        })
        .await?;
    Ok(())
}
