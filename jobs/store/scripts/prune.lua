-- Remove an owner from the lists of owners without entries. ARGV[1]: the owner.
-- A script, because the owner's next job may end between check and removal.
if redis.call('EXISTS', prefix .. ':ended:' .. id) == 0 then redis.call('SREM', prefix .. ':enders', id) end
local usage = prefix .. ':usage:' .. id
local days = redis.call('HLEN', usage) - redis.call('HEXISTS', usage, 'loaded')
if days == 0 and redis.call('EXISTS', prefix .. ':owner:' .. id) == 0 then
  redis.call('SREM', prefix .. ':users', id)
  redis.call('DEL', usage)
end
return 1
