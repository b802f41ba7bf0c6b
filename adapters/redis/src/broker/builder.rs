//! Every setting of a `RedisBroker`, its default, its check.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hapax::{Error, ErrorKind, Result};

use super::RedisBroker;
use super::consuming::PARKING;
use super::places::{Place, check_name, check_slots};
use crate::connect::RedisServer;

/// What to do about streams and groups that do not exist.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Topology {
    /// Create what is missing at `open`. A group that is created starts at the first entry there is.
    #[default]
    Create,
    /// Check at `open`, and fail with the commands that create what is missing.
    Check,
}

/// What to do when the group vanishes while it is consumed: the stream was deleted, or the server lost its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MissingGroup {
    /// Create it again, at the first entry there is: nothing is lost, and what was processed is found processed.
    #[default]
    Recreate,
    /// Fail until somebody created it.
    Fail,
}

/// An entry that was trimmed away before it was processed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trimmed {
    /// The stream it was on.
    pub stream: Box<str>,
    /// Its id.
    pub entry: Box<str>,
}

type OnTrimmed = Arc<dyn Fn(&Trimmed) + Send + Sync>;

/// What a broker was built with.
pub(super) struct Settings {
    pub(super) server: RedisServer,
    pub(super) places: Vec<Place>,
    pub(super) group: Box<str>,
    pub(super) member: Option<Box<str>>,
    pub(super) take_over_after: Duration,
    pub(super) forget_after: Duration,
    pub(super) topology: Topology,
    pub(super) missing_group: MissingGroup,
    pub(super) delete_done: bool,
    pub(super) redelivery_horizon: Option<Duration>,
    pub(super) on_trimmed: Option<OnTrimmed>,
}

/// Builds a [`RedisBroker`].
#[must_use]
pub struct RedisBrokerBuilder {
    server: RedisServer,
    streams: Vec<Box<str>>,
    group: Box<str>,
    member: Option<Box<str>>,
    dead_letters: Option<Box<str>>,
    take_over_after: Duration,
    forget_after: Duration,
    topology: Topology,
    missing_group: MissingGroup,
    delete_done: bool,
    redelivery_horizon: Option<Duration>,
    on_trimmed: Option<OnTrimmed>,
}

impl RedisBrokerBuilder {
    /// After how long an entry that nobody keeps is taken over.
    pub const TAKE_OVER_AFTER: Duration = Duration::from_secs(30);
    /// After how long a member with nothing pending that was not heard of is forgotten.
    pub const FORGET_AFTER: Duration = Duration::from_secs(3600);
    /// Most streams of one broker.
    pub const STREAMS_MAX: usize = 64;

    pub(super) fn new(server: RedisServer, stream: Box<str>, group: Box<str>) -> Self {
        Self {
            server,
            streams: vec![stream],
            group,
            member: None,
            dead_letters: None,
            take_over_after: Self::TAKE_OVER_AFTER,
            forget_after: Self::FORGET_AFTER,
            topology: Topology::default(),
            missing_group: MissingGroup::default(),
            delete_done: false,
            redelivery_horizon: None,
            on_trimmed: None,
        }
    }

    /// Reads this stream too. In a cluster all must share a slot, by a common hash tag.
    pub fn and(mut self, stream: impl Into<Box<str>>) -> Self {
        self.streams.push(stream.into());
        self
    }

    /// This member's name in the group, instead of one made of host, process and chance. No two running processes may bear
    /// the same name.
    pub fn member(mut self, name: impl Into<Box<str>>) -> Self {
        self.member = Some(name.into());
        self
    }

    /// The stream of dead letters, instead of `{stream}.group.dead` for each stream. In a cluster it must share the slot of
    /// the streams.
    pub fn dead_letters(mut self, stream: impl Into<Box<str>>) -> Self {
        self.dead_letters = Some(stream.into());
        self
    }

    /// After how long an entry is taken over that its member no longer keeps: because it died, or because it cannot reach
    /// the server. [`TAKE_OVER_AFTER`](Self::TAKE_OVER_AFTER) by default; the consumer's lease is a good value. A member keeps
    /// what it holds, however long its handler runs, by a call every third of this. Equal for all members.
    pub fn take_over_after(mut self, idle: Duration) -> Self {
        self.take_over_after = idle;
        self
    }

    /// After how long a member that has nothing pending and was not heard of is removed from the group's list;
    /// [`FORGET_AFTER`](Self::FORGET_AFTER). One that has something pending never is.
    pub fn forget_members_after(mut self, idle: Duration) -> Self {
        self.forget_after = idle;
        self
    }

    /// Whether streams and groups are created or only checked.
    pub fn topology(mut self, topology: Topology) -> Self {
        self.topology = topology;
        self
    }

