//! The messages that go to the server: SQL of `sql/`, the schema's name and the values of a batch in it.

use std::time::Duration;

use hapax::{ClaimRequest, ConsumerId, EventKey, Lease, Outcome, Status, Trouble};

use crate::hot::{Form, Hot};
use crate::schema::SCHEMA_VERSION;
use crate::template::{Schema, Template, list, number, quoted, text, uuid};

/// How a record is found.
pub(crate) type Id = (EventKey, ConsumerId);

/// Where the rows of a batch's own statement are in its replies: behind the isolation level and the prelude. Hot
/// statements answer last, and tell in their rows what the prelude does.
pub(crate) const PRELUDE: usize = 1;
pub(crate) const ROWS: usize = 2;

const READ_COMMITTED: &str = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; ";

const PLANNED_ANEW: &str = "force_custom_plan";

/// Durations and instants are cut to this many microseconds, some 3,000 years, so that no sum overflows.
const MICROS_MAX: i64 = 100_000_000_000_000_000;

/// A batch that can be halved waits for a lock this part of the time that an item alone does: each half that holds the
/// locked record waits again, while its neighbours' leases run.
const HALVED_PART: i64 = 8;

/// How long a commit waits for another's claim of the event that it is to claim.
const NEXT_LOCK_MAX_MS: i64 = 100;

/// The number of a status in the column `state`.
pub(crate) const fn state_number(status: Status) -> i16 {
    match status {
        Status::Claimed => 0,
        Status::Waiting => 1,
        Status::Doomed => 2,
        Status::Processed => 3,
        Status::DeadLettered => 4,
    }
}

/// Forgotten by an operator: as if there were no record, but its fence is remembered.
pub(crate) const FORGOTTEN: i16 = 5;

/// The state to which an outcome leads.
pub(crate) fn target(outcome: &Outcome) -> i16 {
    state_number(match outcome {
        Outcome::Processed => Status::Processed,
        Outcome::Failed { .. } => Status::Waiting,
        Outcome::Doomed { .. } => Status::Doomed,
        Outcome::DeadLettered => Status::DeadLettered,
    })
}

pub(crate) fn micros(time: Duration) -> i64 {
    i64::try_from(time.as_micros()).unwrap_or(MICROS_MAX).min(MICROS_MAX)
}

/// Where a batch is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Within {
    /// A transaction of its own, as long as the message.
    Message,
    /// The transaction of a handler that bears this mark.
    Transaction(u64),
}

/// Whether a connection knows a statement by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// Nobody asks, and it is sent as text.
    NotAsked,
    /// It is sent as text once more, with the question whether it is known.
    Unknown,
    /// It is to be prepared.
    Missing,
    Prepared,
}

/// The claim that a commit takes along.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Next<'a> {
    pub(crate) request: &'a ClaimRequest,
    pub(crate) lease: Duration,
}

/// Every message of one store.
#[derive(Debug)]
pub(crate) struct Statements {
    guards: Template,
    prelude: Template,
    claim: Hot,
    reclaim: Template,
    renew: Template,
    processed: Hot,
    record: Template,
    anew: Template,
    read: Template,
    locked: Template,
    open: Template,
    transaction: Template,
    finish: Hot,
    sweep: Template,
    lock_timeout: i64,
    statement_timeout: i64,
}

