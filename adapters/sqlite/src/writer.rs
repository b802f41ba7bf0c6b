//! The one writer of a store: gathers the calls that wait and commits them together.
//!
//! While one commit is under way the next calls gather; it takes them all when it is back. No timer, so a lone call
//! waits for nobody. The lock that it takes for each commit is shared with transactional handlers, first come first
//! served, so that neither waits in SQLite's busy loop for the other.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::TryStreamExt;
use hapax::record::Moment;
use hapax::{Claim, ClaimRequest, ConsumerId, ErrorKind, Lease, Outcome, Recorded, Renewal, Result};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection, Executor, SqliteConnection};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::batch::Batch;
use crate::error::Fault;
use crate::hot::{Claims, Done};
use crate::rows::{Frame, Id, Statement, Within, integer};
use crate::statements::Crossing;
use crate::store::Clock;
use crate::sweep::{self, Place, Rolling, Table};

/// Calls that may wait for the writer; further callers wait to be let in.
pub(crate) const CALLS_MAX: usize = 256;
/// Items that one commit takes at most, unless a single call brings more.
const ITEMS_MAX: usize = 4096;

pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;

/// A call to the writer.
#[derive(Debug)]
pub(crate) enum Call {
    Claim(Vec<ClaimRequest>, Duration, Reply<Vec<Claim>>),
    Renew(Vec<Lease>, Duration, Reply<Vec<Renewal>>),
    Record(Vec<(Lease, Outcome)>, Reply<Vec<Recorded>>),
    Open(String, Duration, Reply<ConsumerId>),
    Sweep(Table, Place, Place, Moment, Reply<u64>),
    Forget(Id, Reply<bool>),
    Close,
}

impl Call {
    fn items(&self) -> usize {
        match self {
            Self::Claim(batch, ..) => batch.len(),
            Self::Renew(leases, ..) => leases.len(),
            Self::Record(batch, ..) => batch.len(),
            _ => 0,
        }
    }

    pub(crate) fn claims(&self) -> Option<(&[ClaimRequest], Duration)> {
        if let Self::Claim(requests, lease, _) = self { Some((requests, *lease)) } else { None }
    }

    pub(crate) fn outcomes(&self) -> &[(Lease, Outcome)] {
        if let Self::Record(outcomes, _) = self { outcomes } else { &[] }
    }

    /// The answer to a call without items.
    fn nothing(&self) -> Option<Applied> {
        match self {
            Self::Claim(requests, ..) if requests.is_empty() => Some(Applied::Claim(Ok(Vec::new()))),
            Self::Renew(leases, ..) if leases.is_empty() => Some(Applied::Renew(Ok(Vec::new()))),
            Self::Record(outcomes, _) if outcomes.is_empty() => Some(Applied::Record(Ok(Vec::new()))),
            _ => None,
        }
    }

    /// Whether it may share a commit.
    fn is_shared(&self) -> bool {
        matches!(self, Self::Claim(..) | Self::Renew(..) | Self::Record(..))
    }

    fn want(&self, batch: &mut Batch) {
        match self {
            Self::Claim(requests, ..) => requests.iter().for_each(|item| batch.want((item.consumer, item.key))),
            Self::Renew(leases, ..) => leases.iter().for_each(|item| batch.want((item.consumer, item.key))),
            Self::Record(outcomes, ..) => {
                outcomes.iter().for_each(|(item, _)| batch.want((item.consumer, item.key)));
            }
            _ => {}
        }
    }

    fn fail(self, fault: &Fault) {
        let fault = fault.clone();
        // A caller that has gone away asks again.
        let _gone = match self {
            Self::Claim(.., reply) => reply.send(Err(fault.during("claim"))).is_err(),
            Self::Renew(.., reply) => reply.send(Err(fault.during("renew"))).is_err(),
            Self::Record(.., reply) => reply.send(Err(fault.during("record"))).is_err(),
            Self::Open(.., reply) => reply.send(Err(fault.during("open"))).is_err(),
            Self::Sweep(.., reply) => reply.send(Err(fault.during("sweep"))).is_err(),
            Self::Forget(_, reply) => reply.send(Err(fault.during("forget"))).is_err(),
            Self::Close => false,
        };
    }
}

