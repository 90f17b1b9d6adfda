-- Compare and set: the only change of a record after its creation, except a claim.
-- ARGV[2] is a JSON object; all parts are optional:
--   from      statuses the job must be in            epoch    the epoch it must be at
--   expired   the lease must have run out            to       the new status
--   set       fields to set, as strings              lease    ms from now until the lease runs out
--   held      ms for which the worker has had the job, said with a lease
--   first     ordinal of the first event in its run  events   [{type, epoch, step, data, time}]
--   expire    ms until the events may go       settles  an outcome stands: any state may end
-- Returns {'ok'|'missing'|'status'|'epoch'|'lease'|'events', status, epoch, events accepted of this run}; 'events' where
-- those before `first` were forgotten.
local order = cjson.decode(ARGV[2])
local owner, status, epoch, told = unpack(redis.call('HMGET', job, 'owner', 'status', 'epoch', 'shipped'))
local shipped = tonumber(told or '0')
if not status then return { 'missing', '', 0, 0 } end
local function refuse(why) return { why, status, tonumber(epoch), shipped } end

if order.epoch and order.epoch ~= tonumber(epoch) then return refuse('epoch') end
if order.from then
  local allowed = false
  for _, name in ipairs(order.from) do allowed = allowed or name == status end
  if not allowed then return refuse('status') end
end
if order.to and order.to ~= status and not transitions[status][order.to] then
  if not (order.settles and terminal[order.to]) then return refuse('status') end
end
if order.first and told and order.first > shipped + 1 then return refuse('events') end
local now = now_ms()
if order.expired then
  local expiry = redis.call('ZSCORE', prefix .. ':leases', id)
  if expiry and tonumber(expiry) > now then return refuse('lease') end
end

for name, value in pairs(order.set or {}) do redis.call('HSET', job, name, value) end
redis.call('HSET', job, 'updated_at', now)
-- After a lost answer a worker sends its events again; those accepted before are skipped.
local ordinal = (order.first or 1) - 1
for _, event in ipairs(order.events or {}) do
  ordinal = ordinal + 1
  if not order.first or ordinal > shipped then
    local number = emit(now, event.epoch or epoch, event.type, event.step, event.data, event.time, order.first and ordinal)
    if event.type == 'metric' then time_step(event.data) end
    if event.type == 'evaluation' then announce(now, owner, 'evaluated', number) end
    if order.first then shipped = ordinal end
  end
end
if order.first then redis.call('HSET', job, 'shipped', shipped) end
if order.to and order.to ~= status then
  set_status(now, owner, status, order.to)
  status = order.to
end
if order.lease then
  redis.call('ZADD', prefix .. ':leases', now + order.lease, id)
  -- A record that was put back does not know since when.
  if order.held and redis.call('HGET', job, 'restored') == '1' then redis.call('HSET', job, 'run_at', now - order.held) end
  redis.call('HDEL', job, 'restored')
end
if order.expire then redis.call('PEXPIRE', prefix .. ':events:' .. id, order.expire) end
return { 'ok', status, tonumber(epoch), shipped }
