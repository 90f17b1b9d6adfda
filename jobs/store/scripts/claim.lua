-- Give a queued job to a worker. ARGV: id, epoch, worker, lease in ms, the name of its GPUs or '', the number of hosts
-- that it has for the job or ''. Returns 1, or 0 if the claim is refused.
local epoch, worker, lease = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local owner, status, current = unpack(redis.call('HMGET', job, 'owner', 'status', 'epoch'))
if status ~= 'queued' or epoch <= tonumber(current) then return 0 end
-- An earlier claim may have been lost.
if redis.call('EXISTS', prefix .. ':server') == 1 and forgot() then return 0 end
local now = now_ms()
set_status(now, owner, status, 'running')
redis.call('ZADD', prefix .. ':leases', now + lease, id)
redis.call('HSET', job, 'epoch', epoch, 'worker', worker, 'phase', 'preparing', 'shipped', 0, 'updated_at', now,
  'run_at', now, 'gpu', ARGV[5] or '', 'run_hosts', ARGV[6] or '')
redis.call('SADD', prefix .. ':users', owner)
redis.call('HSETNX', job, 'started_at', now)
redis.call('HDEL', job, 'restored')
emit(now, epoch, 'status', '0', '{"status":"running","phase":"preparing"}')
return 1
