-- Give a job back to a run that its record has lost. ARGV: id, epoch, worker, lease in ms, number of the last command
-- applied before the run claimed the job, '1' if the run has not been heard of since, or '', the name of its GPUs, the number
-- of its hosts or '', for how many ms it has had the job.
-- Only after a loss can a record have an earlier epoch than one that was claimed. Returns 1, or 0 if the job has ended, has
-- a later run, or was handed back by this one.
local epoch, worker, lease = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local owner, status, current, orders = unpack(redis.call('HMGET', job, 'owner', 'status', 'epoch', 'orders'))
if not status or terminal[status] or epoch < tonumber(current) then return 0 end
if epoch == tonumber(current) and not held[status] then return 0 end
local now = now_ms()
redis.call('HSET', job, 'restored', ARGV[6], 'updated_at', now)
if epoch > tonumber(current) then
  -- An order of later than the claim stands.
  local to = 'running'
  if status == 'cancelling' then to = status end
  if tonumber(orders or '0') > tonumber(ARGV[5]) and (status == 'paused' or status == 'pausing') then to = 'pausing' end
  if status ~= to then set_status(now, owner, status, to) end
  redis.call('HSET', job, 'epoch', epoch, 'worker', worker, 'shipped', 0,
    'orders', math.max(tonumber(orders or '0'), tonumber(ARGV[5])))
  redis.call('HSET', job, 'run_at', now - tonumber(ARGV[9] or '0'), 'gpu', ARGV[7] or '', 'run_hosts', ARGV[8] or '')
  redis.call('HSETNX', job, 'started_at', now)
  emit(now, epoch, 'status', '0', '{"status":"' .. to .. '"}')
end
redis.call('ZADD', prefix .. ':leases', now + lease, id)
return 1
