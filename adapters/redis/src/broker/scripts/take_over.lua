-- Takes entries that nobody has kept for so long, counts the delivery, and says how often each was delivered. What was
-- trimmed away comes as a list of ids; XAUTOCLAIM takes it off the pending list (Redis 7.0). XAUTOCLAIM looks at ten entries for
-- each that is asked for, so it is repeated past those that are kept, up to a bound.
--
-- KEYS  1 stream
-- ARGV  1 group   2 consumer   3 idle_ms   4 cursor   5 most entries
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local cursor, most, entries, trimmed = ARGV[4], tonumber(ARGV[5]), {}, {}
for _ = 1, 100 do
  local found = redis.call('XAUTOCLAIM', stream, group, consumer, ARGV[3], cursor, 'COUNT', most - #entries)
  for _, entry in ipairs(found[2]) do
    local pending = redis.call('XPENDING', stream, group, entry[1], entry[1], 1, consumer)[1]
    entries[#entries + 1] = {entry[1], entry[2], pending and pending[4] or 1}
  end
  for _, id in ipairs(found[3] or {}) do trimmed[#trimmed + 1] = id end
  cursor = found[1]
  if cursor == '0-0' or #entries >= most then break end
end
return {cursor, entries, trimmed}
