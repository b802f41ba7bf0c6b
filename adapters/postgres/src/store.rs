//! `PostgresStore`: settings, opening, and the contracts as messages.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use hapax::{
    Claim, ClaimRequest, ConsumerId, Lease, Outcome, ProcessedStore, Recorded, Renewal, Result, StoreHealth,
    TransactionalStore,
};
use sqlx::{PgPool, Row};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::error::{Fault, code};
use crate::line::{Lines, Replies};
use crate::outcomes::{self, Desk};
use crate::rows::{self, SOON, Seen, not_granted};
use crate::statements::{Id, Next, PRELUDE, ROWS, Statements, distinct};
use crate::sweep::{self, Sweeper};
use crate::template::Schema;
use crate::turns::Turns;
use crate::tx::{self, PgLent, PgTx};
use crate::{health, schema};

/// The schema that holds hapax' tables.
pub const SCHEMA: &str = "public";
/// How long a row lock of another transaction is waited for.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one statement may run.
pub const STATEMENT_TIMEOUT: Duration = Duration::from_secs(8);
/// What the network may add to the time of a statement.
const NETWORK: Duration = Duration::from_secs(2);
/// How long a migration may take.
const MIGRATE_MAX: Duration = Duration::from_secs(60);

/// The settings of a [`PostgresStore`].
#[must_use = "a builder does nothing before connect()"]
pub struct PostgresStoreBuilder {
    pool: PgPool,
    schema: String,
    migrate: bool,
    lock_timeout: Duration,
    statement_timeout: Duration,
    sweep_every: Duration,
    prepare: Option<bool>,
    reuse_connections: bool,
}

impl PostgresStoreBuilder {
    /// The schema that holds hapax' tables; [`SCHEMA`]. Created by a migration where it is missing.
    pub fn schema(self, schema: impl Into<String>) -> Self {
        Self { schema: schema.into(), ..self }
    }

    /// Whether [`connect`](Self::connect) creates hapax' tables or brings them up to date; `false`. Safe where several
    /// start at once. Needs the right to create tables in the schema.
    pub fn migrate(self, migrate: bool) -> Self {
        Self { migrate, ..self }
    }

    /// How long a row lock of another transaction is waited for; [`LOCK_TIMEOUT`].
    pub fn lock_timeout(self, lock_timeout: Duration) -> Self {
        Self { lock_timeout, ..self }
    }

    /// How long one statement may run, waiting for locks included; [`STATEMENT_TIMEOUT`]. The mark at a handler's end runs
    /// under the limit that the handler has, and is tried again under this one.
    pub fn statement_timeout(self, statement_timeout: Duration) -> Self {
        Self { statement_timeout, ..self }
    }

    /// How often a step of the sweep is tried; [`SWEEP_EVERY`](crate::SWEEP_EVERY). Zero leaves sweeping to
    /// [`StoreAdmin::sweep`](hapax::StoreAdmin::sweep).
    pub fn sweep_every(self, sweep_every: Duration) -> Self {
        Self { sweep_every, ..self }
    }

    /// Whether the statements that run for every event are prepared on the connections that claims and records keep.
    ///
    /// Unless it is said: where [`connect`](Self::connect) finds that the pool leads to PostgreSQL itself, and not to a
    /// pooler such as PgBouncer. Told by a setting that sqlx sends when it connects (`extra_float_digits`): where the
    /// server did not get it from its client, nothing is prepared.
    pub fn prepare(self, prepare: bool) -> Self {
        Self { prepare: Some(prepare), ..self }
    }

    /// Whether a connection goes from one handler's transaction to the next without the pool's tests in between, for up
    /// to ten seconds; `false`. Faster, and for pools without `before_acquire` and `after_release` hooks that prepare or
    /// tidy a session: between those handlers they do not run. Done only while the pool has room for others, and never
    /// behind a pooler: a pool with two connections more than handlers and claims take at once has room.
    pub fn reuse_connections(self, reuse_connections: bool) -> Self {
        Self { reuse_connections, ..self }
    }

