"""What Redis does by itself, each in one piece: commit a batch, load states, forget, sweep, lease, close, fold actions.

The scripts know how a conversation's bytes begin (`layout`), and no more of what is in them. A script answers with a
value where it refuses, never with an error. It reads and compares before it writes; its first write is one that Redis
refuses when memory is out, so nothing is half written. (Once a script has written, Redis lets it end.) Redis undoes
nothing when a script fails in the middle, as it would on a foreign key of ours: so a batch can be committed once more
after that, and comes to the same.

Every key of a script lies in one slot of a cluster, by its tag. Declared are the keys that the caller can know. The
others (a ranking, an hour's sums, findings) are named by the script: they share the tag, so they are on the same
server. One declared key never exists: while a cluster moves a slot to another server it answers TRYAGAIN to whoever
names a key that is not there, so that no script sees half a partition.
"""

from __future__ import annotations

from typing import Final

from monitor.store.layout import HEAD, LABEL, POINT, THERE, TOLD

__all__ = ["CLOSE", "COMMIT", "FOLD_ACTIONS", "FORGET", "LEASE", "PRUNE", "RELEASE", "SWEEP"]

# Keep a finding once; whether it is new. The outbox has its own copy, which nothing expires.
_TELL = """
local function tell(tag, id, conversation, score, body)
  if redis.call('HEXISTS', tag .. 'f:' .. conversation, id) == 1 then return false end
  redis.call('ZADD', tag .. 'findings', score, id .. '\\0' .. conversation)
  redis.call('XADD', tag .. 'outbox', '*', 'f', body)
  redis.call('HSET', tag .. 'f:' .. conversation, id, body)
  return true
end
"""

# KEYS: position, a key that never exists, then the conversations'. ARGV: see `RedisStore.commit`.
COMMIT: Final = (
    f"local FIXED, POINT, THERE, TOLD = {LABEL.size + HEAD.size}, {POINT.size}, {THERE}, {TOLD}"
    + _TELL
    + """
local call, sub, pack, unpack_bytes = redis.call, string.sub, struct.pack, struct.unpack
local next_argument = 0
local function take()
  next_argument = next_argument + 1
  return ARGV[next_argument]
end

local tag, schema = take(), take()
local expected_offset, expected_revision, offset = take(), take(), take()
local topic_id, partitions, watermark, behind, config = take(), take(), take(), take(), take()
local ttl, most, kept = take(), tonumber(take()) * POINT, take()

local stored = call('HMGET', KEYS[1], 'schema', 'offset', 'revision', 'topic_id', 'partitions', 'watermark')
if stored[1] and stored[1] ~= schema then return {3, stored[1]} end
if (stored[2] or '') ~= expected_offset or (stored[3] or '') ~= expected_revision then
  return {1, stored[2], stored[3]}
end
local other_topic = stored[4] and stored[4] ~= '' and topic_id ~= '' and stored[4] ~= topic_id
local other_count = stored[5] and stored[5] ~= '0' and partitions ~= '0' and stored[5] ~= partitions
if other_topic or other_count then return {2, stored[4], stored[5]} end

call('HSETNX', KEYS[1], 'schema', schema)

local told = {}
for _ = 1, tonumber(take()) do
  local id, conversation, score, body = take(), take(), take(), take()
  if tell(tag, id, conversation, score, body) then
    told[conversation] = true
    call('EXPIRE', tag .. 'f:' .. conversation, ttl)
  end
end
if next(told) then call('ZREMRANGEBYRANK', tag .. 'findings', kept, -1) end

-- The conversations, by label: how many, then for each its risk for the ranking, session and state, new points.
local name_begins = #tag + 3
local labelled = tonumber(take())
local k, a = 2, next_argument
for _ = 1, labelled do
  local label, deployment, count = ARGV[a + 1], ARGV[a + 2], tonumber(ARGV[a + 3])
  a = a + 3
  local number = call('HGET', tag .. 'labels', label)
  if not number then
    number = tostring(call('HLEN', tag .. 'labels') / 2)
    call('HSET', tag .. 'labels', label, number, number, label)
  end
  call('SADD', tag .. 'rankings', deployment)
  number = tonumber(number)
  local label_bytes, ranking = pack('<I4', number), tag .. 'r:' .. deployment
  for j = k + 1, k + count do
    local key = KEYS[j]
    local conversation = sub(key, name_begins)
    local risk, head, points = ARGV[a + 1], ARGV[a + 2], ARGV[a + 3]
    a = a + 3
    local old = call('GET', key)
    local is_told = told[conversation]
    if old then
      local old_number, begin, _, flags, _, responses = unpack_bytes('<I4I4I4BBI4', old)
      -- Numbers follow from the count of responses. Points that come once more replace themselves and what follows;
      -- where some are missing in between, the old ones go.
      local last = unpack_bytes('<I4', head, 11) - #points / POINT
      local ends = #old - (responses - last) * POINT
      if last <= responses and ends > begin then points = sub(old, begin + 1, ends) .. points end
      if old_number ~= number and flags % 2 == THERE then
        local was = cjson.decode(call('HGET', tag .. 'labels', old_number))[1]
        if was ~= deployment then call('ZREM', tag .. 'r:' .. was, conversation) end
      end
      is_told = is_told or flags >= TOLD
    end
    if #points > most then points = sub(points, -most) end
    if is_told then
      head = sub(head, 1, 8) .. string.char(string.byte(head, 9) + TOLD) .. sub(head, 10)
      call('EXPIRE', tag .. 'f:' .. conversation, ttl)
    end
    call('SETEX', key, ttl, label_bytes .. head .. points)
    call('ZADD', ranking, risk, conversation)
  end
  k = k + count
end

-- The others: only duplicates of them have come, so their state alone has changed.
for j = k + 1, #KEYS do
  local key, value = KEYS[j], pack('<I4', 0) .. ARGV[a + 1]
  a = a + 1
  local old = call('GET', key)
  if old then
    local begin, ends = unpack_bytes('<I4', old, 5), FIXED + string.byte(old, FIXED)
    local state = sub(value, FIXED + 1)
    value = sub(old, 1, 4) .. pack('<I4', ends + #state) .. sub(value, 9, 12) .. sub(old, 13, ends) .. state
      .. sub(old, begin + 1)
  end
  call('SETEX', key, ttl, value)
end

-- What adds up comes last, and is touched before: should anything fail, the batch can be committed once more.
for _, adding in ipairs({false, true}) do
  next_argument = a
  for _ = 1, tonumber(take()) do
    local outcome, count = take(), take()
    if adding then call('HINCRBY', tag .. 'counts', outcome, count) else call('HGET', tag .. 'counts', outcome) end
  end
  for _ = 1, tonumber(take()) do
    local hour, field, responses, z, warned = take(), take(), take(), take(), take()
    local old = call('HGET', tag .. 's:' .. hour, field)
    if adding then
      if old then
        local r, s, w = string.match(old, '^(%d+) (%-?%d+) (%d+)$')
        responses, z, warned = r + responses, s + z, w + warned
      end
      call('HSET', tag .. 's:' .. hour, field, string.format('%.0f %.0f %.0f', responses, z, warned))
    else
      call('ZADD', tag .. 'hours', hour, hour)
    end
  end
end

if watermark ~= '' and not (stored[6] and tonumber(stored[6]) >= tonumber(watermark)) then
  call('HSET', KEYS[1], 'watermark', watermark)
end
if config ~= '' then call('HSET', KEYS[1], 'config', config) end
if topic_id ~= '' or not stored[4] then call('HSET', KEYS[1], 'topic_id', topic_id) end
if partitions ~= '0' or not stored[5] then call('HSET', KEYS[1], 'partitions', partitions) end
call('HSET', KEYS[1], 'offset', offset, 'revision', stored[3] or 0, 'behind', behind)
return {0}
"""
)

