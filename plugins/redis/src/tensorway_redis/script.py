"""What happens in Redis in one step: one script for all calls. Imports nothing.

Everything that changes records goes through it, and it first ends the leases whose time is over by the server's clock.
So no answer ever shows a record of a lease that has ended, and whoever calls next tells the watches; clients that watch
call for that, together twice a second: so each is told how many they are. All records are in a few keys that are
declared, as a cluster demands.
"""

from __future__ import annotations

from typing import Final

#: The keys that the script is given, after the namespace.
KEYS: Final = ("revision", "index", "values", "about", "leases", "ttls", "held", "lookers")

SCRIPT: Final = """
local revision, index, values, about, leases, ttls, held, lookers = unpack(KEYS)
local call, channel, name = ARGV[1], ARGV[2], ARGV[3]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function tell(kind, key, what, value)
  redis.call('PUBLISH', channel .. key, kind .. what .. '\\n' .. value)
end

local function number_of(what) return what and string.match(what, '^%d+') or '0' end
local function lease_of(what) return string.match(what, ':(.*)$') end

local function release(key, what)
  local lease = lease_of(what)
  if lease ~= '' then redis.call('ZREM', held, lease .. ':' .. key) end
end

local function remove(kind, key)
  local what = redis.call('HGET', about, key)
  if not what then return 0 end
  release(key, what)
  redis.call('ZREM', index, key)
  redis.call('HDEL', values, key)
  redis.call('HDEL', about, key)
  redis.call('INCR', revision)
  tell(kind, key, what, '')
  return 1
end

local function finish(kind, lease)
  for _, member in ipairs(redis.call('ZRANGEBYLEX', held, '[' .. lease .. ':', '(' .. lease .. ';')) do
    remove(kind, string.sub(member, #lease + 2))
  end
  redis.call('ZREM', leases, lease)
  redis.call('HDEL', ttls, lease)
end

for _, lease in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now)) do finish('e', lease) end

if call == 'put' then
  local lease, expected, value = ARGV[4], ARGV[5], ARGV[6]
  local what = redis.call('HGET', about, name)
  if expected ~= '' and expected ~= number_of(what) then return {'changed', number_of(what)} end
  if lease ~= '' and not redis.call('ZSCORE', leases, lease) then return {'lost'} end
  -- First what is refused when there is no memory.
  local new = string.format('%.0f', redis.call('INCR', revision)) .. ':' .. lease
  if what then release(name, what) end
  redis.call('HSET', values, name, value)
  redis.call('HSET', about, name, new)
  redis.call('ZADD', index, 0, name)
  if lease ~= '' then redis.call('ZADD', held, 0, lease .. ':' .. name) end
  tell('p', name, new, value)
  return {'ok', number_of(new)}
elseif call == 'get' then
  local what = redis.call('HGET', about, name)
  if not what then return {'ok'} end
  return {'ok', name, what, redis.call('HGET', values, name)}
elseif call == 'list' then
  local rows = {'ok'}
  for _, key in ipairs(redis.call('ZRANGEBYLEX', index, '[' .. name, '(' .. ARGV[4])) do
    rows[#rows + 1] = key
    rows[#rows + 1] = redis.call('HGET', about, key)
    rows[#rows + 1] = redis.call('HGET', values, key)
  end
  return rows
elseif call == 'delete' then
  local at = number_of(redis.call('HGET', about, name))
  if ARGV[4] ~= '' and ARGV[4] ~= at then return {'changed', at} end
  return {'ok', remove('d', name)}
elseif call == 'grant' then
  redis.call('ZADD', leases, now + ARGV[4], name)
  redis.call('HSET', ttls, name, ARGV[4])
elseif call == 'keep' then
  local ttl = redis.call('HGET', ttls, name)
  if not ttl then return {'ok', 0} end
  redis.call('ZADD', leases, now + ttl, name)
  return {'ok', 1}
elseif call == 'revoke' then
  finish('d', name)
elseif call == 'look' then
  -- Who has not looked for as long as it said is gone.
  redis.call('ZREMRANGEBYSCORE', lookers, '-inf', now)
  redis.call('ZADD', lookers, now + ARGV[4], name)
  return {'ok', redis.call('ZCARD', lookers)}
end
return {'ok'}
"""
