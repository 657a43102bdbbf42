"""What the rows' Lua scripts do in Redis, where nothing comes between a comparison and a write."""

from functools import cache
from hashlib import sha1

__all__ = ["DECODE", "DELETE", "REPLACE", "WRITE", "script_sha"]

# A protobuf Timestamp's seconds and nanoseconds: first as nearly every one is written, of a second
# from 1978 to 3058 in five bytes, then whatever else a writer may have put there.
DECODE = """
local function decode(bytes)
  local tag, a, b, c, d, e, more, f, g, h, i, j = string.byte(bytes, 1, 12)
  if tag == 8 and e and a > 127 and b > 127 and c > 127 and d > 127 and e < 128
      and (not more or (more == 16 and #bytes < 13)) then
    local nanos = f or 0
    if g then nanos = nanos - 128 + g * 128 end
    if h then nanos = nanos - 16384 + h * 16384 end
    if i then nanos = nanos - 2097152 + i * 2097152 end
    if j then nanos = nanos - 268435456 + j * 268435456 end
    return a + b * 128 + c * 16384 + d * 2097152 + e * 268435456 - 270549120, nanos
  end
  local seconds, nanos, at = 0, 0, 1
  while at <= #bytes do
    local tag, value, scale = string.byte(bytes, at), 0, 1
    at = at + 1
    repeat
      local byte = string.byte(bytes, at)
      at = at + 1
      value = value + (byte % 128) * scale
      scale = scale * 128
    until byte < 128
    if tag == 8 then seconds = value elseif tag == 16 then nanos = value end
  end
  return seconds, nanos
end
"""
# Rows where none as new stands, and behind them a topic's marks.
#
# KEYS: entities, then the marks, if any. ARGV: how many entities, ttl (0: none), the timestamp's
# field, `RowPacker`'s guards and rows, how many strings a row is of; then how many pairs (name,
# number known to be held) come first, and pairs (name, number to move up to). Gives 1, or 0 where
# less is held (then no mark is moved), and which of the entities have a newer row.
#
# One string for all rows: Redis copies every argument into Lua before a script begins.
WRITE = (
    DECODE
    + """
local call, unpack, select = redis.call, cmsgpack.unpack_limit, select
local count, width = tonumber(ARGV[1]), tonumber(ARGV[6])
local ttl, field, rows = ARGV[2], ARGV[3], ARGV[5]
local guards, answer = {}, {1}
if count > 0 then guards = {cmsgpack.unpack(ARGV[4])} end
for each = 1, count do
  local key, at = KEYS[each], 3 * each
  local standing = call('HGET', key, field)
  local order = -1
  if standing then
    local seconds, nanos = decode(standing)
    order = seconds - guards[at - 2]
    if order == 0 then order = nanos - guards[at - 1] end
  end
  if order < 0 then
    local new = call('HSET', key, select(2, unpack(rows, width, guards[at])))
    if ttl ~= '0' then call('EXPIRE', key, ttl)
    elseif new > 0 then call('PERSIST', key) end -- a key that was to end held no values
  elseif order > 0 then
    answer[#answer + 1] = each
  end
end
local marks = KEYS[count + 1]
if marks then
  local held = 7 + 2 * tonumber(ARGV[7])
  for i = 8, held, 2 do
    if tonumber(call('HGET', marks, ARGV[i]) or '0') < tonumber(ARGV[i + 1]) then
      answer[1] = 0
      return answer
    end
  end
  for i = held + 1, #ARGV, 2 do
    if tonumber(call('HGET', marks, ARGV[i]) or '0') < tonumber(ARGV[i + 1]) then
      call('HSET', marks, ARGV[i], ARGV[i + 1])
    end
  end
end
return answer
"""
)
# KEYS: entity. ARGV: the timestamp's value that was seen (empty: none), ttl (0: none), then the
# hash's fields and values, the timestamp's first. -1 where another timestamp stands.
REPLACE = """
if (redis.call('HGET', KEYS[1], ARGV[3]) or '') ~= ARGV[1] then return -1 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
if ARGV[2] ~= '0' then redis.call('EXPIRE', KEYS[1], ARGV[2])
else redis.call('PERSIST', KEYS[1]) end
return 1
"""
# KEYS: entity. ARGV: seconds, nanos, guard in seconds, the timestamp's field and value, then the
# view's fields. The key, which other views of the entity share, ends with its guard when nothing
# but timestamps is left. Gives -1 where a newer row stands, and changes nothing then.
DELETE = (
    DECODE
    + """
local seconds, nanos = tonumber(ARGV[1]), tonumber(ARGV[2])
local standing = redis.call('HGET', KEYS[1], ARGV[4])
if standing then
  local stood_s, stood_n = decode(standing)
  if stood_s > seconds or (stood_s == seconds and stood_n > nanos) then return -1 end
end
redis.call('HDEL', KEYS[1], unpack(ARGV, 6))
redis.call('HSET', KEYS[1], ARGV[4], ARGV[5])
for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.sub(name, 1, 4) ~= '_ts:' then return 1 end
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""
)


@cache
def script_sha(script: str) -> str:
    """Redis' name of a script."""
    return sha1(script.encode(), usedforsecurity=False).hexdigest()
