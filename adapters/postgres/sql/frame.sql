SELECT
    (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now,
    (SELECT value FROM {schema}.hapax_meta WHERE name = 'fence_floor') AS fence_floor
WHERE (SELECT value FROM {schema}.hapax_meta WHERE name = 'schema') = {version}
    AND (SELECT count(*) FROM {schema}.hapax_consumer WHERE id = ANY ('{{known}}'::integer[])) = {known_count}