impl Statements {
    pub(crate) fn new(schema: &Schema, lock_timeout: Duration, statement_timeout: Duration) -> Self {
        let (schema, version) = (schema.quoted(), SCHEMA_VERSION.to_string());
        let (frame, items) = (include_str!("../sql/frame.sql"), include_str!("../sql/items.sql"));
        let (fresh, told) = (include_str!("../sql/fresh.sql"), include_str!("../sql/told.sql"));
        let constant = [
            ("frame", frame),
            ("told", told),
            ("items", items),
            ("fresh", fresh),
            ("schema", &*schema),
            ("version", &*version),
        ];
        let whole = |sql| Template::new(sql, &constant);
        Self {
            prelude: whole(include_str!("../sql/prelude.sql")),
            guards: whole(include_str!("../sql/guards.sql")),
            claim: Hot::new(include_str!("../sql/claim.sql"), &constant),
            reclaim: whole(include_str!("../sql/reclaim.sql")),
            renew: whole(include_str!("../sql/renew.sql")),
            processed: Hot::new(include_str!("../sql/processed.sql"), &constant),
            record: whole(include_str!("../sql/record.sql")),
            anew: whole(include_str!("../sql/anew.sql")),
            read: whole(include_str!("../sql/read.sql")),
            locked: whole(include_str!("../sql/locked.sql")),
            open: whole(include_str!("../sql/open.sql")),
            transaction: whole(include_str!("../sql/transaction.sql")),
            finish: Hot::new(include_str!("../sql/finish.sql"), &constant),
            sweep: whole(include_str!("../sql/sweep.sql")),
            // Zero would mean for ever.
            lock_timeout: (micros(lock_timeout) / 1_000).max(1),
            statement_timeout: (micros(statement_timeout) / 1_000).max(1),
        }
    }

    /// Asks for `batch`, which is in the order of its ids: claims what was never seen, and reads the rest.
    pub(crate) fn claim(&self, batch: &[&ClaimRequest], lease: Duration, form: Form) -> String {
        let ids: Vec<Id> = batch.iter().map(|request| (request.key, request.consumer)).collect();
        let mut out = self.guarded(2_560 + batch.len() * 160, self.lock_timeout, "force_generic_plan");
        Self::fill_claim(self.claim.template(form), &mut out, batch, &ids, lease);
        out
    }

    /// Claims what is free of `batch`, which is in the order of its ids, whatever is known of it, and reads all of it.
    pub(crate) fn reclaim(&self, batch: &[&ClaimRequest], lease: Duration) -> String {
        let ids: Vec<Id> = batch.iter().map(|request| (request.key, request.consumer)).collect();
        let mut out = self.begun(&ids, Within::Message, 2_560 + batch.len() * 160);
        Self::fill_claim(&self.reclaim, &mut out, batch, &ids, lease);
        out.push(';');
        self.read.write(&mut out, |hole, out| of_ids(hole, out, &ids));
        out
    }

    fn fill_claim(template: &Template, out: &mut String, batch: &[&ClaimRequest], ids: &[Id], lease: Duration) {
        template.write(out, |hole, out| match hole {
            "fingerprints" => list(out, batch, |out, request| uuid(out, request.fingerprint.0)),
            "tokens" => list(out, batch, |out, request| uuid(out, request.token.to_be_bytes())),
            "reopens" => list(out, batch, |out, request| match request.reopen {
                // Beyond what a fence can be, no fence is meant.
                Some(fence) => number(out, i64::try_from(fence.get()).unwrap_or(i64::MAX)),
                None => out.push_str("NULL"),
            }),
            "lease" => number(out, micros(lease)),
            hole => of_ids(hole, out, ids),
        });
    }

    pub(crate) fn renew(&self, leases: &[&Lease], lease: Duration) -> String {
        let ids: Vec<Id> = leases.iter().map(|held| (held.key, held.consumer)).collect();
        let mut out =
            self.begun_for(&ids, Within::Message, 256 + leases.len() * 64, self.lock_timeout_of(leases.len()));
        self.renew.write(&mut out, |hole, out| match hole {
            "fences" => list(out, leases, |out, held| number(out, fence(held))),
            "lease" => number(out, micros(lease)),
            hole => of_ids(hole, out, &ids),
        });
        out
    }