    /// Checks the server and what is in it, migrates if that was asked for, and starts the sweep. Needs a tokio runtime,
    /// and the store belongs to it.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`](hapax::ErrorKind::Configuration) for a server that is too old, read-only or not in UTF-8, a bad schema's name, tables
    /// that are not there, or rights that are missing; [`ErrorKind::Incompatible`](hapax::ErrorKind::Incompatible) for a table of our name with another
    /// shape, or tables written by a newer version. Nothing is written before these checks.
    /// [`ErrorKind::Unavailable`](hapax::ErrorKind::Unavailable) where no connection can be had.
    pub async fn connect(self) -> Result<PostgresStore> {
        self.connect_checked().await.map_err(|fault| fault.during("connect"))
    }

    async fn connect_checked(self) -> std::result::Result<PostgresStore, Fault> {
        let schema = Schema::new(&self.schema)?;
        let runtime = Handle::current();
        let prepares = {
            let lines = Lines::new(self.pool.clone(), MIGRATE_MAX, runtime.clone());
            schema::check_server(&lines).await?;
            if self.migrate {
                schema::migrate(&lines, &schema).await?;
            } else if schema::inspect(&lines, &schema).await?.is_none() {
                return Err(Fault::configuration(format!(
                    "schema {} holds no tables of hapax: PostgresStore::builder(pool).migrate(true), or \
                     PostgresStore::migrate(&pool) as a role that may create them",
                    schema.name()
                )));
            }
            schema::check_rights(&lines, &schema).await?;
            match self.prepare {
                Some(prepare) => prepare,
                None => schema::is_direct(&lines).await?,
            }
        };
        let lines = Lines::new(self.pool, self.statement_timeout + NETWORK, runtime);
        let lines = Arc::new(if prepares { lines.prepare() } else { lines });
        let statements = Arc::new(Statements::new(&schema, self.lock_timeout, self.statement_timeout));
        let sweep_fault = Arc::new(Mutex::new(None));
        let mut tasks = vec![tokio::spawn(Arc::clone(&lines).tidy())];
        if !self.sweep_every.is_zero() {
            let sweeper = Sweeper::new(Arc::clone(&lines), Arc::clone(&statements), &schema, Arc::clone(&sweep_fault));
            tasks.push(tokio::spawn(sweeper.run(self.sweep_every)));
        }
        let turns = Arc::new(Turns::new(Arc::clone(&lines), self.reuse_connections));
        Ok(PostgresStore(Arc::new(Inner { lines, statements, schema, sweep_fault, turns, tasks })))
    }
}

impl fmt::Debug for PostgresStoreBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The pool's options hold the password.
        f.debug_struct("PostgresStoreBuilder")
            .field("schema", &self.schema)
            .field("migrate", &self.migrate)
            .field("lock_timeout", &self.lock_timeout)
            .field("statement_timeout", &self.statement_timeout)
            .field("sweep_every", &self.sweep_every)
            .field("prepare", &self.prepare)
            .field("reuse_connections", &self.reuse_connections)
            .finish_non_exhaustive()
    }
}

/// The processed-events store in a PostgreSQL database, on a pool of the user's. Cheap to clone; the last clone that is
/// dropped ends its tasks. The pool stays open.
///
/// Consumers that share a pool take clones of one store: together their handlers leave two of its connections for claims,
/// renewals and records. Two stores on one pool know nothing of each other, so give each a pool of its own.
#[derive(Clone, Debug)]
pub struct PostgresStore(Arc<Inner>);

struct Inner {
    lines: Arc<Lines>,
    statements: Arc<Statements>,
    schema: Schema,
    sweep_fault: Arc<Mutex<Option<Fault>>>,
    /// Transactions of handlers at once, over all clones.
    turns: Arc<Turns>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("schema", &self.schema.name()).finish_non_exhaustive()
    }
}

impl PostgresStore {
    /// The store in the schema [`SCHEMA`], whose tables are there already. Only checks.
    ///
    /// # Errors
    /// Those of [`PostgresStoreBuilder::connect`].
    pub async fn new(pool: PgPool) -> Result<Self> {
        Self::builder(pool).connect().await
    }

