-- Answers a batch of renewals as `hapax::record::renew` does.
-- KEYS: the record of each item. ARGV: lease in microseconds, retention in milliseconds, then the fence of each item.
-- Answers with a text: R or L for each item.
local lease, retention = tonumber(ARGV[1]), tonumber(ARGV[2])
local found, refusal = read(KEYS)
if refusal then
  return refusal
end
local answers, sets, doomed = {}, {}, {}
for i = 1, #KEYS do
  local record = found[i]
  answers[i] = 'L'
  if record then
    if not intact(record) then
      return damaged()
    end
    local state = byte(record, 1)
    if (state == CLAIMED or state == DOOMED) and sub(record, 2, 8) == ARGV[i + 2] then
      local ends = max(now + lease, number(record, 17))
      local written = sub(record, 1, 16) .. numbered(ends) .. sub(record, 24)
      answers[i] = 'R'
      if state == DOOMED then
        doomed[#doomed + 1] = { KEYS[i], written, decimal(ceil((ends - now) / 1000) + retention) }
      else
        sets[#sets + 1] = KEYS[i]
        sets[#sets + 1] = written
      end
    end
  end
end
if #sets > 0 then
  call('MSET', unpack(sets))
end
for _, set in ipairs(doomed) do
  call('SET', set[1], set[2], 'PX', set[3])
end
return table.concat(answers)
