-- Schema 1. Public API: another version of hapax reads what this one wrote.

-- hapax: the letters "hapax" as a number, the mark of these tables. schema: their version.
-- fence_floor: no smaller than any fence of a record that was removed.
CREATE TABLE hapax_meta (
    name TEXT NOT NULL PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO hapax_meta (name, value) VALUES ('hapax', 448311353720), ('schema', 1), ('fence_floor', 0);

-- retention in microseconds. Never deleted from: numbers are not reused.
CREATE TABLE hapax_consumer (
    id INTEGER NOT NULL PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    retention INTEGER NOT NULL
) STRICT;

-- state: 0 claimed, 1 waiting, 2 doomed, 3 processed, 4 dead-lettered.
-- time: end of the lease (0, 2), when the next attempt is due (1), when it ended (3, 4); microseconds since 1970.
-- What a state does not need is NULL: token but for 0 and 2, first for 3 and 4, reason but for 2 and 4.
CREATE TABLE hapax_record (
    consumer INTEGER NOT NULL,
    key BLOB NOT NULL,
    state INTEGER NOT NULL,
    time INTEGER NOT NULL,
    fence INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    crashes INTEGER NOT NULL,
    fingerprint BLOB NOT NULL,
    token BLOB,
    first INTEGER,
    reason TEXT,
    trouble_id TEXT,
    trouble_error TEXT,
    PRIMARY KEY (consumer, key)
) STRICT, WITHOUT ROWID;