    /// Settings for a store on `pool`.
    pub fn builder(pool: PgPool) -> PostgresStoreBuilder {
        PostgresStoreBuilder {
            pool,
            schema: SCHEMA.to_owned(),
            migrate: false,
            lock_timeout: LOCK_TIMEOUT,
            statement_timeout: STATEMENT_TIMEOUT,
            sweep_every: sweep::SWEEP_EVERY,
            prepare: None,
            reuse_connections: false,
        }
    }

    /// Creates hapax' tables in the schema [`SCHEMA`], or brings them up to date: for a deployment step that runs as
    /// another role than the service. Safe where several start at once, and when there is nothing to do.
    ///
    /// # Errors
    /// As [`PostgresStoreBuilder::connect`].
    pub async fn migrate(pool: &PgPool) -> Result<()> {
        Self::migrate_schema(pool, SCHEMA).await
    }

    /// [`migrate`](Self::migrate) in another schema, which is created where it is missing.
    ///
    /// # Errors
    /// As [`PostgresStoreBuilder::connect`].
    pub async fn migrate_schema(pool: &PgPool, schema: &str) -> Result<()> {
        let migrated = async {
            let schema = Schema::new(schema)?;
            let lines = Lines::new(pool.clone(), MIGRATE_MAX, Handle::current());
            schema::check_server(&lines).await?;
            schema::migrate(&lines, &schema).await
        };
        migrated.await.map_err(|fault| fault.during("migrate"))
    }

    /// The pool it was given.
    pub fn pool(&self) -> &PgPool {
        self.0.lines.pool()
    }

    pub(crate) fn lines(&self) -> &Lines {
        &self.0.lines
    }

    pub(crate) fn statements(&self) -> &Statements {
        &self.0.statements
    }

    pub(crate) fn schema(&self) -> &Schema {
        &self.0.schema
    }

