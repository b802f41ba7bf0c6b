//! A service: consumes the events of any broker and applies one effect for each, with any store.
//!
//! Start it several times with one `--group`, and the workers share the events. Kill one (`kill -9`), pause it, restart
//! broker or store: each event has its effect, and what can repeat is told at start as an open window. SIGTERM drains.
//!
//! Exit codes: 0 when it drained (on a signal, or with `--exit-when-idle`), 2 when it cannot start or cannot go on.

mod brokers;
mod effects;
mod feed;
mod http;
mod idle;
mod options;
mod stores;

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use hapax::{ConsumerHandle, Service};
use options::Options;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

use crate::brokers::Queue;
use crate::http::Http;
use crate::stores::Store;

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    log_to_stderr();
    match Box::pin(run(options)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let _ = writeln!(io::stderr(), "webhook_worker: {why}");
            ExitCode::from(2)
        }
    }
}

/// `RUST_LOG=info,webhook_worker=debug` tells every handler that begins, too.
fn log_to_stderr() {
    let targets = std::env::var("RUST_LOG").ok().and_then(|targets| targets.parse().ok());
    let targets = targets.unwrap_or_else(quiet);
    // For all layers: as the filter of one, it would lose the line that follows a question of sqlx (`tracing::enabled!`).
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(targets).with(lines).init();
}

/// What lapin calls an error is tried again, or told by hapax.
fn quiet() -> Targets {
    Targets::new().with_default(LevelFilter::INFO).with_target("lapin", LevelFilter::OFF)
}

async fn run(options: Options) -> Result<(), String> {
    let wrong = options.check();
    if !wrong.is_empty() {
        return Err(wrong.join("\nwebhook_worker: "));
    }
    let queue = Queue::new(&options).map_err(|error| format!("the broker: {}", told(&error)))?;
    if options.declare_only {
        queue.declare().await.map_err(|error| format!("the broker: {}", told(&error)))?;
        println!("{} and what group {} needs are there", options.topic, options.group);
        return Ok(());
    }
    let http = match options.http {
        Some(at) => Some(Http::bind(at).await?),
        None => None,
    };
    let store = Store::open(&options).await.map_err(|why| format!("the store: {why}"))?;
    let ended = consume(&options, &queue, &store, http).await;
    store.close().await;
    ended
}

async fn consume(options: &Options, queue: &Queue, store: &Store, http: Option<Http>) -> Result<(), String> {
    let consumer = store.consumer(options, queue).await?;
    let handle = consumer.handle();
    let service = Service::new().add(consumer);
    let http = http.map(|http| http.serve(service.handle()));
    let feed = feed::from_stdin(queue);

    let shutdown = {
        let (queue, handle, idle) = (queue.clone(), handle.clone(), options.exit_when_idle);
        async move {
            tokio::select! {
                () = hapax::shutdown_signal() => {}
                () = idle::idle(idle.unwrap_or(Duration::MAX), &handle, &queue), if idle.is_some() => {
                    tracing::info!("nothing arrives, nothing is under way: ending");
                }
            }
        }
    };
    let ended = service.run(shutdown).await;
    // The probes answer until the drain is over.
    http.inspect(|http| http.abort());
    feed.inspect(|feed| feed.abort());
    sum_up(&handle, options.json);
    ended.map_err(|error| told(&error))
}

/// The summary, and the counts as JSON where they are asked for.
fn sum_up(consumer: &ConsumerHandle, json: bool) {
    let done = consumer.statistics();
    let (processed, duplicates, dead_lettered) = (done.processed, done.duplicates, done.dead_lettered);
    let deliveries = processed + duplicates + dead_lettered;
    let mut text = format!(
        "{deliveries} deliveries: {processed} processed (an effect each), {duplicates} duplicates (no effect), \
         {dead_lettered} dead-lettered\n"
    );
    if json {
        text += &format!(
            "{{\"deliveries\":{deliveries},\"processed\":{processed},\"duplicates\":{duplicates},\"dead_lettered\":{dead_lettered}}}\n"
        );
    }
    // Whoever closed the pipe does not want to know.
    let _ = io::stdout().write_all(text.as_bytes());
}

/// An error with its causes.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Some tell their cause themselves.
        let why = cause.to_string();
        if !text.contains(&why) {
            text = format!("{text}: {why}");
        }
        source = cause.source();
    }
    text
}
