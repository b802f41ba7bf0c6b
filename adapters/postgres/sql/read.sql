WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now)
SELECT
    r.key, r.consumer, clock.now, r.state, r.time, r.fence, r.attempt, r.crashes, r.fingerprint, r.reason, r.trouble_id,
    r.trouble_error, r.doomed, r.token
FROM clock, unnest('{{keys}}'::uuid[], '{{consumers}}'::integer[]) AS i (key, consumer)
JOIN {schema}.hapax_record AS r ON r.key = i.key AND r.consumer = i.consumer
