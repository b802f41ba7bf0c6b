//! The servers under test, through `scripts/brokers`: started, killed, stopped and paused by name.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

use crate::options::Options;
use crate::plan::Side;

/// Longest time for one command.
const COMMAND_MAX: Duration = Duration::from_secs(90);

/// Most tries to start a server.
const STARTS_MAX: usize = 3;
/// A server that takes longer to stop in order is killed.
const STOP_MAX: Duration = Duration::from_secs(20);

/// The variables that `scripts/brokers env` prints.
#[derive(Clone, Debug, Default)]
pub(crate) struct Environment(BTreeMap<String, String>);

impl Environment {
    pub(crate) fn get(&self, name: &str) -> Result<&str, String> {
        self.0.get(name).map(String::as_str).ok_or_else(|| format!("scripts/brokers env does not tell {name}"))
    }

    fn parse(text: &str) -> Self {
        let words = text.lines().filter_map(|line| line.strip_prefix("export ")).flat_map(str::split_whitespace);
        Self(words.filter_map(|word| word.split_once('=')).map(|(name, value)| (name.into(), value.into())).collect())
    }
}

/// The broker and the store of a run.
#[derive(Debug)]
pub(crate) struct Servers {
    script: PathBuf,
    broker: &'static str,
    store: &'static str,
    pub(crate) environment: Environment,
}

impl Servers {
    /// Starts what the run needs.
    pub(crate) async fn up(options: &Options) -> Result<Self, String> {
        let mut servers = Self {
            script: options.brokers.clone(),
            broker: options.broker.name(),
            store: options.store.name(),
            environment: Environment::default(),
        };
        let mut names = vec!["up", servers.broker];
        if options.store.is_server() {
            names.push(servers.store);
        }
        servers.command(&names).await?;
        servers.environment = Environment::parse(&servers.command(&["env"]).await?);
        Ok(servers)
    }

    pub(crate) fn url(&self, side: Side) -> Result<&str, String> {
        self.environment.get(&format!("HAPAX_{}_URL", self.name(side).to_uppercase()))
    }

    pub(crate) async fn kill(&self, side: Side) -> Result<(), String> {
        self.command(&["kill", self.name(side)]).await.map(drop)
    }

    /// In order: the server may finish what it does. PostgreSQL takes SIGINT for it, which ends its sessions.
    pub(crate) async fn stop(&self, side: Side) -> Result<(), String> {
        let name = self.name(side);
        let pid = pid(&self.command(&["status"]).await?, name).ok_or_else(|| format!("{name} does not run"))?;
        let signal = if name == "postgres" { "-INT" } else { "-TERM" };
        let sent = Command::new("kill").args([signal, &pid]).status().await;
        if !sent.is_ok_and(|status| status.success()) {
            return Err(format!("{name} (process {pid}) cannot be told to stop"));
        }
        let begun = Instant::now();
        while pid_of_status_is(&self.command(&["status"]).await?, name, &pid) {
            if begun.elapsed() > STOP_MAX {
                return self.kill(side).await;
            }
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Returns when it is ready. On a busy machine one deadline of the script may be too short.
    pub(crate) async fn start(&self, side: Side) -> Result<(), String> {
        let words = ["start", self.name(side)];
        for _ in 1..STARTS_MAX {
            match self.command(&words).await {
                Ok(_) => return Ok(()),
                Err(why) => eprintln!("rig: trying again: {}", why.lines().next().unwrap_or_default()),
            }
        }
        self.command(&words).await.map(drop)
    }

    pub(crate) async fn pause(&self, side: Side) -> Result<(), String> {
        self.command(&["pause", self.name(side)]).await.map(drop)
    }

    pub(crate) async fn resume(&self, side: Side) -> Result<(), String> {
        self.command(&["resume", self.name(side)]).await.map(drop)
    }

    const fn name(&self, side: Side) -> &'static str {
        match side {
            Side::Broker => self.broker,
            Side::Store => self.store,
        }
    }

    async fn command(&self, words: &[&str]) -> Result<String, String> {
        let mut command = Command::new(&self.script);
        command.args(words).stdin(Stdio::null()).kill_on_drop(true);
        let line = format!("{} {}", self.script.display(), words.join(" "));
        let output = timeout(COMMAND_MAX, command.output())
            .await
            .map_err(|_| format!("{line} took longer than {COMMAND_MAX:?}"))?
            .map_err(|error| format!("{line}: {error}"))?;
        if !output.status.success() {
            return Err(format!("{line} failed:\n{}", String::from_utf8_lossy(&output.stderr)));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// The process of a server that runs, from the table of `scripts/brokers status`: name, state, pid, address.
fn pid(status: &str, name: &str) -> Option<String> {
    let mut lines = status.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let line = lines.find(|words| words.first() == Some(&name))?;
    let pid = line.get(2)?;
    pid.bytes().all(|byte| byte.is_ascii_digit()).then(|| (*pid).to_owned())
}

fn pid_of_status_is(status: &str, name: &str, old: &str) -> bool {
    pid(status, name).is_some_and(|pid| pid == old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_in_the_table_while_it_runs() {
        let table = "SERVER STATE PID ADDRESS\nredis up 12 127.0.0.1:1\nkafka dead - 127.0.0.1:2\n";
        assert_eq!(pid(table, "redis").as_deref(), Some("12"));
        assert_eq!(pid(table, "kafka"), None);
        assert_eq!(pid(table, "postgres"), None);
    }

    #[test]
    fn variables_are_read_from_the_lines_of_a_shell() {
        let environment = Environment::parse("export A=redis://h:1\nnoise\nexport B=x C=y\n");
        assert_eq!(environment.get("A"), Ok("redis://h:1"));
        assert_eq!(environment.get("C"), Ok("y"));
        assert!(environment.get("D").is_err());
    }
}
