-- Ends deliveries that are still this consumer's. One answer each: 1 done, 0 not ours, -1 the entry was trimmed away and a
-- copy is needed, or the text of an error; with -1 and with an error nothing of that item was done.
--
-- KEYS  1 stream   2 due   3 dead letters
-- ARGV  1 group   2 consumer   3 who keeps what was given back   4 'delete' or 'keep' what is done
--       5 'again' where the stream is the one of retries: its entries begin with their origin and count
--       6 number of acks, then their ids in ascending order, then the other items:
--       'release' id counted(0|1) | 'retry' id after_ms copy | 'dead' id fields copy, where fields and copy are a number of
--       strings and the strings: names and values. A copy is what the entry held, for when it was trimmed away; 0 without.
local stream, due, dead = KEYS[1], KEYS[2], KEYS[3]
local group, consumer, parking = ARGV[1], ARGV[2], ARGV[3]
local deletes, again = ARGV[4] == 'delete', ARGV[5] == 'again'
local answers = {}

local function owned(id)
  return redis.call('XPENDING', stream, group, id, id, 1, consumer)[1]
end

local function done(ids)
  redis.call('XACK', stream, group, unpack(ids))
  if deletes then redis.call('XDEL', stream, unpack(ids)) end
end

-- What we hold lies close together, so one range mostly answers for all; what it did not reach is asked for alone.
local acks = tonumber(ARGV[6])
local at = 7 + acks
if acks > 0 then
  local mine, ids = {}, {}
  local range = redis.call('XPENDING', stream, group, ARGV[7], ARGV[6 + acks], acks, consumer)
  for i = 1, #range do mine[range[i][1]] = true end
  local whole = #range < acks
  for i = 1, acks do
    local id = ARGV[6 + i]
    if mine[id] or (not whole and owned(id)) then
      ids[#ids + 1] = id
      answers[i] = 1
    else
      answers[i] = 0
    end
  end
  if #ids > 0 then done(ids) end
end

local function strings()
  local count = tonumber(ARGV[at])
  local list = {}
  for i = 1, count do list[i] = ARGV[at + i] end
  at = at + count + 1
  return list
end

-- The entry's fields as they travelled, with its origin and how often it was delivered before. No fields: it was trimmed away,
-- and there is no copy.
local function stored(id, copy)
  local entry = redis.call('XRANGE', stream, id, id)[1]
  local fields = entry and entry[2] or copy
  if not again or #fields < 6 then return fields, id, 0 end
  local origin, count, rest = fields[2], tonumber(fields[4]) or 0, {}
  for i = 5, #fields do rest[i - 4] = fields[i] end
  return rest, origin, count
end

local function release(id, pending, counted)
  -- XCLAIM would take it off the pending list, and if this answer is lost nobody would bring the copy.
  if #redis.call('XRANGE', stream, id, id) == 0 then return -1 end
  local count = pending[4]
  if not counted and count > 0 then count = count - 1 end
  local moved = redis.call('XCLAIM', stream, group, parking, 0, id, 'IDLE', 86400000, 'RETRYCOUNT', count, 'JUSTID')
  return #moved == 1 and 1 or -1
end

local function retry(id, pending, after, copy)
  local fields, origin, before = stored(id, copy)
  if #fields == 0 then return -1 end
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local kept = cmsgpack.pack({origin, before + pending[4], fields})
  local put = redis.pcall('ZADD', due, string.format('%.0f', now + after), kept)
  if type(put) == 'table' and put.err then return put.err end
  done({id})
  return 1
end

local function set_aside(id, marks, copy)
  local fields = stored(id, copy)
  if #fields == 0 then return -1 end
  local letter = {}
  -- `unpack` takes 8000 values at most, whoever wrote the entry: what is behind 6000 is cut off.
  for i = 1, math.min(#fields, 6000), 2 do
    if string.lower(string.sub(fields[i], 1, 6)) ~= 'hapax-' then
      letter[#letter + 1] = fields[i]
      letter[#letter + 1] = fields[i + 1]
    end
  end
  for i = 1, #marks do letter[#letter + 1] = marks[i] end
  local put = redis.pcall('XADD', dead, '*', unpack(letter))
  if type(put) == 'table' and put.err then return put.err end
  done({id})
  return 1
end

while at <= #ARGV do
  local verb, id = ARGV[at], ARGV[at + 1]
  local pending = owned(id)
  local answer = 0
  if verb == 'release' then
    if pending then answer = release(id, pending, ARGV[at + 2] == '1') end
    at = at + 3
  elseif verb == 'retry' then
    local after = tonumber(ARGV[at + 2])
    at = at + 3
    local copy = strings()
    -- An entry that was trimmed away is nobody's: only its holder has it, and hands over a copy.
    if pending or #copy > 0 then answer = retry(id, pending or {id, consumer, 0, 1}, after, copy) end
  else
    at = at + 2
    local marks = strings()
    local copy = strings()
    if pending or #copy > 0 then answer = set_aside(id, marks, copy) end
  end
  answers[#answers + 1] = answer
end
return answers
