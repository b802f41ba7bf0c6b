//! The producer: numbered events in batches, sent by the example `publish` until the broker has accepted them.
//!
//! A batch whose sending failed is sent again as a whole: what is in it twice is a duplicate as producers make them. No
//! batch goes before the one in front of it is accepted, and none holds two events of a lane, so that the order of a lane
//! at the broker is the order of its numbers.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::options::Options;
use crate::scribe::{SOURCE, Scribe};

/// Ordering keys.
pub(crate) const LANES: u64 = 16;
/// Events of a batch: at most one of each lane.
const BATCH: u64 = LANES;
/// Longest time for one run of `publish`, which itself is patient for 30 s.
const PUBLISH_MAX: Duration = Duration::from_secs(60);
/// Longest time until a batch is accepted.
const ACCEPTED_MAX: Duration = Duration::from_secs(180);
/// The share of a batch that is sent twice.
const TWICE: &str = "0.05";

/// The type of the events, and of their conflicting copies.
const TYPE: &str = "rig.event";
const OTHER_TYPE: &str = "rig.conflict";

/// What faults ask of the producer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// Sends an earlier batch again.
    Resend(u64),
    /// Sends another body under the id of an earlier event.
    Conflict(u64),
}

/// What the broker has accepted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Accepted {
    /// Events, numbered from 0.
    pub(crate) events: u64,
    /// Messages, duplicates and conflicts included, as far as they were sent on purpose.
    pub(crate) messages: u64,
    /// Events with a conflicting copy.
    pub(crate) conflicts: Vec<u64>,
    /// Batches that had to be sent more than once.
    pub(crate) sent_again: u64,
}

pub(crate) struct Producer {
    program: PathBuf,
    arguments: Vec<String>,
    every: Duration,
    scribe: Arc<Scribe>,
    accepted: Accepted,
}

pub(crate) fn id(number: u64) -> String {
    format!("e-{number}")
}

impl Producer {
    pub(crate) fn new(options: &Options, url: &str, topic: &str, scribe: Arc<Scribe>) -> Self {
        let arguments = ["--broker", options.broker.name(), "--url", url, "--topic", topic, "--events", "-"];
        Self {
            program: options.bin.join("publish"),
            arguments: arguments.map(str::to_owned).into(),
            every: Duration::from_secs_f64(BATCH as f64 / f64::from(options.rate.max(1))),
            scribe,
            accepted: Accepted::default(),
        }
    }

    /// Sends until it is told to stop, and answers what was accepted.
    pub(crate) async fn run(
        mut self,
        mut orders: mpsc::Receiver<Order>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<Accepted, String> {
        let mut ticks = interval(self.every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                _ = stop.changed() => return Ok(self.accepted),
                Some(order) = orders.recv() => self.obey(order).await?,
                _ = ticks.tick() => {
                    let first = self.accepted.events;
                    self.batch(first).await?;
                    self.accepted.events += BATCH;
                    (first..first + BATCH).for_each(|number| self.scribe.produced(&id(number)));
                }
            }
        }
    }

    async fn obey(&mut self, order: Order) -> Result<(), String> {
        let batches = self.accepted.events / BATCH;
        match order {
            _ if batches == 0 => Ok(()),
            Order::Resend(draw) => self.batch(draw % batches * BATCH).await,
            Order::Conflict(draw) => {
                let number = draw % self.accepted.events;
                let line = line(number, OTHER_TYPE);
                self.send(&line, 1, mode(number / BATCH)).await?;
                self.accepted.conflicts.push(number);
                Ok(())
            }
        }
    }

    async fn batch(&mut self, first: u64) -> Result<(), String> {
        let text: String = (first..first + BATCH).map(|number| line(number, TYPE)).collect();
        self.send(&text, BATCH, mode(first / BATCH)).await
    }

    async fn send(&mut self, text: &str, messages: u64, mode: &str) -> Result<(), String> {
        let begun = Instant::now();
        loop {
            match self.publish(text, mode).await {
                Ok(()) => {
                    self.accepted.messages += messages;
                    return Ok(());
                }
                Err(why) if begun.elapsed() > ACCEPTED_MAX => {
                    return Err(format!("no batch is accepted any more: {why}"));
                }
                Err(_) => self.accepted.sent_again += 1,
            }
        }
    }

    async fn publish(&self, text: &str, mode: &str) -> Result<(), String> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).args(["--mode", mode, "--duplicates", TWICE]).env("NO_COLOR", "1");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| format!("{}: {error}", self.program.display()))?;
        let mut stdin = child.stdin.take().ok_or("publish has no standard input")?;
        let told = async {
            // A batch is smaller than a pipe; an end of the process shows in its status.
            let _ = stdin.write_all(text.as_bytes()).await;
            drop(stdin);
            child.wait_with_output().await
        };
        let output =
            timeout(PUBLISH_MAX, told).await.map_err(|_| format!("publish took longer than {PUBLISH_MAX:?}"))?;
        let output = output.map_err(|error| error.to_string())?;
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }
}

/// One event sent in both modes is no duplicate, but a conflict: all copies of a batch travel alike.
const fn mode(batch: u64) -> &'static str {
    if batch.is_multiple_of(2) { "binary" } else { "structured" }
}

/// One CloudEvent as one line.
fn line(number: u64, ty: &str) -> String {
    let (id, lane) = (id(number), number % LANES);
    let other = ty == OTHER_TYPE;
    format!(
        "{{\"specversion\":\"1.0\",\"id\":\"{id}\",\"source\":\"{SOURCE}\",\"type\":\"{ty}\",\"partitionkey\":\"lane-{lane}\",\
         \"datacontenttype\":\"application/json\",\"data\":{{\"number\":{number},\"other\":{other}}}}}\n"
    )
}
