-- What each hot statement tells of the tables and of its transaction, in every row: nothing is written where it is not
-- as expected.
SELECT
    (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now,
    -- A transaction left open on this connection would swallow the batch.
    now() = statement_timestamp() AS is_own,
    current_setting('hapax.tx', true) AS mark,
    (SELECT value FROM {schema}.hapax_meta WHERE name = 'schema') AS schema,
    (SELECT count(*) FROM {schema}.hapax_consumer WHERE id = ANY ('{{known}}'::integer[])) AS known
