//! Removing expired records in bounded steps, without an index by time.
//!
//! Keys are hashes, so a walk along the primary key meets records of every age evenly. Each record pays for
//! [`WALKED_PER_RECORD`] rows of that walk, so that a round over the table takes a fixed share of the retention: a
//! record outlives its retention by at most a quarter of it at a steady rate, and the table is about an eighth larger
//! than what is retained. An index would cost every record more bytes and another random page for each write.

use hapax::record::Moment;
use sqlx::{Row, SqliteConnection};

use crate::error::Fault;
use crate::rows::{Id, integer};

/// Rows walked for each record that is written.
const WALKED_PER_RECORD: usize = 4;
/// The walk goes on when it is owed so many rows, to spare lone records the extra statements.
const STEP_MIN: usize = 256;
/// Most rows of one step, and most records that one step removes.
pub(crate) const STEP_MAX: usize = 2048;

/// A place in the primary key. Keys that are none of ours are places too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) consumer: i64,
    pub(crate) key: Vec<u8>,
}

impl Place {
    pub(crate) fn start() -> Self {
        Self { consumer: i64::MIN, key: Vec::new() }
    }

    pub(crate) fn end() -> Self {
        Self { consumer: i64::MAX, key: vec![0xff; 17] }
    }

    pub(crate) fn of((consumer, key): Id) -> Self {
        Self { consumer: i64::from(consumer.0), key: key.0.to_vec() }
    }
}

/// The walk of one writer. Where it stands is not stored: it begins anywhere.
#[derive(Debug)]
pub(crate) struct Rolling {
    at: Place,
    owed: usize,
}

impl Rolling {
    pub(crate) fn new() -> Self {
        let consumer = 1;
        Self { at: Place { consumer, key: fastrand::u128(..).to_be_bytes().to_vec() }, owed: 0 }
    }

    /// Counts what was recorded and says whether a step is due.
    pub(crate) fn is_due(&mut self, recorded: usize) -> bool {
        self.owed = self.owed.saturating_add(recorded.saturating_mul(WALKED_PER_RECORD));
        self.owed >= STEP_MIN
    }

    /// Walks on by what is owed, inside the open transaction.
    pub(crate) async fn step(&mut self, connection: &mut SqliteConnection, now: Moment) -> Result<u64, Fault> {
        let rows = self.owed.min(STEP_MAX);
        // Also when it fails: the next try comes with later records.
        self.owed = 0;
        let ahead = "SELECT consumer, key FROM hapax_record WHERE (consumer, key) > (?, ?) \
            ORDER BY consumer, key LIMIT 1 OFFSET ?";
        let ahead = sqlx::query(ahead).bind(self.at.consumer).bind(self.at.key.clone()).bind(i64::try_from(rows).ok());
        let to = match ahead.fetch_optional(&mut *connection).await? {
            Some(row) => Place { consumer: row.try_get(0)?, key: row.try_get(1)? },
            None => Place::end(),
        };
        let removed = remove_between(connection, &self.at, &to, now).await?;
        self.at = if to == Place::end() { Place::start() } else { to };
        Ok(removed)
    }
}

/// What a sweep removes: terminal (doomed counts as that) and older than its consumer's retention. The same rule as
/// `Record::is_swept`.
macro_rules! expired {
    () => {
        "state >= 2 AND time <= ? - (SELECT retention FROM hapax_consumer WHERE id = consumer)"
    };
}

/// Removes the expired records after `after` up to `to`, and keeps the fences growing over them.
pub(crate) async fn remove_between(
    connection: &mut SqliteConnection,
    after: &Place,
    to: &Place,
    now: Moment,
) -> Result<u64, Fault> {
    let remove = concat!(
        "DELETE FROM hapax_record WHERE (consumer, key) > (?, ?) AND (consumer, key) <= (?, ?) AND ",
        expired!(),
        " RETURNING fence"
    );
    let removed = sqlx::query(remove)
        .bind(after.consumer)
        .bind(after.key.clone())
        .bind(to.consumer)
        .bind(to.key.clone())
        .bind(integer(now.0))
        .fetch_all(&mut *connection)
        .await?;
    raise_floor(connection, &removed).await?;
    Ok(removed.len() as u64)
}

/// The place of the `nth` (from 1) expired record after `after`. Only reads.
pub(crate) async fn nth_expired(
    pool: &sqlx::SqlitePool,
    after: &Place,
    nth: usize,
    now: Moment,
) -> Result<Option<Place>, sqlx::Error> {
    let find = concat!(
        "SELECT consumer, key FROM hapax_record WHERE (consumer, key) > (?, ?) AND ",
        expired!(),
        " ORDER BY consumer, key LIMIT 1 OFFSET ?"
    );
    let found = sqlx::query(find)
        .bind(after.consumer)
        .bind(after.key.clone())
        .bind(integer(now.0))
        .bind(i64::try_from(nth.saturating_sub(1)).unwrap_or(i64::MAX))
        .fetch_optional(pool)
        .await?;
    found.map(|row| Ok(Place { consumer: row.try_get(0)?, key: row.try_get(1)? })).transpose()
}

/// Removes one record, whatever its state.
pub(crate) async fn remove_one(connection: &mut SqliteConnection, id: Id) -> Result<bool, Fault> {
    let place = Place::of(id);
    let removed = sqlx::query("DELETE FROM hapax_record WHERE consumer = ? AND key = ? RETURNING fence")
        .bind(place.consumer)
        .bind(place.key)
        .fetch_all(&mut *connection)
        .await?;
    raise_floor(connection, &removed).await?;
    Ok(!removed.is_empty())
}

async fn raise_floor(connection: &mut SqliteConnection, removed: &[sqlx::sqlite::SqliteRow]) -> Result<(), Fault> {
    let mut highest = None;
    for row in removed {
        highest = highest.max(Some(row.try_get::<i64, _>(0)?));
    }
    if let Some(highest) = highest {
        let raise = "UPDATE hapax_meta SET value = ? WHERE name = 'fence_floor' AND value < ?";
        sqlx::query(raise).bind(highest).bind(highest).execute(connection).await?;
    }
    Ok(())
}
