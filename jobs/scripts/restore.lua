-- Put back a record that Valkey lost. ARGV[2]: its fields as a JSON object of strings. ARGV[3]: ms from now until its
-- lease runs out, or ''. Returns 1, or 0 where there is a record.
if redis.call('EXISTS', job) == 1 then return 0 end
local fields = cjson.decode(ARGV[2])
local now = now_ms()
redis.call('ZREM', prefix .. ':submitting', id)
redis.call('ZADD', prefix .. ':owner:' .. fields.owner, 0, id)
for name, value in pairs(fields) do redis.call('HSET', job, name, value) end
set_status(now, fields.owner, nil, fields.status)
redis.call('HSET', job, 'updated_at', now)
-- It ended when its outcome says, and not now.
if fields.finished_at then redis.call('HSET', job, 'finished_at', fields.finished_at) end
if ARGV[3] ~= '' then redis.call('ZADD', prefix .. ':leases', now + tonumber(ARGV[3]), id) end
if not terminal[fields.status] then
  emit(now, fields.epoch, 'log', fields.step,
    '{"code":"restored","message":"The service lost its records and has put this one back from storage."}')
  emit(now, fields.epoch, 'status', fields.step, '{"status":"' .. fields.status .. '"}')
end
return 1
