-- Return whether this server's records were compared with the bucket, and then record that it was seen.
-- Returns {this server, the one that was compared or '', ms when that was last seen or '', now}.
local known, seen = unpack(redis.call('HMGET', prefix .. ':server', 'compared', 'seen'))
local now = now_ms()
if known == server() then redis.call('HSET', prefix .. ':server', 'seen', now) end
return { server(), known or '', seen or '', now }
