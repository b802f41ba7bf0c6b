//! Who is measured: the contenders of a broker, and how each is started.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use compare_kit::{Outcome, Stages};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::feed::Error;
use crate::figures;

/// Longest run, and longest of one that fills a store before.
const PATIENCE: Duration = Duration::from_secs(240);
const FILLING: Duration = Duration::from_secs(1_200);

/// One line of the comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Contender {
    pub broker: String,
    pub store: &'static str,
    pub name: &'static str,
    pub level: Option<&'static str>,
    pub concurrency: usize,
    /// `in_flight` and `batch` where they are not the usual ones.
    pub in_flight: usize,
    pub batch: usize,
    pub by_key: bool,
}

impl Contender {
    pub fn new(broker: &str, name: &'static str, store: &'static str) -> Self {
        let in_flight = if name == "hapax" { HAPAX_AT_ONCE } else { 1 };
        let (broker, batch) = (broker.to_owned(), HAPAX_BATCH);
        Self { broker, store, name, level: None, concurrency: in_flight, in_flight, batch, by_key: false }
    }

    pub fn hapax(broker: &str, store: &'static str, level: &'static str) -> Self {
        Self { level: Some(level), ..Self::new(broker, "hapax", store) }
    }

    pub fn at(self, concurrency: usize) -> Self {
        Self { concurrency, in_flight: self.in_flight.max(concurrency), ..self }
    }

    /// For people: `hapax L2, redis`.
    pub fn title(&self) -> String {
        figures::title(self.name, self.level, self.store, self.concurrency)
    }

    fn program(&self) -> Result<PathBuf, Error> {
        let package = match self.name {
            "raw" | "batched" | "by-hand" | "by-hand-tx" => "plain",
            other => other,
        };
        let program = std::env::current_exe()?.with_file_name(format!("compare-{package}"));
        if program.exists() { Ok(program) } else { Err(format!("{} is not built", program.display()).into()) }
    }

    pub fn is_built(&self) -> bool {
        self.program().is_ok()
    }
}

/// Deliveries in flight and handlers at once of hapax: so many that a batch gathers while another is under way.
pub const HAPAX_AT_ONCE: usize = 1_024;
/// Most items of a call of hapax.
pub const HAPAX_BATCH: usize = 512;

/// All that consume this broker.
pub fn all(broker: &str) -> Vec<Contender> {
    let new = |name, store| Contender::new(broker, name, store);
    let mut all = vec![
        new("raw", "none"),
        new("batched", "redis"),
        new("batched", "postgres"),
        new("by-hand", "redis"),
        new("by-hand", "postgres"),
        new("by-hand-tx", "postgres"),
        new("by-hand-tx", "postgres").at(32),
    ];
    if broker == "kafka" {
        all.extend([
            new("mq-bridge", "none").at(1),
            new("mq-bridge", "memory").at(1),
            new("mq-bridge", "postgres").at(1),
            new("ruststream", "none"),
            new("watermill", "none"),
            new("watermill", "memory"),
        ]);
    }
    let hapax = |store, level| Contender::hapax(broker, store, level);
    all.extend([
        hapax("memory", "L1"),
        hapax("redis", "L2"),
        hapax("postgres", "L2"),
        hapax("sqlite", "L2"),
        hapax("postgres", "L4").at(1),
        hapax("postgres", "L4").at(32),
        hapax("sqlite", "L4").at(32),
        hapax("postgres", "L4-batch"),
        hapax("sqlite", "L4-batch"),
    ]);
    all
}

/// Where things are.
#[derive(Clone, Debug)]
pub struct Place {
    /// Databases of SQLite.
    pub folder: PathBuf,
}

impl Place {
    pub fn url(&self, server: &str) -> Result<String, Error> {
        let variable = format!("HAPAX_{}_URL", server.to_uppercase());
        std::env::var(&variable).map_err(|_| format!("{variable} is not set: scripts/bench sets it").into())
    }

    pub fn store_url(&self, store: &str) -> Result<String, Error> {
        match store {
            "redis" | "postgres" => self.url(store),
            "sqlite" => Ok(self.folder.display().to_string()),
            _ => Ok(String::new()),
        }
    }
}

/// What is asked of one run.
#[derive(Clone, Debug, Default)]
pub struct Task {
    pub topic: String,
    pub group: String,
    pub events: u64,
    pub more: Vec<String>,
}

/// A contender that runs.
pub struct Run {
    child: Child,
    ready: Arc<AtomicBool>,
    reading: tokio::task::JoinHandle<(Option<Outcome>, Option<Stages>)>,
    title: String,
    patience: Duration,
}

pub fn start(contender: &Contender, place: &Place, task: &Task) -> Result<Run, Error> {
    let mut command = Command::new(contender.program()?);
    command.args(["--contender", contender.name, "--broker", &contender.broker]);
    command.args(["--url", &place.url(&contender.broker)?, "--topic", &task.topic, "--group", &task.group]);
    command.args(["--store", contender.store, "--store-url", &place.store_url(contender.store)?]);
    command.args(["--events", &task.events.to_string(), "--concurrency", &contender.concurrency.to_string()]);
    command.args(["--in-flight", &contender.in_flight.to_string(), "--batch", &contender.batch.to_string()]);
    command.args(["--order", if contender.by_key { "key" } else { "none" }]);
    command.args(contender.level.iter().flat_map(|level| ["--level", level]));
    command.args(&task.more);
    let mut child = command.stdout(Stdio::piped()).stdin(Stdio::null()).kill_on_drop(true).spawn()?;
    let ready = Arc::new(AtomicBool::new(false));
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    let is_ready = Arc::clone(&ready);
    let reading = tokio::spawn(async move {
        let (mut outcome, mut stages) = (None, None);
        while let Ok(Some(line)) = lines.next_line().await {
            if line == "ready" {
                is_ready.store(true, Ordering::Relaxed);
            } else if let Ok(read) = serde_json::from_str(&line) {
                outcome = Some(read);
            } else if let Ok(read) = serde_json::from_str(&line) {
                stages = Some(read);
            }
        }
        (outcome, stages)
    });
    let patience = if task.more.iter().any(|option| option == "--remember") { FILLING } else { PATIENCE };
    Ok(Run { child, ready, reading, title: contender.title(), patience })
}

impl Run {
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Waits for its end and for what it tells.
    pub async fn finish(mut self) -> Result<(Outcome, Option<Stages>), Error> {
        let ended = tokio::time::timeout(self.patience, self.child.wait()).await;
        let Ok(ended) = ended else {
            self.child.kill().await?;
            return Err(format!("{} did not end in {:?}", self.title, self.patience).into());
        };
        let (outcome, stages) = self.reading.await?;
        match (outcome, ended?) {
            (Some(outcome), _) => Ok((outcome, stages)),
            (None, status) => Err(format!("{} ended without figures: {status}", self.title).into()),
        }
    }
}
