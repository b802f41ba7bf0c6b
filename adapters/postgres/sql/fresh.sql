coalesce(
    r.state = 5
    OR (r.state = 4 OR r.state = 2 AND r.time <= excluded.first) AND excluded.doomed BETWEEN r.doomed AND r.fence,
    false
)
