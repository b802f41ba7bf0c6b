-- Answers a batch of outcomes as `hapax::record::record` does.
-- KEYS: the record of each item. ARGV: retention in milliseconds, then what is the same for one or several items that
-- follow each other: how many (2 bytes), a letter, the fence (7), the attempt (4), and behind them: P nothing · F whether
-- it counts (1), delay (7), trouble · D reason, trouble · L nothing.
-- Answers with a text: for each item D done, A already done, V vanished, F fenced.
local retention = tonumber(ARGV[1])
local found, refusal = read(KEYS)
if refusal then
  return refusal
end
local now_bytes, keep = numbered(now), decimal(floor(now / 1000) + retention)
local NEVER = pack('>I4', 0)
local answers, sets, ended = {}, {}, 0
local ended_keys, ended_records, ended_until = {}, {}, {}

local function ends(key, record, till)
  ended = ended + 1
  ended_keys[ended], ended_records[ended], ended_until[ended] = key, record, till or keep
end

-- What a processed record begins with.
local function processed(fence)
  local took = floor((now - number(fence, 1)) / 1000)
  return char(PROCESSED) .. fence .. pack('>I4', max(0, min(took, 4294967295)))
end

-- The record has vanished: what ended stays ended, what failed starts afresh.
local function anew(key, kind, fence, item)
  local counts = sub(item, 11, 14) .. NEVER
  if kind == 'P' then
    ends(key, processed(fence) .. ANY .. (counts == ONCE and '' or counts))
  elseif kind == 'D' then
    ends(key, char(DOOMED) .. fence .. counts .. now_bytes .. now_bytes .. ANY .. ANY .. fence .. sub(item, 15))
  elseif kind == 'L' then
    ends(key, char(DEAD_LETTERED) .. fence .. counts .. now_bytes .. fence .. ANY .. pack('>B', 9) .. 'permanent')
  end
  return 'V'
end

local function failed(key, record, fence, item)
  local counted, delay = unpack_from('>BI7', item, 15)
  local attempt = unpack_from('>I4', record, 9) - (1 - counted)
  sets[#sets + 1] = key
  sets[#sets + 1] = char(WAITING) .. fence .. pack('>I4', max(0, attempt)) .. sub(record, 13, 16) .. numbered(now + delay)
    .. sub(record, 24, 62) .. sub(item, 23)
  return 'D'
end

local function outcome(key, record, kind, fence, item)
  local state = byte(record, 1)
  if state == CLAIMED then
    if kind == 'P' then
      local counts = sub(record, 9, 16)
      ends(key, processed(fence) .. sub(record, 31, 46) .. (counts == ONCE and '' or counts))
      return 'D'
    elseif kind == 'F' then
      return failed(key, record, fence, item)
    elseif kind == 'D' then
      local till = ceil(max(now, number(record, 17)) / 1000) + retention
      ends(key, char(DOOMED) .. sub(record, 2, 62) .. fence .. sub(item, 15), decimal(till))
      return 'D'
    end
  elseif state == DOOMED and kind == 'L' then
    ends(key, char(DEAD_LETTERED) .. fence .. sub(record, 9, 16) .. now_bytes .. sub(record, 63, 69)
      .. sub(record, 31, 46) .. sub(record, 70))
    return 'D'
  elseif (state == PROCESSED and kind == 'P') or (state == WAITING and kind == 'F')
    or ((state == DOOMED or state == DEAD_LETTERED) and kind == 'D') or (state == DEAD_LETTERED and kind == 'L') then
    return 'A'
  end
  return 'F'
end

local next_run, left, item, kind, fence = 2, 0, nil, nil, nil
-- What most are, checked and written in two steps each: held by this fence at the first attempt, and processed now.
local held, beginning
for i = 1, #KEYS do
  if left == 0 then
    item = ARGV[next_run]
    next_run = next_run + 1
    left, kind, fence = unpack_from('>I2', item, 1), sub(item, 3, 3), sub(item, 4, 10)
    held = kind == 'P' and char(CLAIMED) .. fence .. ONCE
    beginning = held and processed(fence)
  end
  left = left - 1
  local record = found[i]
  if not record then
    answers[i] = anew(KEYS[i], kind, fence, item)
  elseif sub(record, 1, 16) == held and #record >= 62 then
    ended = ended + 1
    ended_keys[ended], ended_records[ended], ended_until[ended] = KEYS[i], beginning .. sub(record, 31, 46), keep
    answers[i] = 'D'
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
  call('MSET', unpack(sets))
end
for i = 1, ended do
  call('SET', ended_keys[i], ended_records[i], 'PXAT', ended_until[i])
end
return table.concat(answers)
