//! Records as rows: the statements of the hot path, encode and decode.
//!
//! A statement takes a whole batch, since each one crosses to SQLite's thread and back. Batches are cut into powers of
//! two, so that few statements are prepared; a last chunk is filled up by repeating its last row, which changes nothing.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::{Arc, LazyLock};

use hapax::record::{Moment, Record, State};
use hapax::{ConsumerId, EventKey, Fingerprint, Reason, Trouble};
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{AssertSqlSafe, Row, Sqlite, SqliteConnection};

use crate::error::Fault;
use crate::schema;

/// Most rows of one statement.
const CHUNK_MAX: usize = 256;

/// How a record is found.
pub(crate) type Id = (ConsumerId, EventKey);

/// One record inside a transaction: as read, or why it cannot be read, and whether it is to be written back.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) record: Result<Option<Record>, String>,
    pub(crate) changed: bool,
}

/// What a transaction knows besides its records.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) fence_floor: u64,
    /// Numbers are given from 1 without gaps.
    pub(crate) consumers: u32,
}

const FRAME: &str = "SELECT (SELECT value FROM hapax_meta WHERE name = 'schema'), \
    (SELECT value FROM hapax_meta WHERE name = 'fence_floor'), (SELECT coalesce(max(id), 0) FROM hapax_consumer)";

/// The statements for one number of rows.
struct Statements {
    begin: Arc<str>,
    frame: Arc<str>,
    read: Arc<str>,
    write: Arc<str>,
    write_and_commit: Arc<str>,
}

static STATEMENTS: LazyLock<Vec<Statements>> = LazyLock::new(|| {
    let sizes = std::iter::successors(Some(1), |size| Some(size * 2)).take_while(|size| *size <= CHUNK_MAX);
    sizes.map(Statements::of).collect()
});

impl Statements {
    fn of(rows: usize) -> Self {
        let read = format!(
            "WITH wanted (c, k) AS (VALUES {}) SELECT consumer, key, state, time, fence, attempt, crashes, \
             fingerprint, token, first, reason, trouble_id, trouble_error \
             FROM wanted CROSS JOIN hapax_record ON consumer = c AND key = k",
            vec!["(?, ?)"; rows].join(", ")
        );
        let write = format!(
            "INSERT OR REPLACE INTO hapax_record (consumer, key, state, time, fence, attempt, crashes, fingerprint, \
             token, first, reason, trouble_id, trouble_error) VALUES {}",
            vec!["(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"; rows].join(", ")
        );
        Self {
            begin: format!("BEGIN IMMEDIATE; {FRAME}; {read}").into(),
            frame: format!("{FRAME}; {read}").into(),
            write_and_commit: format!("{write}; COMMIT").into(),
            read: read.into(),
            write: write.into(),
        }
    }

    fn for_rows(rows: usize) -> &'static Self {
        &STATEMENTS[rows.trailing_zeros() as usize]
    }
}

/// Cuts `rows` into chunks: how many rows are taken, and how many the statement has.
fn chunks(mut rows: usize) -> Vec<(usize, usize)> {
    let mut chunks = Vec::new();
    while rows > 0 {
        let size = rows.next_power_of_two().min(CHUNK_MAX);
        // Fill up where that wastes little, else take the half that fits.
        let chunk = if rows >= size { (size, size) } else { (rows, size) };
        let chunk = if chunk.0 * 4 < size * 3 { (size / 2, size / 2) } else { chunk };
        rows -= chunk.0;
        chunks.push(chunk);
    }
    chunks
}

fn query(sql: &Arc<str>) -> sqlx::query::Query<'static, Sqlite, SqliteArguments> {
    sqlx::query(AssertSqlSafe(Arc::clone(sql)))
}

/// Whether [`load`] begins a transaction or is inside one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Within {
    /// `BEGIN IMMEDIATE` first, in the same crossing.
    Begin,
    /// The transaction is open.
    Transaction,
}

