//! Writing the changed records of a batch back, in as few statements as they allow.
//!
//! Nearly all that a batch writes is alike: claims of new events, and records of events processed at their first
//! attempt. Those go by blobs, the others by rows (`statements.rs`).

use std::collections::BTreeMap;
use std::num::NonZeroU64;

use hapax::record::{Moment, Record, State};
use hapax::{Reason, Status};
use sqlx::SqliteConnection;

use crate::error::Fault;
use crate::rows::{Id, Slot, Statement, bind_keys, integer, is_ended, state_number, statement};
use crate::statements::{KEYS_MAX, OnKeys, OnRows, chunks, filled};

/// A record and its place.
pub(crate) type Entry<'r> = (Id, &'r Record);

/// Fewer rows than these are bound one by one: there is nothing to save.
const ALIKE_MIN: usize = 2;

/// One statement of a batch.
enum Write<'r> {
    Reopen(Vec<Id>),
    PutAlike(Vec<Entry<'r>>),
    Put(Vec<Entry<'r>>, usize),
    EndAlike(Vec<Entry<'r>>),
    End(Vec<Entry<'r>>, usize),
}

/// Writes the changed records of `slots` back; with `commit` the transaction ends in the same crossing.
pub(crate) async fn save(
    connection: &mut SqliteConnection,
    slots: &BTreeMap<Id, Slot>,
    commit: bool,
) -> Result<(), Fault> {
    let writes = plan(slots);
    if commit && writes.is_empty() {
        sqlx::query("COMMIT").execute(&mut *connection).await?;
    }
    for (index, write) in writes.iter().enumerate() {
        let commits = commit && index + 1 == writes.len();
        write.statement(commits).execute(&mut *connection).await?;
    }
    Ok(())
}

/// The statements for what changed, in an order in which no event is in both tables.
fn plan(slots: &BTreeMap<Id, Slot>) -> Vec<Write<'_>> {
    let (mut reopened, mut open, mut ended) = (Vec::new(), Vec::new(), Vec::new());
    for (id, slot) in slots.iter().filter(|(_, slot)| slot.changed) {
        let Ok(Some(record)) = &slot.record else { continue };
        if is_ended(record) {
            ended.push((*id, record));
            continue;
        }
        open.push((*id, record));
        if slot.ended {
            reopened.push(*id);
        }
    }
    let mut writes = Vec::new();
    for of_one in reopened.chunk_by(|(one, _), (other, _)| one == other) {
        writes.extend(of_one.chunks(KEYS_MAX).map(|ids| Write::Reopen(ids.to_vec())));
    }
    for of_one in open.chunk_by(|((one, _), _), ((other, _), _)| one == other) {
        let (same, other) = alike(of_one);
        writes.extend(same.chunks(KEYS_MAX).map(|entries| Write::PutAlike(entries.to_vec())));
        writes.extend(cut(&other).map(|(entries, size)| Write::Put(entries, size)));
    }
    for of_one in ended.chunk_by(|((one, _), _), ((other, _), _)| one == other) {
        let (same, other) = alike(of_one);
        writes.extend(same.chunks(KEYS_MAX).map(|entries| Write::EndAlike(entries.to_vec())));
        writes.extend(cut(&other).map(|(entries, size)| Write::End(entries, size)));
    }
    writes
}

/// Those that differ in nothing but key, fingerprint and token from the first that may, and the others.
fn alike<'r>(entries: &[Entry<'r>]) -> (Vec<Entry<'r>>, Vec<Entry<'r>>) {
    let plain = |record: &Record| record.trouble.is_none() && matches!(columns(record), (_, None, None));
    let Some((_, first)) = entries.iter().find(|(_, record)| plain(record)) else {
        return (Vec::new(), entries.to_vec());
    };
    let is_alike = |record: &Record| {
        let Record { state, fingerprint: _, fence, attempt, crashes, token: _, first: claimed, trouble: _ } = record;
        plain(record)
            && *state == first.state
            && (*fence, *attempt, *crashes) == (first.fence, first.attempt, first.crashes)
            && (is_ended(record) || *claimed == first.first)
    };
    let (same, other): (Vec<_>, Vec<_>) = entries.iter().partition(|(_, record)| is_alike(record));
    if same.len() < ALIKE_MIN { (Vec::new(), entries.to_vec()) } else { (same, other) }
}

