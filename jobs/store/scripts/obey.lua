-- Apply one of the owner's commands, once, and never an earlier one after a later one.
-- ARGV[2]: its number. ARGV[3]: a JSON object: the status it leads to from each status it knows.
-- Returns what change.lua returns, or 'order' if this command or a later one was applied before.
local number, moves = tonumber(ARGV[2]), cjson.decode(ARGV[3])
local owner, status, epoch, done = unpack(redis.call('HMGET', job, 'owner', 'status', 'epoch', 'orders'))
if not status then return { 'missing', '', 0, 0 } end
if number <= tonumber(done or '0') then return { 'order', status, tonumber(epoch), 0 } end
local to = moves[status]
if not to or (to ~= status and not transitions[status][to]) then return { 'status', status, tonumber(epoch), 0 } end
local now = now_ms()
redis.call('HSET', job, 'orders', number, 'updated_at', now)
if to ~= status then
  set_status(now, owner, status, to)
  emit(now, epoch, 'status', '0', '{"status":"' .. to .. '"}')
end
return { 'ok', to, tonumber(epoch), 0 }
