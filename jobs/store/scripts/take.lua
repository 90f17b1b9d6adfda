-- Take one token from a key's bucket. ARGV: the key's id, requests per second, size of the bucket.
-- Returns {0, or the ms to wait if the bucket is empty; the whole tokens that are left}.
local rate, size = tonumber(ARGV[2]), tonumber(ARGV[3])
local bucket = prefix .. ':rate:' .. id
local now = now_ms()
local left, at = unpack(redis.call('HMGET', bucket, 'left', 'at'))
left = math.min(size, (tonumber(left) or size) + math.max(0, now - (tonumber(at) or now)) * rate / 1000)
local wait = 0
if left >= 1 then left = left - 1 else wait = math.ceil((1 - left) * 1000 / rate) end
redis.call('HSET', bucket, 'left', left, 'at', now)
redis.call('PEXPIRE', bucket, math.ceil(size / rate * 1000) + 1000)
return { wait, math.floor(left) }
