-- Marks one event as processed at the end of its handler's transaction, and claims the one that runs next, if it is told and
-- was never seen: answers its fence. Fails with a division by zero (22012) where the mark is not written, so that the COMMIT
-- behind it in the same message is not reached.
WITH done AS (
    UPDATE {schema}.hapax_record SET
        state = 3, time = (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, token = NULL, first = NULL,
        doomed = NULL, reason = NULL, trouble_id = NULL, trouble_error = NULL
    WHERE key = '{key}' AND consumer = {consumer} AND fence = {fence} AND state = 0
        AND current_setting('hapax.tx', true) = '{mark}'
        AND (SELECT value FROM {schema}.hapax_meta WHERE name = 'schema') = {version}
    RETURNING time AS now
),
claimed AS (
    INSERT INTO {schema}.hapax_record (key, consumer, state, time, fence, attempt, crashes, fingerprint, token, first)
    SELECT
        {next}::uuid, {consumer}, 0, done.now + {lease},
        greatest(done.now, (SELECT value FROM {schema}.hapax_meta WHERE name = 'fence_floor') + 1), 1, 0,
        {fingerprint}::uuid, {token}::uuid, done.now
    FROM done
    WHERE {next}::uuid IS NOT NULL AND EXISTS (SELECT FROM {schema}.hapax_consumer WHERE id = {consumer})
    ON CONFLICT (key, consumer) DO NOTHING
    RETURNING fence
)
SELECT 1 / (SELECT count(*) FROM done) AS marked, (SELECT fence FROM claimed) AS fence
