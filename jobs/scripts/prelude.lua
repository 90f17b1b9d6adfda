-- Shared by all scripts: names of keys, the server's clock, events, and the indexes a status stands in.
-- KEYS[1] is the prefix of every key; ARGV[1] is the job's id. `held`, `terminal` and `transitions` come from
-- jobs/record.py and stand above.
local prefix, id = KEYS[1], ARGV[1]
local job = prefix .. ':job:' .. id

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Events get their number here and nowhere else, so a number is never used twice.
local function emit(now, epoch, kind, step, data, time)
  local seq = redis.call('HINCRBY', job, 'event_seq', 1)
  redis.call('XADD', prefix .. ':events:' .. id, seq .. '-0',
    'type', kind, 'epoch', epoch, 'time', time or now, 'step', step, 'data', data)
end

-- Jobs by status, and those that wait by queue: for telemetry, nothing is decided by them.
local function count(now, old, new)
  local queue = redis.call('HGET', job, 'queue') or ''
  local waiting = prefix .. ':waiting:' .. queue
  if old then redis.call('HINCRBY', prefix .. ':statuses', old, -1) end
  redis.call('HINCRBY', prefix .. ':statuses', new, 1)
  if old == 'queued' then redis.call('ZREM', waiting, id) end
  if new == 'queued' then
    redis.call('ZADD', waiting, now, id)
    redis.call('SADD', prefix .. ':queues', queue)
  end
end

-- How long steps take, by queue: a histogram, also for telemetry.
local step_bounds = { 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600 }
local function time_step(data)
  local readable, metrics = pcall(cjson.decode, data)
  local seconds = readable and type(metrics) == 'table' and type(metrics.seconds) == 'table' and metrics.seconds.total
  if type(seconds) ~= 'number' then return end
  local steps = prefix .. ':steps:' .. (redis.call('HGET', job, 'queue') or '')
  local bucket = '+Inf'
  for _, bound in ipairs(step_bounds) do
    if seconds <= bound then bucket = tostring(bound); break end
  end
  redis.call('HINCRBY', steps, bucket, 1)
  redis.call('HINCRBYFLOAT', steps, 'sum', seconds)
end

local function set_status(now, owner, old, new)
  count(now, old, new)
  local list = prefix .. ':owner:' .. owner
  if old then redis.call('ZREM', list .. ':' .. old, id) end
  redis.call('ZADD', list .. ':' .. new, 0, id)
  redis.call('HSET', job, 'status', new)
  if new == 'queued' then
    redis.call('ZADD', prefix .. ':queued', now, id)
  else
    redis.call('ZREM', prefix .. ':queued', id)
  end
  if not held[new] then redis.call('ZREM', prefix .. ':leases', id) end
  if terminal[new] then redis.call('HSET', job, 'finished_at', now) end
end
