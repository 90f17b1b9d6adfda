-- Decide whether a submission may be written down. ARGV[1]: the id it shall have. ARGV[2]: a JSON object:
--   owner, holder   whose it is; a name of this very attempt     hold   ms after which the attempt counts as dead
--   key, print      digests of its Idempotency-Key and of its body; both may be missing
--   keep            ms for which a key is remembered
--   job             true where it is a job: one that gets no record is found by it (jobs/unfinished.py)
--   queued, owned   how many jobs may be queued in all, and unfinished of one owner; both may be missing
-- Returns {verdict, id, ms to wait}: new, resumed (an attempt died: its id is used again), done, busy, reused,
-- queue_full or owner_full.
local order = cjson.decode(ARGV[2])
local now = now_ms()
local memory = order.key and prefix .. ':idempotency:' .. order.owner .. ':' .. order.key
local verdict = 'new'

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

-- What was admitted and has no record yet counts too, so that many at once do not pass the last free place. This very
-- submission does not: it may ask again where the first answer was lost on its way.
local function admitted(set)
  redis.call('ZREM', set, id)
  redis.call('ZREMRANGEBYSCORE', set, 0, now)
  return redis.call('ZCARD', set)
end
local all, mine = prefix .. ':admitted', prefix .. ':admitted:' .. order.owner
if order.queued and redis.call('ZCARD', prefix .. ':queued') + admitted(all) >= order.queued then
  return { 'queue_full', id, 0 }
end
if order.owned then
  local count = admitted(mine)
  for _, status in ipairs({ 'queued', 'running', 'pausing', 'paused', 'cancelling' }) do
    count = count + redis.call('ZCARD', prefix .. ':owner:' .. order.owner .. ':' .. status)
  end
  if count >= order.owned then return { 'owner_full', id, 0 } end
end
if order.queued or order.owned then
  for _, set in ipairs({ all, mine }) do
    redis.call('ZADD', set, now + order.hold, id)
    redis.call('PEXPIRE', set, order.hold)
  end
end

if order.job then redis.call('ZADD', prefix .. ':submitting', now, id) end
if memory then
  redis.call('HSET', memory, 'id', id, 'print', order.print, 'holder', order.holder, 'until', now + order.hold)
  redis.call('PEXPIRE', memory, order.keep)
end
return { verdict, id, 0 }
