//! What a server says about itself, and what follows for records: from `INFO`, which needs few rights, and
//! `CONFIG GET appendfsync` where that is allowed.

use std::collections::HashMap;

use hapax::{Durability, Error, ErrorKind, Result, StoreHealth};
use redis::{Value, cmd};

use crate::connect::Link;

/// The oldest server that has what broker and store use.
pub(crate) const VERSION_MIN: (u32, u32) = (6, 2);

/// Share of `maxmemory` in use that is worth telling, in percent.
const MEMORY_TOLD_PERCENT: u64 = 90;

/// One server's own words.
#[derive(Clone, Debug, Default)]
pub(super) struct Server {
    fields: HashMap<String, String>,
    /// `always`, `everysec` or `no`; none where the right to ask is missing.
    appendfsync: Option<String>,
}

impl Server {
    /// Asks the primary that holds `key`.
    pub(super) async fn ask(link: &Link, key: &[u8], operation: &'static str) -> Result<Self> {
        let info = link.query_at(operation, key, &cmd("INFO")).await?;
        let text: String = redis::from_redis_value(info).map_err(|_| super::codec::strange(operation))?;
        let fields = text.lines().filter_map(|line| line.trim_end().split_once(':'));
        let mut server = Self {
            fields: fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            appendfsync: None,
        };
        server.is_loaded(operation)?;
        if server.field("aof_enabled") == "1" {
            server.appendfsync = ask_appendfsync(link, key, operation).await?;
        }
        Ok(server)
    }

    /// A server that loads its data answers `INFO` and nothing else, and says that AOF is off as long as that lasts.
    fn is_loaded(&self, operation: &'static str) -> Result<()> {
        match self.field("loading") {
            "1" => Err(Error::new(ErrorKind::Unavailable, operation).because("the server is loading its data")),
            _ => Ok(()),
        }
    }

    fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }

    fn number(&self, name: &str) -> u64 {
        self.field(name).parse().unwrap_or(0)
    }

    /// Tells processes apart: in a cluster several keys may lie on one.
    pub(super) fn run(&self) -> &str {
        self.field("run_id")
    }

    /// Name and version as people know them: forks keep `redis_version` for compatibility and say theirs beside it.
    pub(super) fn version(&self) -> String {
        match (self.field("server_name"), self.field("valkey_version")) {
            ("valkey", version) if !version.is_empty() => format!("valkey {version}"),
            _ => self.field("redis_version").to_owned(),
        }
    }

    pub(super) fn is_primary(&self) -> bool {
        self.field("role") == "master"
    }

    /// Refuses what cannot work, before anything is written.
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |kind, why: String| Err(Error::new(kind, "connect").because(why));
        let mut parts = self.field("redis_version").split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        if version < VERSION_MIN {
            let (major, minor) = VERSION_MIN;
            let why = format!("the server is version {:?}: hapax needs Redis {major}.{minor} or newer", self.version());
            return refuse(ErrorKind::Incompatible, why);
        }
        if !self.is_primary() {
            let why = "the server is a replica and takes no writes: give the address of the primary, or \
                       redis-sentinel://.. so that it is found after each failover";
            return refuse(ErrorKind::Configuration, why.to_owned());
        }
        Ok(())
    }

    fn durability(&self) -> Durability {
        match (self.field("aof_enabled"), self.appendfsync.as_deref()) {
            ("1", Some("always")) => Durability::Durable,
            ("1", _) => Durability::Lossy,
            _ => Durability::Process,
        }
    }

    fn evicts(&self) -> bool {
        !matches!(self.field("maxmemory_policy"), "noeviction")
    }

    fn loses_on_failover(&self) -> bool {
        self.number("connected_slaves") > 0 || self.field("cluster_enabled") == "1"
    }

    /// What people should know although it answers.
    fn troubles(&self) -> Vec<String> {
        let mut troubles = Vec::new();
        match (self.field("aof_enabled"), self.appendfsync.as_deref()) {
            ("1", None) => {
                troubles.push("appendfsync is unknown without the right to CONFIG GET: taken for everysec".to_owned());
            }
            ("1", Some("no")) => {
                troubles.push(
                    "appendfsync is no: a crash of the machine loses what its kernel had not written, some \
                               30 s; set it to everysec or always"
                        .to_owned(),
                );
            }
            ("1", _) => {}
            _ => troubles.push(
                "AOF is off: records written since the last snapshot are lost with the server's process; \
                                set appendonly yes"
                    .to_owned(),
            ),
        }
        if self.field("aof_last_write_status") == "err" {
            troubles.push("the last write to the AOF failed: writes are refused until the disk takes them".to_owned());
        }
        if self.evicts() {
            troubles.push(format!("maxmemory-policy is {:?}: set it to noeviction", self.field("maxmemory_policy")));
        }
        let evicted = self.number("evicted_keys");
        if evicted > 0 {
            troubles.push(format!("{evicted} keys were evicted since the server started: records may be among them"));
        }
        let (used, most) = (self.number("used_memory"), self.number("maxmemory"));
        if most > 0 && used / most.div_ceil(100).max(1) >= MEMORY_TOLD_PERCENT {
            troubles.push(format!("{used} of {most} bytes of memory are in use: at the limit claims are refused"));
        }
        troubles
    }
}

