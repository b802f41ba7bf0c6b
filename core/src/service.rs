//! Service: several consumers under one shutdown, and one place to ask how they are.

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::consumer::{Consumer, ConsumerHandle};
use crate::error::{Error, ErrorKind, Result};
use crate::guarantee::Level;
use crate::health::{Health, Statistics};

/// Several consumers that start, drain and end together.
///
/// ```no_run
/// # async fn run(billing: hapax::Consumer, shipping: hapax::Consumer) -> hapax::Result<()> {
/// let service = hapax::Service::new().add(billing).add(shipping);
/// let handle = service.handle(); // for /live, /ready and /report of your HTTP server
/// service.run(hapax::shutdown_signal()).await
/// # }
/// ```
#[derive(Default)]
pub struct Service {
    consumers: Vec<Consumer>,
    stop: CancellationToken,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("consumers", &self.consumers).finish_non_exhaustive()
    }
}

impl Service {
    /// Without consumers yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// With this consumer too.
    #[must_use]
    #[expect(clippy::should_implement_trait, reason = "the verb by which consumers are built, too")]
    pub fn add(mut self, consumer: Consumer) -> Self {
        self.consumers.push(consumer);
        self
    }

    /// A handle on all consumers that were added so far, good for as long as anybody keeps it.
    pub fn handle(&self) -> ServiceHandle {
        let consumers = self.consumers.iter().map(Consumer::handle).collect();
        ServiceHandle { consumers, stop: self.stop.clone() }
    }

    /// Runs all consumers until `shutdown` resolves or [`ServiceHandle::stop`] is called; then all drain at the same time,
    /// each with its own deadline. Ends early when every consumer has ended by itself.
    ///
    /// All run inside this one future, on one thread at a time. Consumers that need a processor each are better run in
    /// tasks of their own, with a shutdown they share.
    ///
    /// Dropping the future is a crash of all of them: see [`Consumer::run`].
    ///
    /// # Errors
    /// The first consumer that fails stops the others gracefully; its error is returned with its name when they have
    /// drained. Errors of the others are logged. A service without consumers is a configuration error.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<()> {
        if self.consumers.is_empty() {
            return Err(Error::new(ErrorKind::Configuration, "run").because("a service needs at least one consumer"));
        }
        let stop = self.stop;
        let runs = self.consumers.into_iter().map(|consumer| {
            let (name, stop) = (consumer.handle(), stop.clone());
            Box::pin(async move {
                let ended = consumer.run(stop.cancelled_owned()).await;
                ended.map_err(|error| of_consumer(name.name(), error))
            })
        });
        together(runs, &stop, shutdown).await
    }
}

/// Runs all to their ends. The first error, or `shutdown`, cancels `stop`, which is to end the others.
async fn together<R>(
    runs: impl Iterator<Item = R>,
    stop: &CancellationToken,
    shutdown: impl Future<Output = ()>,
) -> Result<()>
where
    R: Future<Output = Result<()>>,
{
    let mut runs: FuturesUnordered<R> = runs.collect();
    let mut shutdown = pin!(shutdown);
    let mut outcome = Ok(());
    loop {
        let ended = tokio::select! {
            biased;
            () = &mut shutdown, if !stop.is_cancelled() => {
                stop.cancel();
                continue;
            }
            ended = runs.next() => ended,
        };
        match ended {
            None => return outcome,
            Some(Ok(())) => {}
            Some(Err(error)) => {
                tracing::error!(target: "hapax", %error, "a consumer failed: the service stops");
                stop.cancel();
                outcome = outcome.and(Err(error));
            }
        }
    }
}

fn of_consumer(name: &str, error: Error) -> Error {
    Error::new(error.kind(), "run").because(format!("consumer {name:?}: {error}")).with_source(error)
}

/// A view of all consumers of a service, and the levers on them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ServiceHandle {
    consumers: Arc<[ConsumerHandle]>,
    stop: CancellationToken,
}

impl ServiceHandle {
    /// Whether every consumer lives: false means that the process is to be restarted.
    pub fn live(&self) -> bool {
        self.consumers.iter().all(|consumer| consumer.health().live)
    }

    /// Whether there are consumers and every one takes work.
    pub fn ready(&self) -> bool {
        !self.consumers.is_empty() && self.consumers.iter().all(|consumer| consumer.health().ready)
    }

    /// How everything is, to be serialised. Holds no ids, keys, payloads or credentials; error texts are redacted and cut.
    pub fn report(&self) -> Report {
        let consumers: Vec<_> = self.consumers.iter().map(ConsumerReport::of).collect();
        Report {
            live: consumers.iter().all(|consumer| consumer.health.live),
            ready: !consumers.is_empty() && consumers.iter().all(|consumer| consumer.health.ready),
            consumers,
        }
    }