/// Reads the records of `slots`, which are all empty, and the frame. `slots` is not empty.
pub(crate) async fn load(
    connection: &mut SqliteConnection,
    slots: &mut BTreeMap<Id, Slot>,
    within: Within,
) -> Result<Frame, Fault> {
    let ids: Vec<Id> = slots.keys().copied().collect();
    let mut frame = None;
    let mut rest = ids.as_slice();
    for (take, size) in chunks(ids.len()) {
        let (chunk, after) = rest.split_at(take);
        rest = after;
        let statements = Statements::for_rows(size);
        let first = frame.is_none();
        let mut read = query(match within {
            _ if !first => &statements.read,
            Within::Begin => &statements.begin,
            Within::Transaction => &statements.frame,
        });
        for (consumer, key) in filled(chunk, size) {
            read = read.bind(i64::from(consumer.0)).bind(key.0.to_vec());
        }
        let rows = read.fetch_all(&mut *connection).await?;
        let mut rows = rows.iter();
        if first {
            frame = Some(decode_frame(rows.next())?);
        }
        for row in rows {
            let (id, record) = decode(row)?;
            if let Some(slot) = slots.get_mut(&id) {
                slot.record = record.map(Some);
            }
        }
    }
    frame.ok_or_else(|| Fault::new(hapax::ErrorKind::Internal, "an empty batch was loaded"))
}

/// Writes the changed records of `slots` back; with `commit` the transaction ends in the same crossing.
pub(crate) async fn save(
    connection: &mut SqliteConnection,
    slots: &BTreeMap<Id, Slot>,
    commit: bool,
) -> Result<(), Fault> {
    let changed: Vec<(Id, &Record)> = slots
        .iter()
        .filter(|(_, slot)| slot.changed)
        .filter_map(|(id, slot)| Some((*id, slot.record.as_ref().ok()?.as_ref()?)))
        .collect();
    let chunks = chunks(changed.len());
    let mut rest = changed.as_slice();
    for (index, (take, size)) in chunks.iter().copied().enumerate() {
        let (chunk, after) = rest.split_at(take);
        rest = after;
        let statements = Statements::for_rows(size);
        let last = index + 1 == chunks.len();
        let mut write = query(if commit && last { &statements.write_and_commit } else { &statements.write });
        for (id, record) in filled(chunk, size) {
            write = encode(write, id, record);
        }
        write.execute(&mut *connection).await?;
    }
    if commit && chunks.is_empty() {
        sqlx::query("COMMIT").execute(&mut *connection).await?;
    }
    Ok(())
}

fn filled<T: Copy>(chunk: &[T], size: usize) -> impl Iterator<Item = T> {
    chunk.iter().copied().chain(chunk.last().copied().into_iter().cycle()).take(size)
}

fn decode_frame(row: Option<&SqliteRow>) -> Result<Frame, Fault> {
    let row = row.ok_or_else(|| Fault::new(hapax::ErrorKind::Internal, "no answer to the frame"))?;
    let schema: Option<i64> = row.try_get(0)?;
    schema::check_version(schema)?;
    let fence_floor: i64 = row.try_get::<Option<i64>, _>(1)?.unwrap_or_default();
    let consumers: i64 = row.try_get(2)?;
    Ok(Frame {
        fence_floor: u64::try_from(fence_floor).unwrap_or_default(),
        consumers: u32::try_from(consumers).unwrap_or(u32::MAX),
    })
}

type Statement = sqlx::query::Query<'static, Sqlite, SqliteArguments>;

fn encode(statement: Statement, (consumer, key): Id, record: &Record) -> Statement {
    let (state, time, reason) = match record.state {
        State::Claimed { until } => (0, until, None),
        State::Waiting { until } => (1, until, None),
        State::Doomed { until, reason } => (2, until, Some(reason)),
        State::Processed { at } => (3, at, None),
        State::DeadLettered { at, reason } => (4, at, Some(reason)),
    };
    let held = matches!(record.state, State::Claimed { .. } | State::Doomed { .. });
    let open = held || matches!(record.state, State::Waiting { .. });
    let (id, error) = match record.trouble.as_deref() {
        Some(trouble) => (Some(trouble.id.to_string()), Some(trouble.error.to_string())),
        None => (None, None),
    };
    statement
        .bind(i64::from(consumer.0))
        .bind(key.0.to_vec())
        .bind(state)
        .bind(integer(time.0))
        .bind(integer(record.fence.get()))
        .bind(i64::from(record.attempt))
        .bind(i64::from(record.crashes))
        .bind(record.fingerprint.0.to_vec())
        .bind(held.then(|| record.token.to_be_bytes().to_vec()))
        .bind(open.then_some(integer(record.first.0)))
        .bind(reason.map(Reason::as_str))
        .bind(id)
        .bind(error)
}

