-- Forgets one event. KEYS: the highest fence of this partition, the record. Answers whether there was one.
local found, refusal = read(KEYS)
if refusal then
  return refusal
end
local record = found[2]
if not record then
  return 0
end
-- Its fence lives on, so that the next one is higher even where the server's clock was set back meanwhile.
local fence = #record >= 8 and number(record, 2) or 0
if fence <= NUMBER_MAX and fence > (found[1] and number(found[1], 1) or 0) then
  call('MSET', KEYS[1], numbered(fence))
end
return call('DEL', KEYS[2])
