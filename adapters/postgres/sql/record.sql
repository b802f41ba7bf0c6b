-- Records a batch: answers how many were written, and which, if not all of them. An outcome is the number of the state it
-- leads to.
WITH frame AS MATERIALIZED ({told}),
done AS (
    UPDATE {schema}.hapax_record AS r SET
        state = i.state,
        time = CASE i.state WHEN 2 THEN r.time WHEN 1 THEN frame.now + i.after ELSE frame.now END,
        attempt = r.attempt - i.uncounted,
        token = CASE WHEN i.state = 2 THEN r.token END,
        first = CASE WHEN i.state IN (1, 2) THEN r.first END,
        doomed = CASE i.state WHEN 2 THEN r.fence WHEN 4 THEN r.doomed END,
        reason = CASE i.state WHEN 2 THEN i.reason WHEN 4 THEN r.reason END,
        trouble_id = CASE i.state WHEN 4 THEN r.trouble_id ELSE i.trouble_id END,
        trouble_error = CASE i.state WHEN 4 THEN r.trouble_error ELSE i.trouble_error END
    FROM frame, ({items}) AS i
    WHERE r.key = i.key AND r.consumer = i.consumer AND r.fence = i.fence
        AND r.state = CASE i.state WHEN 4 THEN 2 ELSE 0 END
        AND frame.schema = {version} AND frame.known = {known_count} {guard}
    RETURNING r.key, r.consumer
),
total AS (SELECT count(*) AS written FROM done)
SELECT done.key, done.consumer, frame.is_own, frame.mark, frame.schema, frame.known, total.written
FROM frame CROSS JOIN total LEFT JOIN done ON total.written < {count}
