-- Marks one event as processed at the end of its handler's transaction. Fails with a division by zero (22012) where it is
-- not marked, so that the COMMIT behind it in the same message is not reached.
WITH done AS (
    UPDATE {schema}.hapax_record SET
        state = 3, time = (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, token = NULL, first = NULL,
        doomed = NULL, reason = NULL, trouble_id = NULL, trouble_error = NULL
    WHERE key = '{key}' AND consumer = {consumer} AND fence = {fence} AND state = 0
        AND current_setting('hapax.tx', true) = '{mark}'
        AND (SELECT value FROM {schema}.hapax_meta WHERE name = 'schema') = {version}
    RETURNING 1
)
SELECT 1 / count(*) AS marked FROM done
