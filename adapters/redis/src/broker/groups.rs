//! Streams and groups: created or checked at `open`, created again where they vanished.

use hapax::{Error, ErrorKind, Result};
use redis::Cmd;

use super::builder::{Settings, Topology};
use super::entry::{bytes, items};
use super::places::sources;
use crate::connect::Link;

/// At `open`.
pub(super) async fn prepare(link: &Link, settings: &Settings) -> Result<()> {
    match settings.topology {
        Topology::Create => create(link, settings).await,
        Topology::Check => check(link, settings).await,
    }
}

/// Creates what is missing. Several members do so at once safely.
pub(super) async fn create(link: &Link, settings: &Settings) -> Result<()> {
    for source in sources(&settings.places) {
        let mut command = Cmd::new();
        // From `0`: starting at `$` would skip what was sent before the group existed.
        command.arg("XGROUP").arg("CREATE").arg(&*source.key).arg(&*settings.group).arg("0").arg("MKSTREAM");
        match link.query("open", &command).await {
            Err(error) if !error.to_string().contains("BUSYGROUP") => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

async fn check(link: &Link, settings: &Settings) -> Result<()> {
    let mut missing = Vec::new();
    for source in sources(&settings.places) {
        let mut command = Cmd::new();
        command.arg("XINFO").arg("GROUPS").arg(&*source.key);
        let there = match link.query("open", &command).await {
            Ok(groups) => items(groups).into_iter().any(|info| names(info, &settings.group)),
            Err(error) if error.to_string().contains("no such key") => false,
            Err(error) => return Err(error),
        };
        if !there {
            missing.push(format!("XGROUP CREATE {} {} 0 MKSTREAM", source.key, settings.group));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Configuration, "open").because(format!(
        "groups are missing, and topology is Check: run `{}`, or take Topology::Create",
        missing.join("`, `")
    )))
}

fn names(info: redis::Value, group: &str) -> bool {
    let flat = match info {
        redis::Value::Map(pairs) => pairs.into_iter().flat_map(|(name, value)| [name, value]).collect(),
        flat => items(flat),
    };
    let mut flat = flat.into_iter();
    while let (Some(name), Some(value)) = (flat.next(), flat.next()) {
        if bytes(name).as_deref() == Some(b"name") {
            return bytes(value).as_deref() == Some(group.as_bytes());
        }
    }
    false
}
