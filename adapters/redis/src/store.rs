//! `RedisStore`: settings, opening, and the contracts, each verb one script a batch and partition.

mod admin;
mod codec;
mod health;
mod keys;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::{join_all, try_join_all};
use hapax::{
    Claim, ClaimRequest, ConsumerId, Error, ErrorKind, EventKey, Lease, Outcome, ProcessedStore, Recorded, Renewal,
    Result, SecretUrl, StoreHealth,
};
use redis::{Cmd, cmd};

use crate::connect::{Link, RedisServer};
use crate::script::Script;
use codec::strange;
use health::Server;
use keys::{Keys, PARTITIONS_MAX};

/// What names begin with, unless it is set.
pub const PREFIX: &str = "hapax";

/// Partitions of a new store in a cluster, unless it is set. Elsewhere it is one.
pub const CLUSTER_PARTITIONS: u16 = 16;

/// The version of names and records in Redis.
pub const FORMAT_VERSION: u32 = 2;

/// Most items of one script: keys and values of a call stand on Lua's stack.
const ITEMS_MAX: usize = 1_024;

/// After so many scripts of claims that met only new events the next writes first, and looks only where that was wrong:
/// a third of the claim's cost where it is right, a quarter lost where it is not.
const LIKELY_NEW: u32 = 4;

macro_rules! script {
    ($name:ident, $file:literal) => {
        static $name: LazyLock<Script> =
            LazyLock::new(|| Script::new(concat!(include_str!("store/common.lua"), include_str!($file))));
    };
}

script!(CLAIM, "store/claim.lua");
script!(RENEW, "store/renew.lua");
script!(RECORD, "store/record.lua");
script!(FORGET, "store/forget.lua");
script!(LOOK, "store/look.lua");
script!(LIST, "store/list.lua");
static REGISTER: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("store/register.lua")));
static PREPARE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("store/prepare.lua")));

/// The settings of a [`RedisStore`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing before connect()"]
pub struct RedisStoreBuilder {
    server: RedisServer,
    prefix: Box<str>,
    partitions: Option<u16>,
}

impl RedisStoreBuilder {
    /// What the names of all keys begin with; [`PREFIX`]. Stores with different prefixes know nothing of each other.
    pub fn prefix(self, prefix: impl Into<Box<str>>) -> Self {
        Self { prefix: prefix.into(), ..self }
    }

    /// Into how many slots of a cluster the records are divided; [`CLUSTER_PARTITIONS`] in a cluster, else one. It is
    /// chosen when the store is new and stays: another value is refused later.
    ///
    /// A batch is sent in one script for each partition it touches. Many partitions spread memory and load over the nodes;
    /// few keep batches large.
    pub fn partitions(self, partitions: u16) -> Self {
        Self { partitions: Some(partitions), ..self }
    }

    /// Connects, looks at version, role and rights of the server, and prepares the store where it is new.
    ///
    /// # Errors
    /// [`Configuration`](ErrorKind::Configuration) for a prefix or partitions that cannot be, a replica, wrong
    /// credentials or missing rights; [`Incompatible`](ErrorKind::Incompatible) for an old server or a store of another
    /// version; [`Unavailable`](ErrorKind::Unavailable) where it cannot be reached.
    pub async fn connect(self) -> Result<RedisStore> {
        let keys = Keys::new(&self.prefix)?;
        if self.partitions.is_some_and(|count| count == 0 || count > PARTITIONS_MAX) {
            let why = format!("partitions must be from 1 to {PARTITIONS_MAX}");
            return Err(Error::new(ErrorKind::Configuration, "connect").because(why));
        }
        let link = self.server.link();
        Server::ask(&link, &keys.store(), "connect").await?.check()?;
        let wish = self.partitions.unwrap_or(if self.server.is_cluster() { CLUSTER_PARTITIONS } else { 1 });
        let arguments = [FORMAT_VERSION.to_string(), wish.to_string()];
        let found = link.run("connect", &PREPARE, &[keys.store(), keys.trial()], &arguments).await?;
        let (version, partitions): (u32, u16) = redis::from_redis_value(found).map_err(|_| strange("connect"))?;
        if version != FORMAT_VERSION {
            let why = format!(
                "the store {:?} has version {version}, this hapax writes {FORMAT_VERSION}: use the hapax that \
                 wrote it, or another prefix",
                self.prefix
            );
            return Err(Error::new(ErrorKind::Incompatible, "connect").because(why));
        }
        if self.partitions.is_some_and(|asked| asked != partitions) || partitions == 0 {
            let why =
                format!("the store {:?} was made with {partitions} partitions: leave the setting out", self.prefix);
            return Err(Error::new(ErrorKind::Configuration, "connect").because(why));
        }
        let has_failover = self.server.has_failover();
        Ok(RedisStore(Arc::new(Inner {
            link,
            keys,
            partitions,
            has_failover,
            retentions_ms: Mutex::default(),
            new_in_a_row: AtomicU32::new(0),
        })))
    }
}

/// The processed-events store in Redis. Cheap to clone: all clones share one connection.
#[derive(Clone)]
pub struct RedisStore(Arc<Inner>);

