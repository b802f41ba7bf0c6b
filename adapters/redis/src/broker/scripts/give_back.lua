-- Gives back what is pending for this consumer, uncounted, so that any member takes it at once; then forgets the consumer,
-- if asked to and if nothing is pending. What was trimmed away meanwhile stays: XCLAIM would take it off the list, and
-- whoever takes it over in its time reports it. Answers the last id of a full page, from where to go on; else nothing.
--
-- KEYS  1 stream
-- ARGV  1 group   2 consumer   3 who keeps what was given back   4 'forget' or 'keep' the consumer   5 most entries   6 from
local stream, group, consumer, parking = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local pending = redis.call('XPENDING', stream, group, ARGV[6], '+', ARGV[5], consumer)
for i = 1, #pending do
  local id, count = pending[i][1], math.max(0, pending[i][4] - 1)
  if #redis.call('XRANGE', stream, id, id) > 0 then
    redis.call('XCLAIM', stream, group, parking, 0, id, 'IDLE', 86400000, 'RETRYCOUNT', count, 'JUSTID')
  end
end
if #pending == tonumber(ARGV[5]) then return pending[#pending][1] end
if ARGV[4] == 'forget' and #redis.call('XPENDING', stream, group, '-', '+', 1, consumer) == 0 then
  redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer)
end
return false
