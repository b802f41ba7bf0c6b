-- Answers a batch of claims as `hapax::record::claim` does.
-- KEYS: the highest fence of this partition, then the record of each item.
-- ARGV: lease in microseconds, retention in milliseconds, then for each item its fingerprint (16 bytes), its token (16)
-- and, where it has one, its reopen token (7).
-- Answers for each item: the fence of a first attempt as a number, or a letter and what belongs to it.
local lease, retention = tonumber(ARGV[1]), tonumber(ARGV[2])
local found, refusal = read(KEYS)
if refusal then
  return refusal
end
-- Fences grow with the clock, and over every fence of this partition where the clock was set back: so they grow for a
-- key whose record was forgotten, too.
local highest = found[1] and number(found[1], 1) or 0
local fresh = math.max(now, highest + 1)
local ends = now + lease
local fresh_head = char(CLAIMED) .. numbered(fresh) .. numbered(ends)
local fresh_middle = pack('>I4I4', 1, 0) .. numbered(now)
local ends_bytes = numbered(ends)
local answers, sets, doomed, granted = {}, {}, {}, 0

local function reopens(record, state, time, fence, request)
  if #request < 39 then
    return false
  end
  local since
  if state == DEAD_LETTERED then
    since = number(record, 40)
  elseif state == DOOMED and time <= now then
    since = number(record, 63)
  else
    return false
  end
  local token = number(request, 33)
  return since <= token and token <= fence
end

for i = 2, #KEYS do
  local record, request = found[i], ARGV[i + 1]
  local print, token = sub(request, 1, 16), sub(request, 17, 32)
  if not record then
    sets[#sets + 1] = KEYS[i]
    sets[#sets + 1] = fresh_head .. print .. fresh_middle .. token
    answers[i - 1] = fresh
    granted = math.max(granted, fresh)
  elseif not intact(record) then
    return damaged()
  else
    local state, fence = byte(record, 1), number(record, 2)
    local time, known
    if state == PROCESSED then
      time, known = fence + unpack_from('>I4', record, 9) * 1000, sub(record, 13, 28)
    else
      time, known = number(record, 9), sub(record, 16, 31)
    end
    local next_fence = math.max(fence + 1, fresh)
    local answer, attempt, crashes, written
    if reopens(record, state, time, fence, request) then
      answer, granted = next_fence, math.max(granted, next_fence)
      sets[#sets + 1] = KEYS[i]
      sets[#sets + 1] = char(CLAIMED) .. numbered(next_fence) .. ends_bytes .. print .. fresh_middle .. token
    elseif known ~= print and known ~= ANY and print ~= ANY then
      answer = 'C'
    elseif state == PROCESSED then
      answer = 'P' .. numbered(math.max(0, now - time))
    elseif state == DEAD_LETTERED then
      answer = 'D' .. numbered(math.max(0, now - time))
    elseif state ~= WAITING and sub(record, 47, 62) == token then
      -- The answer to this very claim was lost: the same grant again.
      attempt, crashes = unpack_from('>I4I4', record, 32)
      local longer = numbered(math.max(ends, time))
      written = sub(record, 1, 8) .. longer .. sub(record, 16)
      if attempt <= 1 and crashes == 0 and #record == 62 then
        answer = fence
      else
        next_fence = fence
      end
    elseif time > now then
      answer = (state == WAITING and 'N' or 'H') .. numbered(time - now)
    else
      attempt, crashes = unpack_from('>I4I4', record, 32)
      if state ~= DOOMED then
        attempt = attempt + 1
        crashes = crashes + (state == CLAIMED and 1 or 0)
        state = CLAIMED
      end
      granted = math.max(granted, next_fence)
      written = char(state) .. numbered(next_fence) .. ends_bytes .. known .. pack('>I4I4', attempt, crashes)
        .. sub(record, 40, 46) .. token .. sub(record, 63)
    end
    if written then
      if state == DOOMED then
        doomed[#doomed + 1] = { KEYS[i], written, milliseconds(math.ceil((math.max(ends, time) - now) / 1000) + retention) }
      else
        sets[#sets + 1] = KEYS[i]
        sets[#sets + 1] = written
      end
    end
    answers[i - 1] = answer or ('G' .. numbered(next_fence) .. pack('>I4I4', attempt, crashes)
      .. numbered(math.max(0, now - number(record, 40))) .. char(state) .. sub(record, 63))
  end
end

if granted > NUMBER_MAX then
  return redis.error_reply('HAPAX a fence would not be below 2^53: a record or the clock of the server is wrong')
end
-- All is checked: from here on only memory or rights can refuse, and they refuse the first write.
if granted > highest then
  sets[#sets + 1] = KEYS[1]
  sets[#sets + 1] = numbered(granted)
end
if #sets > 0 then
  redis.call('MSET', unpack(sets))
end
for _, set in ipairs(doomed) do
  redis.call('SET', set[1], set[2], 'PX', set[3])
end
return answers
