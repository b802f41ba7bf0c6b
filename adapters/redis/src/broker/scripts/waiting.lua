-- What waits for the group. Answers {not yet delivered or -1, waiting for their time, trimmed away before the group read them
-- or -1}, where -1 means that the server does not know.
--
-- KEYS  1 stream   2 stream of retries   3 due
-- ARGV  1 group
local function pairs_of(flat)
  local of = {}
  for i = 1, #flat, 2 do of[flat[i]] = flat[i + 1] end
  return of
end

local function group_of(stream)
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local group = pairs_of(info)
    if group.name == ARGV[1] then return group end
  end
  return {}
end

local lag, trimmed = 0, -1
for i = 1, 2 do
  local group = group_of(KEYS[i])
  if type(group.lag) == 'number' and lag >= 0 then lag = lag + group.lag else lag = -1 end
  if i == 1 and type(group['entries-read']) == 'number' then
    local stream = pairs_of(redis.call('XINFO', 'STREAM', KEYS[1]))
    if type(stream['entries-added']) == 'number' then
      trimmed = math.max(0, stream['entries-added'] - group['entries-read'] - stream.length)
    end
  end
end
return {lag, redis.call('ZCARD', KEYS[3]), trimmed}
