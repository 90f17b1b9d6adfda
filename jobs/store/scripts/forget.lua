-- Delete a record with its events, and from every list. Returns 1, or 0 if it does not exist.
redis.call('DEL', prefix .. ':events:' .. id)
local owner = redis.call('HGET', job, 'owner')
if not owner then return 0 end
local status = redis.call('HGET', job, 'status')
local list = prefix .. ':owner:' .. owner
redis.call('ZREM', list, id)
redis.call('ZREM', list .. ':' .. status, id)
local group = redis.call('HGET', job, 'group')
if group and group ~= '' then redis.call('ZREM', list .. ':' .. group, id) end
redis.call('ZREM', prefix .. ':ended:' .. owner, id)
redis.call('ZREM', prefix .. ':queued', id)
redis.call('ZREM', prefix .. ':leases', id)
local queue = redis.call('HGET', job, 'queue') or ''
redis.call('ZREM', prefix .. ':waiting:' .. queue, id)
leave_lane(queue, owner, id)
redis.call('HINCRBY', prefix .. ':statuses', status, -1)
redis.call('DEL', job)
return 1
