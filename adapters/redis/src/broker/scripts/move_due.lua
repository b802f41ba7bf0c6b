-- Moves what is due into the stream of retries, which the group reads. Any member may call it; a script runs alone, so each
-- goes over once. Written before it is removed: a write that is refused leaves it where it was.
-- What does not unpack was not written by us: it goes to the dead letters as it is, rather than stay for ever.
--
-- KEYS  1 due   2 stream of retries   3 dead letters
-- ARGV  1 most entries
-- Answers {how many moved, how many waiting, ms until the next is due or -1}
local due, again, dead = KEYS[1], KEYS[2], KEYS[3]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local moved = 0
for _, kept in ipairs(redis.call('ZRANGE', due, '-inf', string.format('%.0f', now), 'BYSCORE', 'LIMIT', 0, ARGV[1])) do
  local readable, entry = pcall(cmsgpack.unpack, kept)
  if readable and type(entry) == 'table' and type(entry[3]) == 'table' and #entry[3] > 0 and #entry[3] <= 7900 then
    redis.call('XADD', again, '*', 'hapax-from', entry[1], 'hapax-count', entry[2], unpack(entry[3]))
  else
    redis.call('XADD', dead, '*', 'data', kept, 'hapax-reason', 'undecodable', 'hapax-error', 'not an entry of the due set')
  end
  redis.call('ZREM', due, kept)
  moved = moved + 1
end
local next = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')
local wait = -1
if next[2] then wait = math.max(0, tonumber(next[2]) - now) end
return {moved, redis.call('ZCARD', due), string.format('%.0f', wait)}