    /// Records `batch`, which is in the order of its ids.
    pub(crate) fn record(&self, batch: &[&(Lease, Outcome)], within: Within, form: Form) -> String {
        let statement = match batch.iter().all(|(_, outcome)| matches!(outcome, Outcome::Processed)) {
            true => self.processed.template(form),
            false => &self.record,
        };
        let size = 2_560 + batch.len() * 140;
        let mut out = match within {
            Within::Message => self.guarded(size, self.lock_timeout_of(batch.len()), PLANNED_ANEW),
            // One row is found by the index anyway, and what comes after this in the transaction is the commit.
            Within::Transaction(_) if batch.len() == 1 => {
                let (lock, statement) = (self.lock_timeout, self.statement_timeout);
                format!("SET LOCAL lock_timeout = {lock}; SET LOCAL statement_timeout = {statement}; ")
            }
            Within::Transaction(_) => self.guards(size, self.lock_timeout, PLANNED_ANEW),
        };
        self.fill_outcomes(statement, &mut out, batch, within);
        out
    }

    /// Writes anew what [`record`](Self::record) did not find, and reads the rest.
    pub(crate) fn record_anew(&self, batch: &[&(Lease, Outcome)], within: Within) -> String {
        let ids: Vec<Id> = batch.iter().map(|(held, _)| (held.key, held.consumer)).collect();
        let lock_timeout = match within {
            Within::Message => self.lock_timeout_of(batch.len()),
            Within::Transaction(_) => self.lock_timeout,
        };
        let mut out = self.begun_for(&ids, within, 512 + batch.len() * 100, lock_timeout);
        self.fill_outcomes(&self.anew, &mut out, batch, within);
        out.push(';');
        self.read.write(&mut out, |hole, out| of_ids(hole, out, &ids));
        out
    }

    /// The hot statements, to be prepared on a connection of hapax' own: name and text.
    pub(crate) fn prepared(&self) -> [(&str, &str); 2] {
        [&self.claim, &self.processed].map(|hot| (&*hot.name, &*hot.prepare))
    }

    /// Asks which records of `ids` are locked.
    pub(crate) fn locked(&self, ids: &[Id]) -> String {
        let mut out = self.begun(ids, Within::Message, 256 + ids.len() * 80);
        self.locked.write(&mut out, |hole, out| of_ids(hole, out, ids));
        out
    }

    /// Registers a consumer; its number is the only row of the last statement.
    pub(crate) fn open(&self, consumer: &str, retention: Duration) -> String {
        let mut out = self.begun(&[], Within::Message, 512);
        self.open.write(&mut out, |hole, out| match hole {
            "name" => text(out, consumer),
            _ => number(out, micros(retention)),
        });
        out
    }

    /// Begins a handler's transaction.
    pub(crate) fn begin(&self, mark: u64) -> String {
        let mut out = String::new();
        self.transaction.write(&mut out, |_, out| out.push_str(&mark.to_string()));
        out
    }

    /// Begins the next handler's transaction where `finish` ended one. Not the one that it chained, whose `now()` is that
    /// of the commit before.
    pub(crate) fn begin_next(&self, mark: u64) -> String {
        format!("ROLLBACK; BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL hapax.tx = '{mark}'")
    }