/// A call that was applied and is answered once the commit is durable.
enum Answer {
    Claim(std::result::Result<Vec<Claim>, Fault>, Reply<Vec<Claim>>),
    Renew(std::result::Result<Vec<Renewal>, Fault>, Reply<Vec<Renewal>>),
    Record(std::result::Result<Vec<Recorded>, Fault>, Reply<Vec<Recorded>>),
}

impl Answer {
    fn send(self) {
        let _gone = match self {
            Self::Claim(answer, reply) => reply.send(answer.map_err(|fault| fault.during("claim"))).is_err(),
            Self::Renew(answer, reply) => reply.send(answer.map_err(|fault| fault.during("renew"))).is_err(),
            Self::Record(answer, reply) => reply.send(answer.map_err(|fault| fault.during("record"))).is_err(),
        };
    }
}

/// How long and how often another process' lock is waited for: SQLite's own waiting in slices, with random pauses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    tries: u32,
}

/// How long SQLite itself waits for a lock at a time.
pub(crate) const BUSY_SLICE: Duration = Duration::from_millis(50);

impl Patience {
    pub(crate) fn new(busy_timeout: Duration) -> Self {
        let slices = busy_timeout.as_micros().div_ceil(BUSY_SLICE.as_micros());
        Self { tries: u32::try_from(slices).unwrap_or(u32::MAX).max(1) }
    }

    /// Pauses before the next try; false when it is over.
    pub(crate) async fn again(&mut self, fault: &Fault) -> bool {
        self.tries = self.tries.saturating_sub(1);
        if !fault.is_busy() || self.tries == 0 {
            return false;
        }
        tokio::time::sleep(Duration::from_micros(fastrand::u64(500..4000))).await;
        true
    }
}

/// The task that owns the writing connection.
pub(crate) struct Writer {
    pub(crate) options: SqliteConnectOptions,
    pub(crate) connection: Option<SqliteConnection>,
    pub(crate) lock: Arc<Semaphore>,
    pub(crate) patience: Patience,
    pub(crate) clock: Clock,
    pub(crate) rolling: Rolling,
    /// Why the last removal of expired records failed: told by the store's probe.
    pub(crate) sweep_fault: Arc<Mutex<Option<Fault>>>,
}

impl Writer {
    /// Serves until the last sender is gone or the store is closed.
    pub(crate) async fn run(mut self, mut calls: mpsc::Receiver<Call>) {
        let mut next = None;
        loop {
            let first = match next.take() {
                Some(call) => call,
                None => match calls.recv().await {
                    Some(call) => call,
                    None => break,
                },
            };
            if !first.is_shared() {
                if matches!(first, Call::Close) {
                    calls.close();
                } else {
                    self.alone(first).await;
                }
                continue;
            }
            let mut items = first.items();
            let mut group = vec![first];
            while items < ITEMS_MAX {
                match calls.try_recv() {
                    Ok(call) if call.is_shared() => {
                        items += call.items();
                        group.push(call);
                    }
                    Ok(call) => {
                        next = Some(call);
                        break;
                    }
                    Err(_) => break,
                }
            }
            self.together(group).await;
        }
        if let Some(connection) = self.connection.take()
            && let Err(error) = connection.close().await
        {
            tracing::warn!(%error, "the SQLite store did not close cleanly; what it acknowledged is safe");
        }
    }

    /// One commit for several calls. Where SQLite refuses it as a whole, each gets its own.
    async fn together(&mut self, calls: Vec<Call>) {
        let refused = match self.try_together(calls).await {
            Ok(answers) => return answers.into_iter().for_each(Answer::send),
            Err(refused) => refused,
        };
        let (calls, fault) = refused;
        if fault.kind != ErrorKind::Rejected || calls.len() == 1 {
            return calls.into_iter().for_each(|call| call.fail(&fault));
        }
        for call in calls {
            match self.try_together(vec![call]).await {
                Ok(answers) => answers.into_iter().for_each(Answer::send),
                Err((calls, fault)) => calls.into_iter().for_each(|call| call.fail(&fault)),
            }
        }
    }

    async fn try_together(&mut self, calls: Vec<Call>) -> std::result::Result<Vec<Answer>, (Vec<Call>, Fault)> {
        let applied = match calls.iter().map(|call| call.nothing().map(Some)).collect() {
            Some(nothing) => Ok(nothing),
            None => self.apply_locked(&calls).await,
        };
        match applied {
            Ok(applied) => Ok(calls.into_iter().zip(applied).filter_map(|(call, applied)| applied?.to(call)).collect()),
            Err(fault) => Err((calls, fault)),
        }
    }

