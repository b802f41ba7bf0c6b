-- In front of each hot statement, in the same message and so in the same transaction. The planner may only do what is
-- right at any number of rows: go through the keys in their order and find each by the index. A claim can be planned no
-- other way, so one plan serves every claim of a connection on which it was prepared; a record is planned each time, since
-- for a table that was empty once a plan may go through the whole of it.
SET LOCAL lock_timeout = {lock_timeout};
SET LOCAL statement_timeout = {statement_timeout};
SET LOCAL plan_cache_mode = {plans};
SET LOCAL enable_seqscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL enable_hashjoin = off;
SET LOCAL enable_mergejoin = off;
SET LOCAL enable_material = off;
SET LOCAL jit = off;
