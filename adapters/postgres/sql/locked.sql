-- Which of these records another transaction holds a lock on.
WITH free AS MATERIALIZED (
    SELECT r.key, r.consumer
    FROM unnest('{{keys}}'::uuid[], '{{consumers}}'::integer[]) AS i (key, consumer)
    JOIN {schema}.hapax_record AS r ON r.key = i.key AND r.consumer = i.consumer
    FOR UPDATE OF r SKIP LOCKED
)
SELECT r.key, r.consumer
FROM unnest('{{keys}}'::uuid[], '{{consumers}}'::integer[]) AS i (key, consumer)
JOIN {schema}.hapax_record AS r ON r.key = i.key AND r.consumer = i.consumer
WHERE NOT EXISTS (SELECT FROM free WHERE free.key = r.key AND free.consumer = r.consumer)
