-- Search a part of a list of jobs, newest first, without sending their records to the caller.
-- ARGV[1]: the list's key after the prefix. ARGV[2]: where to start, as in ZREVRANGEBYLEX. ARGV[3]: how many jobs to
-- examine. ARGV[4]: a JSON object with conditions, all of which must hold:
--   metadata  pairs in the job's metadata            text      a text in its spec
--   words     a text, in lower case, in its id, name, model or metadata
--   kind      its kind                               priority  its priority
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

local function has_words(name, metadata, spec)
  local model = type(spec.model) == 'table' and spec.model.name or ''
  local text = table.concat({ name, tostring(spec.name or ''), tostring(model), metadata or '' }, '\n')
  return string.find(string.lower(text), order.words, 1, true)
end

local found = {}
for _, name in ipairs(ids) do
  local metadata, spec = unpack(redis.call('HMGET', prefix .. ':job:' .. name,
    (order.metadata or order.words) and 'metadata' or '', (order.text or order.words or order.kind) and 'spec' or ''))
  local holds = not order.metadata or has_pairs(metadata)
  if holds and order.text then holds = spec and string.find(spec, order.text, 1, true) end
  if holds and (order.words or order.kind) then
    local readable, asked = pcall(cjson.decode, spec or '{}')
    asked = readable and type(asked) == 'table' and asked or {}
    if order.kind then holds = (asked.kind or 'training') == order.kind end
    if holds and order.words then holds = has_words(name, metadata, asked) end
  end
  if holds and order.priority then
    local priority = redis.call('HGET', prefix .. ':job:' .. name, 'priority')
    if not priority or priority == '' then priority = 'normal' end
    holds = priority == order.priority
  end
  if holds then found[#found + 1] = name end
end
return { #ids, ids[#ids] or '', found }
