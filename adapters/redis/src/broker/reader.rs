//! The reader: the one task that reads, on a link of its own, and never gives a read up half-way. A read that was cancelled
//! would leave its entries on our pending list without anybody knowing; what it brings goes into the buffer instead, where the
//! next `receive` finds it.
//!
//! The order of a round matters: first what is on our own pending list and not in hand, if an error came before; then what is
//! due and what others lost; only then what is new.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use hapax::{Error, ErrorKind, Result, Settlement};
use redis::{Cmd, Pipeline, Value};
use tokio::time::{Instant, sleep};

use super::builder::MissingGroup;
use super::consuming::{BLOCK_MAX, Consuming, Phase, is_no_group};
use super::entry::{self, Entry, EntryId, items, number};
use super::{groups, settling};
use crate::error::error;

/// Most entries of one read.
const READ_MAX: usize = 512;
/// Most entries of one script that takes over or moves.
const SWEEP_MAX: usize = 100;
/// Most calls of one sweep over one stream: the next goes on where it ended.
const SWEEP_CALLS_MAX: usize = 16;
/// What an entry is taken to measure before one was seen.
const BYTES_GUESSED: usize = 256 << 10;
/// How many pages of our own pending list are looked through at a time.
const RECOVER_PAGE: usize = 256;

pub(super) struct Reader {
    c: Arc<Consuming>,
    /// When to look through our own pending list. After an error twice: at once, and again when whatever the server still
    /// did for the connection that broke must be over.
    recover: [Option<Instant>; 2],
    sweep_at: Instant,
    /// Where the next look for lost entries goes on, for each source.
    cursors: Vec<String>,
    bytes_each: usize,
    /// The group was found missing, and is not there again.
    missing: bool,
    pauses: ExponentialBackoff,
}

fn pauses() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(20))
        .with_max_delay(Duration::from_secs(1))
        .with_jitter()
        .without_max_times()
        .build()
}

impl Reader {
    pub(super) fn new(c: Arc<Consuming>) -> Self {
        let cursors = vec!["0-0".to_owned(); c.sources.len()];
        // A name of chance has nothing pending; a given one may have what its last bearer left, and that is taken over like
        // anybody's, so that a second process of the same name takes nothing from the first.
        Self {
            c,
            recover: [None; 2],
            sweep_at: Instant::now(),
            cursors,
            bytes_each: BYTES_GUESSED,
            missing: false,
            pauses: pauses(),
        }
    }

    pub(super) async fn run(mut self) {
        while self.wanted().await {
            match self.round().await {
                Ok(()) => {
                    self.pauses = pauses();
                    self.missing = false;
                    self.c.set_trouble(None);
                }
                Err(error) => self.pause_after(&error).await,
            }
        }
        self.leave().await;
    }

    /// Waits until somebody wants entries, nothing waits for them, and there is room. `false` at the end.
    async fn wanted(&self) -> bool {
        let c = &self.c;
        loop {
            if c.phase() != Phase::Running {
                return false;
            }
            let ((room, _), waiting) = {
                let table = c.table();
                (table.room(), table.waiting())
            };
            // After an error it goes on by itself, so that the trouble ends when the server is back.
            if c.trouble_known() || (c.demand() > 0 && room > 0 && waiting == 0) {
                return true;
            }
            tokio::select! {
                () = c.wanted.notified() => {}
                () = c.not_running() => return false,
            }
        }
    }

    async fn pause_after(&mut self, error: &Error) {
        let now = Instant::now();
        self.recover = [Some(now), Some(now + BLOCK_MAX * 2 + Duration::from_secs(1))];
        if !self.c.trouble_known() {
            tracing::warn!(%error, "reading from Redis failed; trying again until it works");
        }
        self.c.set_trouble(Some(error));
        let pause = self.pauses.next().unwrap_or(Duration::from_secs(1));
        tokio::select! {
            () = sleep(pause) => {}
            () = self.c.not_running() => {}
        }
    }

    async fn round(&mut self) -> Result<()> {
        match self.read().await {
            Err(error) if is_no_group(&error) => self.missing_group(error).await,
            result => result,
        }
    }

    async fn read(&mut self) -> Result<()> {
        for at in 0..self.recover.len() {
            if self.recover[at].is_some_and(|when| when <= Instant::now()) && self.recover().await? {
                self.recover[at] = None;
            }
        }
        if Instant::now() >= self.sweep_at {
            let next = self.sweep().await?;
            self.sweep_at = Instant::now() + next;
        }
        if self.c.table().waiting() == 0 {
            self.read_new().await?;
        }
        if self.c.table().waiting() > 0 {
            self.c.arrived();
        }
        Ok(())
    }

