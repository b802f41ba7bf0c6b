//! The worker processes: started, killed, paused, terminated, and listened to.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use hapax_testkit::ledger::What;
use tokio::fs::File;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::links::Link;
use crate::options::Options;
use crate::plan::Side;
use crate::scribe::{Life, Scribe};
use crate::witness::Witness;

/// The drain of a worker takes at most 25 s; then it is to have ended.
const SHUTDOWN_MAX: Duration = Duration::from_secs(32);

/// The exit code of a worker that cannot start.
const CANNOT_START: i32 = 2;
/// Longest time in which a start fails: a few calls with their deadlines.
const START_MAX: Duration = Duration::from_secs(45);

/// The number of the signal that asks for an end.
const SIGTERM: i32 = 15;

/// What a supervisor found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Supervised {
    Well,
    StartedAgain,
}

/// What all workers have in common.
#[derive(Debug)]
pub(crate) struct Orders {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) out: PathBuf,
    /// Whether effects are lines of files.
    pub(crate) lines: bool,
}

impl Orders {
    pub(crate) fn new(options: &Options, topic: &str, group: &str, out: PathBuf) -> Self {
        let mut arguments: Vec<String> = Vec::new();
        let mut flag = |name: &str, value: String| arguments.extend([format!("--{name}"), value]);
        flag("broker", options.broker.name().into());
        flag("topic", topic.into());
        flag("group", group.into());
        flag("store", options.store.name().into());
        flag("order", options.order.name().into());
        flag("lease-ms", options.lease_ms.to_string());
        flag("handler-ms", options.handler_ms().to_string());
        flag("fail-rate", options.fail_rate.to_string());
        Self { program: options.bin.join("webhook_worker"), arguments, out, lines: !options.transactional() }
    }
}

/// One worker, over all its lives.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) number: u32,
    pub(crate) broker: Arc<Link>,
    /// None where the store is a file.
    pub(crate) store: Option<Arc<Link>>,
    store_url: String,
    orders: Arc<Orders>,
    scribe: Arc<Scribe>,
    witness: Arc<Witness>,
    /// Held while something is done to it.
    state: Mutex<State>,
}

/// What runs of a worker.
#[derive(Debug, Default)]
pub(crate) struct State {
    lives: u32,
    since: Option<Instant>,
    running: Option<(Life, Child, JoinHandle<()>)>,
}

impl Worker {
    pub(crate) fn new(
        number: u32,
        (broker, store, store_url): (Arc<Link>, Option<Arc<Link>>, String),
        orders: Arc<Orders>,
        scribe: Arc<Scribe>,
        witness: Arc<Witness>,
    ) -> Self {
        let state = Mutex::default();
        Self { number, broker, store, store_url, orders, scribe, witness, state }
    }

    /// Its link to that server.
    pub(crate) fn link(&self, side: Side) -> Option<Arc<Link>> {
        match side {
            Side::Broker => Some(Arc::clone(&self.broker)),
            Side::Store => self.store.clone(),
        }
    }

