-- Release a lock. ARGV[1]: its name. ARGV[2]: its holder; a lock of another holder stays.
local lock = prefix .. ':lock:' .. ARGV[1]
if redis.call('GET', lock) == ARGV[2] then redis.call('DEL', lock) end
return 0
