-- Create a record. ARGV[2]: its fields as a JSON object of strings. ARGV[3], ARGV[4]: the digest of the
-- submission's Idempotency-Key, or '', and for how many ms it is stored.
-- Returns 1, or 0 where it exists already.
local now = now_ms()
local fields = cjson.decode(ARGV[2])
redis.call('ZREM', prefix .. ':submitting', id)
redis.call('HDEL', prefix .. ':references', id)
redis.call('ZREM', prefix .. ':admitted', id)
redis.call('ZREM', prefix .. ':admitted:' .. fields.owner, id)
-- In the same step as the record, so that a key that is done always has a job.
if ARGV[3] ~= '' then
  local memory = prefix .. ':idempotency:' .. fields.owner .. ':' .. ARGV[3]
  redis.call('HSET', memory, 'id', id, 'done', 1)
  redis.call('PEXPIRE', memory, ARGV[4])
end
if redis.call('EXISTS', job) == 1 then return 0 end
for name, value in pairs(fields) do redis.call('HSET', job, name, value) end
redis.call('HSET', job, 'created_at', fields.created_at or now, 'updated_at', now)
add_to_lists(fields.owner, fields.group)
set_status(now, fields.owner, nil, fields.status)
announce_status(now, fields.owner, 'new', fields.status)
emit(now, fields.epoch, 'status', '0', '{"status":"' .. fields.status .. '"}')
return 1
