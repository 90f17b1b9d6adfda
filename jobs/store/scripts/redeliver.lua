-- Set when a delivery is due, and when its webhook has the next one. ARGV: webhook, owner, event, ms from now, or '' if the
-- delivery has ended. Returns 1.
local owner, event, wait = ARGV[2], ARGV[3], ARGV[4]
local undelivered, webhooks = prefix .. ':undelivered:' .. id, prefix .. ':deliveries'
if wait == '' then
  redis.call('ZREM', undelivered, event)
else
  redis.call('ZADD', undelivered, 'XX', now_ms() + tonumber(wait), event)
end
local first = redis.call('ZRANGE', undelivered, 0, 0, 'WITHSCORES')
if first[1] then
  redis.call('ZADD', webhooks, first[2], owner .. ' ' .. id)
else
  redis.call('ZREM', webhooks, owner .. ' ' .. id)
end
return 1
