-- Shared by all scripts: names of keys, the server's clock, events, and the indexes by status.
-- KEYS[1] is the prefix of every key; ARGV[1] is the job's id. jobs/store/job_store.py puts constants above this text.
local prefix, id = KEYS[1], ARGV[1]
local job = prefix .. ':job:' .. id

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The identity of this server. It changes with a restart, a failover or a promotion, after which the most recent writes
-- may be lost. Empty if INFO is not allowed.
local here
local function server()
  if here then return here end
  local function ask(section, field)
    local info = redis.pcall('INFO', section)
    return type(info) == 'string' and string.match(info, field .. ':(%w+)') or ''
  end
  here = ask('server', 'run_id') .. ask('replication', 'master_replid')
  return here
end

-- Whether this server's records must still be compared with the bucket (jobs/lifecycle/valkey_recovery.py). A server that
-- does not show its identity counts as compared.
local function forgot()
  return server() ~= '' and redis.call('HGET', prefix .. ':server', 'compared') ~= server()
end

-- Only this function assigns event numbers, and no number is used twice. If another server assigned the last known number,
-- later ones may be lost. Then numbers start at the job's age in microseconds (no server assigns a number in less) plus
-- `event_room`, which is above every assigned number. The known last number is not added to that: if such a jump were
-- lost too, the next one would repeat its numbers.
local function next_number(now)
  local last, by, born = unpack(redis.call('HMGET', job, 'event_seq', 'server', 'created_at'))
  local number = (tonumber(last) or 0) + 1
  if by ~= server() then
    if by then number = math.max(number, (now - (tonumber(born) or now)) * 1000 + event_room) end
    redis.call('HSET', job, 'server', server())
  end
  local text = string.format('%.0f', number)
  redis.call('HSET', job, 'event_seq', text)
  return text
end

-- `ordinal`: the event's position among those of its run, for events from a run's worker. Returns the event's number.
local function emit(now, epoch, kind, step, data, time, ordinal)
  local number = next_number(now)
  redis.call('XADD', prefix .. ':events:' .. id, number .. '-0',
    'type', kind, 'epoch', epoch, 'time', time or now, 'step', step, 'data', data, 'n', ordinal or 0)
  return number
end

-- Lanes: the waiting jobs of one owner in one queue, by rank. A rank is the time in ms at which a job was queued, less the
-- head start of its priority; pick.lua says what follows from it.
local patience = 24 * 3600000
local head_starts = { high = 6 * 3600000, low = -6 * 3600000 }

local function lane_of(queue, owner) return prefix .. ':lane:' .. queue .. ':' .. owner end

local function enter_lane(queue, owner, rank)
  redis.call('ZADD', lane_of(queue, owner), 'NX', rank, id)
  redis.call('SADD', prefix .. ':lanes:' .. queue, owner)
end

local function leave_lane(queue, owner, name)
  redis.call('ZREM', lane_of(queue, owner), name)
  if redis.call('EXISTS', lane_of(queue, owner)) == 0 then redis.call('SREM', prefix .. ':lanes:' .. queue, owner) end
end

-- Counts of jobs by status and of waiting jobs by queue: for telemetry, never for decisions.
local function count(now, old, new)
  local queue, owner, priority = unpack(redis.call('HMGET', job, 'queue', 'owner', 'priority'))
  queue = queue or ''
  local waiting = prefix .. ':waiting:' .. queue
  if old then redis.call('HINCRBY', prefix .. ':statuses', old, -1) end
  redis.call('HINCRBY', prefix .. ':statuses', new, 1)
  if old == 'queued' then
    redis.call('ZREM', waiting, id)
    leave_lane(queue, owner, id)
    redis.call('DEL', prefix .. ':picked:' .. id)
  end
  if new == 'queued' then
    enter_lane(queue, owner, now - (head_starts[priority] or 0))
    redis.call('ZADD', waiting, now, id)
    redis.call('SADD', prefix .. ':queues', queue)
  end
