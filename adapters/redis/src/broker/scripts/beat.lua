-- Keeps entries ours: resets the idle time of those that are, without counting a delivery. Answers two lists of ids: lost
-- (another's, or done) and trimmed (gone from the stream). What was trimmed stays on the pending list, from which XCLAIM would
-- take it: if this answer is lost, the next must say the same, and if its holder dies, whoever takes over reports it.
--
-- KEYS  1 stream
-- ARGV  1 group   2 consumer   3.. ids in ascending order
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local count = #ARGV - 2
local mine, claim, lost, trimmed = {}, {stream, group, consumer, 0}, {}, {}
local range = redis.call('XPENDING', stream, group, ARGV[3], ARGV[#ARGV], count, consumer)
for i = 1, #range do mine[range[i][1]] = true end
local whole = #range < count
for i = 3, #ARGV do
  local id = ARGV[i]
  if not mine[id] and (whole or not redis.call('XPENDING', stream, group, id, id, 1, consumer)[1]) then
    lost[#lost + 1] = id
  elseif #redis.call('XRANGE', stream, id, id) == 0 then
    trimmed[#trimmed + 1] = id
  else
    claim[#claim + 1] = id
  end
end
if #claim > 4 then
  claim[#claim + 1] = 'JUSTID'
  redis.call('XCLAIM', unpack(claim))
end
return {lost, trimmed}
