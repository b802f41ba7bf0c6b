//! The statements of the hot path, each for a whole batch, since each one crosses to SQLite's thread and back.
//!
//! What a batch has in common is bound once, what differs travels as one blob that the statement cuts up: keys,
//! fingerprints and tokens are 16 bytes each. Binding each column of each row costs more than SQLite's work on it. Rows
//! that differ in more (after failures) are bound one by one.
//!
//! Batches take the next larger of a few sizes, so that few statements are prepared.

use std::sync::{Arc, LazyLock};

use crate::schema::SCHEMA_VERSION;

/// Most keys of one statement.
pub(crate) const KEYS_MAX: usize = 1024;
/// Most rows of one statement that binds them one by one.
const ROWS_MAX: usize = 256;

/// What a transaction reads besides records: schema version, fence floor, highest consumer.
const FRAME: &str = "SELECT (SELECT value FROM hapax_meta WHERE name = 'schema'), \
    (SELECT value FROM hapax_meta WHERE name = 'fence_floor'), (SELECT coalesce(max(id), 0) FROM hapax_consumer)";

/// The columns that both tables of records have.
macro_rules! columns {
    () => {
        "consumer, key, state, time, fence, attempt, crashes, fingerprint, reason, doomed, trouble_id, trouble_error"
    };
}

/// Events under way in one state, oldest first.
pub(crate) const LIST_OPEN: &str = concat!(
    "SELECT ",
    columns!(),
    ", token, first FROM hapax_open WHERE consumer = ? AND state = ? AND length(key) = 16 ORDER BY time, key LIMIT ?"
);

/// Events that ended in one state, oldest first.
pub(crate) const LIST_ENDED: &str = concat!(
    "SELECT ",
    columns!(),
    ", NULL, NULL FROM hapax_record WHERE consumer = ? AND state = ? AND length(key) = 16 ORDER BY time, key LIMIT ?"
);

/// One that can end its transaction in the same crossing.
#[derive(Debug)]
pub(crate) struct Ending {
    goes_on: Arc<str>,
    commits: Arc<str>,
}

impl Ending {
    fn of(sql: String) -> Self {
        Self { commits: format!("{sql}; COMMIT").into(), goes_on: sql.into() }
    }

    /// The text, with a commit or without.
    pub(crate) fn sql(&self, commits: bool) -> &Arc<str> {
        if commits { &self.commits } else { &self.goes_on }
    }
}

/// Which crossing of its transaction it is with which statements of `hot.rs` go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crossing {
    /// The only one, which commits too.
    Alone,
    /// The one that begins.
    First,
    /// A later one.
    Next,
}

/// Statements of `hot.rs`, for each crossing.
#[derive(Debug)]
pub(crate) struct Hot {
    alone: Arc<str>,
    first: Arc<str>,
    next: Arc<str>,
}

impl Hot {
    /// A single statement is a transaction of its own; each further one would wake who waits for the answer.
    fn single(sql: String) -> Self {
        let next: Arc<str> = sql.into();
        Self { alone: Arc::clone(&next), first: format!("BEGIN IMMEDIATE; {next}").into(), next }
    }

    fn several(sql: String) -> Self {
        let first = format!("BEGIN IMMEDIATE; {sql}");
        Self { alone: format!("{first}; COMMIT").into(), first: first.into(), next: sql.into() }
    }

    pub(crate) fn sql(&self, crossing: Crossing) -> &Arc<str> {
        match crossing {
            Crossing::Alone => &self.alone,
            Crossing::First => &self.first,
            Crossing::Next => &self.next,
        }
    }
}

