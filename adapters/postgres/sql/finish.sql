-- Marks one event as processed at the end of its handler's transaction, and commits. Where it is not marked, this fails
-- with a division by zero (22012) before it commits, and the savepoint keeps what the handler wrote: then it is found out
-- why, one question after the other. Chained, since sqlx believes the transaction to be open until it ends it itself.
SAVEPOINT hapax_mark;
SET LOCAL lock_timeout = {lock_timeout};
SET LOCAL statement_timeout = {statement_timeout};
WITH done AS (
    UPDATE {schema}.hapax_record SET
        state = 3, time = (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, token = NULL, first = NULL,
        doomed = NULL, reason = NULL, trouble_id = NULL, trouble_error = NULL
    WHERE key = '{key}' AND consumer = {consumer} AND fence = {fence} AND state = 0
        AND current_setting('hapax.tx', true) = '{mark}'
        AND (SELECT value FROM {schema}.hapax_meta WHERE name = 'schema') = {version}
    RETURNING 1
)
SELECT 1 / count(*) FROM done;
COMMIT AND CHAIN
