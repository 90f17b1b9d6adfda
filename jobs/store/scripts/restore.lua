-- Restore a record that Valkey lost. ARGV[2]: its fields as a JSON object of strings. ARGV[3]: ms from now until its
-- lease expires, or ''. ARGV[4] to ARGV[6]: the digests of its Idempotency-Key and of its body, and for how many ms these
-- are still stored; '' without a key. Returns 1, or 0 if a record exists.
local fields = cjson.decode(ARGV[2])
local now = now_ms()
local memory = prefix .. ':idempotency:' .. fields.owner .. ':' .. ARGV[4]
if ARGV[4] ~= '' and tonumber(ARGV[6]) > 0 then
  local named = fields.group ~= '' and fields.group or id
  redis.call('HSETNX', memory, 'id', named)
  -- It may be reserved for this very job: that it was accepted is what was forgotten.
  if redis.call('HGET', memory, 'id') == named then
    -- Of a group other jobs may be missing: the next attempt looks at each.
    if named == id then redis.call('HSET', memory, 'done', 1) else redis.call('HSETNX', memory, 'until', 0) end
    redis.call('HSET', memory, 'print', ARGV[5])
    redis.call('PEXPIRE', memory, ARGV[6])
  end
end
if redis.call('EXISTS', job) == 1 then return 0 end
redis.call('ZREM', prefix .. ':submitting', id)
add_to_lists(fields.owner, fields.group)
for name, value in pairs(fields) do redis.call('HSET', job, name, value) end
set_status(now, fields.owner, nil, fields.status)
redis.call('HSET', job, 'updated_at', now)
-- The time of its end is that of its outcome, not now.
if fields.finished_at then
  redis.call('HSET', job, 'finished_at', fields.finished_at)
  note_ended(fields.owner, fields.finished_at)
end
if ARGV[3] ~= '' then redis.call('ZADD', prefix .. ':leases', now + tonumber(ARGV[3]), id) end
if not terminal[fields.status] then
  emit(now, fields.epoch, 'log', fields.step,
    '{"code":"restored","message":"The service lost its records and has put this one back from storage."}')
  emit(now, fields.epoch, 'status', fields.step, '{"status":"' .. fields.status .. '"}')
end
return 1
