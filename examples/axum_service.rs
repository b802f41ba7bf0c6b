//! A service: probes and metrics over HTTP beside a consumer, and a drain when it is told to stop.
//!
//! `/livez` says whether to restart it, `/readyz` whether it takes work (an outage of the store makes it unready, never
//! dead), `/metrics` what it does. SIGTERM and Ctrl-C drain: what runs finishes, then the process ends with 0.

use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use hapax::{Consumer, Context, Failure, Message, Service, ServiceHandle};
use hapax_memory::{MemoryBroker, MemoryStore};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

async fn greet(_: Arc<Message>, _: Context<()>) -> Result<(), Failure> {
    tokio::time::sleep(Duration::from_millis(10)).await;
    Ok(())
}

fn probe(holds: bool) -> StatusCode {
    if holds { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn routes(service: ServiceHandle, metrics: PrometheusHandle) -> Router {
    let (live, ready, report) = (service.clone(), service.clone(), service);
    Router::new()
        .route("/livez", get(async move || probe(live.live())))
        .route("/readyz", get(async move || probe(ready.ready())))
        .route("/report", get(async move || Json(report.report())))
        .route("/metrics", get(async move || metrics.render()))
}

#[tokio::main]
async fn main() -> Result<(), hapax::BoxError> {
    // Before the consumer is built: the metrics it makes without a recorder stay silent.
    let metrics = PrometheusBuilder::new().install_recorder()?;
    hapax::describe_metrics();

    let broker = MemoryBroker::new("greetings");
    let consumer = Consumer::builder("greeter", broker.another(), MemoryStore::new()).on_any(greet).build().await?;
    let service = Service::new().add(consumer);
    let handle = service.handle();
    for id in [1, 2, 3, 2, 1] {
        broker.publisher().send(Message::event("https://shop.example", id.to_string(), "com.shop.visit")).await;
    }

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on http://{}", listener.local_addr()?);
    let http = tokio::spawn(axum::serve(listener, routes(handle.clone(), metrics)).into_future());

    service.run(hapax::shutdown_signal()).await?;
    // The probes answer until the drain is over.
    http.abort();
    for consumer in handle.consumers() {
        let done = consumer.statistics();
        println!("{} drained: processed {}, duplicates {}", consumer.name(), done.processed, done.duplicates);
    }
    Ok(())
}
