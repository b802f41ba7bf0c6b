-- What was not written because there is no record any more: what ended stays ended, what failed starts afresh. Answers
-- what was written.
WITH frame AS MATERIALIZED ({frame})
INSERT INTO {schema}.hapax_record AS r
    (key, consumer, state, time, fence, attempt, crashes, fingerprint, first, doomed, reason, trouble_id, trouble_error)
SELECT
    i.key, i.consumer, i.state, frame.now, i.fence, i.attempt, 0, '00000000-0000-0000-0000-000000000000',
    CASE WHEN i.state = 2 THEN frame.now END,
    CASE WHEN i.state IN (2, 4) THEN i.fence END,
    CASE i.state WHEN 2 THEN i.reason WHEN 4 THEN 'permanent' END,
    i.trouble_id, i.trouble_error
FROM frame, ({items}) AS i
WHERE i.state <> 1 {guard}
ORDER BY i.key, i.consumer
ON CONFLICT (key, consumer) DO UPDATE SET
    state = excluded.state, time = excluded.time, fence = excluded.fence, attempt = excluded.attempt,
    crashes = excluded.crashes, fingerprint = excluded.fingerprint, token = NULL, first = excluded.first,
    doomed = excluded.doomed, reason = excluded.reason, trouble_id = excluded.trouble_id,
    trouble_error = excluded.trouble_error
WHERE r.state = 5
RETURNING key, consumer
