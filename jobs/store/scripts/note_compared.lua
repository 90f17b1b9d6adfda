-- Record that a server's records were compared with the bucket. ARGV[2]: the server's identity.
-- Returns 1, or 0 if another server has replaced it meanwhile, which must be compared too.
if server() ~= ARGV[2] then return 0 end
redis.call('HSET', prefix .. ':server', 'compared', server(), 'seen', now_ms())
return 1