/// The columns of a row in the order of [`Statements::read`]: its place, and the record or why it cannot be read.
pub(crate) fn decode(row: &SqliteRow) -> Result<(Id, Result<Record, String>), sqlx::Error> {
    let consumer: i64 = row.try_get(0)?;
    let key: &[u8] = row.try_get(1)?;
    let id = (
        ConsumerId(u32::try_from(consumer).unwrap_or_default()),
        EventKey(key.try_into().unwrap_or_default()),
    );
    Ok((id, decode_record(row)))
}

fn decode_record(row: &SqliteRow) -> Result<Record, String> {
    let text = |column: usize| row.try_get::<Option<&str>, _>(column).map_err(|error| error.to_string());
    let number = |column: usize| row.try_get::<i64, _>(column).map_err(|error| error.to_string());
    let bytes = |column: usize| row.try_get::<Option<&[u8]>, _>(column).map_err(|error| error.to_string());
    let count = |column: usize| u32::try_from(number(column)?).map_err(|_| format!("column {column} is no count"));
    let until = Moment(u64::try_from(number(3)?).unwrap_or_default());
    let reason = text(10)?.map_or(Reason::Permanent, Reason::from_word);
    let state = match number(2)? {
        0 => State::Claimed { until },
        1 => State::Waiting { until },
        2 => State::Doomed { until, reason },
        3 => State::Processed { at: until },
        4 => State::DeadLettered { at: until, reason },
        other => return Err(format!("state {other} is unknown")),
    };
    let fence = u64::try_from(number(4)?).ok().and_then(NonZeroU64::new).ok_or("the fence is not positive")?;
    let fingerprint = bytes(7)?.and_then(|bytes| bytes.try_into().ok()).ok_or("the fingerprint is not 16 bytes")?;
    let token = match bytes(8)? {
        Some(bytes) => u128::from_be_bytes(bytes.try_into().map_err(|_| "the token is not 16 bytes")?),
        None => 0,
    };
    let first = row.try_get::<Option<i64>, _>(9).map_err(|error| error.to_string())?.unwrap_or_default();
    let trouble = match (text(11)?, text(12)?) {
        (None, None) => None,
        (id, error) => Some(Box::new(Trouble {
            id: id.unwrap_or_default().into(),
            error: error.unwrap_or_default().into(),
        })),
    };
    Ok(Record {
        state,
        fingerprint: Fingerprint(fingerprint),
        fence,
        attempt: count(5)?,
        crashes: count(6)?,
        token,
        first: Moment(u64::try_from(first).unwrap_or_default()),
        trouble,
    })
}

/// SQLite's integers are signed: what is beyond them stands for "for ever".
pub(crate) fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_a_batch_and_waste_little() {
        for rows in 0..2000 {
            let chunks = chunks(rows);
            assert_eq!(chunks.iter().map(|(take, _)| take).sum::<usize>(), rows);
            assert!(chunks.iter().all(|(take, size)| size.is_power_of_two() && take <= size && *size <= CHUNK_MAX));
            let written = chunks.iter().map(|(_, size)| size).sum::<usize>();
            assert!(written * 3 <= rows * 4, "{rows} rows are written as {written}");
        }
    }

    #[test]
    fn a_filled_chunk_repeats_its_last_row() {
        assert_eq!(filled(&[1, 2, 3], 4).collect::<Vec<_>>(), [1, 2, 3, 3]);
    }
}
