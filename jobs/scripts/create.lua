-- Create a record. ARGV[2]: its fields as a JSON object of strings. Returns 1, or 0 where it exists already.
if redis.call('EXISTS', job) == 1 then return 0 end
local now = now_ms()
local fields = cjson.decode(ARGV[2])
for name, value in pairs(fields) do redis.call('HSET', job, name, value) end
redis.call('HSET', job, 'created_at', fields.created_at or now, 'updated_at', now)
redis.call('ZADD', prefix .. ':owner:' .. fields.owner, 0, id)
set_status(now, fields.owner, nil, fields.status)
emit(now, fields.epoch, 'status', '0', '{"status":"' .. fields.status .. '"}')
return 1
