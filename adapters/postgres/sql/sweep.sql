-- One step: the next blocks of the table, in the order in which they lie on disk, by one replica at a time. Records that
-- another transaction holds are passed over, so that it waits for nobody. Answers nothing where it is another's turn.
WITH turn AS MATERIALIZED (
    SELECT
        (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now,
        size.pages,
        CASE WHEN place.value < size.pages THEN place.value ELSE 0 END AS first_page
    FROM
        (SELECT pg_try_advisory_xact_lock(hashtextextended('hapax sweep {schema}', 0)) AS mine OFFSET 0) AS lock,
        (
            SELECT pg_relation_size('{schema}.hapax_record') / current_setting('block_size')::bigint AS pages
        ) AS size,
        {schema}.hapax_meta AS place
    WHERE lock.mine AND place.name = 'sweep_block'
        AND (SELECT value FROM {schema}.hapax_meta WHERE name = 'schema') = {version}
), expired AS MATERIALIZED (
    SELECT r.ctid AS place
    FROM {schema}.hapax_record AS r
    WHERE r.ctid >= (SELECT format('(%s,0)', first_page)::tid FROM turn)
        AND r.ctid < (SELECT format('(%s,0)', least(first_page + {pages}, 4294967295))::tid FROM turn)
        AND r.state >= 2
        AND r.time + (SELECT c.retention FROM {schema}.hapax_consumer AS c WHERE c.id = r.consumer)
            <= (SELECT now FROM turn)
    LIMIT {limit}
    FOR UPDATE OF r SKIP LOCKED
), removed AS (
    DELETE FROM {schema}.hapax_record AS r WHERE r.ctid = ANY (ARRAY(SELECT place FROM expired)) RETURNING r.fence
), outcome AS MATERIALIZED (
    SELECT
        turn.first_page, turn.pages,
        -- A step that was cut short by the limit looks at its blocks again.
        CASE WHEN count(removed.fence) < {limit} THEN turn.first_page + {pages} ELSE turn.first_page END AS next_page,
        count(removed.fence) AS removed, max(removed.fence) AS fence
    FROM turn LEFT JOIN removed ON true
    GROUP BY turn.first_page, turn.pages
), place AS (
    UPDATE {schema}.hapax_meta SET value = outcome.next_page FROM outcome
    WHERE name = 'sweep_block' AND value <> outcome.next_page
), floor AS (
    UPDATE {schema}.hapax_meta SET value = outcome.fence FROM outcome
    WHERE name = 'fence_floor' AND value < outcome.fence
)
SELECT first_page, next_page, pages, removed FROM outcome