    /// Marks one event as processed in the handler's transaction that bears `mark`, claims the `next`, and commits. The
    /// savepoint keeps what the handler wrote where it cannot be marked. Chained, since sqlx believes a transaction to be
    /// open until it ends it itself.
    pub(crate) fn finish(&self, held: &Lease, next: Option<Next<'_>>, mark: u64, readiness: Readiness) -> String {
        // With a claim it waits for nobody long: others may wait for what this transaction holds, and without the claim it
        // can be tried again. Shorter than the server's `deadlock_timeout`, so that nobody else is made to fail.
        let lock_timeout = if next.is_some() { self.lock_timeout.min(NEXT_LOCK_MAX_MS) } else { self.lock_timeout };
        let mut out = format!("SAVEPOINT hapax_mark; SET LOCAL lock_timeout = {lock_timeout}; ");
        let form = match readiness {
            Readiness::NotAsked => Form::Text,
            Readiness::Unknown => {
                let name = &self.finish.name;
                out.push_str(&format!(
                    "SELECT count(*) > 0 AS is_prepared FROM pg_catalog.pg_prepared_statements WHERE name = '{name}'; "
                ));
                Form::Text
            }
            Readiness::Missing => {
                out.extend([&*self.finish.prepare, "; "]);
                Form::Prepared
            }
            Readiness::Prepared => Form::Prepared,
        };
        // A plan that is kept for long must not go through a table that was small when it was made. The user's deferred
        // triggers, which run with the commit, are planned as ever.
        let is_kept = form == Form::Prepared;
        out.push_str(if is_kept { "SET LOCAL enable_seqscan = off; " } else { "" });
        self.finish.template(form).write(&mut out, |hole, out| match hole {
            "key" => uuid(out, held.key.0),
            "consumer" => number(out, consumer_number(held.consumer)),
            "fence" => number(out, fence(held)),
            "mark" => out.push_str(&mark.to_string()),
            "lease" => number(out, next.map_or(0, |next| micros(next.lease))),
            hole => match (hole, next.map(|next| next.request)) {
                ("next", Some(request)) => quoted(out, request.key.0),
                ("fingerprint", Some(request)) => quoted(out, request.fingerprint.0),
                (_, Some(request)) => quoted(out, request.token.to_be_bytes()),
                (_, None) => out.push_str("NULL"),
            },
        });
        out.push_str(if is_kept { "; SET LOCAL enable_seqscan TO DEFAULT" } else { "" });
        if lock_timeout < self.lock_timeout {
            // For the user's deferred triggers.
            out.push_str(&format!("; SET LOCAL lock_timeout = {}", self.lock_timeout));
        }
        out.push_str("; COMMIT AND CHAIN");
        out
    }

    /// One step of the sweep over `pages` pages, which removes at most `limit` records.
    pub(crate) fn sweep(&self, pages: u64, limit: usize) -> String {
        let mut out = self.limits();
        self.sweep.write(&mut out, |hole, out| match hole {
            "limit" => number(out, i64::try_from(limit).unwrap_or(i64::MAX)),
            _ => number(out, i64::try_from(pages).unwrap_or(i64::MAX)),
        });
        out
    }

    /// In front of statements that the planner may run as it likes.
    pub(crate) fn limits(&self) -> String {
        limits(self.lock_timeout, self.statement_timeout)
    }

    fn fill_outcomes(&self, statement: &Template, out: &mut String, batch: &[&(Lease, Outcome)], within: Within) {
        let ids: Vec<Id> = batch.iter().map(|(held, _)| (held.key, held.consumer)).collect();
        statement.write(out, |hole, out| match hole {
            "count" => number(out, batch.len() as i64),
            "fences" => list(out, batch, |out, (held, _)| number(out, fence(held))),
            "attempts" => {
                list(out, batch, |out, (held, _)| number(out, i64::from(held.attempt).min(i64::from(i32::MAX))))
            }
            "states" => list(out, batch, |out, (_, outcome)| number(out, i64::from(target(outcome)))),
            "afters" => list(out, batch, |out, (_, outcome)| match outcome {
                Outcome::Failed { after, .. } => number(out, micros(*after)),
                _ => out.push('0'),
            }),
            "uncounted" => list(out, batch, |out, (_, outcome)| {
                number(out, i64::from(matches!(outcome, Outcome::Failed { counted: false, .. })));
            }),
            "reasons" => list(out, batch, |out, (_, outcome)| match outcome {
                Outcome::Doomed { reason, .. } => out.push_str(reason.as_str()),
                _ => out.push_str("NULL"),
            }),
            "trouble_ids" => list(out, batch, |out, (_, outcome)| trouble(out, outcome, |trouble| &trouble.id)),
            "trouble_errors" => list(out, batch, |out, (_, outcome)| trouble(out, outcome, |trouble| &trouble.error)),
            "guard" => {
                if let Within::Transaction(mark) = within {
                    out.push_str(&format!("AND current_setting('hapax.tx', true) = '{mark}'"));
                }
            }
            hole => of_ids(hole, out, &ids),
        });
    }

