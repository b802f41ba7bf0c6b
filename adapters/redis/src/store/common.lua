-- Put before the scripts that follow. A record is, in bytes from 1:
--   1 version (high half) and state (low half) · 2-8 fence
--   processed, short because there are many: 9-12 milliseconds from the fence's time until it was processed
--     · 13-28 fingerprint · 29-32 attempt · 33-36 crashes, left out where they are 1 and 0
--   all others: 9-12 attempt · 13-16 crashes · 17-23 time (end of the lease, due, or when it ended)
--     · 24-30 first claim, of a dead letter doomed since · 31-46 fingerprint
--   claimed, waiting: 47-62 token · 63- trouble
--   doomed:           47-62 token · 63-69 doomed since · 70- reason · trouble
--   dead-lettered:    47- reason · trouble
-- Numbers are big-endian. Times and fences are microseconds since 1970: whole numbers below 2^53 until the year 2255.
local CLAIMED, WAITING, DOOMED, PROCESSED, DEAD_LETTERED = 32, 33, 34, 35, 36
local SHORTEST = { [CLAIMED] = 62, [WAITING] = 62, [DOOMED] = 70, [PROCESSED] = 28, [DEAD_LETTERED] = 47 }
local ANY = string.rep('\0', 16)
local NUMBER_MAX = 9007199254740991
local byte, char, sub, pack, unpack_from = string.byte, string.char, string.sub, struct.pack, struct.unpack
local call, max, min, floor, ceil = redis.call, math.max, math.min, math.floor, math.ceil
-- The first attempt, and no crash.
local ONCE = pack('>I4I4', 1, 0)

local function number(text, at)
  return (unpack_from('>I7', text, at))
end

local function numbered(value)
  return pack('>I7', value)
end

local function decimal(value)
  return string.format('%.0f', value)
end

local function foreign()
  return redis.error_reply('WRONGTYPE a key of hapax holds something that hapax did not write')
end

-- What the keys hold; false where there is nothing. The second answer is why it cannot be worked with.
local function read(keys)
  local found, missing = call('MGET', unpack(keys)), {}
  for i = 1, #keys do
    if not found[i] then
      missing[#missing + 1] = keys[i]
    end
  end
  -- MGET tells nothing about a list or a hash, and MSET would write over it.
  if #missing > 0 and call('EXISTS', unpack(missing)) > 0 then
    return nil, foreign()
  end
  return found
end

local function intact(record)
  local shortest = SHORTEST[byte(record, 1)]
  return shortest and #record >= shortest
end

local function damaged()
  return redis.error_reply('HAPAX a record is damaged or was written by another version of hapax')
end

local clock = call('TIME')
local now = clock[1] * 1000000 + clock[2]