async fn ask_appendfsync(link: &Link, key: &[u8], operation: &'static str) -> Result<Option<String>> {
    let mut ask = cmd("CONFIG");
    ask.arg("GET").arg("appendfsync");
    match link.query_at(operation, key, &ask).await {
        Ok(Value::Array(pair)) => Ok(pair.into_iter().nth(1).and_then(|value| redis::from_redis_value(value).ok())),
        Ok(Value::Map(pairs)) => {
            Ok(pairs.into_iter().next().and_then(|(_, value)| redis::from_redis_value(value).ok()))
        }
        Ok(_) => Ok(None),
        Err(lost) if lost.is_retryable() && !lost.to_string().contains("CONFIG") => Err(lost),
        // No right to ask, or a host that took the command away: the least is assumed.
        Err(_) => Ok(None),
    }
}

/// What the store promises that lies on these servers: what the weakest of them does.
pub(super) fn health(servers: &[Server], has_failover: bool) -> StoreHealth {
    let version = servers.first().map(Server::version).unwrap_or_default();
    let durability = servers.iter().map(Server::durability).min().unwrap_or(Durability::Process);
    let mut health = StoreHealth::new("redis", version, durability);
    health.evicts = servers.iter().any(Server::evicts);
    health.loses_on_failover = has_failover || servers.iter().any(Server::loses_on_failover);
    let mut troubles: Vec<String> = servers.iter().flat_map(Server::troubles).collect();
    troubles.dedup();
    health.trouble = (!troubles.is_empty()).then(|| troubles.join("; ").into());
    health
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(fields: &[(&str, &str)], appendfsync: Option<&str>) -> Server {
        let sound =
            [("redis_version", "7.0.15"), ("role", "master"), ("maxmemory_policy", "noeviction"), ("aof_enabled", "1")];
        let fields =
            sound.iter().chain(fields).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Server { fields, appendfsync: appendfsync.map(str::to_owned) }
    }

    #[test]
    fn durability_follows_from_persistence_and_the_weakest_counts() {
        for (aof, appendfsync, durability) in [
            ("1", Some("always"), Durability::Durable),
            ("1", Some("everysec"), Durability::Lossy),
            ("1", Some("no"), Durability::Lossy),
            ("1", None, Durability::Lossy),
            ("0", None, Durability::Process),
        ] {
            let found = server(&[("aof_enabled", aof)], appendfsync);
            assert_eq!(health(std::slice::from_ref(&found), false).durability, durability, "{aof} {appendfsync:?}");
            let both = [server(&[], Some("always")), found];
            assert_eq!(health(&both, false).durability, durability, "the weakest of two");
        }
    }

    #[test]
    fn what_is_sound_has_no_trouble_and_what_is_not_is_told() {
        let sound = health(&[server(&[], Some("always"))], false);
        assert_eq!((sound.trouble, sound.evicts, sound.loses_on_failover), (None, false, false));
        for (field, value, says) in [
            ("aof_enabled", "0", "AOF is off"),
            ("aof_last_write_status", "err", "AOF failed"),
            ("maxmemory_policy", "volatile-lru", "noeviction"),
            ("evicted_keys", "7", "7 keys were evicted"),
        ] {
            let told = health(&[server(&[(field, value)], Some("always"))], false).trouble.unwrap_or_default();
            assert!(told.contains(says), "{told}");
        }
        let full = server(&[("used_memory", "950"), ("maxmemory", "1000")], Some("always"));
        assert!(health(&[full], false).trouble.is_some_and(|told| told.contains("950 of 1000")));
    }

    #[test]
    fn a_server_that_loads_its_data_is_away_and_not_without_aof() {
        let loading = server(&[("loading", "1"), ("aof_enabled", "0")], None);
        assert_eq!(loading.is_loaded("probe").expect_err("loading").kind(), ErrorKind::Unavailable);
        server(&[("loading", "0")], None).is_loaded("probe").expect("loaded");
    }

    #[test]
    fn every_policy_but_noeviction_evicts() {
        for policy in ["allkeys-lru", "allkeys-lfu", "allkeys-random", "volatile-lru", "volatile-ttl", ""] {
            assert!(health(&[server(&[("maxmemory_policy", policy)], None)], false).evicts, "{policy}");
        }
    }

    #[test]
    fn replicas_and_old_servers_are_refused_by_name() {
        for (field, value, says) in [("role", "slave", "replica"), ("redis_version", "6.0.16", "6.2")] {
            let error = server(&[(field, value)], None).check().expect_err(value);
            assert!(error.to_string().contains(says), "{error}");
        }
        for version in ["6.2.0", "7.0.15", "8.2.1"] {
            server(&[("redis_version", version)], None).check().expect("new enough");
        }
    }

    #[test]
    fn failover_may_lose_what_was_acknowledged() {
        assert!(health(&[server(&[("connected_slaves", "1")], None)], false).loses_on_failover);
        assert!(health(&[server(&[], None)], true).loses_on_failover);
    }
}