    /// One transaction for calls of which some have items.
    async fn apply_locked(&mut self, calls: &[Call]) -> std::result::Result<Vec<Option<Applied>>, Fault> {
        let lock = Arc::clone(&self.lock);
        let Ok(_permit) = lock.acquire().await else {
            return Err(Fault::new(ErrorKind::Unavailable, "the store is closed"));
        };
        let sweeps = self.rolling.is_due(calls.iter().map(|call| call.outcomes().len()).sum());
        let usual = match self.apply_usual(calls, sweeps).await {
            // What cannot be there is there; the connection is gone with the transaction.
            Err(fault) if fault.kind == ErrorKind::Rejected => None,
            usual => usual?,
        };
        match usual {
            Some(applied) => Ok(applied),
            None => {
                let mut applied: Vec<_> = calls.iter().map(Call::nothing).collect();
                let batch = self.apply_rest(calls, &mut applied, None).await?;
                self.finish(&batch, sweeps).await?;
                Ok(applied)
            }
        }
    }

    /// `hot.rs` does what it can and the state machine the rest. `None` where the state machine is to look at the whole group,
    /// in a transaction of its own.
    async fn apply_usual(
        &mut self,
        calls: &[Call],
        sweeps: bool,
    ) -> std::result::Result<Option<Vec<Option<Applied>>>, Fault> {
        let mut applied: Vec<_> = calls.iter().map(Call::nothing).collect();
        let mut open = None;
        let crossing =
            |items: usize| if calls.len() == 1 && items == 1 && !sweeps { Crossing::Alone } else { Crossing::First };
        if let Some(done) = Done::of(calls) {
            let crossing = crossing(done.len());
            let (now, changed) = self.begin_with(crossing, |now| done.statement(crossing, now)).await?;
            if !done.are_written(crossing, &changed) {
                if crossing == Crossing::First {
                    self.roll_back().await?;
                }
                return Ok(None);
            }
            Done::answer(calls, &mut applied);
            open = (crossing == Crossing::First).then_some(now);
        }
        if let Some(claims) = Claims::of(calls) {
            let crossing = if open.is_some() { Crossing::Next } else { crossing(claims.len()) };
            let (now, changed) = match open {
                Some(now) => (now, self.inside(claims.statement(crossing, now)).await?),
                None => self.begin_with(crossing, |now| claims.statement(crossing, now)).await?,
            };
            open = (crossing != Crossing::Alone).then_some(now);
            if claims.are_written(&changed) {
                claims.answer(calls, &mut applied, now);
            }
        }
        let is_done = applied.iter().all(Option::is_some);
        if open.is_none() {
            return Ok(is_done.then_some(applied));
        }
        let batch = if is_done { Batch::default() } else { self.apply_rest(calls, &mut applied, open).await? };
        // A claim that is refused as a whole leaves no lease behind.
        if applied.iter().any(|applied| matches!(applied, Some(Applied::Claim(Err(_))))) {
            self.roll_back().await?;
            return Ok(None);
        }
        self.finish(&batch, sweeps).await?;
        Ok(Some(applied))
    }

    /// Answers what is not answered by the state machine: in the transaction that is open since the moment told, or in one
    /// that it begins.
    async fn apply_rest(
        &mut self,
        calls: &[Call],
        applied: &mut [Option<Applied>],
        open: Option<Moment>,
    ) -> std::result::Result<Batch, Fault> {
        let mut batch = Batch::default();
        let rest = || calls.iter().zip(applied.iter()).filter(|(_, applied)| applied.is_none());
        rest().for_each(|(call, _)| call.want(&mut batch));
        let (frame, now) = match open {
            Some(now) => {
                let loaded = batch.load(self.connected().await?, Within::Transaction).await;
                (self.kept(loaded)?, now)
            }
            // The clock is read inside the transaction, so that waiting for the lock does not use up leases.
            None => (self.begin(&mut batch).await?, (self.clock)()),
        };
        for (call, applied) in calls.iter().zip(applied).filter(|(_, applied)| applied.is_none()) {
            *applied = match call {
                Call::Claim(requests, lease, _) => Some(Applied::Claim(batch.claim(requests, *lease, now, frame))),
                Call::Renew(leases, lease, _) => Some(Applied::Renew(batch.renew(leases, *lease, now, frame))),
                Call::Record(outcomes, _) => Some(Applied::Record(batch.record(outcomes, now, frame))),
                _ => None,
            };
        }
        Ok(batch)
    }

