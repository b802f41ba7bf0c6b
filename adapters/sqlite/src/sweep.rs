//! Removing expired records in bounded steps, without an index by time.
//!
//! Keys are hashes, so a walk along the primary key meets records of every age evenly. Each record pays for
//! [`WALKED_PER_RECORD`] rows of that walk, so that a round over the table takes a fixed share of the retention: a
//! record outlives its retention by at most a quarter of it at a steady rate, and the table is about an eighth larger
//! than what is retained. An index would cost every record more bytes and another random page for each write.

use hapax::record::Moment;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection, SqlitePool};

use crate::error::Fault;
use crate::rows::{Id, integer};

/// Rows walked for each record that is written.
const WALKED_PER_RECORD: usize = 4;
/// The walk goes on when it is owed so many rows, to spare lone records the extra statements.
const STEP_MIN: usize = 256;
/// Most rows of one step, and most records that one step removes.
pub(crate) const STEP_MAX: usize = 2048;

/// Which table is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    /// What ended.
    Ended,
    /// What is under way: of it, what has been doomed for as long as the retention is removed.
    Open,
}

impl Table {
    pub(crate) const ALL: [Self; 2] = [Self::Ended, Self::Open];
}

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
}

macro_rules! ahead {
    ($table:literal) => {
        concat!(
            "SELECT consumer, key FROM ",
            $table,
            " WHERE (consumer, key) > (?, ?) ORDER BY consumer, key LIMIT 1 OFFSET ?"
        )
    };
}
/// The walk of one writer. Where it stands is not stored: it begins anywhere.
#[derive(Debug)]
pub(crate) struct Rolling {
    at: [Place; 2],
    owed: usize,
}

impl Rolling {
    pub(crate) fn new() -> Self {
        let anywhere = || Place { consumer: 1, key: fastrand::u128(..).to_be_bytes().to_vec() };
        Self { at: [anywhere(), anywhere()], owed: 0 }
    }

    /// Counts what was recorded and says whether a step is due.
    pub(crate) fn is_due(&mut self, recorded: usize) -> bool {
        self.owed = self.owed.saturating_add(recorded.saturating_mul(WALKED_PER_RECORD));
        self.owed >= STEP_MIN
    }

    /// Walks on by what is owed, inside the open transaction.
    pub(crate) async fn step(&mut self, connection: &mut SqliteConnection, now: Moment) -> Result<(), Fault> {
        let rows = i64::try_from(self.owed.min(STEP_MAX)).unwrap_or(i64::MAX);
        // Also when it fails: the next try comes with later records.
        self.owed = 0;
        for (table, at) in Table::ALL.into_iter().zip(&mut self.at) {
            let ahead = sqlx::query(match table {
                Table::Ended => ahead!("hapax_record"),
                Table::Open => ahead!("hapax_open"),
            });
            let ahead = ahead.bind(at.consumer).bind(at.key.clone()).bind(rows);
            let to = match ahead.fetch_optional(&mut *connection).await? {
                Some(row) => Place { consumer: row.try_get(0)?, key: row.try_get(1)? },
                None => Place::end(),
            };
            remove_between(connection, table, at, &to, now).await?;
            *at = if to == Place::end() { Place::start() } else { to };
        }
        Ok(())
    }
}

/// What a sweep removes: terminal (doomed counts as that) and older than its consumer's retention, as
/// `Record::is_swept` says.
macro_rules! expired {
    () => {
        "state >= 2 AND time <= ? - (SELECT retention FROM hapax_consumer WHERE id = consumer)"
    };
}

macro_rules! remove {
    ($table:literal) => {
        concat!(
            "DELETE FROM ",
            $table,
            " WHERE (consumer, key) > (?, ?) AND (consumer, key) <= (?, ?) AND ",
            expired!(),
            " RETURNING fence"
        )
    };
}

macro_rules! find {
    ($table:literal) => {
        concat!(
            "SELECT consumer, key FROM ",
            $table,
            " WHERE (consumer, key) > (?, ?) AND ",
            expired!(),
            " ORDER BY consumer, key LIMIT 1 OFFSET ?"
        )
    };
}

/// Removes the expired records after `after` up to `to`, and keeps the fences growing over them.
pub(crate) async fn remove_between(
    connection: &mut SqliteConnection,
    table: Table,
    after: &Place,
    to: &Place,
    now: Moment,
) -> Result<u64, Fault> {
    let remove = sqlx::query(match table {
        Table::Ended => remove!("hapax_record"),
        Table::Open => remove!("hapax_open"),
    });
    let remove = remove.bind(after.consumer).bind(after.key.clone()).bind(to.consumer).bind(to.key.clone());
    let removed = remove.bind(integer(now.0)).fetch_all(&mut *connection).await?;
    raise_floor(connection, &removed).await?;
    Ok(removed.len() as u64)
}

/// The place of the `nth` (from 1) expired record after `after`. Only reads.
pub(crate) async fn nth_expired(
    pool: &SqlitePool,
    table: Table,
    after: &Place,
    nth: usize,
    now: Moment,
) -> Result<Option<Place>, sqlx::Error> {
    let find = sqlx::query(match table {
        Table::Ended => find!("hapax_record"),
        Table::Open => find!("hapax_open"),
    });
    let find = find.bind(after.consumer).bind(after.key.clone()).bind(integer(now.0));
    let found = find.bind(i64::try_from(nth.saturating_sub(1)).unwrap_or(i64::MAX)).fetch_optional(pool).await?;
    found.map(|row| Ok(Place { consumer: row.try_get(0)?, key: row.try_get(1)? })).transpose()
}

/// Removes one record, whatever its state.
pub(crate) async fn remove_one(connection: &mut SqliteConnection, (consumer, key): Id) -> Result<bool, Fault> {
    let one = [
        "DELETE FROM hapax_record WHERE consumer = ? AND key = ? RETURNING fence",
        "DELETE FROM hapax_open WHERE consumer = ? AND key = ? RETURNING fence",
    ];
    let mut found = false;
    for remove in one {
        let remove = sqlx::query(remove).bind(i64::from(consumer.0)).bind(key.0.to_vec());
        let removed = remove.fetch_all(&mut *connection).await?;
        raise_floor(connection, &removed).await?;
        found |= !removed.is_empty();
    }
    Ok(found)
}

async fn raise_floor(connection: &mut SqliteConnection, removed: &[SqliteRow]) -> Result<(), Fault> {
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
