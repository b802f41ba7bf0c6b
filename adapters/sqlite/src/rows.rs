//! Records as rows: reading a batch, decode.
//!
//! Events under way are in `hapax_open`, a small table that stays in the page cache; those that ended are in
//! `hapax_record`. Their keys are hashes, so each row of the large table costs a page of its own in the WAL: an event
//! writes there once, not for its claim and again for its record.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::Arc;

use hapax::record::{Moment, Record, State};
use hapax::{ConsumerId, ErrorKind, EventKey, Fingerprint, Reason, Status, Trouble};
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{AssertSqlSafe, Row, Sqlite, SqliteConnection, SqlitePool};

use crate::error::Fault;
use crate::schema;
use crate::statements::{KEYS_MAX, OnKeys};

/// How a record is found.
pub(crate) type Id = (ConsumerId, EventKey);

/// One record inside a transaction: as it is now, or why it cannot be read.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) record: Result<Option<Record>, String>,
    /// To be written back.
    pub(crate) changed: bool,
    /// Was read from the records of events that ended.
    pub(crate) ended: bool,
}

impl Slot {
    pub(crate) fn empty() -> Self {
        Self { record: Ok(None), changed: false, ended: false }
    }
}

/// What a transaction knows besides its records.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) fence_floor: u64,
    /// Numbers are given from 1 without gaps.
    pub(crate) consumers: u32,
}

/// Whether [`load`] begins a transaction or is inside one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Within {
    /// `BEGIN IMMEDIATE` first, in the same crossing.
    Begin,
    /// The transaction is open.
    Transaction,
}

pub(crate) type Statement = sqlx::query::Query<'static, Sqlite, SqliteArguments>;

pub(crate) fn statement(sql: &Arc<str>) -> Statement {
    sqlx::query(AssertSqlSafe(Arc::clone(sql)))
}

/// Reads the records of `slots`, which are all empty, and the frame. `slots` holds at least one.
pub(crate) async fn load(
    connection: &mut SqliteConnection,
    slots: &mut BTreeMap<Id, Slot>,
    within: Within,
) -> Result<Frame, Fault> {
    let ids: Vec<Id> = slots.keys().copied().collect();
    let mut frame = None;
    for ids in ids.chunk_by(|(one, _), (other, _)| one == other).flat_map(|of_one| of_one.chunks(KEYS_MAX)) {
        let statements = OnKeys::for_keys(ids.len());
        let read = match (&frame, within) {
            (Some(_), _) => &statements.read,
            (None, Within::Begin) => &statements.begin,
            (None, Within::Transaction) => &statements.frame,
        };
        let rows = bind_keys(statement(read), ids).fetch_all(&mut *connection).await?;
        let mut rows = rows.iter();
        if frame.is_none() {
            frame = Some(decode_frame(rows.next())?);
        }
        for row in rows {
            let (id, record) = decode(row)?;
            if let Some(slot) = slots.get_mut(&id) {
                slot.ended = record.as_ref().is_ok_and(is_ended);
                slot.record = record.map(Some);
            }
        }
    }
    frame.ok_or_else(|| Fault::new(ErrorKind::Internal, "an empty batch was loaded"))
}

/// Reads one record outside of any transaction.
pub(crate) async fn find(pool: &SqlitePool, id: Id) -> Result<Option<SqliteRow>, sqlx::Error> {
    bind_keys(statement(&OnKeys::for_keys(1).read), &[id]).fetch_optional(pool).await
}

/// The keys of one consumer, as the statements cut them.
pub(crate) fn bind_keys(statement: Statement, ids: &[Id]) -> Statement {
    let consumer = ids.first().map(|(consumer, _)| i64::from(consumer.0));
    let keys: Vec<u8> = ids.iter().flat_map(|(_, key)| key.0).collect();
    statement.bind(consumer).bind(keys)
}

pub(crate) fn is_ended(record: &Record) -> bool {
    matches!(record.status(), Status::Processed | Status::DeadLettered)
}

/// The number of a status in the column `state`.
pub(crate) fn state_number(status: Status) -> i64 {
    match status {
        Status::Claimed => 0,
        Status::Waiting => 1,
        Status::Doomed => 2,
        Status::Processed => 3,
        Status::DeadLettered => 4,
    }
}

fn decode_frame(row: Option<&SqliteRow>) -> Result<Frame, Fault> {
    let row = row.ok_or_else(|| Fault::new(ErrorKind::Internal, "no answer to the frame"))?;
    schema::check_version(row.try_get(0)?)?;
    let fence_floor: Option<i64> = row.try_get(1)?;
    let consumers: i64 = row.try_get(2)?;
    Ok(Frame {
        fence_floor: u64::try_from(fence_floor.unwrap_or_default()).unwrap_or_default(),
        consumers: u32::try_from(consumers).unwrap_or(u32::MAX),
    })
}

/// A row as `Statements::read` gives it: its place, and the record or why it cannot be read.
pub(crate) fn decode(row: &SqliteRow) -> Result<(Id, Result<Record, String>), sqlx::Error> {
    let consumer: i64 = row.try_get(0)?;
    let key: &[u8] = row.try_get(1)?;
    let consumer = ConsumerId(u32::try_from(consumer).unwrap_or_default());
    Ok(((consumer, EventKey(key.try_into().unwrap_or_default())), decode_record(row)))
}

fn decode_record(row: &SqliteRow) -> Result<Record, String> {
    let told = |error: sqlx::Error| error.to_string();
    let number = |column: usize| row.try_get::<i64, _>(column).map_err(told);
    let maybe = |column: usize| row.try_get::<Option<i64>, _>(column).map_err(told);
    let text = |column: usize| row.try_get::<Option<&str>, _>(column).map_err(told);
    let bytes = |column: usize| row.try_get::<Option<&[u8]>, _>(column).map_err(told);
    let count = |column: usize| u32::try_from(number(column)?).map_err(|_| format!("column {column} is no count"));
    let fence =
        |value: i64| u64::try_from(value).ok().and_then(NonZeroU64::new).ok_or_else(|| format!("{value} is no fence"));
    let time = Moment(u64::try_from(number(3)?).unwrap_or_default());
    let last = fence(number(4)?)?;
    let reason = text(8)?.map_or(Reason::Permanent, Reason::from_word);
    let since = maybe(9)?.map_or(Ok(last), fence)?;
    let state = match number(2)? {
        0 => State::Claimed { until: time },
        1 => State::Waiting { until: time },
        2 => State::Doomed { until: time, reason, since },
        3 => State::Processed { at: time },
        4 => State::DeadLettered { at: time, reason, since },
        other => return Err(format!("state {other} is unknown")),
    };
    let fingerprint = bytes(7)?.and_then(|bytes| bytes.try_into().ok()).ok_or("the fingerprint is not 16 bytes")?;
    let token = match bytes(12)? {
        Some(bytes) => u128::from_be_bytes(bytes.try_into().map_err(|_| "the token is not 16 bytes")?),
        None => 0,
    };
    let trouble = match (text(10)?, text(11)?) {
        (None, None) => None,
        (id, error) => {
            Some(Box::new(Trouble { id: id.unwrap_or_default().into(), error: error.unwrap_or_default().into() }))
        }
    };
    Ok(Record {
        state,
        fingerprint: Fingerprint(fingerprint),
        fence: last,
        attempt: count(5)?,
        crashes: count(6)?,
        token,
        first: Moment(u64::try_from(maybe(13)?.unwrap_or_default()).unwrap_or_default()),
        trouble,
    })
}

/// SQLite's integers are signed: what is beyond them stands for "for ever".
pub(crate) fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