    /// Begins a transaction and reads the batch in one crossing.
    async fn begin(&mut self, batch: &mut Batch) -> std::result::Result<Frame, Fault> {
        let mut patience = self.patience;
        loop {
            match batch.load(self.connected().await?, Within::Begin).await {
                Ok(frame) => return Ok(frame),
                Err(fault) => self.wait_after(fault, &mut patience).await?,
            }
        }
    }

    /// Begins a transaction with statements that do so, made anew for each try so that waiting for the lock uses up little
    /// of their leases; tells their moment and how many rows each changed, of which that of BEGIN means nothing.
    async fn begin_with(
        &mut self,
        crossing: Crossing,
        statements: impl Fn(Moment) -> Statement,
    ) -> std::result::Result<(Moment, Vec<u64>), Fault> {
        let mut patience = self.patience;
        loop {
            let now = (self.clock)();
            match changes(self.connected().await?, statements(now)).await {
                Ok(changed) => return Ok((now, changed)),
                Err(fault) => {
                    // What commits may have taken place.
                    let fault = if crossing == Crossing::Alone { fault.at_commit() } else { fault };
                    self.wait_after(fault, &mut patience).await?;
                }
            }
        }
    }

    /// More statements of the transaction that is open.
    async fn inside(&mut self, statements: Statement) -> std::result::Result<Vec<u64>, Fault> {
        let changed = changes(self.connected().await?, statements).await;
        self.kept(changed)
    }

    async fn roll_back(&mut self) -> std::result::Result<(), Fault> {
        self.inside(sqlx::query("ROLLBACK")).await.map(drop)
    }

    /// Waits for the lock of another process, where no transaction was begun; after any other fault the connection is not
    /// used again.
    async fn wait_after(&mut self, fault: Fault, patience: &mut Patience) -> std::result::Result<(), Fault> {
        if patience.again(&fault).await { Ok(()) } else { self.kept(Err(fault)) }
    }

    /// After a fault inside a transaction the connection is not used again.
    fn kept<T>(&mut self, done: std::result::Result<T, Fault>) -> std::result::Result<T, Fault> {
        if done.is_err() {
            self.connection = None;
        }
        done
    }

    /// Writes the batch, removes a bounded number of expired records, and commits.
    async fn finish(&mut self, batch: &Batch, sweeps: bool) -> std::result::Result<(), Fault> {
        let now = (self.clock)();
        let Some(connection) = &mut self.connection else {
            return Err(Fault::new(ErrorKind::Internal, "no transaction is open"));
        };
        let mut done = batch.save(connection, !sweeps).await;
        if sweeps && done.is_ok() {
            // Its failure is told by the probe and does not keep the records from being committed.
            let swept = self.rolling.step(connection, now).await;
            tell(&self.sweep_fault, swept.err());
            done = sqlx::query("COMMIT").execute(&mut *connection).await.map(drop).map_err(Fault::from);
        }
        if done.is_err() {
            self.connection = None;
        }
        done.map_err(Fault::at_commit)
    }

    async fn connected(&mut self) -> std::result::Result<&mut SqliteConnection, Fault> {
        if self.connection.is_none() {
            self.connection = Some(self.options.connect().await?);
        }
        self.connection.as_mut().ok_or_else(|| Fault::new(ErrorKind::Internal, "no connection"))
    }