/// Statements on up to so many keys of one consumer: `?1` is the consumer, `?2` the keys, one after the other.
#[derive(Debug)]
pub(crate) struct OnKeys {
    /// Begins, reads the frame, reads the records.
    pub(crate) begin: Arc<str>,
    /// Reads the frame and the records.
    pub(crate) frame: Arc<str>,
    /// Reads the records.
    pub(crate) read: Arc<str>,
    /// Writes events under way: `?3` to `?7` state, time, fence, attempt and crashes of all, `?8` fingerprints, `?9`
    /// tokens, `?10` the first claim of all.
    pub(crate) put: Ending,
    /// Writes events that ended, `?3` to `?8` as above, and takes them off those under way.
    pub(crate) end: Ending,
    /// Takes reopened events off those that ended.
    pub(crate) reopen: Ending,
    /// As `put`, of events that no table has; changes one row for each of those.
    pub(crate) claim: Hot,
    /// Moves events that are claimed to those that were processed: `?3` their fences, of 20 digits each, `?4` the time,
    /// `?5` how many they are. First changes a row for each event that is claimed under its fence, then, if they were
    /// all, takes them off those under way.
    pub(crate) done: Hot,
}

static ON_KEYS: LazyLock<Vec<OnKeys>> = LazyLock::new(|| {
    let sizes = std::iter::successors(Some(1), |size| Some(size * 4)).take_while(|size| *size <= KEYS_MAX);
    sizes.map(OnKeys::of).collect()
});

impl OnKeys {
    /// Those for at most [`KEYS_MAX`] keys.
    pub(crate) fn for_keys(keys: usize) -> &'static Self {
        let larger = keys.max(1).next_power_of_two().trailing_zeros().div_ceil(2);
        &ON_KEYS[larger as usize]
    }

    fn of(size: usize) -> Self {
        let places: Vec<_> = (0..size).map(|row| format!("({})", 16 * row + 1)).collect();
        let cut = format!("WITH cut (i) AS (VALUES {})", places.join(", "));
        let columns = columns!();
        let found: Vec<_> = columns.split(", ").map(|column| format!("coalesce(o.{column}, r.{column})")).collect();
        // An event is in one of the two tables: the large one is not searched for what the small one holds.
        let read = format!(
            "{cut} SELECT {}, o.token, o.first FROM cut \
             LEFT JOIN hapax_open o ON o.consumer = ?1 AND o.key = substr(?2, i, 16) \
             LEFT JOIN hapax_record r ON r.consumer = CASE WHEN o.key IS NULL THEN ?1 END AND r.key = substr(?2, i, 16) \
             WHERE i <= length(?2) AND (o.key IS NOT NULL OR r.key IS NOT NULL)",
            found.join(", ")
        );
        let common = "?1, substr(?2, i, 16), ?3, ?4, ?5, ?6, ?7, substr(?8, i, 16), NULL, NULL, NULL, NULL";
        let put = format!(
            "{cut} INSERT OR REPLACE INTO hapax_open ({columns}, token, first) \
             SELECT {common}, substr(?9, i, 16), ?10 FROM cut WHERE i <= length(?2)"
        );
        let keys = "consumer = ?1 AND key IN (SELECT substr(?2, i, 16) FROM cut WHERE i <= length(?2))";
        let end = format!(
            "{cut} INSERT OR REPLACE INTO hapax_record ({columns}) SELECT {common} FROM cut WHERE i <= length(?2); \
             {cut} DELETE FROM hapax_open WHERE {keys}"
        );
        // A claim of what is there already changes no row; an event in both tables ends the transaction.
        let frame = format!("(SELECT value FROM hapax_meta WHERE name = 'schema') = {SCHEMA_VERSION}");
        let claim = format!(
            "{cut} INSERT OR IGNORE INTO hapax_open ({columns}, token, first) \
             SELECT {common}, substr(?9, i, 16), ?10 FROM cut WHERE i <= length(?2) \
             AND NOT EXISTS (SELECT 1 FROM hapax_record r WHERE r.consumer = ?1 AND r.key = substr(?2, i, 16)) \
             AND EXISTS (SELECT 1 FROM hapax_consumer WHERE id = ?1) AND {frame} \
             AND ?5 > (SELECT value FROM hapax_meta WHERE name = 'fence_floor')"
        );
        let done = format!(
            "{cut} INSERT OR ROLLBACK INTO hapax_record ({columns}) \
             SELECT o.consumer, o.key, 3, ?4, o.fence, o.attempt, o.crashes, o.fingerprint, NULL, NULL, NULL, NULL \
             FROM cut CROSS JOIN hapax_open o WHERE i <= length(?2) AND {frame} \
             AND o.consumer = ?1 AND o.key = substr(?2, i, 16) AND o.state = 0 AND length(o.fingerprint) = 16 \
             AND o.fence = CAST(substr(?3, (i - 1) / 16 * 20 + 1, 20) AS INTEGER); \
             {cut} DELETE FROM hapax_open WHERE {keys} AND changes() = ?5"
        );
        Self {
            begin: format!("BEGIN IMMEDIATE; {FRAME}; {read}").into(),
            frame: format!("{FRAME}; {read}").into(),
            read: read.into(),
            put: Ending::of(put),
            end: Ending::of(end),
            reopen: Ending::of(format!("{cut} DELETE FROM hapax_record WHERE {keys}")),
            claim: Hot::single(claim),
            done: Hot::several(done),
        }
    }
}

