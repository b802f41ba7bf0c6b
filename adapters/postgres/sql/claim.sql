-- Claims what was never seen, and reads the records of the rest: one row at least, with how many are new, their fence, and
-- a record that was there when the statement began, if there was one. Takes no lock on those, and writes nothing to them:
-- what is free among them is for reclaim.sql.
WITH frame AS MATERIALIZED ({told}),
claimed AS (
    INSERT INTO {schema}.hapax_record
        (key, consumer, state, time, fence, attempt, crashes, fingerprint, token, first, doomed)
    SELECT
        i.key, i.consumer, 0, frame.now + {lease},
        greatest(frame.now, (SELECT value FROM {schema}.hapax_meta WHERE name = 'fence_floor') + 1), 1, 0,
        i.fingerprint, i.token, frame.now, i.reopen
    FROM
        frame,
        unnest(
            '{{keys}}'::uuid[], '{{consumers}}'::integer[], '{{fingerprints}}'::uuid[], '{{tokens}}'::uuid[],
            '{{reopens}}'::bigint[]
        ) AS i (key, consumer, fingerprint, token, reopen)
    WHERE frame.schema = {version} AND frame.known = {known_count}
    ORDER BY i.key, i.consumer
    ON CONFLICT (key, consumer) DO NOTHING
    RETURNING key, consumer, fence
),
total AS (SELECT count(*) AS granted, max(fence) AS granted_fence FROM claimed)
SELECT
    r.key, r.consumer, frame.now, r.state, r.time, r.fence, r.attempt, r.crashes, r.fingerprint, r.reason, r.trouble_id,
    r.trouble_error, r.doomed, r.token, r.is_granted, frame.is_own, frame.schema, frame.known, total.granted,
    total.granted_fence
FROM frame CROSS JOIN total LEFT JOIN (
    SELECT
        i.key, i.consumer, r.state, r.time, r.fence, r.attempt, r.crashes, r.fingerprint, r.reason, r.trouble_id,
        r.trouble_error, r.doomed, r.token,
        -- Removed, and claimed since.
        (i.key, i.consumer) IN (SELECT key, consumer FROM claimed) AS is_granted
    FROM unnest('{{keys}}'::uuid[], '{{consumers}}'::integer[]) AS i (key, consumer)
    -- Fenced in, so that no plan can go through the table and look each record up in the batch.
    CROSS JOIN LATERAL (
        SELECT * FROM {schema}.hapax_record AS r WHERE r.key = i.key AND r.consumer = i.consumer OFFSET 0
    ) AS r
) AS r ON true
