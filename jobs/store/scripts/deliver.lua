-- Queue the delivery of one event to one webhook. ARGV: webhook, event, owner, fields as a JSON object of strings, ms for
-- which a delivery is listed, and how many are. Returns 1, or 0 if it was queued before.
local event, owner, fields, keep, most = ARGV[2], ARGV[3], cjson.decode(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local delivery, list = prefix .. ':delivery:' .. id .. ':' .. event, prefix .. ':deliveries-of:' .. id
if redis.call('EXISTS', delivery) == 1 then return 0 end
local now = now_ms()
for name, value in pairs(fields) do redis.call('HSET', delivery, name, value) end
redis.call('HSET', delivery, 'created_ms', now)
redis.call('ZADD', prefix .. ':undelivered:' .. id, now, event)
redis.call('ZADD', prefix .. ':deliveries', 'LT', now, owner .. ' ' .. id)
redis.call('ZADD', list, now, event)
redis.call('ZREMRANGEBYSCORE', list, 0, now - keep)
redis.call('ZREMRANGEBYRANK', list, 0, -most - 1)
redis.call('PEXPIRE', list, keep)
return 1