    /// When to ask again for what is locked.
    pub(crate) fn lock_wait(&self) -> Duration {
        Duration::from_millis(self.lock_timeout.unsigned_abs())
    }

    fn lock_timeout_of(&self, items: usize) -> i64 {
        if items > 1 { (self.lock_timeout / HALVED_PART).max(1) } else { self.lock_timeout }
    }

    /// What stands in front of a hot statement in a message of its own.
    fn guarded(&self, size: usize, lock_timeout: i64, plans: &str) -> String {
        let guards = self.guards(size, lock_timeout, plans);
        format!("{READ_COMMITTED}{guards}")
    }

    fn guards(&self, size: usize, lock_timeout: i64, plans: &str) -> String {
        let mut out = String::with_capacity(size);
        self.guards.write(&mut out, |hole, out| match hole {
            "lock_timeout" => number(out, lock_timeout),
            "plans" => out.push_str(plans),
            _ => number(out, self.statement_timeout),
        });
        out.push(' ');
        out
    }

    /// What stands in front of a batch.
    fn begun(&self, ids: &[Id], within: Within, size: usize) -> String {
        self.begun_for(ids, within, size, self.lock_timeout)
    }

    fn begun_for(&self, ids: &[Id], within: Within, size: usize, lock_timeout: i64) -> String {
        let mut out = String::with_capacity(2_048 + size + ids.len() * 40);
        if within == Within::Message {
            out.push_str(READ_COMMITTED);
        }
        self.prelude.write(&mut out, |hole, out| match hole {
            "lock_timeout" => number(out, lock_timeout),
            "statement_timeout" => number(out, self.statement_timeout),
            hole => of_ids(hole, out, ids),
        });
        out.push(' ');
        out
    }
}

/// Bounds a message in time, and asks whether its transaction is its own.
pub(crate) fn limits(lock_timeout_ms: i64, statement_timeout_ms: i64) -> String {
    format!(
        "SELECT set_config('lock_timeout', '{lock_timeout_ms}', true), \
         set_config('statement_timeout', '{statement_timeout_ms}', true), now() = statement_timestamp() AS is_own; "
    )
}

fn of_ids(hole: &str, out: &mut String, ids: &[Id]) {
    match hole {
        "keys" => list(out, ids, |out, (key, _)| uuid(out, key.0)),
        "consumers" => list(out, ids, |out, (_, consumer)| number(out, consumer_number(*consumer))),
        "known" => list(out, distinct(ids), |out, consumer| number(out, consumer_number(consumer))),
        "known_count" => number(out, distinct(ids).len() as i64),
        hole => debug_assert!(false, "nothing for {hole}"),
    }
}

/// The consumers of a batch, each once: nearly always one.
pub(crate) fn distinct(ids: &[Id]) -> Vec<ConsumerId> {
    let mut all = Vec::with_capacity(1);
    for (_, consumer) in ids {
        if !all.contains(consumer) {
            all.push(*consumer);
        }
    }
    all
}

/// Numbers are given from 1: one beyond PostgreSQL's integers is unknown, as 0 is.
fn consumer_number(consumer: ConsumerId) -> i64 {
    i64::from(i32::try_from(consumer.0).unwrap_or(0))
}

fn fence(held: &Lease) -> i64 {
    i64::try_from(held.fence.get()).unwrap_or(i64::MAX)
}

fn trouble(out: &mut String, outcome: &Outcome, part: impl Fn(&Trouble) -> &str) {
    match outcome {
        Outcome::Failed { trouble, .. } | Outcome::Doomed { trouble, .. } => text(out, part(trouble)),
        Outcome::Processed | Outcome::DeadLettered => out.push_str("NULL"),
    }
}
