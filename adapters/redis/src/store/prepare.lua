-- Looks at the store before anything is written for an event. KEYS: what is known of the store, a key to try. ARGV: the
-- format's version, the number of partitions if the store is new. Answers with version and partitions as they are.
-- What this server, its role and its rights refuse shows here, with the commands that claim and record use.
redis.call('MSET', KEYS[2], 'x')
redis.call('SET', KEYS[2], 'x', 'PXAT', '4102444800000')
redis.call('SET', KEYS[2], 'x', 'PX', '1000')
redis.call('MSETNX', KEYS[2], 'x')
redis.call('EXISTS', KEYS[2])
redis.call('MGET', KEYS[2])
redis.call('DEL', KEYS[2])
-- Every number that is stored goes through these two: a server that has other ones than Redis must have them as exact.
local most = 9007199254740991
if struct.unpack('>I7', struct.pack('>I7', most)) ~= most or tonumber(redis.call('TIME')[1]) < 1 then
  return redis.error_reply('HAPAX the scripts of this server do not keep whole numbers up to 2^53')
end
redis.call('HSETNX', KEYS[1], 'version', ARGV[1])
redis.call('HSETNX', KEYS[1], 'partitions', ARGV[2])
return { redis.call('HGET', KEYS[1], 'version'), redis.call('HGET', KEYS[1], 'partitions') }
