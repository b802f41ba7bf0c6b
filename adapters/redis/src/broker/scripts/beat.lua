-- Keeps entries ours: resets the idle time of those that are, without counting a delivery. Answers two lists of ids: lost
-- (another's, or done) and trimmed (gone from the stream; XCLAIM takes such entries off the pending list).
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
  if mine[id] or (not whole and redis.call('XPENDING', stream, group, id, id, 1, consumer)[1]) then
    claim[#claim + 1] = id
  else
    lost[#lost + 1] = id
  end
end
if #claim > 4 then
  claim[#claim + 1] = 'JUSTID'
  local kept = redis.call('XCLAIM', unpack(claim))
  if #kept < #claim - 5 then
    local there = {}
    for i = 1, #kept do there[kept[i]] = true end
    for i = 5, #claim - 1 do
      if not there[claim[i]] then trimmed[#trimmed + 1] = claim[i] end
    end
  end
end
return {lost, trimmed}
