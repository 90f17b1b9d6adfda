-- Count the jobs whose turn comes before that of the queued job in ARGV[1], if workers get free and no job ends or is added.
-- ARGV[2]: the time in ms, or '' for the server's. By the rules of pick.lua; jobs of other owners in this queue are taken
-- to weigh as much as this one, as they do unless jobs of several hosts share it. Returns -1 if the job does not wait.
local queue, mine, status = unpack(redis.call('HMGET', job, 'queue', 'owner', 'status'))
if status ~= 'queued' then return -1 end
local lane = lane_of(queue, mine)
local rank = tonumber(redis.call('ZSCORE', lane, id) or nil)
-- An earlier release has queued it.
if not rank then return redis.call('ZRANK', prefix .. ':waiting:' .. queue, id) or -1 end
local overdue = string.format('(%.0f', (tonumber(ARGV[2]) or now_ms()) - patience)
local owners = redis.call('SMEMBERS', prefix .. ':lanes:' .. queue)

if redis.call('ZCOUNT', lane, rank, overdue) > 0 then
  local ahead = redis.call('ZRANK', lane, id)
  for _, owner in ipairs(owners) do
    if owner ~= mine then
      ahead = ahead + redis.call('ZCOUNT', lane_of(queue, owner), '-inf', string.format('(%.0f', rank))
      for _, name in ipairs(redis.call('ZRANGEBYSCORE', lane_of(queue, owner), rank, rank)) do
        if name < id then ahead = ahead + 1 end
      end
    end
  end
  return ahead
end

-- Its turn comes when its owner's jobs weigh so much; those of another owner go before it until theirs weigh as much.
local weight, before_it = weight_of(id), redis.call('ZRANK', lane, id)
local turn = held_by(mine) + before_it * weight
local ahead = before_it
for _, owner in ipairs(owners) do
  if owner ~= mine then
    local theirs = lane_of(queue, owner)
    local late, all = redis.call('ZCOUNT', theirs, '-inf', overdue), redis.call('ZCARD', theirs)
    local base = held_by(owner)
    local count = math.min(all, math.max(late, math.ceil((turn - base) / weight)))
    if count < all and base + count * weight == turn then
      local name, score = unpack(redis.call('ZRANGE', theirs, count, count, 'WITHSCORES'))
      if tonumber(score) < rank or (tonumber(score) == rank and name < id) then count = count + 1 end
    end
    ahead = ahead + count
  end
end
return ahead