struct Inner {
    link: Link,
    keys: Keys,
    partitions: u16,
    has_failover: bool,
    retentions_ms: Mutex<HashMap<ConsumerId, u64>>,
    /// Scripts of claims, one after the other, in which every event was new.
    new_in_a_row: AtomicU32,
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStore")
            .field("link", &self.0.link)
            .field("keys", &self.0.keys)
            .field("partitions", &self.0.partitions)
            .finish_non_exhaustive()
    }
}

/// Items of a batch that one script answers: of one consumer, in one partition.
struct Group {
    partition: u16,
    consumer: ConsumerId,
    indices: Vec<usize>,
}

impl RedisStore {
    /// The store at `url` with the default settings.
    ///
    /// # Errors
    /// Those of [`RedisServer::at`] and [`RedisStoreBuilder::connect`].
    pub async fn open(url: SecretUrl) -> Result<Self> {
        Self::builder(RedisServer::at(url)?).connect().await
    }

    /// Settings for a store at `server`.
    pub fn builder(server: RedisServer) -> RedisStoreBuilder {
        RedisStoreBuilder { server, prefix: PREFIX.into(), partitions: None }
    }

    /// Into how many slots of a cluster the records are divided.
    pub fn partitions(&self) -> u16 {
        self.0.partitions
    }

    fn link(&self) -> &Link {
        &self.0.link
    }

    fn keys(&self) -> &Keys {
        &self.0.keys
    }

    fn record_key(&self, consumer: ConsumerId, key: EventKey) -> Vec<u8> {
        let partition = keys::partition(key, self.0.partitions);
        [self.keys().records(partition, consumer).as_slice(), &key.0].concat()
    }

    fn groups(&self, items: impl Iterator<Item = (ConsumerId, EventKey)>) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for (index, (consumer, key)) in items.enumerate() {
            let partition = keys::partition(key, self.0.partitions);
            let belongs = |group: &&mut Group| {
                group.partition == partition && group.consumer == consumer && group.indices.len() < ITEMS_MAX
            };
            match groups.iter_mut().find(belongs) {
                Some(group) => group.indices.push(index),
                None => groups.push(Group { partition, consumer, indices: vec![index] }),
            }
        }
        groups
    }

    /// A call whose keys are `first` and the records of a group, with room for arguments of so many bytes.
    fn call(
        &self,
        script: &Script,
        first: Option<&[u8]>,
        (group, key): (&Group, impl Fn(usize) -> EventKey),
        (arguments, bytes): (usize, usize),
    ) -> Cmd {
        let mut name = self.keys().records(group.partition, group.consumer);
        let (prefix, count) = (name.len(), group.indices.len());
        let keys = count + usize::from(first.is_some());
        let mut command = script.begin(keys, arguments, (keys + 1) * (prefix + 16) + bytes);
        if let Some(first) = first {
            command.arg(first);
        }
        for index in &group.indices {
            name.truncate(prefix);
            name.extend_from_slice(&key(*index).0);
            command.arg(name.as_slice());
        }
        command
    }

    /// How long a consumer's terminal records are kept: as this process opened it, or else as the store knows it.
    async fn retention_ms(&self, consumer: ConsumerId, operation: &'static str) -> Result<u64> {
        let known = self.retentions_ms().get(&consumer).copied();
        if let Some(retention_ms) = known {
            return Ok(retention_ms);
        }
        let mut find = cmd("HGET");
        find.arg(self.keys().retentions()).arg(consumer.0);
        let found = self.link().query(operation, &find).await?;
        let found: Option<u64> = redis::from_redis_value(found).map_err(|_| strange(operation))?;
        let retention_ms = found.ok_or_else(|| {
            let why = format!("consumer number {} is not known to this store: open it first", consumer.0);
            Error::new(ErrorKind::Incompatible, operation).because(why)
        })?;
        self.retentions_ms().insert(consumer, retention_ms);
        Ok(retention_ms)
    }

    fn retentions_ms(&self) -> std::sync::MutexGuard<'_, HashMap<ConsumerId, u64>> {
        self.0.retentions_ms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn claim_group(&self, group: &Group, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        let retention_ms = self.retention_ms(group.consumer, "claim").await?;
        let likely_new = u8::from(self.0.new_in_a_row.load(Ordering::Relaxed) >= LIKELY_NEW);
        let (fence, count) = (self.keys().fence(group.partition), group.indices.len());
        let items = (group, |index: usize| batch[index].key);
        let mut command = self.call(&CLAIM, Some(&fence), items, (3 + count, 64 + count * codec::CLAIM_BYTES));
        command.arg(codec::microseconds(lease)).arg(retention_ms).arg(likely_new);
        let mut item = Vec::with_capacity(codec::CLAIM_BYTES);
        for index in &group.indices {
            codec::put_claim(&mut item, &batch[*index]);
            command.arg(item.as_slice());
        }
        let answer = self.link().run_command("claim", &CLAIM, &command).await?;
        let (claims, all_new) = codec::claims(&answer, group.indices.iter().map(|index| &batch[*index]))?;
        // Batches at once may miscount: it is a guess.
        let row = if all_new { self.0.new_in_a_row.load(Ordering::Relaxed).saturating_add(1) } else { 0 };
        self.0.new_in_a_row.store(row, Ordering::Relaxed);
        Ok(claims)
    }

    async fn renew_group(&self, group: &Group, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        let retention_ms = self.retention_ms(group.consumer, "renew").await?;
        let count = group.indices.len();
        let mut command = self.call(&RENEW, None, (group, |index| leases[index].key), (2 + count, 64 + count * 7));
        command.arg(codec::microseconds(lease)).arg(retention_ms);
        for index in &group.indices {
            command.arg(codec::fence(&leases[*index], "renew")?.as_slice());
        }
        let answer = self.link().run_command("renew", &RENEW, &command).await?;
        codec::renewals(&answer, count)
    }

    async fn record_group(&self, group: &Group, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let retention_ms = self.retention_ms(group.consumer, "record").await?;
        let mut runs = codec::Runs::default();
        for index in &group.indices {
            let (lease, outcome) = &batch[*index];
            runs.add(lease, outcome)?;
        }
        let items = (group, |index: usize| batch[index].0.key);
        let mut command = self.call(&RECORD, None, items, (1 + runs.iter().len(), 32 + runs.len()));
        command.arg(retention_ms);
        for run in runs.iter() {
            command.arg(run);
        }
        let answer = self.link().run_command("record", &RECORD, &command).await?;
        codec::recordeds(&answer, group.indices.len())
    }
}

