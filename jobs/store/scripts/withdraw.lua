-- An attempt to submit has failed. ARGV[1]: its id. ARGV[2]: a JSON object: owner, holder, key, forget, members.
-- With forget nothing was written and the key is as if never used; else something may have been: the next attempt
-- with the key goes on at once, under the same id, or what was written is made a job later (jobs/lifecycle/recovery.py).
local order = cjson.decode(ARGV[2])
for place = 1, order.members or 1 do
  redis.call('ZREM', prefix .. ':admitted', place_of(place))
  redis.call('ZREM', prefix .. ':admitted:' .. order.owner, place_of(place))
end
if order.forget then
  redis.call('ZREM', prefix .. ':submitting', id)
  redis.call('HDEL', prefix .. ':references', id)
end
if not order.key then return 0 end
local memory = prefix .. ':idempotency:' .. order.owner .. ':' .. order.key
local holder, done = unpack(redis.call('HMGET', memory, 'holder', 'done'))
-- A later attempt may have taken over, or even finished.
if holder ~= order.holder or done then return 0 end
if order.forget then redis.call('DEL', memory) else redis.call('HSET', memory, 'until', 0) end
return 1
