-- In front of every batch, in the same message and so in the same transaction. The planner may only do what is right at
-- any number of rows: go through the keys in their order and find each by the index.
SELECT
    set_config('lock_timeout', '{lock_timeout}', true),
    set_config('statement_timeout', '{statement_timeout}', true),
    set_config('plan_cache_mode', 'force_custom_plan', true),
    set_config('enable_seqscan', 'off', true),
    set_config('enable_bitmapscan', 'off', true),
    set_config('enable_hashjoin', 'off', true),
    set_config('enable_mergejoin', 'off', true),
    set_config('enable_material', 'off', true),
    set_config('jit', 'off', true),
    -- A transaction left open on this connection would swallow the batch.
    now() = statement_timestamp() AS is_own,
    current_setting('hapax.tx', true) AS mark,
    (SELECT value FROM {schema}.hapax_meta WHERE name = 'schema') AS schema,
    (SELECT count(*) FROM {schema}.hapax_consumer WHERE id = ANY ('{{known}}'::integer[])) AS known;
