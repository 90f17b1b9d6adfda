-- Change the priority of a job that waits or is paused. ARGV[2]: the new one. Returns its status; '' without a record.
local queue, owner, status, before = unpack(redis.call('HMGET', job, 'queue', 'owner', 'status', 'priority'))
if not status then return '' end
if status ~= 'queued' and status ~= 'paused' then return status end
redis.call('HSET', job, 'priority', ARGV[2], 'updated_at', now_ms())
if status == 'queued' then
  local change = (head_starts[before] or 0) - (head_starts[ARGV[2]] or 0)
  if redis.call('ZSCORE', lane_of(queue, owner), id) then redis.call('ZINCRBY', lane_of(queue, owner), change, id) end
end
return status
