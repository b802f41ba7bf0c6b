-- Records a batch in which everything was processed: answers how many were written, and which, if not all of them.
WITH frame AS MATERIALIZED ({told}),
done AS (
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
    WHERE r.key = i.key AND r.consumer = i.consumer AND r.fence = i.fence AND r.state = 0
        AND frame.schema = {version} AND frame.known = {known_count} {guard}
    RETURNING r.key, r.consumer
),
total AS (SELECT count(*) AS written FROM done)
SELECT done.key, done.consumer, frame.is_own, frame.mark, frame.schema, frame.known, total.written
FROM frame CROSS JOIN total LEFT JOIN done ON total.written < {count}
