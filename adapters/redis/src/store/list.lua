-- A step of a walk over the records of one partition. KEYS: any key of it. ARGV: cursor, pattern, state.
-- Answers with the time, the next cursor, and key and record of those in that state.
local step = call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', 512)
local answer = { numbered(now), step[1] }
if #step[2] > 0 then
  local records = call('MGET', unpack(step[2]))
  for i, key in ipairs(step[2]) do
    if records[i] and byte(records[i], 1) == tonumber(ARGV[3]) then
      answer[#answer + 1] = key
      answer[#answer + 1] = records[i]
    end
  end
end
return answer