end

-- Histogram of the seconds per step, by queue, for telemetry.
local step_bounds = { 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600 }
local function time_step(data)
  local readable, metrics = pcall(cjson.decode, data)
  local seconds = readable and type(metrics) == 'table' and type(metrics.seconds) == 'table' and metrics.seconds.total
  -- All jobs of a queue share the sum, so values that would spoil it, such as infinity, are left out.
  if type(seconds) ~= 'number' or not (seconds >= 0 and seconds <= 86400) then return end
  local steps = prefix .. ':steps:' .. (redis.call('HGET', job, 'queue') or '')
  local bucket = '+Inf'
  for _, bound in ipairs(step_bounds) do
    if seconds <= bound then bucket = tostring(bound); break end
  end
  redis.call('HINCRBY', steps, bucket, 1)
  redis.call('HINCRBYFLOAT', steps, 'sum', seconds)
end

-- GPU time of an owner's runs, by the day of their start (in days since 1970), each run once; jobs/usage/gpu_time.py reads it.
local function tally(owner, day, run, ms)
  local runs = prefix .. ':usage:' .. owner .. ':' .. day
  if redis.call('HSETNX', runs, run, ms) == 0 then return end
  -- Longer than the bucket has them (KEEP_DAYS): otherwise they would be read from there and count again.
  redis.call('PEXPIRE', runs, 402 * 86400000)
  redis.call('HINCRBY', prefix .. ':usage:' .. owner, day, ms)
  redis.call('SADD', prefix .. ':usage-unsaved', owner .. ' ' .. day)
end

-- The same by day and kind of GPU, for reports: a run that lasts over midnight has a part in each day (`ms class`).
local function note_part(owner, day, run, part)
  local parts = prefix .. ':usage-parts:' .. owner .. ':' .. day
  if redis.call('HSETNX', parts, run, part) == 0 then return end
  redis.call('PEXPIRE', parts, 402 * 86400000)
  redis.call('SADD', prefix .. ':usage-unsaved', owner .. ' ' .. day)
end

local function split(owner, run, began, ended, gpus, class)
  local day = math.floor(began / 86400000)
  repeat
    local held_ms = math.min(ended, (day + 1) * 86400000) - math.max(began, day * 86400000)
    note_part(owner, day, run, string.format('%.0f %s', held_ms * gpus, class))
    day = day + 1
  until day * 86400000 >= ended
end

-- The GPUs that a job asks for, on all its hosts together.
local function gpus_of(spec)
  local readable, asked = pcall(cjson.decode, spec or '')
  local resources = readable and type(asked) == 'table' and type(asked.resources) == 'table' and asked.resources
  if not resources or type(resources.gpus) ~= 'number' then return 0 end
  return resources.gpus, tonumber(resources.hosts) or 1
end

-- What a job weighs in its owner's share: its GPUs on all hosts, or its hosts if it needs none. Kept in the record, because
-- reading the spec takes long.
local function weight_of(name)
  local record = prefix .. ':job:' .. name
  local known, run_hosts = unpack(redis.call('HMGET', record, 'weight', 'run_hosts'))
  local gpus, hosts = string.match(known or '', '^(%d+) (%d+)$')
  if not gpus then
    gpus, hosts = gpus_of(redis.call('HGET', record, 'spec'))
    redis.call('HSET', record, 'weight', string.format('%d %d', gpus, hosts or 1))
  end
  run_hosts = tonumber(run_hosts or '') or 0
  return math.max(1, tonumber(gpus)) * (run_hosts > 0 and run_hosts or tonumber(hosts or 1))
end

-- The weight of all jobs of an owner that workers hold.
local function held_by(owner)
  local sum = 0
  for status in pairs(held) do
    for _, name in ipairs(redis.call('ZRANGE', prefix .. ':owner:' .. owner .. ':' .. status, 0, -1)) do
      sum = sum + weight_of(name)
    end
  end
  return sum
