-- Answers a batch of claims as `hapax::record::claim` does.
-- KEYS: the highest fence of this partition, then the record of each item.
-- ARGV: lease in microseconds, retention in milliseconds, 1 where all are likely to be new (else 0), then for each item
-- its fingerprint (16 bytes), its token (16) and, where it has one, its reopen token (7).
-- Answers with a text: the fence of what is new (7 bytes), then for each item a letter and what belongs to it: N new,
-- F first attempt under another fence, G any other grant, P processed, D dead-lettered, H held, W waiting, C conflict.
local lease, retention = tonumber(ARGV[1]), tonumber(ARGV[2])
local likely_new = ARGV[3] == '1'
local found = likely_new and call('MGET', KEYS[1]) or call('MGET', unpack(KEYS))
-- Fences grow with the clock, and over every fence of this partition where the clock was set back: so they grow for a
-- key whose record was forgotten, too.
local highest = found[1] and number(found[1], 1) or 0
local fresh = max(now, highest + 1)
local ends = now + lease
local fresh_bytes, ends_bytes = numbered(fresh), numbered(ends)
-- What the record of a new event begins with; fingerprint and token are its rest.
local beginning = char(CLAIMED) .. fresh_bytes .. ONCE .. ends_bytes .. numbered(now)
local news, sets, doomed, granted = {}, {}, {}, 0

local function beyond()
  return redis.error_reply('HAPAX a fence would not be below 2^53: a record or the clock of the server is wrong')
end

-- The highest fence goes with the other writes: among those of new keys where it is one, so that nothing foreign is lost.
local function keep_highest()
  local writes = found[1] and sets or news
  writes[#writes + 1] = KEYS[1]
  writes[#writes + 1] = numbered(granted)
end

-- Nothing is read before it is written: all or none, and none where one of them is there, whatever it is.
if likely_new and fresh <= NUMBER_MAX then
  local n = 0
  for i = 2, #KEYS do
    local request = ARGV[i + 2]
    news[n + 1] = KEYS[i]
    n = n + 2
    news[n] = beginning .. (#request == 32 and request or sub(request, 1, 32))
  end
  granted = fresh
  keep_highest()
  if call('MSETNX', unpack(news)) == 1 then
    if #sets > 0 then
      call('MSET', unpack(sets))
    end
    return fresh_bytes .. string.rep('N', #KEYS - 1)
  end
  news, sets, granted = {}, {}, 0
end
if likely_new then
  found = call('MGET', unpack(KEYS))
end

local function write(key, record)
  sets[#sets + 1] = key
  sets[#sets + 1] = record
end

local function reopens(record, state, time, fence, request)
  if #request < 39 then
    return false
  end
  local since
  if state == DEAD_LETTERED then
    since = number(record, 24)
  elseif state == DOOMED and time <= now then
    since = number(record, 63)
  else
    return false
  end
  local token = number(request, 33)
  return since <= token and token <= fence
end

-- A lease, and what happened to the event before. A doomed one stays it, and its record expires after the lease.
local function grant(key, written, state, time)
  if state == DOOMED then
    doomed[#doomed + 1] = { key, written, decimal(ceil((time - now) / 1000) + retention) }
  else
    write(key, written)
  end
  local history = sub(written, 2, 16) .. numbered(max(0, now - number(written, 24))) .. char(state) .. sub(written, 63)
  return 'G' .. pack('>I4', #history) .. history
end

-- The answer to this very claim was lost: the same grant again.
local function grant_again(key, record, state, time)
  local written = sub(record, 1, 16) .. numbered(time) .. sub(record, 24)
  if #record == 62 and sub(record, 9, 16) == ONCE then
    write(key, written)
    return 'F' .. sub(record, 2, 8)
  end
  return grant(key, written, state, time)
end

-- What was under way until its lease ended, or until its delay was over, goes on with another holder.
local function grant_next(key, record, state, fence, token)
  local attempt, crashes = unpack_from('>I4I4', record, 9)
  if state ~= DOOMED then
    attempt = attempt + 1
    crashes = crashes + (state == CLAIMED and 1 or 0)
    state = CLAIMED
  end
  granted = max(granted, fence)
  local written = char(state) .. numbered(fence) .. pack('>I4I4', attempt, crashes) .. ends_bytes .. sub(record, 24, 46)
    .. token .. sub(record, 63)
  return grant(key, written, state, ends)
end

local function answer(key, record, request)
  local state, fence = byte(record, 1), number(record, 2)
  local print = sub(request, 1, 16)
  local time, known
  if state == PROCESSED then
    time, known = fence + unpack_from('>I4', record, 9) * 1000, sub(record, 13, 28)
  else
    time, known = number(record, 17), sub(record, 31, 46)
  end
  local next_fence = max(fence + 1, fresh)
  if reopens(record, state, time, fence, request) then
    granted = max(granted, next_fence)
    write(key, char(CLAIMED) .. numbered(next_fence) .. sub(beginning, 9) .. sub(request, 1, 32))
    return 'F' .. numbered(next_fence)
  elseif known ~= print and known ~= ANY and print ~= ANY then
    return 'C'
  elseif state == PROCESSED then
    return 'P' .. numbered(max(0, now - time))
  elseif state == DEAD_LETTERED then
    return 'D' .. numbered(max(0, now - time))
  end
  local token = sub(request, 17, 32)
  if state ~= WAITING and sub(record, 47, 62) == token then
    return grant_again(key, record, state, max(ends, time))
  elseif time > now then
    return (state == WAITING and 'W' or 'H') .. numbered(time - now)
  end
  return grant_next(key, record, state, next_fence, token)
end

local answers = { fresh_bytes }
for i = 2, #KEYS do
  local record, request = found[i], ARGV[i + 2]
  if not record then
    granted = max(granted, fresh)
    news[#news + 1] = KEYS[i]
    news[#news + 1] = beginning .. sub(request, 1, 32)
    answers[i] = 'N'
  elseif not intact(record) then
    return damaged()
  else
    answers[i] = answer(KEYS[i], record, request)
  end
end

if granted > NUMBER_MAX then
  return beyond()
elseif granted > highest then
  keep_highest()
end
-- All is checked: from here on only memory or rights can refuse, and they refuse the first write. MGET tells nothing about
-- a list or a hash, which MSET would write over.
if #news > 0 and call('MSETNX', unpack(news)) == 0 then
  return foreign()
end
if #sets > 0 then
  call('MSET', unpack(sets))
end
for _, set in ipairs(doomed) do
  call('SET', set[1], set[2], 'PX', set[3])
end
return table.concat(answers)
