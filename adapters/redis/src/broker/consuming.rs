//! What one `open` keeps until `close`, shared by the two tasks behind it and the calls of the contract: links, the table of
//! what is in hand, and the signals between them.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hapax::{Error, ErrorKind, Limits, Message, Origin};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::builder::{Settings, Trimmed};
use super::entry::{self, Entry, EntryId, Fields};
use super::places::{Source, sources};
use super::scripts::Scripts;
use super::table::{Arrival, Key, Table};
use crate::connect::Link;

/// Longest that a read blocks on the server.
pub(super) const BLOCK_MAX: Duration = Duration::from_millis(500);

/// How long the answer of a read may take beyond the time that it blocks: a link that is cut without a word is noticed then.
const READ_TIMEOUT: Duration = Duration::from_secs(3);

/// The name under which entries that were given back are kept until a member takes them.
pub(super) const PARKING: &str = "hapax.given-back";

/// The longest a known trouble keeps a `receive` waiting before it is told again.
pub(super) const TROUBLE_TOLD_EVERY: Duration = Duration::from_secs(1);

/// How far it is on its way to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Running,
    Stopped,
    Closed,
}

/// What is counted over the life of a broker.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) trimmed: AtomicU64,
    pub(super) groups_lost: AtomicU64,
}

/// Why reading does not work at the moment.
#[derive(Clone, Debug)]
struct Trouble {
    kind: ErrorKind,
    text: String,
    told: bool,
}

pub(super) struct Consuming {
    pub(super) settings: Arc<Settings>,
    pub(super) scripts: Scripts,
    pub(super) member: Box<str>,
    pub(super) sources: Vec<Source>,
    pub(super) limits: Limits,
    /// For everything that does not block.
    pub(super) link: Link,
    /// For the reader alone.
    pub(super) reading: Link,
    table: Mutex<Table>,
    sessions: Arc<AtomicU32>,
    pub(super) counters: Arc<Counters>,
    pub(super) phase: watch::Sender<Phase>,
    /// Something can be received, or the reason why not has changed.
    pub(super) arrivals: Notify,
    /// The reader should look: somebody wants entries, or there is room.
    pub(super) wanted: Notify,
    /// How many entries the `receive` that waits would take; 0 where none waits.
    demand: AtomicUsize,
    trouble: Mutex<Option<Trouble>>,
    /// What waits for this group, as last heard; `u64::MAX` where unknown.
    pub(super) lag: AtomicU64,
}

impl Consuming {
    pub(super) fn new(
        settings: Arc<Settings>,
        limits: Limits,
        sessions: Arc<AtomicU32>,
        counters: Arc<Counters>,
    ) -> Self {
        let member = settings.member.clone().unwrap_or_else(generated_name);
        let number = sessions.fetch_add(1, Ordering::Relaxed);
        Self {
            scripts: Scripts::new(),
            member,
            sources: sources(&settings.places),
            limits,
            link: settings.server.link(),
            reading: settings.server.clone().response_timeout(READ_TIMEOUT).blocking_link(BLOCK_MAX),
            table: Mutex::new(Table::new(number, limits)),
            settings,
            sessions,
            counters,
            phase: watch::Sender::new(Phase::Running),
            arrivals: Notify::new(),
            wanted: Notify::new(),
            demand: AtomicUsize::new(0),
            trouble: Mutex::new(None),
            lag: AtomicU64::new(u64::MAX),
        }
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Waits until it is no longer running.
    pub(super) async fn not_running(&self) {
        let mut phase = self.phase.subscribe();
        // The sender is part of `self`.
        let _ = phase.wait_for(|phase| *phase != Phase::Running).await;
    }

    pub(super) fn advance(&self, to: Phase) {
        self.phase.send_modify(|phase| *phase = (*phase).max(to));
        self.arrivals.notify_waiters();
        self.wanted.notify_one();
    }

    /// Somebody waits for so many.
    pub(super) fn want(&self, events: usize) {
        self.demand.fetch_max(events.max(1), Ordering::Relaxed);
        self.wanted.notify_one();
    }

    pub(super) fn demand(&self) -> usize {
        self.demand.load(Ordering::Relaxed)
    }

    /// Wakes those who wait for entries. Whoever gets none will say again what it wants.
    pub(super) fn arrived(&self) {
        self.demand.store(0, Ordering::Relaxed);
        self.arrivals.notify_waiters();
    }

    /// Ends the session, since the group and with it everything pending is gone, and begins the next.
    pub(super) fn begin_session(&self) {
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        self.table().begin_next(number);
    }

    fn trouble_cell(&self) -> MutexGuard<'_, Option<Trouble>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_trouble(&self, error: Option<&Error>) {
        let mut cell = self.trouble_cell();
        let told = cell.as_ref().is_some_and(|trouble| trouble.told);
        *cell = error.map(|error| Trouble { kind: error.kind(), text: text(error), told });
        drop(cell);
        if error.is_some() {
            self.arrivals.notify_waiters();
        }
    }

