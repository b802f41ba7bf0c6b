-- Answers a batch of outcomes as `hapax::record::record` does.
-- KEYS: the record of each item. ARGV: retention in milliseconds, then for each item a letter, its fence (7 bytes), its
-- attempt (4), and behind them: P nothing · F whether it counts (1), delay (7), trouble · D reason, trouble · L nothing.
-- Answers with a text: for each item D done, A already done, V vanished, F fenced.
local retention = tonumber(ARGV[1])
local found, refusal = read(KEYS)
if refusal then
  return refusal
end
local now_bytes, keep = numbered(now), milliseconds(retention)
local ONCE, NEVER = pack('>I4I4', 1, 0), pack('>I4', 0)
local answers, sets, ended = {}, {}, {}

local function ends(key, record, after)
  ended[#ended + 1] = { key, record, after or keep }
end

local function processed(key, fence, print, counts)
  local took = math.floor((now - number(fence, 1)) / 1000)
  local took_bytes = pack('>I4', math.max(0, math.min(took, 4294967295)))
  ends(key, char(PROCESSED) .. fence .. took_bytes .. print .. (counts == ONCE and '' or counts))
end

-- The record has vanished: what ended stays ended, what failed starts afresh.
local function anew(key, kind, fence, item)
  local counts = sub(item, 9, 12) .. NEVER
  if kind == 'P' then
    processed(key, fence, ANY, counts)
  elseif kind == 'D' then
    ends(key, char(DOOMED) .. fence .. now_bytes .. ANY .. counts .. now_bytes .. ANY .. fence .. sub(item, 13))
  elseif kind == 'L' then
    ends(key, char(DEAD_LETTERED) .. fence .. now_bytes .. ANY .. counts .. fence .. pack('>B', 9) .. 'permanent')
  end
  return 'V'
end

local function failed(key, record, fence, item)
  local counted, delay = unpack_from('>BI7', item, 13)
  local attempt = unpack_from('>I4', record, 32) - (1 - counted)
  sets[#sets + 1] = key
  sets[#sets + 1] = char(WAITING) .. fence .. numbered(now + delay) .. sub(record, 16, 31)
    .. pack('>I4', math.max(0, attempt)) .. sub(record, 36, 62) .. sub(item, 21)
  return 'D'
end

local function outcome(key, record, kind, fence, item)
  local state = byte(record, 1)
  if state == CLAIMED then
    if kind == 'P' then
      processed(key, fence, sub(record, 16, 31), sub(record, 32, 39))
      return 'D'
    elseif kind == 'F' then
      return failed(key, record, fence, item)
    elseif kind == 'D' then
      local left = math.max(0, number(record, 9) - now)
      local written = char(DOOMED) .. sub(record, 2, 62) .. fence .. sub(item, 13)
      ends(key, written, milliseconds(math.ceil(left / 1000) + retention))
      return 'D'
    end
  elseif state == DOOMED and kind == 'L' then
    ends(key, char(DEAD_LETTERED) .. fence .. now_bytes .. sub(record, 16, 39) .. sub(record, 63))
    return 'D'
  elseif (state == PROCESSED and kind == 'P') or (state == WAITING and kind == 'F')
    or ((state == DOOMED or state == DEAD_LETTERED) and kind == 'D') or (state == DEAD_LETTERED and kind == 'L') then
    return 'A'
  end
  return 'F'
end

for i = 1, #KEYS do
  local record, item = found[i], ARGV[i + 1]
  local kind, fence = sub(item, 1, 1), sub(item, 2, 8)
  if not record then
    answers[i] = anew(KEYS[i], kind, fence, item)
  elseif not intact(record) then
    return damaged()
  elseif sub(record, 2, 8) ~= fence then
    answers[i] = 'F'
  else
    answers[i] = outcome(KEYS[i], record, kind, fence, item)
  end
end
-- All is checked: from here on only memory or rights can refuse, and they refuse the first write.
if #sets > 0 then
  redis.call('MSET', unpack(sets))
end
for _, set in ipairs(ended) do
  redis.call('SET', set[1], set[2], 'PX', set[3])
end
return table.concat(answers)
