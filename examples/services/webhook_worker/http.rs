//! Probes, a report and metrics over HTTP, until the drain is over.
//!
//! `/livez` says whether to restart it, `/readyz` whether it takes work: an outage of broker or store makes it unready,
//! never dead.

use std::net::SocketAddr;
use std::time::Duration;

use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use hapax::ServiceHandle;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// How often samples of histograms are put together.
const UPKEEP: Duration = Duration::from_secs(5);

/// A socket that listens, and the metrics that it will serve.
pub(crate) struct Http {
    listener: TcpListener,
    metrics: PrometheusHandle,
}

impl Http {
    /// Goes before the consumer is built: metrics that are made without a recorder stay silent.
    pub(crate) async fn bind(at: SocketAddr) -> Result<Self, String> {
        let metrics = PrometheusBuilder::new().install_recorder().map_err(|error| format!("--http {at}: {error}"))?;
        hapax::describe_metrics();
        let listener = TcpListener::bind(at).await.map_err(|error| format!("--http {at}: {error}"))?;
        Ok(Self { listener, metrics })
    }

    /// Answers from here on, until the task is aborted.
    pub(crate) fn serve(self, service: ServiceHandle) -> JoinHandle<()> {
        let Self { listener, metrics } = self;
        if let Ok(address) = listener.local_addr() {
            tracing::info!("listening on http://{address}");
        }
        let upkeep = metrics.clone();
        let (live, ready, report) = (service.clone(), service.clone(), service);
        let routes = Router::new()
            .route("/livez", get(async move || probe(live.live())))
            .route("/readyz", get(async move || probe(ready.ready())))
            .route("/report", get(async move || Json(report.report())))
            .route("/metrics", get(async move || metrics.render()));
        tokio::spawn(async move {
            tokio::select! {
                served = axum::serve(listener, routes) => {
                    if let Err(error) = served {
                        tracing::error!(%error, "the probes are not answered any more");
                    }
                }
                () = tidy(&upkeep) => {}
            }
        })
    }
}

/// Histograms keep every sample until somebody asks for them, or until they are tidied.
async fn tidy(metrics: &PrometheusHandle) {
    let mut ticks = tokio::time::interval(UPKEEP);
    loop {
        ticks.tick().await;
        metrics.run_upkeep();
    }
}

fn probe(holds: bool) -> StatusCode {
    if holds { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}