    /// How many entries to ask for now.
    fn most(&self, at_most: usize) -> usize {
        let (events, bytes) = self.c.table().room();
        self.c.demand().min(events).min(bytes / self.bytes_each.max(1)).clamp(1, at_most)
    }

    fn take_in(&mut self, source: usize, entries: Vec<Entry>) -> Vec<EntryId> {
        let sizes = entries.iter().filter_map(|entry| entry.fields.as_ref());
        let sizes = sizes.map(|fields| fields.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>());
        let (bytes, count) = sizes.fold((0_usize, 0), |(bytes, count), size| (bytes + size, count + 1));
        if let Some(each) = bytes.checked_div(count) {
            // Grows at once and shrinks slowly: a guess too small would read too much.
            self.bytes_each = each.max((self.bytes_each * 7 + each) / 8).max(64);
        }
        self.c.take_in(source, entries)
    }

    async fn read_new(&mut self) -> Result<()> {
        let c = Arc::clone(&self.c);
        let until = self.sweep_at.saturating_duration_since(Instant::now());
        // BLOCK 0 would block for ever.
        let block = until.min(BLOCK_MAX).as_millis().max(1) as u64;
        let streams = c.settings.places.len();
        let count = self.most(READ_MAX).div_ceil(streams);
        let mut command = Cmd::new();
        command.arg("XREADGROUP").arg("GROUP").arg(&*c.settings.group).arg(&*c.member);
        command.arg("COUNT").arg(count).arg("BLOCK").arg(block).arg("STREAMS");
        command.arg(c.sources.iter().map(|source| &*source.key).collect::<Vec<_>>());
        command.arg(vec![">"; c.sources.len()]);
        let reply = c.reading.query("receive", &command).await?;
        for (stream, entries) in entry::streams(reply) {
            if let Some(source) = c.sources.iter().position(|source| source.key.as_bytes() == stream) {
                self.take_in(source, entries);
            }
        }
        Ok(())
    }

    /// Looks through our own pending list for what is not in hand: entries whose reply was lost. Answers whether it came to
    /// the end; with no room left it goes on later.
    async fn recover(&mut self) -> Result<bool> {
        let c = Arc::clone(&self.c);
        for (at, source) in c.sources.iter().enumerate() {
            let mut start = "-".to_owned();
            loop {
                let mut command = Cmd::new();
                command.arg("XPENDING").arg(&*source.key).arg(&*c.settings.group);
                command.arg(&start).arg("+").arg(RECOVER_PAGE).arg(&*c.member);
                let page = items(c.reading.query("receive", &command).await?);
                let full = page.len() == RECOVER_PAGE;
                let pending: Vec<_> = page.into_iter().filter_map(pending).collect();
                let Some((last, _)) = pending.last() else { break };
                start = format!("({last}");
                let missing: Vec<_> = pending.into_iter().filter(|(id, _)| !c.table().has((at, *id))).collect();
                for some in missing.chunks(SWEEP_MAX) {
                    if c.table().room().0 == 0 {
                        return Ok(false);
                    }
                    self.fetch(at, some).await?;
                }
                if !full {
                    break;
                }
            }
        }
        Ok(true)
    }

    /// Reads pending entries by their ids. Those that are gone are acked, since nothing will come of them.
    async fn fetch(&mut self, at: usize, pending: &[(EntryId, u32)]) -> Result<()> {
        let c = Arc::clone(&self.c);
        let key = &c.sources[at].key;
        let mut pipeline = Pipeline::with_capacity(pending.len());
        for (id, _) in pending {
            pipeline.cmd("XRANGE").arg(&**key).arg(id.to_string()).arg(id.to_string());
        }
        let replies = c.reading.pipeline("receive", &pipeline).await?;
        let entries = pending
            .iter()
            .zip(replies)
            .map(|((id, count), reply)| Ok(Entry { id: *id, fields: fields_of_one(reply)?, count: *count }));
        let entries = entries.collect::<Result<Vec<_>>>()?;
        let gone = self.take_in(at, entries);
        if !gone.is_empty() {
            let mut command = Cmd::new();
            command.arg("XACK").arg(&**key).arg(&*c.settings.group);
            command.arg(gone.iter().map(EntryId::to_string).collect::<Vec<_>>());
            c.reading.query("receive", &command).await?;
        }
        Ok(())
    }