    pub(crate) fn sweep_fault(&self) -> Option<Fault> {
        self.0.sweep_fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn claimed(&self, batch: &[ClaimRequest], lease: Duration) -> std::result::Result<Vec<Claim>, Fault> {
        let mut order: Vec<usize> = (0..batch.len()).collect();
        order.sort_unstable_by_key(|&n| (batch[n].key, batch[n].consumer));
        if order
            .windows(2)
            .any(|pair| (batch[pair[0]].key, batch[pair[0]].consumer) == (batch[pair[1]].key, batch[pair[1]].consumer))
        {
            return Err(Fault::rejected("one key twice in a batch"));
        }
        let mut answers: Vec<Option<Claim>> = vec![None; batch.len()];
        let mut left = order;
        if let Err(fault) = self.claim_some(batch, &mut left, &mut answers, lease).await {
            if !fault.has_code(code::LOCK_NOT_AVAILABLE) {
                return Err(fault);
            }
            // Another transaction holds some of the records for long: they wait, the others do not.
            let locked = self.locked(&ids(batch, &left)).await?;
            tracing::warn!(locked = locked.len(), "records are locked by other transactions; their events wait");
            left.retain(|&n| {
                let is_locked = locked.contains(&(batch[n].key, batch[n].consumer));
                if is_locked {
                    answers[n] = Some(Claim::Held { wait: self.0.statements.lock_wait() });
                }
                !is_locked
            });
            let again = self.claim_some(batch, &mut left, &mut answers, lease).await;
            // Somebody inserts one of them, which no look into the table shows: halved, it keeps back none but itself.
            let is_inserted = |fault: &Fault| fault.has_code(code::LOCK_NOT_AVAILABLE) && left.len() > 1;
            again.map_err(|fault| if is_inserted(&fault) { fault.of_an_item() } else { fault })?;
        }
        Ok(answers.into_iter().map(|answer| answer.unwrap_or(Claim::Held { wait: SOON })).collect())
    }

    /// Claims what is `left`, in its order: what was never seen, then what is free of the rest. Leaves nothing, unless it
    /// fails.
    async fn claim_some(
        &self,
        batch: &[ClaimRequest],
        left: &mut Vec<usize>,
        answers: &mut [Option<Claim>],
        lease: Duration,
    ) -> std::result::Result<(), Fault> {
        if left.is_empty() {
            return Ok(());
        }
        let requests: Vec<&ClaimRequest> = left.iter().map(|&n| &batch[n]).collect();
        let statements = self.statements();
        let replies = self.lines().ask_hot(statements, |form| statements.claim(&requests, lease, form)).await?;
        let last = replies.len().saturating_sub(1);
        check_prelude(&replies, last, Some(distinct(&ids(batch, left)).len()))?;
        let first = rows::First::read(replies.last().map(Vec::as_slice).unwrap_or_default(), left.len())?;
        left.retain(|&n| {
            answers[n] = first.answer(&batch[n]);
            answers[n].is_none()
        });
        if left.is_empty() { Ok(()) } else { self.reclaim(batch, left, answers, lease).await }
    }

    /// Claims what is `left` and known: what failed and is due, what was abandoned, forgotten or reopened.
    async fn reclaim(
        &self,
        batch: &[ClaimRequest],
        left: &mut Vec<usize>,
        answers: &mut [Option<Claim>],
        lease: Duration,
    ) -> std::result::Result<(), Fault> {
        let requests: Vec<&ClaimRequest> = left.iter().map(|&n| &batch[n]).collect();
        let replies = self.lines().ask(self.statements().reclaim(&requests, lease)).await?;
        check_prelude(&replies, PRELUDE, Some(distinct(&ids(batch, left)).len()))?;
        let mut granted = Vec::with_capacity(left.len());
        for row in replies.get(ROWS).map(Vec::as_slice).unwrap_or_default() {
            granted.push((rows::id(row)?, rows::granted(row)?));
        }
        granted.sort_unstable_by_key(|(id, _)| *id);
        let seen = Seen::read_all(replies.get(ROWS + 1).map(Vec::as_slice).unwrap_or_default())?;
        for n in left.drain(..) {
            let id = (batch[n].key, batch[n].consumer);
            answers[n] = Some(match granted.binary_search_by_key(&id, |(id, _)| *id) {
                Ok(at) => granted[at].1.clone(),
                Err(_) => not_granted(&batch[n], seen.get(&id)),
            });
        }
        Ok(())
    }

    async fn locked(&self, ids: &[Id]) -> std::result::Result<Vec<Id>, Fault> {
        let replies = self.lines().ask(self.statements().locked(ids)).await?;
        check_prelude(&replies, PRELUDE, None)?;
        replies.get(ROWS).map(Vec::as_slice).unwrap_or_default().iter().map(rows::id).collect()
    }

    async fn renewed(&self, leases: &[Lease], lease: Duration) -> std::result::Result<Vec<Renewal>, Fault> {
        let mut sorted: Vec<&Lease> = leases.iter().collect();
        sorted.sort_unstable_by_key(|held| (held.key, held.consumer));
        let ids: Vec<Id> = sorted.iter().map(|held| (held.key, held.consumer)).collect();
        let asked = self.lines().ask(self.statements().renew(&sorted, lease)).await;
        let replies = asked.map_err(|fault| match fault.has_code(code::LOCK_NOT_AVAILABLE) {
            // Halved until it stands alone, a record that another transaction locks costs its neighbours nothing. Alone too
            // it is rejected: the store is there, and the lease is asked for again when the next renewal is due.
            true => fault.of_an_item(),
            false => fault,
        })?;
        check_prelude(&replies, PRELUDE, Some(distinct(&ids).len()))?;
        let rows = replies.get(ROWS).map(Vec::as_slice).unwrap_or_default().iter();
        let mut renewed = rows.map(rows::id).collect::<std::result::Result<Vec<Id>, Fault>>()?;
        renewed.sort_unstable();
        let answer = |held: &Lease| match renewed.binary_search(&(held.key, held.consumer)) {
            Ok(_) => Renewal::Renewed,
            Err(_) => Renewal::Lost,
        };
        Ok(leases.iter().map(answer).collect())
    }

    async fn opened(&self, consumer: &str, retention: Duration) -> std::result::Result<ConsumerId, Fault> {
        if consumer.is_empty() {
            return Err(Fault::configuration("the consumer's name is empty: give it one"));
        }
        let replies = self.lines().ask(self.statements().open(consumer, retention)).await?;
        check_prelude(&replies, PRELUDE, None)?;
        let number = replies.last().and_then(|rows| rows.first()).map(|row| row.try_get::<i32, _>(0)).transpose()?;
        let number = number.and_then(|number| u32::try_from(number).ok()).filter(|number| *number > 0);
        number.map(ConsumerId).ok_or_else(|| Fault::incompatible("table hapax_consumer gave no number"))
    }
}

fn ids(batch: &[ClaimRequest], which: &[usize]) -> Vec<Id> {
    which.iter().map(|&n| (batch[n].key, batch[n].consumer)).collect()
}

/// Looks at what the prelude tells: whether the batch was committed, by tables that we know, for consumers that they
/// know. Where it says no, nothing was written.
pub(crate) fn check_prelude(replies: &Replies, at: usize, consumers: Option<usize>) -> std::result::Result<(), Fault> {
    let row = replies.get(at).and_then(|rows| rows.first());
    let row = row.ok_or_else(|| Fault::unavailable("the server's answer is cut short"))?;
    schema::check_version(row.try_get("schema")?)?;
    let known: i64 = row.try_get("known")?;
    if consumers.is_some_and(|consumers| i64::try_from(consumers) != Ok(known)) {
        return Err(Fault::incompatible(
            "a consumer's number is not of this database: was it replaced or restored? restart",
        ));
    }
    Ok(())
}

#[async_trait]
impl ProcessedStore for PostgresStore {
    async fn open(&self, consumer: &str, retention: Duration) -> Result<ConsumerId> {
        self.opened(consumer, retention).await.map_err(|fault| fault.during("open"))
    }

