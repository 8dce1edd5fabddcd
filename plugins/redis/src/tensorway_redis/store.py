"""The store `redis`: see `tensorway.rendezvous.contract.Store`.

May import tensorway's ground, the rendezvous' contract and `reopening`, and its own package. Revisions are a counter in
Redis; what is compared, is compared by the script that writes.
"""

from __future__ import annotations

import math
import random
import re
import secrets
import threading
import time
from typing import Any, Final, Literal

from tensorway.errors import DeadlineExceeded, LeaseLost, RecordRefused, TensorwayError
from tensorway.rendezvous.contract import Ability, Event, Record, check_key, end_of
from tensorway.rendezvous.reopening import Reopening
from tensorway_redis.connections import Connections
from tensorway_redis.options import RedisOptions

#: How often clients that watch let Redis look for leases that have ended, in seconds: all together so often, and each
#: of them at least so often, for when the others are gone.
_LOOK: Final = 0.4
_LOOK_AT_LEAST: Final = 3.5
_KINDS: Final[dict[bytes, Literal["put", "deleted", "expired"]]] = {b"p": "put", b"d": "deleted", b"e": "expired"}


class RedisStore:
    """Threads may share it."""

    name = "redis"
    abilities: frozenset[Ability] = frozenset({"lease", "watch", "compare"})
    #: A password of Redis is its operator's, and often everybody's.
    authenticates = False

    def __init__(self, options: RedisOptions) -> None:
        self._connections = Connections(options)
        self.address = self._connections.address
        self._watches: set[RedisChanges] = set()
        self._lock = threading.Lock()
        self._name = secrets.token_hex(8)
        #: When a call of ours let Redis look, and for how long the others can be relied on after that.
        self._looked = 0.0
        self._pause = _LOOK

    def put(self, key: str, value: bytes, lease: str, expected: int | None, seconds: float) -> int:
        """Write."""
        wanted = "" if expected is None else str(expected)
        call = self._connections.call
        answer = call("put", key, lease, wanted, value, seconds=seconds, again=expected is None)
        return int(_checked(answer, key, expected)[0])

    def get(self, key: str, seconds: float) -> Record | None:
        """Read."""
        records = _records(self._connections.call("get", key, seconds=seconds))
        return records[0] if records else None

    def list(self, prefix: str, seconds: float) -> list[Record]:
        """All below a prefix; the script's index is sorted by key."""
        return _records(self._connections.call("list", prefix, end_of(prefix), seconds=seconds))

    def delete(self, key: str, expected: int | None, seconds: float) -> bool:
        """Remove."""
        wanted = "" if expected is None else str(expected)
        answer = self._connections.call("delete", key, wanted, seconds=seconds, again=expected is None)
        return int(_checked(answer, key, expected)[0]) > 0

    def grant(self, ttl: float, seconds: float) -> str:
        """A new lease; nobody can guess its name."""
        lease = secrets.token_hex(16)
        self._connections.call("grant", lease, str(math.ceil(ttl * 1000)), seconds=seconds)
        return lease

    def keep(self, lease: str, seconds: float) -> bool:
        """Begin its time anew."""
        kept = int(self._connections.call("keep", lease, seconds=seconds)[1]) > 0
        self._looked = time.monotonic()  # every call of the script does, and this one comes often
        return kept

    def revoke(self, lease: str, seconds: float) -> None:
        """End it."""
        self._connections.call("revoke", lease, seconds=seconds)

    def changes(self, prefix: str, seconds: float) -> RedisChanges:
        """Watch a prefix."""
        changes = RedisChanges(self, self._connections, prefix)
        changes.begin(seconds)
        with self._lock:
            self._watches.add(changes)
        return changes

    def look(self, seconds: float) -> None:
        """Let Redis end the leases whose time is over; once for all watches of this client."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked < self._pause:
                return
            self._looked = now
        counts = str(math.ceil((self._pause + 1.0) * 1000))
        many = int(self._connections.call("look", self._name, counts, seconds=seconds)[1])
        self._pause = _LOOK if many < 2 else min(_LOOK * many, _LOOK_AT_LEAST) * random.uniform(0.5, 1.0)

    def forget(self, changes: RedisChanges) -> None:
        """A watch is closed."""
        with self._lock:
            self._watches.discard(changes)

    def close(self) -> None:
        """Disconnect."""
        with self._lock:
            watches = list(self._watches)
        for changes in watches:
            changes.close()
        self._connections.close()


class RedisChanges(Reopening[Any]):
    """See `contract.Changes`."""

    def __init__(self, store: RedisStore, connections: Connections, prefix: str) -> None:
        super().__init__(prefix, store.forget)
        self._store = store
        self._connections = connections
        # Redis' patterns have special characters; a key may have them, too.
        self._pattern = re.sub(r"([*?\[\]\\^-])", r"\\\1", connections.channel + prefix) + "*"

    def _open(self, seconds: float) -> Any:
        return self._connections.subscribed(self._pattern, seconds)

    def _told(self, connection: Any, until: float) -> list[Event]:
        """All events that have arrived; waits for the first, and no longer than until it is time to look again."""
        seconds = max(0.0, min(_LOOK, until - time.monotonic()))
        self._look(seconds)
        events: list[Event] = []
        try:
            while connection.can_read(timeout=0 if events else seconds):
                events += self._event(connection.read_response())
        except self._connections.trouble:
            self._cut()
        return events

    def _shut(self, connection: Any) -> None:
        connection.disconnect()

    def _look(self, seconds: float) -> None:
        try:
            self._store.look(max(seconds, 0.05))
        except DeadlineExceeded:
            pass  # the connection of the watch tells what became of Redis

    def _event(self, message: Any) -> list[Event]:
        kind, _, channel, data = message
        if kind != b"pmessage":
            return []
        what, _, value = data[1:].partition(b"\n")
        known = _KINDS.get(data[:1])
        for record in _records([b"ok", channel[len(self._connections.channel) :], what, value]):
            if known is not None and record.key.startswith(self._prefix):
                return [Event(known, record.key, record if known == "put" else None)]
        return []  # nobody of ours said that


def _checked(answer: list[Any], key: str, expected: int | None) -> list[Any]:
    """What the script returned, less its first word."""
    word, *rest = answer
    if word == b"changed":
        raise RecordRefused.changed(key, expected or 0, int(rest[0]))
    if word == b"lost":
        raise LeaseLost.ended(f"{key} was to be put under a lease.")
    return rest


def _records(answer: list[Any]) -> list[Record]:
    """The records of an answer: key, revision and lease, value; what can be none of ours is passed over."""
    rows, records = iter(answer[1:]), []
    for key, what, value in zip(rows, rows, rows, strict=False):
        try:
            number, _, lease = what.decode("ascii").partition(":")
            records.append(Record(check_key(key.decode("ascii")), value or b"", int(number), lease))
        except (ValueError, AttributeError, TensorwayError):
            continue
    return records
