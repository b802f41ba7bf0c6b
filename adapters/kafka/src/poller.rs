//! The polling thread: the only one that talks to the group.
//!
//! It polls whatever handlers do, so that membership never depends on them. Where enough is buffered it waits a moment
//! for room, then pauses the partition: a pause throws away what the client has fetched ahead. It has commits made, one
//! at a time, so that none overtakes another; and it answers revocations when what runs has ended, or `drain` has passed.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backon::{BackoffBuilder, ExponentialBackoff};
use hapax::{Error, ErrorKind, redact};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::topic_partition_list::TopicPartitionList;
use tokio::time::Instant;

use crate::assignment::Assignment;
use crate::committer::{self, Committer, Offsets};
use crate::error::{error, is_fenced};
use crate::fetched::{Entry, Fetched, Retry};
use crate::member::{Member, unassign};
use crate::places::Kind;
use crate::state::{Shared, drain_max};
use crate::wire::Blocks;

/// Longest that one poll waits.
const POLL: Duration = Duration::from_millis(50);
/// The same while something is to be done soon: a paused partition has room, a revocation waits for its last handler.
const POLL_SOON: Duration = Duration::from_millis(5);
/// How long a full partition holds up polling before it is paused: with a pause librdkafka forgets what it has fetched ahead
/// and fetches it again, so that pausing for every full buffer costs most of the throughput.
const HOLD_MAX: Duration = Duration::from_millis(500);
/// How often it is looked for room meanwhile.
const HOLD_STEP: Duration = Duration::from_millis(1);
/// Most records taken before they are handed over.
const BATCH_EVENTS: usize = 256;
const BATCH_BYTES: usize = 1 << 20;
/// How long the last commit of a session or a run may take.
const LAST_COMMIT_MAX: Duration = Duration::from_secs(5);
/// Longest wait before a member that failed for good is replaced.
const REBUILD_MAX: Duration = Duration::from_secs(10);

/// What the thread is told.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) config: ClientConfig,
    pub(crate) commit_interval: Duration,
    /// `max.poll.interval.ms`: how long the group waits for an answer to a revocation.
    pub(crate) poll_interval_max: Duration,
}

/// Partitions that were revoked and are not yet given back.
struct Revoking {
    list: TopicPartitionList,
    sessions: Vec<u32>,
    drain_until: Instant,
    /// Set once it has drained.
    commit_until: Option<Instant>,
}

/// Runs until the run is closed. Whatever ends it, the sessions end with it.
pub(crate) fn run(shared: &Arc<Shared>, task: &Task) {
    struct End<'a>(&'a Shared);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.stop(true);
            self.0.ended.send_replace(true);
        }
    }
    let _end = End(shared);
    let mut waits = rebuilds();
    while !shared.is_closing() {
        match Poller::new(shared, task) {
            Ok(mut poller) => {
                let since = Instant::now();
                if let Some(fatal) = poller.run() {
                    tracing::error!(error = %fatal, "this member of the group is lost for good, and is replaced");
                    shared.tell(fatal);
                    poller.end_all();
                }
                drop(poller);
                if since.elapsed() > REBUILD_MAX {
                    waits = rebuilds();
                }
            }
            Err(refused) => shared.tell(refused),
        }
        if !shared.is_closing() {
            std::thread::park_timeout(waits.next().unwrap_or(REBUILD_MAX));
        }
    }
}

fn rebuilds() -> ExponentialBackoff {
    let waits = backon::ExponentialBuilder::default().with_min_delay(Duration::from_millis(200));
    waits.with_max_delay(REBUILD_MAX).with_jitter().without_max_times().build()
}

struct Poller<'a> {
    shared: &'a Arc<Shared>,
    task: &'a Task,
    /// Goes before the consumer, which it uses.
    committer: Committer,
    consumer: Arc<BaseConsumer<Member>>,
    revoking: Option<Revoking>,
    commit_at: Instant,
    blocks: Blocks,
    /// The group refused the last commit because this member is no longer in it.
    fenced: bool,
}