/// Statements on so many rows, each with all its columns.
#[derive(Debug)]
pub(crate) struct OnRows {
    /// Writes events under way.
    pub(crate) put: Ending,
    /// Writes events of one consumer that ended, and takes them off those under way.
    pub(crate) end: Ending,
}

static ON_ROWS: LazyLock<Vec<OnRows>> = LazyLock::new(|| {
    let sizes = std::iter::successors(Some(1), |size| Some(size * 2)).take_while(|size| *size <= ROWS_MAX);
    sizes.map(OnRows::of).collect()
});

impl OnRows {
    /// Those for a chunk's size, a power of two.
    pub(crate) fn for_rows(size: usize) -> &'static Self {
        &ON_ROWS[size.trailing_zeros() as usize]
    }

    fn of(size: usize) -> Self {
        let rows = |columns: usize| vec![format!("({})", vec!["?"; columns].join(", ")); size].join(", ");
        let columns = columns!();
        // Keys of one consumer: SQLite looks single values up in the primary key, but not pairs.
        let keys = format!("({})", vec!["?"; size].join(", "));
        Self {
            put: Ending::of(format!("INSERT OR REPLACE INTO hapax_open ({columns}, token, first) VALUES {}", rows(14))),
            end: Ending::of(format!(
                "INSERT OR REPLACE INTO hapax_record ({columns}) VALUES {}; \
                 DELETE FROM hapax_open WHERE consumer = ? AND key IN {keys}",
                rows(12)
            )),
        }
    }
}

/// Cuts rows that are bound one by one into chunks: how many are taken, and how many the statement has, a power of two;
/// the last is filled up.
pub(crate) fn chunks(mut rows: usize) -> Vec<(usize, usize)> {
    let mut chunks = Vec::new();
    while rows > 0 {
        let size = rows.next_power_of_two().min(ROWS_MAX);
        let take = rows.min(size);
        // Fill up where that wastes little, else take the half that fits.
        let chunk = if take * 4 >= size * 3 { (take, size) } else { (size / 2, size / 2) };
        rows -= chunk.0;
        chunks.push(chunk);
    }
    chunks
}

/// A chunk, filled up to its statement's size by repeating its last row, which changes nothing.
pub(crate) fn filled<T: Copy>(chunk: &[T], size: usize) -> Vec<T> {
    let mut rows = chunk.to_vec();
    if let Some(last) = chunk.last() {
        rows.resize(size, *last);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_a_batch_and_waste_little() {
        for rows in 0..2000 {
            let chunks = chunks(rows);
            assert_eq!(chunks.iter().map(|(take, _)| take).sum::<usize>(), rows);
            assert!(chunks.iter().all(|(take, size)| size.is_power_of_two() && take <= size && *size <= ROWS_MAX));
            let written = chunks.iter().map(|(_, size)| size).sum::<usize>();
            assert!(written * 3 <= rows * 4, "{rows} rows are written as {written}");
        }
    }

    #[test]
    fn statements_on_keys_have_room_for_all_keys() {
        for keys in 1..=KEYS_MAX {
            let places = OnKeys::for_keys(keys).read.matches("), (").count() + 1;
            assert!(places >= keys && places < 4 * keys.max(1) + 1, "{keys} keys in {places} places");
        }
    }

    #[test]
    fn a_filled_chunk_repeats_its_last_row() {
        assert_eq!(filled(&[1, 2, 3], 4), [1, 2, 3, 3]);
    }
}
