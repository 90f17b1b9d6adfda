-- Decide whether a submission is admitted. ARGV[1]: the id of the future job or data set. ARGV[2]: a JSON object:
--   owner, holder   its owner; a name of this attempt            hold   ms after which the attempt counts as dead
--   key, print      digests of its Idempotency-Key and of its body; both may be missing
--   keep            ms for which a key is stored
--   job             true for a job: one without a record is found by this mark (jobs/lifecycle/recovery.py)
--   careful         true if a server that may have lost the key must not check it
--   queued, owned   limits of queued jobs in total, and of one owner's unfinished jobs; both may be missing
--   members         how many jobs are submitted together, under the id of their group; missing for one job
-- Returns {verdict, id, ms to wait}: new, resumed (an attempt died: its id is used again), done, busy, reused,
-- queue_full, owner_full or forgot.
local order = cjson.decode(ARGV[2])
local now = now_ms()
local memory = order.key and prefix .. ':idempotency:' .. order.owner .. ':' .. order.key
local verdict = 'new'

if memory and order.careful and forgot() then return { 'forgot', id, 0 } end
if memory then
  local known, print, holder, until_ms, done =
    unpack(redis.call('HMGET', memory, 'id', 'print', 'holder', 'until', 'done'))
  if known then
    if print ~= order.print then return { 'reused', known, 0 } end
    if done then return { 'done', known, 0 } end
    -- The same holder asks again where the first answer was lost on its way.
    if holder ~= order.holder and tonumber(until_ms) > now then
      return { 'busy', known, tonumber(until_ms) - now }
    end
    id, verdict = known, 'resumed'
  end
end

-- Admitted submissions without a record count too, so that concurrent ones cannot exceed the limit. This submission itself
-- does not count: it may be repeated after its first answer was lost.
local members = order.members or 1
-- Jobs of a group that an earlier attempt created are counted by their status.
local left = members - redis.call('ZCARD', prefix .. ':owner:' .. order.owner .. ':' .. id)
local function admitted(set)
  for place = 1, members do redis.call('ZREM', set, place_of(place)) end
  redis.call('ZREMRANGEBYSCORE', set, 0, now)
  return redis.call('ZCARD', set)
end
local all, mine = prefix .. ':admitted', prefix .. ':admitted:' .. order.owner
if left > 0 and order.queued and redis.call('ZCARD', prefix .. ':queued') + admitted(all) + left > order.queued then
  return { 'queue_full', id, 0 }
end
if left > 0 and order.owned then
  local count = admitted(mine)
  for _, status in ipairs({ 'queued', 'running', 'pausing', 'paused', 'cancelling' }) do
    count = count + redis.call('ZCARD', prefix .. ':owner:' .. order.owner .. ':' .. status)
  end
  if count + left > order.owned then return { 'owner_full', id, 0 } end
end
if order.queued or order.owned then
  for _, set in ipairs({ all, mine }) do
    for place = 1, members do redis.call('ZADD', set, now + order.hold, place_of(place)) end
    redis.call('PEXPIRE', set, order.hold)
  end
end

if order.job then redis.call('ZADD', prefix .. ':submitting', now, id) end
if memory then
  redis.call('HSET', memory, 'id', id, 'print', order.print, 'holder', order.holder, 'until', now + order.hold)
  redis.call('PEXPIRE', memory, order.keep)
end
return { verdict, id, 0 }