/// Chunks of rows, filled up to their statement's size.
fn cut<'r, 'e>(entries: &'e [Entry<'r>]) -> impl Iterator<Item = (Vec<Entry<'r>>, usize)> + use<'r, 'e> {
    let mut rest = entries;
    chunks(entries.len()).into_iter().map(move |(take, size)| {
        let (chunk, after) = rest.split_at(take);
        rest = after;
        (filled(chunk, size), size)
    })
}

impl Write<'_> {
    fn statement(&self, commits: bool) -> Statement {
        match self {
            Self::Reopen(ids) => bind_keys(statement(OnKeys::for_keys(ids.len()).reopen.sql(commits)), ids),
            Self::PutAlike(entries) => {
                bind_open_alike(statement(OnKeys::for_keys(entries.len()).put.sql(commits)), entries)
            }
            Self::EndAlike(entries) => bind_alike(statement(OnKeys::for_keys(entries.len()).end.sql(commits)), entries),
            Self::Put(entries, size) => {
                let put = statement(OnRows::for_rows(*size).put.sql(commits));
                entries.iter().fold(put, |put, entry| bind_open(put, *entry))
            }
            Self::End(entries, size) => {
                let end = statement(OnRows::for_rows(*size).end.sql(commits));
                let end = entries.iter().fold(end, |end, entry| bind_record(end, *entry));
                let end = end.bind(entries.first().map(|((consumer, _), _)| i64::from(consumer.0)));
                entries.iter().fold(end, |end, ((_, key), _)| end.bind(key.0.to_vec()))
            }
        }
    }
}

/// Time, reason and doomed of a state.
fn columns(record: &Record) -> (Moment, Option<Reason>, Option<NonZeroU64>) {
    match record.state {
        State::Claimed { until } | State::Waiting { until } => (until, None, None),
        State::Doomed { until, reason, since } => (until, Some(reason), Some(since)),
        State::Processed { at } => (at, None, None),
        State::DeadLettered { at, reason, since } => (at, Some(reason), Some(since)),
    }
}

/// State, time, fence, attempt and crashes.
fn bind_counts(statement: Statement, record: &Record) -> Statement {
    let (time, ..) = columns(record);
    statement
        .bind(state_number(record.status()))
        .bind(integer(time.0))
        .bind(integer(record.fence.get()))
        .bind(i64::from(record.attempt))
        .bind(i64::from(record.crashes))
}

fn bind_alike(statement: Statement, entries: &[Entry<'_>]) -> Statement {
    let ids: Vec<Id> = entries.iter().map(|(id, _)| *id).collect();
    let statement = bind_keys(statement, &ids);
    let Some((_, first)) = entries.first() else { return statement };
    let fingerprints: Vec<u8> = entries.iter().flat_map(|(_, record)| record.fingerprint.0).collect();
    bind_counts(statement, first).bind(fingerprints)
}

/// As `OnKeys::put` takes them.
pub(crate) fn bind_open_alike(statement: Statement, entries: &[Entry<'_>]) -> Statement {
    let put = bind_alike(statement, entries);
    let Some((_, first)) = entries.first() else { return put };
    let held = first.status() != Status::Waiting;
    let tokens = || entries.iter().flat_map(|(_, record)| record.token.to_be_bytes()).collect::<Vec<u8>>();
    put.bind(held.then(tokens)).bind(integer(first.first.0))
}

fn bind_record(statement: Statement, ((consumer, key), record): Entry<'_>) -> Statement {
    let (_, reason, doomed) = columns(record);
    let trouble = record.trouble.as_deref();
    bind_counts(statement.bind(i64::from(consumer.0)).bind(key.0.to_vec()), record)
        .bind(record.fingerprint.0.to_vec())
        .bind(reason.map(Reason::as_str))
        .bind(doomed.map(|since| integer(since.get())))
        .bind(trouble.map(|trouble| trouble.id.to_string()))
        .bind(trouble.map(|trouble| trouble.error.to_string()))
}

fn bind_open(statement: Statement, (id, record): Entry<'_>) -> Statement {
    let held = record.status() != Status::Waiting;
    bind_record(statement, (id, record))
        .bind(held.then(|| record.token.to_be_bytes().to_vec()))
        .bind(integer(record.first.0))
}
