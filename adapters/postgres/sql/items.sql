SELECT
    i.key, i.consumer, i.fence, i.attempt, i.state, i.after, i.uncounted, i.reason,
    convert_from(decode(i.trouble_id, 'hex'), 'UTF8') AS trouble_id,
    convert_from(decode(i.trouble_error, 'hex'), 'UTF8') AS trouble_error
FROM unnest(
    '{{keys}}'::uuid[], '{{consumers}}'::integer[], '{{fences}}'::bigint[], '{{attempts}}'::integer[],
    '{{states}}'::smallint[], '{{afters}}'::bigint[], '{{uncounted}}'::integer[], '{{reasons}}'::text[],
    '{{trouble_ids}}'::text[], '{{trouble_errors}}'::text[]
) AS i (key, consumer, fence, attempt, state, after, uncounted, reason, trouble_id, trouble_error)
ORDER BY i.key, i.consumer
