-- Schema 1. Public API: another version of hapax reads what this one wrote.

-- hapax: the letters "hapax" as a number, the mark of these tables. schema: their version.
-- fence_floor: no smaller than any fence of a record that was removed. sweep_block: where the sweep goes on.
CREATE TABLE {schema}.hapax_meta (
    name text NOT NULL PRIMARY KEY,
    value bigint NOT NULL
);

INSERT INTO {schema}.hapax_meta (name, value)
VALUES ('hapax', 448311353720), ('schema', 1), ('fence_floor', 0), ('sweep_block', 0);

-- retention in microseconds. Never deleted from: numbers are not reused.
CREATE TABLE {schema}.hapax_consumer (
    id integer NOT NULL PRIMARY KEY,
    name text NOT NULL UNIQUE,
    retention bigint NOT NULL
);

-- state: claimed (0), waiting for its next attempt (1), doomed (2), processed (3), dead-lettered (4), forgotten (5).
-- time: end of the lease (0, 2), when the next attempt is due (1), when it ended (3, 4, 5); first: the first claim; both
-- in microseconds since 1970. doomed: the fence under which it was doomed (2, 4), or the reopen token it was claimed
-- with (0). What a state does not need is NULL.
--
-- The fixed columns come first, by alignment. Each row is inserted once and updated once: the space left in each page
-- takes the second version, so that no index is touched (HOT).
CREATE TABLE {schema}.hapax_record (
    time bigint NOT NULL,
    fence bigint NOT NULL,
    consumer integer NOT NULL,
    attempt integer NOT NULL,
    crashes integer NOT NULL,
    state smallint NOT NULL,
    key uuid NOT NULL,
    fingerprint uuid NOT NULL,
    token uuid,
    first bigint,
    doomed bigint,
    reason text,
    trouble_id text,
    trouble_error text,
    PRIMARY KEY (key, consumer)
) WITH (fillfactor = 55);
