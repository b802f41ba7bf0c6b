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

-- Events under way: claimed (0), waiting for their next attempt (1), doomed (2). Few rows, often rewritten.
-- time: end of the lease (0, 2) or when the next attempt is due (1); first: the first claim; both in microseconds since
-- 1970. doomed: the fence under which it was doomed. What a state does not need is NULL.
CREATE TABLE hapax_open (
    consumer INTEGER NOT NULL,
    key BLOB NOT NULL,
    state INTEGER NOT NULL,
    time INTEGER NOT NULL,
    fence INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    crashes INTEGER NOT NULL,
    fingerprint BLOB NOT NULL,
    reason TEXT,
    doomed INTEGER,
    trouble_id TEXT,
    trouble_error TEXT,
    token BLOB,
    first INTEGER,
    PRIMARY KEY (consumer, key)
) STRICT, WITHOUT ROWID;

-- What ended: processed (3), dead-lettered (4), and when. Many small rows, written once. An event is in one of the two.
CREATE TABLE hapax_record (
    consumer INTEGER NOT NULL,
    key BLOB NOT NULL,
    state INTEGER NOT NULL,
    time INTEGER NOT NULL,
    fence INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    crashes INTEGER NOT NULL,
    fingerprint BLOB NOT NULL,
    reason TEXT,
    doomed INTEGER,
    trouble_id TEXT,
    trouble_error TEXT,
    PRIMARY KEY (consumer, key)
) STRICT, WITHOUT ROWID;
