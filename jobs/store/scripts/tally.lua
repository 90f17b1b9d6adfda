-- Note what runs used, each once. ARGV[1]: their owner. ARGV[2]: the day they began. ARGV[3]: a JSON object: the ms
-- times GPUs of each run. ARGV[4]: the same of the parts of runs within that day, each as `ms class`.
local usage, day = prefix .. ':usage:' .. id, ARGV[2]
local runs, known = usage .. ':' .. day, tonumber(redis.call('HGET', usage, day))
for run, part in pairs(cjson.decode(ARGV[4] or '{}')) do note_part(id, day, run, part) end
local told, sum = cjson.decode(ARGV[3]), 0
if known and redis.call('EXISTS', runs) == 0 then
  -- A release before this one let go of the runs after 40 days and kept their sum: which of these it has is not known.
  for _, ms in pairs(told) do sum = sum + ms end
  if sum > known then redis.call('HSET', usage, day, string.format('%.0f', sum)) end
  return 1
end
for run, ms in pairs(told) do tally(id, day, run, ms) end
return 1
