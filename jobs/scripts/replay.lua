-- Put events back that Valkey lost, numbered as they were. ARGV[2]: [{seq, epoch, type, time, step, data}] as JSON, in
-- order. Nothing once the job has its record again, and nothing twice.
if redis.call('EXISTS', job) == 1 then return 0 end
local events = prefix .. ':events:' .. id
local newest = redis.call('XREVRANGE', events, '+', '-', 'COUNT', 1)
local last = newest[1] and tonumber(string.match(newest[1][1], '^%d+')) or 0
for _, event in ipairs(cjson.decode(ARGV[2])) do
  if tonumber(event.seq) > last then
    redis.call('XADD', events, event.seq .. '-0', 'type', event.type, 'epoch', event.epoch, 'time', event.time,
      'step', event.step, 'data', event.data)
  end
end
return 1