    /// The right to do something to it, unless another does something already.
    pub(crate) fn try_hold(&self) -> Option<tokio::sync::MutexGuard<'_, State>> {
        self.state.try_lock().ok()
    }

    pub(crate) async fn hold(&self) -> tokio::sync::MutexGuard<'_, State> {
        self.state.lock().await
    }

    /// Begins a life, unless it lives.
    pub(crate) async fn start(&self, state: &mut State) -> Result<(), String> {
        if state.running.as_mut().is_some_and(|(_, child, _)| matches!(child.try_wait(), Ok(None))) {
            return Ok(());
        }
        let life = Life { worker: self.number, number: state.lives };
        state.lives += 1;
        let mut command = Command::new(&self.orders.program);
        command.args(&self.orders.arguments).args(["--url", &self.broker.url, "--store-url", &self.store_url]);
        if self.orders.lines {
            let file = self.orders.out.join(format!("effects-{}.jsonl", self.number));
            // The reader of the life before has read what there is; this one continues in the same file.
            let file = file.with_extension(format!("{}.jsonl", life.number));
            self.witness.follow(life, &file).map_err(|error| format!("{}: {error}", file.display()))?;
            command.arg("--effects").arg(&file);
        }
        command.env("NO_COLOR", "1").env("RUST_LOG", "info,webhook_worker=debug");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| format!("{}: {error}", self.orders.program.display()))?;
        let stderr = child.stderr.take().ok_or("a worker has no standard error")?;
        let log = self.orders.out.join(format!("worker-{}.log", self.number));
        let listening = tokio::spawn(listen(stderr, log, life, Arc::clone(&self.witness)));
        state.running = Some((life, child, listening));
        state.since = Some(Instant::now());
        Ok(())
    }

    /// Does what a supervisor does: a worker that could not start, since a server was away, is started again. One that
    /// ended later than that is told: it is to outlive every outage.
    pub(crate) async fn supervise(&self, state: &mut State) -> Result<Supervised, String> {
        let ended = match state.running.as_mut().map(|(life, child, _)| (*life, child.try_wait())) {
            None | Some((_, Ok(None))) => return Ok(Supervised::Well),
            Some((life, Ok(Some(status)))) => (life, status),
            Some((_, Err(error))) => return Err(format!("worker {}: {error}", self.number)),
        };
        let (life, status) = ended;
        let age = state.since.map_or(Duration::ZERO, |since| since.elapsed());
        if let Some((life, _, listening)) = state.running.take() {
            self.bury(life, listening).await;
        }
        self.start(state).await?;
        if status.code() == Some(CANNOT_START) && age < START_MAX {
            return Ok(Supervised::StartedAgain);
        }
        Err(format!("worker {}.{} ended by itself after {age:.1?}: {status}", life.worker, life.number))
    }

    /// `kill -9`.
    pub(crate) async fn kill(&self, state: &mut State) {
        let Some((life, mut child, listening)) = state.running.take() else { return };
        // The only error says that it has ended already.
        let _ = child.kill().await;
        self.bury(life, listening).await;
    }

    /// SIGTERM, and its end in time; a worker that does not end is killed, and told. One that can say nothing to its
    /// servers while one of them is away may end with an error.
    pub(crate) async fn terminate(&self, state: &mut State, is_away: impl Fn() -> bool) -> Result<(), String> {
        let Some((life, mut child, listening)) = state.running.take() else { return Ok(()) };
        let young = state.since.is_some_and(|since| since.elapsed() < START_MAX);
        let had_ended = matches!(child.try_wait(), Ok(Some(_)));
        let was_away = is_away();
        signal(&child, "TERM").await;
        let ended = timeout(SHUTDOWN_MAX, child.wait()).await;
        if let Ok(Ok(status)) = &ended
            && status.success()
        {
            let _ = listening.await;
            self.witness.drain();
            return Ok(());
        }
        // The only error says that it has ended already.
        let _ = child.kill().await;
        self.bury(life, listening).await;
        match ended {
            Ok(Ok(status)) if status.code() == Some(CANNOT_START) && (was_away || is_away() || had_ended && young) => {
                Ok(())
            }
            // It was told before it could listen.
            Ok(Ok(status)) if status.signal() == Some(SIGTERM) && young => Ok(()),
            Ok(ended) => Err(format!("worker {}.{} ended badly after SIGTERM: {ended:?}", life.worker, life.number)),
            Err(_) => {
                Err(format!("worker {}.{} was still there {SHUTDOWN_MAX:?} after SIGTERM", life.worker, life.number))
            }
        }
    }

    /// SIGSTOP, and SIGCONT after `length`.
    pub(crate) async fn pause(&self, state: &mut State, length: Duration) {
        let Some((life, child, _)) = state.running.as_ref() else { return };
        self.scribe.of(*life, What::Paused);
        signal(child, "STOP").await;
        tokio::time::sleep(length).await;
        self.witness.drain();
        signal(child, "CONT").await;
        self.scribe.of(*life, What::Resumed);
    }

    /// What it wrote before its end comes before its end in the history.
    async fn bury(&self, life: Life, listening: JoinHandle<()>) {
        let _ = listening.await;
        self.witness.drain();
        self.scribe.died(life);
    }
}

async fn signal(child: &Child, name: &str) {
    // None when it has ended.
    let Some(pid) = child.id() else { return };
    // Its own pid, and it is our child: the number cannot be another's.
    let sent = Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status().await;
    if !sent.is_ok_and(|status| status.success()) {
        eprintln!("rig: SIG{name} did not reach process {pid}");
    }
}

/// Keeps the log, and hears when handlers begin.
async fn listen(stderr: ChildStderr, log: PathBuf, life: Life, witness: Arc<Witness>) {
    let mut log = File::options().create(true).append(true).open(log).await.ok();
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some((id, attempt)) = begins(&line) {
            witness.started(life, id, attempt);
        } else if let Some(log) = &mut log {
            // A log that cannot be written is missed by people, and not by the judge.
            let _ = log.write_all(format!("{} {line}\n", life.number).as_bytes()).await;
        }
    }
    if let Some(log) = &mut log {
        let _ = log.flush().await;
    }
}

/// The event and the attempt of a line that says that a handler begins.
fn begins(line: &str) -> Option<(&str, u32)> {
    let (_, told) = line.split_once("webhook_worker")?;
    let (_, told) = told.split_once(": begins ")?;
    let id = told.split_once("id=\"")?.1.split_once('"')?.0;
    let attempt = told.split_once("attempt=")?.1.split_whitespace().next()?.parse().ok()?;
    Some((id, attempt))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_which_handler_begins() {
        let line = "2026-01-01T00:00:00.000000Z DEBUG hapax.handle{consumer=\"c\" attempt=1}: webhook_worker::effects: begins id=\"e-1\" attempt=2";
        assert_eq!(begins(line), Some(("e-1", 2)));
        assert_eq!(begins("2026-01-01T00:00:00.000000Z  INFO webhook_worker: listening"), None);
    }
}