    pub(super) fn trouble_known(&self) -> bool {
        self.trouble_cell().is_some()
    }

    /// Why reading does not work, where that was not told before or `again` asks for it.
    pub(super) fn trouble(&self, again: bool) -> Option<Error> {
        let mut cell = self.trouble_cell();
        let trouble = cell.as_mut().filter(|trouble| again || !trouble.told)?;
        trouble.told = true;
        Some(Error::new(trouble.kind, "receive").because(trouble.text.clone()))
    }

    /// Takes entries in that a reply brought. Those that were trimmed away are told, and their ids come back to be acked.
    pub(super) fn take_in(&self, source: usize, entries: Vec<Entry>) -> Vec<EntryId> {
        let now = Instant::now();
        let mut gone = Vec::new();
        for Entry { id, fields, count } in entries {
            match fields {
                None => gone.push(id),
                Some(fields) => {
                    let arrival = self.read((source, id), fields, count);
                    self.table().arrive(arrival, now);
                }
            }
        }
        self.tell_trimmed(source, &gone);
        gone
    }

    fn read(&self, key: Key, mut fields: Fields, count: u32) -> Arrival {
        let source = &self.sources[key.0];
        let again = if source.again { entry::take_again(&mut fields) } else { None };
        let (first, before) = again.map_or((key.1, 0), |again| (again.origin, again.count));
        let bytes: usize = fields.iter().map(|(name, value)| name.len() + value.len()).sum();
        let message: Message = entry::message(fields, &self.limits.message);
        let place = (*self.settings.places[source.place].stream).into();
        Arrival {
            key,
            origin: Arc::new(Origin { place, position: first.to_string().into() }),
            count: count.saturating_add(before),
            bytes: bytes.max(message.bytes()),
            message: Arc::new(message),
        }
    }

    /// Says that entries were trimmed away before they were processed.
    pub(super) fn tell_trimmed(&self, source: usize, gone: &[EntryId]) {
        if gone.is_empty() {
            return;
        }
        self.counters.trimmed.fetch_add(gone.len() as u64, Ordering::Relaxed);
        let stream = &self.sources[source].key;
        tracing::error!(%stream, entries = gone.len(), first = %gone[0], "entries were trimmed away before they were processed");
        if let Some(tell) = &self.settings.on_trimmed {
            for id in gone {
                tell(&Trimmed { stream: stream.clone(), entry: id.to_string().into() });
            }
        }
    }

    /// How often a member keeps what it holds.
    pub(super) fn keep_every(&self) -> Duration {
        self.settings.take_over_after / 3
    }

    /// How often it looks for what others lost and for what is due.
    pub(super) fn sweep_every(&self) -> Duration {
        (self.settings.take_over_after / 4).min(BLOCK_MAX)
    }
}

/// The text of an error without the verb before it.
pub(crate) fn text(error: &Error) -> String {
    let text = error.to_string();
    text.strip_prefix(error.operation()).and_then(|rest| rest.strip_prefix(": ")).map_or(text.clone(), str::to_owned)
}

/// The group is not there, or its stream is not.
pub(super) fn is_no_group(error: &Error) -> bool {
    let text = error.to_string();
    text.contains("NOGROUP") || text.contains("UNBLOCKED")
}

/// Host, process and chance: no two processes get the same.
fn generated_name() -> Box<str> {
    let host = std::env::var("HOSTNAME").ok().or_else(|| std::fs::read_to_string("/etc/hostname").ok());
    let host: String = host
        .unwrap_or_default()
        .trim()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || "-._".contains(*c))
        .take(64)
        .collect();
    let host = if host.is_empty() { "member".to_owned() } else { host };
    format!("{host}-{}-{:08x}", std::process::id(), fastrand::u32(..)).into()
}
