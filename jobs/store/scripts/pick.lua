-- Choose the job whose turn it is, of the queue of the job in ARGV[1], for a worker that is free.
-- ARGV[2]: the worker. ARGV[3]: a JSON list of jobs that it cannot run. ARGV[4]: the time in ms, or '' for the server's.
-- Jobs that have waited for a day go first, the longest first, so none waits forever. Then it is the turn of the owner
-- whose jobs hold the fewest GPUs; owners with as many take turns by the rank of their first job. Of an owner, the job
-- with the lowest rank goes first. ahead.lua counts by the same rules. The job is kept for the worker for some seconds. Returns its id, or ''.
local kept = 15000
local worker, refused = ARGV[2], {}
for _, name in ipairs(cjson.decode(ARGV[3])) do refused[name] = true end
local now = tonumber(ARGV[4]) or now_ms()
local queue, mine, status, priority = unpack(redis.call('HMGET', job, 'queue', 'owner', 'status', 'priority'))
if not queue then return '' end
-- A process of an earlier release has queued it, and knows no lanes.
if status == 'queued' then
  local since = redis.call('ZSCORE', prefix .. ':waiting:' .. queue, id) or now
  enter_lane(queue, mine, tonumber(since) - (head_starts[priority] or 0))
end

local function first_of(owner)
  local entries = redis.call('ZRANGE', lane_of(queue, owner), 0, 63, 'WITHSCORES')
  for place = 1, #entries, 2 do
    local name, rank = entries[place], tonumber(entries[place + 1])
    local at, where = unpack(redis.call('HMGET', prefix .. ':job:' .. name, 'status', 'queue'))
    if at ~= 'queued' or where ~= queue then
      leave_lane(queue, owner, name)
    elseif not refused[name] then
      local holder = redis.call('GET', prefix .. ':picked:' .. name)
      if not holder or holder == worker then return name, rank end
    end
  end
end

local best
for _, owner in ipairs(redis.call('SMEMBERS', prefix .. ':lanes:' .. queue)) do
  local name, rank = first_of(owner)
  if name then
    local is_overdue = now - rank > patience
    local found = { is_overdue and 0 or 1, is_overdue and 0 or held_by(owner), rank, name }
    local is_better = not best
    for place = 1, 4 do
      if best and found[place] ~= best[place] then
        is_better = found[place] < best[place]
        break
      end
    end
    if is_better then best = found end
  end
end
if not best then return '' end
redis.call('SET', prefix .. ':picked:' .. best[4], worker, 'PX', kept)
return best[4]
