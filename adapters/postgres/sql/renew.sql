WITH frame AS MATERIALIZED ({frame})
UPDATE {schema}.hapax_record AS r SET time = greatest(r.time, frame.now + {lease})
FROM
    frame,
    (
        SELECT * FROM unnest('{{keys}}'::uuid[], '{{consumers}}'::integer[], '{{fences}}'::bigint[])
            AS i (key, consumer, fence)
        ORDER BY i.key, i.consumer
    ) AS i
WHERE r.key = i.key AND r.consumer = i.consumer AND r.fence = i.fence AND r.state IN (0, 2)
RETURNING r.key, r.consumer
