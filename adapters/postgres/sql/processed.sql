-- The same for a batch in which everything was processed.
WITH frame AS MATERIALIZED ({frame})
UPDATE {schema}.hapax_record AS r SET
    state = 3, time = frame.now, token = NULL, first = NULL, doomed = NULL, reason = NULL, trouble_id = NULL,
    trouble_error = NULL
FROM
    frame,
    (
        SELECT * FROM unnest('{{keys}}'::uuid[], '{{consumers}}'::integer[], '{{fences}}'::bigint[])
            AS i (key, consumer, fence)
        ORDER BY i.key, i.consumer
    ) AS i
WHERE r.key = i.key AND r.consumer = i.consumer AND r.fence = i.fence AND r.state = 0 {guard}
RETURNING r.key, r.consumer