impl<'a> Poller<'a> {
    fn new(shared: &'a Arc<Shared>, task: &'a Task) -> hapax::Result<Self> {
        let refused = |refused| error("receive", refused);
        let consumer: BaseConsumer<Member> =
            task.config.create_with_context(Member::new(Arc::clone(shared))).map_err(refused)?;
        let topics: Vec<&str> = shared.places.subscribed.iter().map(|place| &*place.name).collect();
        consumer.subscribe(&topics).map_err(refused)?;
        let consumer = Arc::new(consumer);
        let committer = Committer::start(Arc::clone(&consumer)).map_err(|refused| {
            Error::new(ErrorKind::Unavailable, "receive").because("no thread can be started").with_source(refused)
        })?;
        let (commit_at, blocks) = (Instant::now(), Blocks::default());
        Ok(Self { shared, task, committer, consumer, revoking: None, commit_at, blocks, fenced: false })
    }

    /// Until the run is closed, or what ended this member for good.
    fn run(&mut self) -> Option<Error> {
        while !self.shared.is_closing() {
            let (soon, holds) = self.pause_and_resume();
            self.serve_revocations();
            self.commit_when_due();
            if holds && self.revoking.is_none() {
                std::thread::park_timeout(HOLD_STEP);
                self.hear_committer();
                continue;
            }
            if let Some(fatal) = self.poll(if soon || self.revoking.is_some() { POLL_SOON } else { POLL }) {
                return Some(fatal);
            }
        }
        self.finish();
        None
    }

    /// Takes what there is, up to a batch.
    fn poll(&mut self, patience: Duration) -> Option<Error> {
        let consumer = Arc::clone(&self.consumer);
        let (mut records, mut bytes) = (Vec::new(), 0);
        let mut patience = patience.min(self.task.commit_interval);
        let mut fatal = None;
        while records.len() < BATCH_EVENTS && bytes < BATCH_BYTES {
            match consumer.poll(patience) {
                None => break,
                Some(Ok(record)) => {
                    if let Some(fetched) = self.read(&record) {
                        bytes += fetched.entry.raw.bytes();
                        records.push(fetched);
                    }
                }
                Some(Err(KafkaError::MessageConsumptionFatal(code))) => {
                    fatal = Some(error("receive", KafkaError::MessageConsumptionFatal(code)));
                    break;
                }
                Some(Err(refused)) => {
                    fatal = self.noted(refused);
                    if fatal.is_some() {
                        break;
                    }
                }
            }
            patience = Duration::ZERO;
        }
        if !records.is_empty() {
            self.shared.arrive(records);
        }
        self.hear_committer();
        fatal
    }

    fn hear_committer(&mut self) {
        if let Some((offsets, answer)) = self.committer.answer() {
            self.committed(&offsets, answer);
        }
    }

    fn read(&mut self, record: &BorrowedMessage<'_>) -> Option<Fetched> {
        let places = &self.shared.places;
        let place = places.find(record.topic())?;
        let raw = self.blocks.copy(record);
        let retry = match places.subscribed[place].kind {
            Kind::Main => None,
            Kind::Retry { main, step } => {
                let main = &places.subscribed[main].name;
                let wait = raw.wait(record.timestamp().to_millis(), SystemTime::now(), step);
                let home = raw.home(|topic| *topic == **main);
                Some(Box::new(Retry { home, due: Instant::now() + wait }))
            }
        };
        let entry = Entry { raw, offset: record.offset(), retry };
        Some(Fetched { place, partition: record.partition(), entry })
    }