    /// What to do when the group vanishes while it is consumed.
    pub fn missing_group(mut self, missing_group: MissingGroup) -> Self {
        self.missing_group = missing_group;
        self
    }

    /// Deletes entries of the streams once they are done. For streams that have this one group: another would miss them.
    /// Without it entries stay, and whoever owns the stream trims it.
    pub fn delete_done(mut self) -> Self {
        self.delete_done = true;
        self
    }

    /// The longest time after which an entry can be delivered again: how long the stream keeps entries. Unknown by default.
    pub fn redelivery_horizon(mut self, horizon: Duration) -> Self {
        self.redelivery_horizon = Some(horizon);
        self
    }

    /// Called for each entry that was trimmed away before it was processed, beside the warning and the
    /// [counter](RedisBroker::trimmed). Must return soon.
    pub fn on_trimmed(mut self, tell: impl Fn(&Trimmed) + Send + Sync + 'static) -> Self {
        self.on_trimmed = Some(Arc::new(tell));
        self
    }

    /// The broker. Connects to nothing yet.
    ///
    /// # Errors
    /// [`Configuration`](ErrorKind::Configuration), with every fault there is.
    pub fn build(self) -> Result<RedisBroker> {
        let faults = self.faults();
        if !faults.is_empty() {
            return Err(Error::new(ErrorKind::Configuration, "build").because(faults.join("; ")));
        }
        let dead = self.dead_letters.as_deref();
        let places: Vec<_> = self.streams.iter().map(|stream| Place::new(stream, &self.group, dead)).collect();
        if self.server.is_cluster() {
            check_slots(&places)?;
        }
        Ok(RedisBroker::with(Settings {
            server: self.server,
            places,
            group: self.group,
            member: self.member,
            take_over_after: self.take_over_after,
            forget_after: self.forget_after,
            topology: self.topology,
            missing_group: self.missing_group,
            delete_done: self.delete_done,
            redelivery_horizon: self.redelivery_horizon,
            on_trimmed: self.on_trimmed,
        }))
    }

    fn faults(&self) -> Vec<String> {
        let named = |what: &str, name: &str| check_name(what, name);
        let mut checks: Vec<Result<()>> = self.streams.iter().map(|stream| named("stream", stream)).collect();
        checks.push(named("group", &self.group));
        checks.extend(self.member.iter().map(|member| named("member", member)));
        checks.extend(self.dead_letters.iter().map(|stream| named("dead_letters", stream)));
        let mut faults: Vec<_> = checks.into_iter().filter_map(Result::err).map(|error| error.to_string()).collect();
        if self.group.contains(['{', '}']) {
            faults.push("group: a group has no hash tag".into());
        }
        if self.member.as_deref() == Some(PARKING) {
            faults.push(format!("member: {PARKING} is the name for what was given back"));
        }
        let mut streams = self.streams.clone();
        streams.sort_unstable();
        streams.dedup();
        if streams.len() < self.streams.len() || self.streams.len() > Self::STREAMS_MAX {
            faults.push(format!("streams: each stream once, and at most {}", Self::STREAMS_MAX));
        }
        if self.dead_letters.as_ref().is_some_and(|dead| self.streams.contains(dead)) {
            faults.push("dead_letters: a stream that is read here would be its own dead letters, for ever".into());
        }
        if !(Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&self.take_over_after) {
            faults.push("take_over_after: 100 ms to 1 h".into());
        }
        if self.forget_after < self.take_over_after {
            faults.push("forget_members_after: not shorter than take_over_after".into());
        }
        faults
    }
}

impl fmt::Debug for RedisBrokerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisBrokerBuilder")
            .field("server", &self.server)
            .field("streams", &self.streams)
            .field("group", &self.group)
            .field("member", &self.member)
            .field("take_over_after", &self.take_over_after)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder(stream: &str) -> RedisBrokerBuilder {
        let url = "redis://127.0.0.1".parse().expect("a url");
        RedisBroker::builder(RedisServer::at(url).expect("a server"), stream, "g")
    }

    #[test]
    fn every_fault_is_told_at_once() {
        let built = builder("a b").and("orders").and("orders").member(PARKING).dead_letters("orders");
        let error = built.take_over_after(Duration::ZERO).build().expect_err("it has faults");
        assert_eq!(error.kind(), ErrorKind::Configuration);
        for fault in ["stream:", "each stream once", "member:", "dead_letters:", "take_over_after:"] {
            assert!(error.to_string().contains(fault), "{fault} in {error}");
        }
    }

    #[test]
    fn the_defaults_are_in_order() {
        let broker = builder("orders").build().expect("no fault");
        assert_eq!(broker.dead_letter_streams(), ["{orders}.g.dead"]);
    }
}
