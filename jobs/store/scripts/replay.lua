-- Restore events that Valkey lost, with their numbers. ARGV[2]: [{seq, epoch, type, time, step, data, n}] as JSON, in
-- order. Changes nothing for events that exist, and nothing once this server or a restored record has later events.
local last, by = unpack(redis.call('HMGET', job, 'event_seq', 'server'))
if last and (not by or by == server()) then return 0 end
local events = prefix .. ':events:' .. id
local newest = redis.call('XREVRANGE', events, '+', '-', 'COUNT', 1)
local top = newest[1] and tonumber(string.match(newest[1][1], '^%d+')) or 0
for _, event in ipairs(cjson.decode(ARGV[2])) do
  if tonumber(event.seq) > top then
    redis.call('XADD', events, event.seq .. '-0', 'type', event.type, 'epoch', event.epoch, 'time', event.time,
      'step', event.step, 'data', event.data, 'n', event.n)
    if last then redis.call('HSET', job, 'event_seq', event.seq) end
  end
end
return 1