    /// An error that came out of polling. Most pass by themselves; some are to be told; one that is given back ends this
    /// member.
    fn noted(&mut self, refused: KafkaError) -> Option<Error> {
        let code = refused.rdkafka_error_code();
        match code {
            // This process stood still for longer than the group waits: others have the partitions. In the midst of a
            // rebalance nothing is revoked for it, and partitions could be left that are fetched and nobody's.
            Some(Code::PollExceeded) => {
                tracing::warn!("the group gave this member up: it did not poll for max.poll.interval.ms");
                return Some(error("receive", refused));
            }
            Some(
                Code::AllBrokersDown
                | Code::Authentication
                | Code::SSL
                | Code::SaslAuthenticationFailed
                | Code::TopicAuthorizationFailed
                | Code::GroupAuthorizationFailed
                | Code::ClusterAuthorizationFailed
                | Code::UnknownTopicOrPartition
                | Code::AutoOffsetReset
                | Code::InconsistentGroupProtocol
                | Code::UnsupportedAssignor
                | Code::Resolve,
            ) => {
                let text = redact(&refused.to_string()).into_owned();
                self.shared.tell(Error::new(ErrorKind::Unavailable, "receive").because(text).with_source(refused));
            }
            _ => tracing::debug!(error = %refused, "polling goes on"),
        }
        None
    }

    /// Tells the client which partitions to leave alone. Answers whether one of those may be wanted again soon, and whether
    /// one that is full holds up polling for now.
    fn pause_and_resume(&self) -> (bool, bool) {
        let (mut pause, mut resume) = (TopicPartitionList::new(), TopicPartitionList::new());
        let (mut soon, mut holds) = (false, false);
        let (now, mains) = (Instant::now(), self.shared.places.mains());
        {
            let mut state = self.shared.lock();
            let stopped = state.phase != crate::state::Phase::Open;
            for assignment in state.assigned.values_mut() {
                let pauses = assignment.pauses(stopped);
                // Retries wait in full buffers for minutes: they hold up nobody.
                let hold_max = if stopped || assignment.place >= mains { Duration::ZERO } else { HOLD_MAX };
                if assignment.holds(pauses, now, hold_max) {
                    holds = true;
                    continue;
                }
                if assignment.paused != Some(pauses) {
                    let list = if pauses { &mut pause } else { &mut resume };
                    list.add_partition(&self.shared.places.subscribed[assignment.place].name, assignment.partition);
                    assignment.paused = Some(pauses);
                }
                soon |= !stopped && assignment.wants_more();
            }
        }
        for (list, told) in [
            (&pause, (pause.count() > 0).then(|| self.consumer.pause(&pause))),
            (&resume, (resume.count() > 0).then(|| self.consumer.resume(&resume))),
        ] {
            if let Some(Err(error)) = told {
                // The partition went meanwhile; what comes of it is ignored.
                tracing::debug!(%error, partitions = list.count(), "partitions could not be paused or resumed");
            }
        }
        (soon, holds)
    }

    /// Drains what is revoked, commits, ends the sessions, and gives the partitions back.
    fn serve_revocations(&mut self) {
        while self.revoking.is_none() {
            let Some(list) = self.consumer.context().revoked() else { return };
            self.revoke(list);
        }
        let lost = self.consumer.assignment_lost();
        let now = Instant::now();
        let Some(revoking) = &mut self.revoking else { return };
        let sessions = revoking.sessions.clone();
        let drained = {
            let state = self.shared.lock();
            let settled = |session: &u32| state.assigned.get(session).is_none_or(Assignment::is_settled);
            sessions.iter().all(settled)
        };
        if !lost && !drained && now < revoking.drain_until {
            return;
        }
        let commit_until = *revoking.commit_until.get_or_insert(now + LAST_COMMIT_MAX);
        let waits = !lost && !self.fenced && now < commit_until;
        if waits && (self.committer.is_under_way() || self.commit(|session| sessions.contains(&session))) {
            return;
        }
        self.fenced = false;
        if let Some(revoking) = self.revoking.take() {
            self.end(&revoking.sessions);
            tracing::debug!(partitions = revoking.list.count(), lost, drained, "given back");
            unassign(&self.consumer, &revoking.list);
        }
    }

