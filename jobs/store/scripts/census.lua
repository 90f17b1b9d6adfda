-- The count of owners' bytes in the bucket (jobs/usage/stored_bytes.py). ARGV[1]: the operation. A walk has a number and a
-- position up to which it has counted. A process whose number or position is outdated changes nothing, and neither does a
-- repetition after a lost answer.
--   begin    {ms between walks}: returns {number, place}, or {} where none is under way and none is due
--   note     {number, place, new place, notes seen, counts as JSON}: returns 1, 0 where another was first, or -1 where
--            there are more notes of changes by now
--   publish  {number, place, ms until the next}: returns 1, or 0 where another was first
--   add      {name of this call, owner, bytes, folder, bytes in it after, or '' for what is found there}
local state, counting, changed = prefix .. ':census', prefix .. ':census-counting', prefix .. ':census-changed'
local stored = prefix .. ':stored'
local now = now_ms()
local place, number, due = unpack(redis.call('HMGET', state, 'at', 'walk', 'due'))
number = number or ''

if id == 'begin' then
  if place then return { number, place } end
  if due and now < tonumber(due) then return {} end
  number = string.format('%.0f', now)
  redis.call('DEL', counting, changed)
  redis.call('HSET', state, 'at', '', 'walk', number)
  return { number, '' }
end

if id == 'add' then
  local once = prefix .. ':census-call:' .. ARGV[2]
  if not redis.call('SET', once, 1, 'NX', 'PX', 60000) then return 0 end
  local owner, bytes, folder = ARGV[3], ARGV[4], ARGV[5]
  redis.call('HINCRBY', stored, owner, bytes)
  if not place then return 1 end
  if place >= folder .. '\127' then
    redis.call('HINCRBY', counting, owner, bytes)
  else
    -- The walk has yet to pass it, or is passing it now: what it finds there is no matter.
    if ARGV[6] == '' then
      redis.call('HDEL', changed, folder)
    else
      redis.call('HSET', changed, folder, ARGV[6] .. ' ' .. owner)
    end
    redis.call('HINCRBY', state, 'notes', 1)
  end
  return 1
end

if number ~= ARGV[2] or place ~= ARGV[3] then return 0 end

if id == 'note' then
  if (redis.call('HGET', state, 'notes') or '0') ~= ARGV[5] then return -1 end
  for owner, bytes in pairs(cjson.decode(ARGV[6])) do
    redis.call('HINCRBY', counting, owner, string.format('%.0f', bytes))
  end
  redis.call('HSET', state, 'at', ARGV[4])
  return 1
end

if id == 'publish' then
  redis.call('HSET', counting, ' measured', now)
  redis.call('RENAME', counting, stored)
  redis.call('DEL', changed)
  redis.call('HSET', state, 'due', string.format('%.0f', now + tonumber(ARGV[4])))
  redis.call('HDEL', state, 'at')
  return 1
end