    /// A call with a transaction of its own.
    async fn alone(&mut self, call: Call) {
        // A consumer that is registered already needs no lock: a start must not wait for another process' handler.
        if let Call::Open(name, retention, _) = &call
            && let Ok(connection) = self.connected().await
            && let Ok(Some(id)) = registered(connection, name, *retention).await
        {
            if let Call::Open(.., reply) = call {
                let _gone = reply.send(Ok(id)).is_err();
            }
            return;
        }
        let lock = Arc::clone(&self.lock);
        let Ok(_permit) = lock.acquire().await else {
            return call.fail(&Fault::new(ErrorKind::Unavailable, "the store is closed"));
        };
        if let Err(fault) = self.begin_with(Crossing::First, |_| sqlx::query("BEGIN IMMEDIATE")).await {
            return call.fail(&fault);
        }
        let Some(mut connection) = self.connection.take() else { return };
        match call {
            Call::Open(name, retention, reply) => {
                let opened = open(&mut connection, &name, retention).await;
                let done = ended(&mut connection, opened).await;
                self.keep(connection, done, "open", reply);
            }
            Call::Sweep(table, after, to, now, reply) => {
                let swept = sweep::remove_between(&mut connection, table, &after, &to, now).await;
                let done = ended(&mut connection, swept).await;
                tell(&self.sweep_fault, done.as_ref().err().cloned());
                self.keep(connection, done, "sweep", reply);
            }
            Call::Forget(id, reply) => {
                let removed = sweep::remove_one(&mut connection, id).await;
                let done = ended(&mut connection, removed).await;
                self.keep(connection, done, "forget", reply);
            }
            _ => self.connection = Some(connection),
        }
    }

    /// Answers; a connection on which something failed is closed, which rolls back.
    fn keep<T>(
        &mut self,
        connection: SqliteConnection,
        done: std::result::Result<T, Fault>,
        operation: &'static str,
        reply: Reply<T>,
    ) {
        self.connection = done.is_ok().then_some(connection);
        let _gone = reply.send(done.map_err(|fault| fault.during(operation))).is_err();
    }
}

/// How many rows each statement changed.
async fn changes(connection: &mut SqliteConnection, statements: Statement) -> std::result::Result<Vec<u64>, Fault> {
    let mut done = connection.fetch_many(statements);
    let mut changes = Vec::new();
    while let Some(done) = done.try_next().await? {
        changes.extend(done.left().map(|done| done.rows_affected()));
    }
    Ok(changes)
}

pub(crate) enum Applied {
    Claim(std::result::Result<Vec<Claim>, Fault>),
    Renew(std::result::Result<Vec<Renewal>, Fault>),
    Record(std::result::Result<Vec<Recorded>, Fault>),
}

impl Applied {
    fn to(self, call: Call) -> Option<Answer> {
        match (self, call) {
            (Self::Claim(answer), Call::Claim(.., reply)) => Some(Answer::Claim(answer, reply)),
            (Self::Renew(answer), Call::Renew(.., reply)) => Some(Answer::Renew(answer, reply)),
            (Self::Record(answer), Call::Record(.., reply)) => Some(Answer::Record(answer, reply)),
            _ => None,
        }
    }
}

async fn ended<T>(
    connection: &mut SqliteConnection,
    done: std::result::Result<T, Fault>,
) -> std::result::Result<T, Fault> {
    let done = done?;
    sqlx::query("COMMIT").execute(connection).await.map_err(|error| Fault::from(error).at_commit())?;
    Ok(done)
}

async fn open(
    connection: &mut SqliteConnection,
    name: &str,
    retention: Duration,
) -> std::result::Result<ConsumerId, Fault> {
    let register = "INSERT INTO hapax_consumer (name, retention) VALUES (?, ?) \
        ON CONFLICT (name) DO UPDATE SET retention = excluded.retention";
    sqlx::query(register).bind(name).bind(micros(retention)).execute(&mut *connection).await?;
    let id = registered(connection, name, retention).await?;
    id.ok_or_else(|| Fault::incompatible(format!("consumer {name} has a number out of range")))
}

async fn registered(
    connection: &mut SqliteConnection,
    name: &str,
    retention: Duration,
) -> std::result::Result<Option<ConsumerId>, Fault> {
    let find = sqlx::query_scalar("SELECT id FROM hapax_consumer WHERE name = ? AND retention = ?");
    let id: Option<i64> = find.bind(name).bind(micros(retention)).fetch_optional(connection).await?;
    Ok(id.and_then(|id| u32::try_from(id).ok()).filter(|id| *id > 0).map(ConsumerId))
}

fn micros(duration: Duration) -> i64 {
    integer(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX))
}

fn tell(place: &Mutex<Option<Fault>>, fault: Option<Fault>) {
    if let Some(fault) = &fault {
        tracing::warn!(?fault, "expired records could not be removed; the SQLite file goes on growing");
    }
    *place.lock().unwrap_or_else(PoisonError::into_inner) = fault;
}
