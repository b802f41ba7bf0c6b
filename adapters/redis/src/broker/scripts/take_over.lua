-- Takes entries that nobody has kept for so long, counts the delivery, and says how often each was delivered. What was
-- trimmed away comes as a list of ids; XAUTOCLAIM takes it off the pending list (Redis 7.0).
--
-- KEYS  1 stream
-- ARGV  1 group   2 consumer   3 idle_ms   4 cursor   5 most entries
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local found = redis.call('XAUTOCLAIM', stream, group, consumer, ARGV[3], ARGV[4], 'COUNT', ARGV[5])
local entries = {}
for i = 1, #found[2] do
  local id = found[2][i][1]
  local pending = redis.call('XPENDING', stream, group, id, id, 1, consumer)[1]
  entries[i] = {id, found[2][i][2], pending and pending[4] or 1}
end
return {found[1], entries, found[3] or {}}