/// The answers of all groups in the order of the batch. Where one group failed, another may have been written, so that
/// only kinds which allow for that are told.
fn in_order<T>(
    groups: &[Group],
    mut answers: Vec<Result<Vec<T>>>,
    count: usize,
    operation: &'static str,
) -> Result<Vec<T>> {
    // Those of one group are in order, and of an empty batch there are none.
    if groups.len() <= 1 {
        return answers.pop().unwrap_or_else(|| Ok(Vec::new()));
    }
    let mut ordered: Vec<Option<T>> = std::iter::repeat_with(|| None).take(count).collect();
    for (group, answers) in groups.iter().zip(answers) {
        let answers = answers.map_err(|error| match error.kind() {
            ErrorKind::Full => Error::new(ErrorKind::Unavailable, operation).because(error.to_string()),
            _ => error,
        })?;
        for (index, answer) in group.indices.iter().zip(answers) {
            ordered[*index] = Some(answer);
        }
    }
    ordered.into_iter().collect::<Option<Vec<T>>>().ok_or_else(|| strange(operation))
}

#[async_trait]
impl ProcessedStore for RedisStore {
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId> {
        // A record that ends must not vanish with its own writing.
        let retention_ms = (codec::microseconds(retention) / 1_000).max(1);
        let [a, b, c, d, ..] = EventKey::of("hapax consumer number", "", consumer).0;
        let wish = u32::from_be_bytes([a, b, c, d]);
        let names = [self.keys().numbers(), self.keys().retentions()];
        let arguments = [consumer.to_owned(), wish.to_string(), retention_ms.to_string()];
        let answer = self.link().run("open", &REGISTER, &names, &arguments).await?;
        let number: u32 = redis::from_redis_value(answer).map_err(|_| strange("open"))?;
        let id = ConsumerId(number);
        self.retentions_ms().insert(id, retention_ms);
        Ok(id)
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        let groups = self.groups(batch.iter().map(|request| (request.consumer, request.key)));
        let answers = join_all(groups.iter().map(|group| self.claim_group(group, batch, lease))).await;
        in_order(&groups, answers, batch.len(), "claim")
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        let groups = self.groups(leases.iter().map(|held| (held.consumer, held.key)));
        let answers = join_all(groups.iter().map(|group| self.renew_group(group, leases, lease))).await;
        in_order(&groups, answers, leases.len(), "renew")
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let groups = self.groups(batch.iter().map(|(lease, _)| (lease.consumer, lease.key)));
        let answers = join_all(groups.iter().map(|group| self.record_group(group, batch))).await;
        in_order(&groups, answers, batch.len(), "record")
    }

    async fn probe(&self) -> Result<StoreHealth> {
        let range: Range<u16> = 0..self.0.partitions;
        let places: Vec<_> = range.map(|partition| self.keys().fence(partition)).collect();
        let asked = places.iter().map(|key| Server::ask(self.link(), key, "probe"));
        let mut servers = try_join_all(asked).await?;
        servers.sort_by(|a, b| a.run().cmp(b.run()));
        servers.dedup_by(|a, b| a.run() == b.run());
        if servers.iter().any(|server| !server.is_primary()) {
            // Perhaps another has taken over, which the next connection finds.
            self.link().reset();
            let why = "the server has become a replica: nothing can be written until the primary is found";
            return Err(Error::new(ErrorKind::Unavailable, "probe").because(why));
        }
        Ok(health::health(&servers, self.0.has_failover))
    }
}
