-- Claims events of which there are records: answers the rows that were granted. "r" is the record, "excluded" the one
-- proposed, whose "first" is now and whose "doomed" is the reopen token.
WITH frame AS MATERIALIZED ({frame})
INSERT INTO {schema}.hapax_record AS r
    (key, consumer, state, time, fence, attempt, crashes, fingerprint, token, first, doomed)
SELECT
    i.key, i.consumer, 0, frame.now + {lease}, greatest(frame.now, frame.fence_floor + 1), 1, 0, i.fingerprint, i.token,
    frame.now, i.reopen
FROM
    frame,
    unnest(
        '{{keys}}'::uuid[], '{{consumers}}'::integer[], '{{fingerprints}}'::uuid[], '{{tokens}}'::uuid[],
        '{{reopens}}'::bigint[]
    ) AS i (key, consumer, fingerprint, token, reopen)
ORDER BY i.key, i.consumer
ON CONFLICT (key, consumer) DO UPDATE SET
    (state, time, fence, attempt, crashes, fingerprint, token, first, doomed, reason, trouble_id, trouble_error) = (
        SELECT
            CASE WHEN v.fresh OR r.state = 1 THEN 0 ELSE r.state END,
            CASE WHEN v.repeated THEN greatest(r.time, excluded.time) ELSE excluded.time END,
            CASE WHEN v.repeated THEN r.fence ELSE greatest(r.fence + 1, excluded.fence) END,
            CASE
                WHEN v.fresh THEN 1
                WHEN v.repeated OR r.state = 2 THEN r.attempt
                ELSE r.attempt + 1
            END,
            CASE
                WHEN v.fresh THEN 0
                WHEN v.repeated OR r.state <> 0 THEN r.crashes
                ELSE r.crashes + 1
            END,
            CASE WHEN v.fresh THEN excluded.fingerprint ELSE r.fingerprint END,
            excluded.token,
            CASE WHEN v.fresh THEN excluded.first ELSE r.first END,
            CASE WHEN v.fresh THEN excluded.doomed ELSE r.doomed END,
            CASE WHEN v.fresh THEN NULL ELSE r.reason END,
            CASE WHEN v.fresh THEN NULL ELSE r.trouble_id END,
            CASE WHEN v.fresh THEN NULL ELSE r.trouble_error END
        FROM (
            SELECT known.fresh, NOT known.fresh AND r.state <> 1 AND r.token = excluded.token AS repeated
            FROM (SELECT {fresh} AS fresh) AS known
        ) AS v
    )
WHERE
    {fresh}
    OR (
        (
            r.fingerprint = excluded.fingerprint
            OR r.fingerprint = '00000000-0000-0000-0000-000000000000'
            OR excluded.fingerprint = '00000000-0000-0000-0000-000000000000'
        )
        -- Free, or the answer to this very claim was lost.
        AND (r.state IN (0, 1, 2) AND r.time <= excluded.first OR r.state IN (0, 2) AND r.token = excluded.token)
    )
RETURNING
    key, consumer, fence, attempt, crashes, (SELECT now FROM frame) - first,
    CASE WHEN state = 2 THEN coalesce(reason, 'permanent') END, trouble_id, trouble_error