    /// Moves what is due, and takes over what nobody keeps. Answers when to come again.
    async fn sweep(&mut self) -> Result<Duration> {
        let c = Arc::clone(&self.c);
        let mut next = c.sweep_every();
        for place in &c.settings.places {
            let most = SWEEP_MAX.to_string();
            let keys = [&*place.due, &*place.again, &*place.dead];
            let reply = match c.reading.run("receive", &c.scripts.move_due, &keys, &[most]).await {
                // They wait until there is memory. What is acked in the meantime may make some.
                Err(error) if error.kind() == ErrorKind::Full => continue,
                reply => reply?,
            };
            let wait = items(reply).get(2).and_then(number).and_then(|ms| u64::try_from(ms).ok());
            next = wait.map_or(next, |ms| next.min(Duration::from_millis(ms.max(1))));
        }
        for source in 0..c.sources.len() {
            for _ in 0..SWEEP_CALLS_MAX {
                if c.table().room().0 == 0 || !self.take_over(source).await? {
                    break;
                }
            }
        }
        Ok(next)
    }

    /// One step through the pending list of a stream. Answers whether there is more.
    async fn take_over(&mut self, source: usize) -> Result<bool> {
        let c = Arc::clone(&self.c);
        let idle = c.settings.take_over_after.as_millis().to_string();
        let most = self.most(SWEEP_MAX).to_string();
        let arguments = [&*c.settings.group, &*c.member, &idle, &self.cursors[source], &most];
        let key = [&*c.sources[source].key];
        let mut reply = items(c.reading.run("receive", &c.scripts.take_over, &key, &arguments).await?).into_iter();
        let cursor = reply.next().and_then(entry::bytes).and_then(|cursor| String::from_utf8(cursor).ok());
        let entries = items(reply.next().unwrap_or_default()).into_iter().filter_map(entry::entry).collect();
        let mut gone: Vec<_> =
            items(reply.next().unwrap_or_default()).into_iter().filter_map(entry::entry_id).collect();
        // What we hold is not over: our copy of it can still be settled.
        gone.retain(|id| !c.table().trimmed_in_hand((source, *id)));
        self.take_in(source, entries);
        c.tell_trimmed(source, &gone);
        self.cursors[source] = cursor.unwrap_or_else(|| "0-0".to_owned());
        Ok(self.cursors[source] != "0-0")
    }

    /// The group is gone, and with it everything pending: receipts mean nothing any more.
    async fn missing_group(&mut self, error: Error) -> Result<()> {
        let c = &self.c;
        if !self.missing {
            self.missing = true;
            c.counters.groups_lost.fetch_add(1, Ordering::Relaxed);
            c.begin_session();
        }
        if c.settings.missing_group == MissingGroup::Fail {
            return Err(Error::new(ErrorKind::Unavailable, "receive").because(format!(
                "the group vanished, and missing_group is Fail: {}",
                super::consuming::text(&error)
            )));
        }
        tracing::error!(group = %c.settings.group, "the group vanished; creating it again, from the first entry there is");
        groups::create(&c.reading, &c.settings).await
    }

    /// Gives back what waits in the buffer, so that others have it.
    async fn leave(&self) {
        let waiting = self.c.table().stale_waiting(Duration::ZERO, Instant::now());
        if !waiting.is_empty() {
            let release = |(receipt, _)| (receipt, Settlement::Release { counted: false });
            settling::settle_own(&self.c, waiting.into_iter().map(release).collect()).await;
        }
    }
}

/// The fields in an answer to `XRANGE` about one entry; `None` where that says that the entry is gone. An answer that says
/// neither is an error: such an entry may well be there.
fn fields_of_one(reply: Value) -> Result<Option<entry::Fields>> {
    let reply = reply.extract_error().map_err(|failed| error("receive", &failed))?;
    if matches!(&reply, Value::Array(found) if found.is_empty()) {
        return Ok(None);
    }
    let fields = items(reply).into_iter().next().and_then(entry::entry).and_then(|entry| entry.fields);
    let unreadable = || Error::new(ErrorKind::Incompatible, "receive").because("XRANGE gave an answer of another form");
    fields.map(Some).ok_or_else(unreadable)
}

/// `[id, consumer, idle, count]`.
fn pending(value: Value) -> Option<(EntryId, u32)> {
    let mut parts = items(value).into_iter();
    let id = entry::entry_id(parts.next()?)?;
    let count = parts.nth(2).and_then(|count| number(&count)).unwrap_or(1);
    Some((id, u32::try_from(count).unwrap_or(u32::MAX).max(1)))
}
