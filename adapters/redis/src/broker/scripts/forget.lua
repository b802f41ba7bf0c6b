-- Forgets consumers that have nothing pending and have not been heard of for long. Looking and deleting are one step here,
-- since XGROUP DELCONSUMER throws away what is pending. Answers how many.
--
-- KEYS  1 stream
-- ARGV  1 group   2 consumer, which stays   3 idle_ms
local forgotten = 0
for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local of = {}
  for i = 1, #info, 2 do of[info[i]] = info[i + 1] end
  if of.name ~= ARGV[2] and of.pending == 0 and of.idle >= tonumber(ARGV[3]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], of.name)
    forgotten = forgotten + 1
  end
end
return forgotten
