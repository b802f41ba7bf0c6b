-- Numbers are given one after the other.
SELECT pg_advisory_xact_lock(hashtextextended('hapax consumers {schema}', 0));
INSERT INTO {schema}.hapax_consumer AS c (id, name, retention)
SELECT coalesce(max(id), 0) + 1, convert_from(decode('{name}', 'hex'), 'UTF8'), {retention}
FROM {schema}.hapax_consumer
ON CONFLICT (name) DO UPDATE SET retention = excluded.retention WHERE c.retention <> excluded.retention;
SELECT id FROM {schema}.hapax_consumer WHERE name = convert_from(decode('{name}', 'hex'), 'UTF8')