    /// The handles, in the order in which the consumers were added.
    pub fn consumers(&self) -> &[ConsumerHandle] {
        &self.consumers
    }

    /// Stops all gracefully, as `shutdown` does.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}

/// How a service is at one moment.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Every consumer lives.
    pub live: bool,
    /// There are consumers and every one takes work.
    pub ready: bool,
    /// One by one, in the order in which they were added.
    pub consumers: Vec<ConsumerReport>,
}

/// How one consumer is at one moment.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ConsumerReport {
    /// Its name.
    pub name: String,
    /// The lowest level among its handlers.
    pub level: Level,
    /// Live, ready, phase, reach, switch, in flight.
    #[serde(flatten)]
    pub health: Health,
    /// What it has done since it was built.
    pub statistics: Statistics,
}

impl ConsumerReport {
    fn of(consumer: &ConsumerHandle) -> Self {
        Self {
            name: consumer.name().to_owned(),
            level: consumer.guarantee().level(),
            health: consumer.health(),
            statistics: consumer.statistics(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::time::Duration;

    use futures_util::future::BoxFuture;
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::health::Vitals;

    type Run = BoxFuture<'static, Result<()>>;

    /// Runs until it is told to stop, then drains for so long.
    fn until_stopped(stop: &CancellationToken, drain: Duration) -> Run {
        let stop = stop.clone();
        Box::pin(async move {
            stop.cancelled().await;
            sleep(drain).await;
            Ok(())
        })
    }

    fn failing_after(wait: Duration, name: &'static str) -> Run {
        Box::pin(async move {
            sleep(wait).await;
            Err(of_consumer(name, Error::new(ErrorKind::Incompatible, "claim").because("a foreign record")))
        })
    }

    #[tokio::test(start_paused = true)]
    async fn all_drain_at_the_same_time_when_shutdown_comes() {
        let (stop, begun) = (CancellationToken::new(), Instant::now());
        let runs = [3, 5, 4].map(|seconds| until_stopped(&stop, Duration::from_secs(seconds)));
        together(runs.into_iter(), &stop, sleep(Duration::from_secs(10))).await.expect("nobody failed");
        assert_eq!(begun.elapsed().as_secs(), 15, "ten until shutdown, five for the longest drain");
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_fatal_error_stops_the_others_gracefully_and_is_returned() {
        let (stop, begun) = (CancellationToken::new(), Instant::now());
        let runs = [
            until_stopped(&stop, Duration::from_secs(4)),
            failing_after(Duration::from_secs(1), "billing"),
            failing_after(Duration::from_secs(2), "shipping"),
        ];
        let error = together(runs.into_iter(), &stop, pending()).await.expect_err("one failed");
        assert_eq!(error.kind(), ErrorKind::Incompatible);
        assert_eq!(error.to_string(), "run: consumer \"billing\": claim: a foreign record");
        assert_eq!(begun.elapsed().as_secs(), 5, "the healthy one has drained");
    }

    #[tokio::test(start_paused = true)]
    async fn a_consumer_that_ends_by_itself_leaves_the_others_running() {
        let (stop, begun) = (CancellationToken::new(), Instant::now());
        let ended: Run = Box::pin(async { Ok(()) });
        let runs = [ended, until_stopped(&stop, Duration::ZERO)];
        together(runs.into_iter(), &stop, sleep(Duration::from_secs(7))).await.expect("nobody failed");
        assert_eq!(begun.elapsed().as_secs(), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_ends_when_its_last_consumer_has_ended() {
        let stop = CancellationToken::new();
        let ended: Run = Box::pin(async { Ok(()) });
        together([ended].into_iter(), &stop, pending()).await.expect("nobody failed");
        assert!(!stop.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_reads_as_flat_json() {
        let consumer = ConsumerReport {
            name: "billing".to_owned(),
            level: Level::Deduplicated,
            health: Vitals::new().health(),
            statistics: Statistics::default(),
        };
        let json = serde_json::to_value(Report { live: true, ready: false, consumers: vec![consumer] }).unwrap();
        let first = &json["consumers"][0];
        assert_eq!(
            (&json["ready"], &first["ready"], &first["phase"]),
            (&false.into(), &false.into(), &"starting".into())
        );
        assert_eq!((&first["level"], &first["name"]), (&"Deduplicated".into(), &"billing".into()));
        assert_eq!((&first["statistics"]["processed"], &first["store"]["up"]), (&0.into(), &false.into()));
    }

    #[tokio::test]
    async fn a_service_without_consumers_is_refused_and_not_ready() {
        let service = Service::new();
        assert!(!service.handle().ready() && !service.handle().report().ready);
        assert_eq!(service.run(pending()).await.expect_err("refused").kind(), ErrorKind::Configuration);
    }
}
