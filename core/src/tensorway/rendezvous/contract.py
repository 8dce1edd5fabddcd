"""How endpoints find each other: what is asked of a store of records, and what every store is given.

Room `rendezvous`; may import the ground. Whoever drives a new store writes a `Store`, some hundred lines; leases that
keep themselves, watches, waits, seals and deadlines come from `Rendezvous`. `tensorway.testing.RendezvousSuite` proves
it.
"""

from __future__ import annotations

from typing import Final, Literal, Protocol

import attrs

from tensorway.errors import RecordRefused

MAX_KEY: Final = 256
#: A description of an endpoint with all its regions fits.
MAX_VALUE: Final = 16 << 20
#: Shorter ones are lost to a busy machine, longer ones tell nobody anything.
TTL: Final = (0.5, 3600.0)

#: What a store may be able to do beyond put, get, list and delete.
Ability = Literal["lease", "watch", "compare", "durable"]


@attrs.frozen
class Record:
    """A value under a key."""

    key: str
    value: bytes = attrs.field(repr=False)
    #: Grows with every change of the key; 0 stands for a key that is not there.
    revision: int
    #: The lease that it ends with; empty if it stays.
    lease: str = ""


@attrs.frozen
class Event:
    """What became of a key. `reset`: some changes were missed, so read again whatever you need."""

    kind: Literal["put", "deleted", "expired", "reset"]
    key: str
    record: Record | None = None


class Changes(Protocol):
    """Changes below a prefix, from when this was made on."""

    def next(self, seconds: float) -> list[Event]:
        """What happened; waits for the first of it, and is empty when nothing did in time."""
        ...

    def close(self) -> None:
        """No more; whoever waits for the next should be woken."""
        ...


class Store(Protocol):
    """What `Rendezvous` asks of a store. Calls come from several threads, and none takes longer than its seconds.

    What a store raises: `DeadlineExceeded` when it did not answer, `RecordRefused` when it answered no, `LeaseLost`,
    `Unauthenticated`.
    """

    #: The name that it is offered under: `direct`, `etcd`.
    name: str
    abilities: frozenset[Ability]
    #: Whether only those who know the secret can write; if not, every record is sealed with it.
    authenticates: bool

    def put(self, key: str, value: bytes, lease: str, expected: int | None, seconds: float) -> int:
        """Write; returns the new revision. With `expected`, only if that is the revision now (0: not there)."""
        ...

    def get(self, key: str, seconds: float) -> Record | None:
        """Read."""
        ...

    def list(self, prefix: str, seconds: float) -> list[Record]:
        """All records below a prefix, by key."""
        ...

    def delete(self, key: str, expected: int | None, seconds: float) -> bool:
        """Remove; whether it was there. With `expected`, only at that revision."""
        ...

    def grant(self, ttl: float, seconds: float) -> str:
        """A new lease: its records go when nobody has kept it for so many seconds."""
        ...

    def keep(self, lease: str, seconds: float) -> bool:
        """Begin the lease's time anew; False when it has ended."""
        ...

    def revoke(self, lease: str, seconds: float) -> None:
        """End it, and its records with it."""
        ...

    def changes(self, prefix: str, seconds: float) -> Changes:
        """Watch a prefix from now on."""
        ...

    def close(self) -> None:
        """Let go of the store; called once."""
        ...


def check_key(key: str, what: str = "key") -> str:
    """A key or prefix that every store can hold; raises `RecordRefused`."""
    if 0 < len(key) <= MAX_KEY and key.isascii() and key.isprintable() and " " not in key:
        return key
    raise RecordRefused(
        f"The {what} {key[:80]!a} was given.",
        f"A {what} is printable ASCII without spaces, 1 to {MAX_KEY} characters.",
        "Write /deployment/group/member, for example.",
    )


def end_of(prefix: str) -> str:
    """The first key after all that begin with a prefix, for stores that list a range of keys; keys are ASCII."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def check_value(key: str, value: object) -> bytes:
    """A value that every store can hold; raises `RecordRefused`."""
    if isinstance(value, bytes) and len(value) <= MAX_VALUE:
        return value
    size = f"{len(value):,} bytes" if isinstance(value, bytes) else f"of type {type(value).__name__}"
    raise RecordRefused(
        f"A value was to be put under {key}.",
        f"It is {size}; a value is bytes, at most {MAX_VALUE:,} of them.",
        "Put how to reach the data, not the data.",
    )


def check_ttl(ttl: object) -> float:
    """A time for a lease that means something; raises `RecordRefused`."""
    shortest, longest = TTL
    if isinstance(ttl, (int, float)) and shortest <= ttl <= longest:
        return float(ttl)
    raise RecordRefused(
        f"A lease of {ttl!r} seconds was asked for.",
        f"A lease lasts {shortest:g} to {longest:g} s.",
        "Take 10: its holder is missed within 10 s, and a pause of 6 s does no harm.",
    )
