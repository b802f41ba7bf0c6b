-- One record as it is. KEYS: the record. Answers with the time and the record, if there is one.
local found, refusal = read(KEYS)
if refusal then
  return refusal
end
return { numbered(now), found[1] }
