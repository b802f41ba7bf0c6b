-- Takes entries that nobody has kept for so long, counts the delivery, and says how often each was delivered. What was
-- trimmed away meanwhile is taken off the pending list and told as a list of ids, unless it is pending for this consumer:
-- its only copy is in our hands, and whoever finds it after us is to tell. Not by XAUTOCLAIM, which takes what was trimmed
-- off the list whoever keeps it, and however well (Redis 7.0).
--
-- KEYS  1 stream
-- ARGV  1 group   2 consumer   3 idle_ms   4 cursor   5 most entries
local stream, group, consumer, idle = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local cursor, most, entries, trimmed = ARGV[4], tonumber(ARGV[5]), {}, {}
local PAGE, PAGES = 250, 40
for _ = 1, PAGES do
  local page = redis.call('XPENDING', stream, group, cursor == '0-0' and '-' or '(' .. cursor, '+', PAGE)
  local full = #page == PAGE
  for i = 1, #page do
    local id, owner, count = page[i][1], page[i][2], page[i][4]
    if page[i][3] >= idle then
      if #entries >= most then full = true break end
      if #redis.call('XRANGE', stream, id, id) > 0 then
        local entry = redis.call('XCLAIM', stream, group, consumer, idle, id)[1]
        if entry then entries[#entries + 1] = {entry[1], entry[2], count + 1} end
      elseif owner ~= consumer then
        redis.call('XACK', stream, group, id)
        trimmed[#trimmed + 1] = id
      end
    end
    cursor = id
  end
  if not full then cursor = '0-0' end
  if not full or #entries >= most then break end
end
return {cursor, entries, trimmed}
