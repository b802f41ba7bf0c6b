-- Gives back everything that is pending for this consumer, uncounted, so that any member takes it at once; then forgets the
-- consumer, if asked to and if nothing is pending. Answers how many were given back.
--
-- KEYS  1 stream
-- ARGV  1 group   2 consumer   3 who keeps what was given back   4 'forget' or 'keep' the consumer   5 most entries
local stream, group, consumer, parking = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local pending = redis.call('XPENDING', stream, group, '-', '+', ARGV[5], consumer)
for i = 1, #pending do
  local count = math.max(0, pending[i][4] - 1)
  redis.call('XCLAIM', stream, group, parking, 0, pending[i][1], 'IDLE', 86400000, 'RETRYCOUNT', count, 'JUSTID')
end
if ARGV[4] == 'forget' and #redis.call('XPENDING', stream, group, '-', '+', 1, consumer) == 0 then
  redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer)
end
return #pending