# KEYS: position, a key that never exists, conversation. ARGV: tag, conversation. How many things were deleted.
FORGET: Final = """
local tag, conversation = ARGV[1], ARGV[2]
local gone = 0
local value = redis.call('GETRANGE', KEYS[3], 0, 15)
if value ~= '' then
  local label, _, _, flags = struct.unpack('<I4I4I4B', value)
  if flags % 2 == 1 then
    local deployment = cjson.decode(redis.call('HGET', tag .. 'labels', label))[1]
    redis.call('ZREM', tag .. 'r:' .. deployment, conversation)
  end
  gone = gone + redis.call('DEL', KEYS[3])
end
for _, id in ipairs(redis.call('HKEYS', tag .. 'f:' .. conversation)) do
  redis.call('ZREM', tag .. 'findings', id .. '\\0' .. conversation)
end
gone = gone + redis.call('DEL', tag .. 'f:' .. conversation)
if redis.call('HEXISTS', KEYS[1], 'offset') == 1 then redis.call('HINCRBY', KEYS[1], 'revision', 1) end
return gone
"""

# KEYS: set of rankings, ranking, a key that never exists, conversations. ARGV: deployment, their names in the ranking.
SWEEP: Final = """
local swept = 0
for i = 4, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then swept = swept + redis.call('ZREM', KEYS[2], ARGV[i - 2]) end
end
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('SREM', KEYS[1], ARGV[1]) end
return swept
"""

# KEYS: lease. ARGV: holder, milliseconds.
LEASE: Final = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

# KEYS: lease. ARGV: holder.
RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 0
"""

# KEYS: what is closed, a key that never exists. ARGV: tag, expected, through, closed, how many findings to keep, then
# id, score and body of each finding.
CLOSE: Final = (
    _TELL
    + """
local tag, expected, through, closed, kept = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local stored = redis.call('HGET', KEYS[1], 'through')
if (stored or '') ~= expected then return {1, stored} end
redis.call('HSET', KEYS[1], 'through', through, 'closed', closed)
for i = 6, #ARGV, 3 do tell(tag, ARGV[i], '', ARGV[i + 1], ARGV[i + 2]) end
for _, member in ipairs(redis.call('ZRANGE', tag .. 'findings', kept, -1)) do
  redis.call('HDEL', tag .. 'f:', string.sub(member, 1, -2))
  redis.call('ZREM', tag .. 'findings', member)
end
return {0}
"""
)

# KEYS: a partition's hours, a key that never exists. ARGV: tag, the oldest hour to keep.
PRUNE: Final = """
for _, hour in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[2])) do
  redis.call('DEL', ARGV[1] .. 's:' .. hour)
  redis.call('ZREM', KEYS[1], hour)
end
return 0
"""

# KEYS: position, values, keys. ARGV: topic id, expected, offset, then key, whether there is a value, and the value.
FOLD_ACTIONS: Final = """
local stored = redis.call('HMGET', KEYS[1], 'topic_id', 'offset')
local offset = stored[1] == ARGV[1] and stored[2] or '0'
if offset ~= ARGV[2] then return {1, offset} end
redis.call('HSET', KEYS[1], 'topic_id', ARGV[1], 'offset', ARGV[3])
if offset == '0' then redis.call('DEL', KEYS[2], KEYS[3]) end
for i = 4, #ARGV, 3 do
  if ARGV[i + 1] == '1' then
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 2])
    redis.call('ZADD', KEYS[3], 0, ARGV[i])
  else
    redis.call('HDEL', KEYS[2], ARGV[i])
    redis.call('ZREM', KEYS[3], ARGV[i])
  end
end
return {0}
"""