end

-- Record the duration of a run that has ended.
local function note_run(now, owner)
  local began, epoch, spec, restored, gpu, run_hosts =
    unpack(redis.call('HMGET', job, 'run_at', 'epoch', 'spec', 'restored', 'gpu', 'run_hosts'))
  if not began or began == '' then return end
  -- Without an event since its record was restored, it is not known whether the run still existed.
  if restored == '1' then redis.call('HDEL', job, 'run_at'); return end
  local ran = math.max(0, now - tonumber(began))
  redis.call('HINCRBY', job, 'run_ms', ran)
  redis.call('HDEL', job, 'run_at', 'gpu', 'run_hosts')
  local gpus, hosts = gpus_of(spec)
  if gpus <= 0 then return end
  -- A run may have fewer hosts than the job asks for.
  run_hosts = tonumber(run_hosts or '') or 0
  if run_hosts > 0 then hosts = run_hosts end
  local run = id .. ':' .. epoch
  tally(owner, math.floor(tonumber(began) / 86400000), run, ran * gpus * hosts)
  split(owner, run, tonumber(began), tonumber(began) + ran, gpus * hosts, gpu or '')
  local known, used = pcall(cjson.decode, redis.call('HGET', job, 'gpu_ms') or '')
  if not known or type(used) ~= 'table' then used = {} end
  used[gpu or ''] = (used[gpu or ''] or 0) + ran * gpus * hosts
  redis.call('HSET', job, 'gpu_ms', cjson.encode(used))
end

-- Index of ended jobs by owner and time, for jobs/lifecycle/retention.py.
local function note_ended(owner, at)
  redis.call('SADD', prefix .. ':enders', owner)
  redis.call('ZADD', prefix .. ':ended:' .. owner, at, id)
end

-- The name of a job among those admitted with it; of a single one, its id.
local function place_of(place)
  return place == 1 and id or id .. ':' .. place
end

-- The lists of an owner's jobs: of all, and of the group it was submitted with.
local function add_to_lists(owner, group)
  local list = prefix .. ':owner:' .. owner
  redis.call('ZADD', list, 0, id)
  redis.call('SADD', prefix .. ':owners', owner)
  if group and group ~= '' then redis.call('ZADD', list .. ':' .. group, 0, id) end
end

-- Record something that webhooks may report, until jobs/webhooks/courier.py has read it. What is recorded twice is one
-- member, so it is reported once.
local function announce(now, owner, ...)
  redis.call('ZADD', prefix .. ':changes', 'NX', now, table.concat({ id, owner, ... }, ' '))
end

-- The epoch and the number of commands tell one change of a job from a later one between the same states.
local passing = { pausing = true, cancelling = true }
local function announce_status(now, owner, old, new)
  if passing[new] then return end
  local epoch, orders = unpack(redis.call('HMGET', job, 'epoch', 'orders'))
  announce(now, owner, old, new, epoch or '0', orders or '0')
end

local function set_status(now, owner, old, new)
  count(now, old, new)
  -- A record that is created or restored is no change: create.lua announces the former.
  if old then announce_status(now, owner, old, new) end
  local list = prefix .. ':owner:' .. owner
  if old then redis.call('ZREM', list .. ':' .. old, id) end
  redis.call('ZADD', list .. ':' .. new, 0, id)
  redis.call('HSET', job, 'status', new)
  if new == 'queued' then
    redis.call('ZADD', prefix .. ':queued', now, id)
  else
    redis.call('ZREM', prefix .. ':queued', id)
  end
  if not held[new] then
    redis.call('ZREM', prefix .. ':leases', id)
    if held[old] then note_run(now, owner) end
  end
  if terminal[new] then
    redis.call('HSET', job, 'finished_at', now)
    note_ended(owner, now)
  end
end
