//! What the server is and how it keeps what it has: checked at `open`, told in the capabilities.

use hapax::{Durability, Error, ErrorKind, Result};
use redis::{Cmd, Value};

use super::entry::{bytes, items};
use super::places::Place;
use crate::connect::Link;

/// The oldest server that is tested; what those before do with entries that were trimmed away differs.
const OLDEST: (u32, u32) = (7, 0);

/// Refuses a server that is too old, and answers how durable it is. Where the rights to ask are missing it is taken for one
/// that may lose the last second.
pub(super) async fn examine(link: &Link, place: &Place) -> Result<Durability> {
    let Some(info) = info(link, place).await? else { return Ok(Durability::Lossy) };
    let value = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    if let Some(version) = value("redis_version") {
        let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
        if (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) < OLDEST {
            return Err(Error::new(ErrorKind::Configuration, "open")
                .because(format!("Redis {version} is too old: 7.0 or newer is needed")));
        }
    }
    if value("aof_enabled") == Some("0") {
        return Ok(Durability::Process);
    }
    let replicas = value("connected_slaves").is_some_and(|count| count != "0");
    let always = appendfsync(link, place).await.as_deref() == Some("always");
    Ok(if always && !replicas { Durability::Durable } else { Durability::Lossy })
}

async fn info(link: &Link, place: &Place) -> Result<Option<String>> {
    let mut command = Cmd::new();
    command.arg("INFO");
    let answer = match link.query_at("open", place.stream.as_bytes(), &command).await {
        Err(error) if error.kind() == ErrorKind::Configuration && error.to_string().contains("INFO") => {
            return Ok(None);
        }
        answer => answer?,
    };
    let text = match answer {
        Value::VerbatimString { text, .. } => text.into_bytes(),
        answer => bytes(answer).unwrap_or_default(),
    };
    Ok(Some(String::from_utf8_lossy(&text).into_owned()))
}

async fn appendfsync(link: &Link, place: &Place) -> Option<String> {
    let mut command = Cmd::new();
    command.arg("CONFIG").arg("GET").arg("appendfsync");
    let value = match link.query_at("open", place.stream.as_bytes(), &command).await.ok()? {
        Value::Map(pairs) => pairs.into_iter().next().map(|(_, value)| value),
        flat => items(flat).into_iter().nth(1),
    };
    value.and_then(bytes).and_then(|value| String::from_utf8(value).ok())
}
