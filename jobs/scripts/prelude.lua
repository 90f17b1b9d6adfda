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

local function set_status(now, owner, old, new)
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
