-- What waits for the group. Answers {not yet delivered or -1 where the server does not know, waiting for their time}.
--
-- KEYS  1 stream   2 stream of retries   3 due
-- ARGV  1 group
local lag = 0
for i = 1, 2 do
  local known
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[i])) do
    local of = {}
    for j = 1, #info, 2 do of[info[j]] = info[j + 1] end
    if of.name == ARGV[1] and type(of.lag) == 'number' then known = of.lag end
  end
  lag = known and lag >= 0 and lag + known or -1
end
return {lag, redis.call('ZCARD', KEYS[3])}