    fn revoke(&mut self, list: TopicPartitionList) {
        let spots = self.consumer.context().spots(&list);
        let mut state = self.shared.lock();
        let drain = drain_max(&state.limits, self.task.poll_interval_max);
        let mut sessions = Vec::new();
        for (place, partition) in &spots {
            if let Some(assignment) = state.at(*place, *partition) {
                assignment.drain();
                sessions.push(assignment.session.id());
            }
        }
        drop(state);
        let drain_until = Instant::now() + drain;
        self.revoking = Some(Revoking { list, sessions, drain_until, commit_until: None });
    }

    fn end(&self, sessions: &[u32]) {
        let mut state = self.shared.lock();
        sessions.iter().for_each(|session| state.end(*session));
        drop(state);
        // Room for others.
        self.shared.arrivals.notify_waiters();
    }

    /// Every session is over, without a commit.
    fn end_all(&self) {
        let sessions: Vec<u32> = self.shared.lock().assigned.keys().copied().collect();
        self.end(&sessions);
    }

    fn commit_when_due(&mut self) {
        if self.committer.is_under_way() || Instant::now() < self.commit_at {
            return;
        }
        self.commit(|_| true);
    }

    /// Begins to commit what is done. Answers whether there was anything.
    fn commit(&mut self, only: impl Fn(u32) -> bool) -> bool {
        let due = self.shared.lock().to_commit(only);
        if due.is_empty() || self.consumer.assignment_lost() {
            return false;
        }
        self.commit_at = Instant::now() + self.task.commit_interval;
        match committer::list(&due, |place| &self.shared.places.subscribed[place].name) {
            Ok(list) => self.committer.begin(list, due),
            Err(error) => tracing::warn!(%error, "offsets cannot be committed"),
        }
        self.committer.is_under_way()
    }

    /// The answer to the commit under way.
    fn committed(&mut self, offsets: &Offsets, answer: KafkaResult<()>) {
        let Err(refused) = answer else {
            let mut state = self.shared.lock();
            for ((place, partition), offset) in offsets {
                if let Some(assignment) = state.at(*place, *partition) {
                    assignment.tracker.committed(*offset);
                }
            }
            self.fenced = false;
            return;
        };
        // What was not committed is so with the next, or found processed by whoever gets it.
        self.fenced = refused.rdkafka_error_code().is_some_and(is_fenced);
        tracing::debug!(error = %refused, fenced = self.fenced, "a commit was refused");
        self.commit_at = Instant::now() + self.task.commit_interval.max(Duration::from_millis(100));
    }

    /// The last commit, and goodbye. The sessions have ended.
    fn finish(&mut self) {
        let until = Instant::now() + LAST_COMMIT_MAX;
        while Instant::now() < until {
            if self.fenced || (!self.committer.is_under_way() && !self.commit(|_| true)) {
                break;
            }
            // What is fetched now belongs to nobody.
            let _ = self.poll(POLL_SOON);
        }
        if !self.fenced && !self.consumer.assignment_lost() {
            self.shared.leave_uncommitted();
        }
        self.end_all();
        self.answer_revocations();
        self.consumer.unsubscribe();
    }

    /// Lets go what librdkafka waits for.
    fn answer_revocations(&mut self) {
        if let Some(revoking) = self.revoking.take() {
            unassign(&self.consumer, &revoking.list);
        }
        while let Some(list) = self.consumer.context().revoked() {
            unassign(&self.consumer, &list);
        }
    }
}

impl Drop for Poller<'_> {
    /// Whatever ended this member, its client must be able to go.
    fn drop(&mut self) {
        self.consumer.context().leave();
        if std::thread::panicking() {
            // Before the client takes its time.
            self.shared.stop(true);
        }
        self.answer_revocations();
    }
}

#[cfg(test)]
mod tests;
