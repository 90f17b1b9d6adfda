-- Search a part of a list of jobs, newest first, without sending their records to the caller.
-- ARGV[1]: the list's key after the prefix. ARGV[2]: where to start, as in ZREVRANGEBYLEX. ARGV[3]: how many jobs to
-- examine. ARGV[4]: a JSON object with conditions, all of which must hold:
--   metadata  pairs in the job's metadata            text  a text in its spec
-- Returns {number of jobs examined, id of the last one, ids found}.
local order = cjson.decode(ARGV[4])
local ids = redis.call('ZREVRANGEBYLEX', prefix .. ':' .. id, ARGV[2], '-', 'LIMIT', 0, ARGV[3])

local function has_pairs(text)
  if not text or text == '' or text == '{}' then return false end
  local metadata = cjson.decode(text)
  for name, value in pairs(order.metadata) do
    if metadata[name] ~= value then return false end
  end
  return true
end

local found = {}
for _, name in ipairs(ids) do
  local metadata, spec = unpack(redis.call('HMGET', prefix .. ':job:' .. name,
    order.metadata and 'metadata' or '', order.text and 'spec' or ''))
  local holds = not order.metadata or has_pairs(metadata)
  if holds and order.text then holds = spec and string.find(spec, order.text, 1, true) end
  if holds then found[#found + 1] = name end
end
return { #ids, ids[#ids] or '', found }