    async fn claim(&self, batch: &[ClaimRequest], lease: Duration) -> Result<Vec<Claim>> {
        self.claimed(batch, lease).await.map_err(|fault| fault.during("claim"))
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewal>> {
        if leases.is_empty() {
            return Ok(Vec::new());
        }
        self.renewed(leases, lease).await.map_err(|fault| fault.during("renew"))
    }

    async fn record(&self, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let mut desk = Desk::Lines(self.lines());
        outcomes::record(self.statements(), batch, &mut desk).await.map_err(|fault| fault.during("record"))
    }

    async fn probe(&self) -> Result<StoreHealth> {
        health::probe(self).await.map_err(|fault| fault.during("probe"))
    }
}

#[async_trait]
impl TransactionalStore for PostgresStore {
    type Tx = PgTx;
    type Lent = PgLent;

    async fn begin(&self) -> Result<(PgTx, PgLent)> {
        tx::begin(self.statements(), &self.0.turns).await.map_err(|fault| fault.during("begin"))
    }

    async fn record_in(&self, lent: &mut PgLent, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        lent.record(self.statements(), batch).await.map_err(|fault| fault.during("record"))
    }

    async fn commit(&self, lent: PgLent) -> Result<()> {
        lent.commit().await.map_err(|fault| fault.during("commit"))
    }

    async fn record_and_commit(&self, lent: PgLent, batch: &[(Lease, Outcome)]) -> Result<Vec<Recorded>> {
        let committed = lent.record_and_commit(self.statements(), batch, None).await;
        committed.map(|(answers, _)| answers).map_err(|fault| fault.during("commit"))
    }

    async fn commit_and_claim(
        &self,
        lent: PgLent,
        batch: &[(Lease, Outcome)],
        next: &ClaimRequest,
        lease: Duration,
    ) -> Result<(Vec<Recorded>, Option<Lease>)> {
        let next = Some(Next { request: next, lease });
        lent.record_and_commit(self.statements(), batch, next).await.map_err(|fault| fault.during("commit"))
    }
}
