//! The statements of the hot path, each for a whole batch, since each one crosses to SQLite's thread and back.
//!
//! Batches are cut into powers of two, so that few statements are prepared; a last chunk is filled up by repeating its
//! last row, which changes nothing.

use std::sync::{Arc, LazyLock};

/// Most rows of one statement.
const CHUNK_MAX: usize = 256;

/// What a transaction reads besides records: schema version, fence floor, highest consumer.
const FRAME: &str = "SELECT (SELECT value FROM hapax_meta WHERE name = 'schema'), \
    (SELECT value FROM hapax_meta WHERE name = 'fence_floor'), (SELECT coalesce(max(id), 0) FROM hapax_consumer)";

/// The columns that both tables of records have.
macro_rules! columns {
    () => {
        "consumer, key, state, time, fence, attempt, crashes, fingerprint, reason, doomed, trouble_id, trouble_error"
    };
}

/// Reads the places of a table named `wanted`.
const READ: &str = concat!(
    "SELECT ",
    columns!(),
    ", token, first FROM wanted CROSS JOIN hapax_open ON consumer = c AND key = k UNION ALL SELECT ",
    columns!(),
    ", NULL, NULL FROM wanted CROSS JOIN hapax_record ON consumer = c AND key = k"
);

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

/// The statements for one number of rows.
#[derive(Debug)]
pub(crate) struct Statements {
    /// Begins, reads the frame, reads the places.
    pub(crate) begin: Arc<str>,
    /// Reads the frame and the places.
    pub(crate) frame: Arc<str>,
    /// Reads the places.
    pub(crate) read: Arc<str>,
    /// Writes events under way.
    pub(crate) put: Arc<str>,
    /// The same, and commits.
    pub(crate) put_and_commit: Arc<str>,
    /// Writes events of one consumer that ended, and takes them off those under way.
    pub(crate) end: Arc<str>,
    /// The same, and commits.
    pub(crate) end_and_commit: Arc<str>,
    /// Takes reopened events of one consumer off those that ended.
    pub(crate) reopen: Arc<str>,
}

static STATEMENTS: LazyLock<Vec<Statements>> = LazyLock::new(|| {
    let sizes = std::iter::successors(Some(1), |size| Some(size * 2)).take_while(|size| *size <= CHUNK_MAX);
    sizes.map(Statements::of).collect()
});

impl Statements {
    /// Those for a chunk's size, a power of two.
    pub(crate) fn for_rows(size: usize) -> &'static Self {
        &STATEMENTS[size.trailing_zeros() as usize]
    }

    fn of(size: usize) -> Self {
        let rows = |columns: usize| vec![format!("({})", vec!["?"; columns].join(", ")); size].join(", ");
        // Places of one consumer: SQLite looks single values up in the primary key, but not pairs.
        let keys = format!("({})", vec!["?"; size].join(", "));
        let read = format!("WITH wanted (c, k) AS MATERIALIZED (VALUES {}) {READ}", rows(2));
        let columns = columns!();
        let put = format!("INSERT OR REPLACE INTO hapax_open ({columns}, token, first) VALUES {}", rows(14));
        let end = format!(
            "INSERT OR REPLACE INTO hapax_record ({columns}) VALUES {}; \
             DELETE FROM hapax_open WHERE consumer = ? AND key IN {}",
            rows(12),
            keys
        );
        Self {
            begin: format!("BEGIN IMMEDIATE; {FRAME}; {read}").into(),
            frame: format!("{FRAME}; {read}").into(),
            read: read.into(),
            put_and_commit: format!("{put}; COMMIT").into(),
            put: put.into(),
            end_and_commit: format!("{end}; COMMIT").into(),
            end: end.into(),
            reopen: format!("DELETE FROM hapax_record WHERE consumer = ? AND key IN {keys}").into(),
        }
    }
}

/// Cuts `rows` into chunks: how many rows are taken, and how many the statement has.
pub(crate) fn chunks(mut rows: usize) -> Vec<(usize, usize)> {
    let mut chunks = Vec::new();
    while rows > 0 {
        let size = rows.next_power_of_two().min(CHUNK_MAX);
        let take = rows.min(size);
        // Fill up where that wastes little, else take the half that fits.
        let chunk = if take * 4 >= size * 3 { (take, size) } else { (size / 2, size / 2) };
        rows -= chunk.0;
        chunks.push(chunk);
    }
    chunks
}

/// A chunk, filled up to its statement's size.
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
            assert!(chunks.iter().all(|(take, size)| size.is_power_of_two() && take <= size && *size <= CHUNK_MAX));
            let written = chunks.iter().map(|(_, size)| size).sum::<usize>();
            assert!(written * 3 <= rows * 4, "{rows} rows are written as {written}");
        }
    }

    #[test]
    fn a_filled_chunk_repeats_its_last_row() {
        assert_eq!(filled(&[1, 2, 3], 4), [1, 2, 3, 3]);
    }
}
