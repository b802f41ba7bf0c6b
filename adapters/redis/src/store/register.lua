-- A consumer's number and retention. KEYS: numbers by name, retentions by number. ARGV: name, the number it would like,
-- retention in milliseconds. The wish comes from the name, so that a store that was emptied gives the same again.
local number = redis.call('HGET', KEYS[1], ARGV[1])
if not number then
  local taken = {}
  for _, other in ipairs(redis.call('HVALS', KEYS[1])) do
    taken[other] = true
  end
  local wish = tonumber(ARGV[2])
  number = string.format('%.0f', wish)
  while taken[number] do
    wish = (wish + 1) % 4294967296
    number = string.format('%.0f', wish)
  end
  redis.call('HSET', KEYS[1], ARGV[1], number)
end
if redis.call('HGET', KEYS[2], number) ~= ARGV[3] then
  redis.call('HSET', KEYS[2], number, ARGV[3])
end
return number
