"""Every word of offloading: keys, requests, where blocks are, the manager that keeps track, the worker that copies.

Room `offload`; may import the rooms below. No engine and no array library is in any signature: blocks are known by
opaque keys, engine memory by page numbers, and whatever a backend keeps is a `LoadStoreSpec` of its own. Tiers below
the primary one are in `tier`, orders of eviction in `policy`.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, NewType, Protocol

import attrs

from tensorway.errors import OptionsInvalid
from tensorway.geometry import RankGeometry
from tensorway.memory import Copier
from tensorway.metrics import Sample

#: What stands for one stored block everywhere: its content's hash, its tenant and its cache group, in this order.
OffloadKey = NewType("OffloadKey", bytes)
TENANT_BYTES: Final = 8
GROUP_BYTES: Final = 4
_TAIL: Final = TENANT_BYTES + GROUP_BYTES
#: A hash is of the engine's own kind; of fewer bytes it is none, and of more it is something else.
HASH_BYTES: Final = range(4, 65)


@lru_cache(maxsize=4096)
def tenant_of_salt(salt: str) -> bytes:
    """What a salt is in keys: requests of other salts never find the same block. Zeros for no salt."""
    return hashlib.blake2b(salt.encode(), digest_size=TENANT_BYTES).digest() if salt else bytes(TENANT_BYTES)


def make_offload_key(block_hash: bytes, group: int = 0, salt: str = "") -> OffloadKey:
    """The key of the block with this content hash, for one cache group and one tenant."""
    if len(block_hash) not in HASH_BYTES or not 0 <= group < 1 << 8 * GROUP_BYTES:
        raise OptionsInvalid(
            f"A key was to be made of a hash of {len(block_hash)} bytes, for group {group}.",
            f"A hash has {HASH_BYTES[0]} to {HASH_BYTES[-1]} bytes, and groups count from 0.",
            "Give the engine's own hash of the block, and the index of its cache group.",
        )
    return OffloadKey(block_hash + tenant_of_salt(salt) + group.to_bytes(GROUP_BYTES, "big"))


def key_hash(key: OffloadKey) -> bytes:
    """The content hash in a key."""
    return key[:-_TAIL]


def key_tenant(key: OffloadKey) -> bytes:
    """Whose block it is, as `tenant_of_salt` says it."""
    return key[-_TAIL:-GROUP_BYTES]


def key_group(key: OffloadKey) -> int:
    """The cache group in a key."""
    return int.from_bytes(key[-GROUP_BYTES:], "big")


@attrs.frozen
class Hint:
    """What an engine or a router knows of a request's future; whoever knows nothing says nothing."""

    #: Requests of one conversation have the same one.
    session: str = ""
    #: Seconds until its blocks are wanted again, such as a tool's running time; None if nobody knows.
    reuse_seconds: float | None = None
    #: Blocks of lower numbers go first, where a policy looks at it.
    priority: int = 0


@attrs.frozen
class ReqContext:
    """A request, as far as offloading must know it."""

    request: str
    #: What separates tenants; it is in the keys already, and says here whose quota is used.
    salt: str = ""
    #: Names of the tiers that may be asked and written to for it; None for all, empty for the primary one alone.
    tiers: frozenset[str] | None = None
    hint: Hint = Hint()


class LookupResult(enum.Enum):
    """What is known of a block."""

    MISS = "miss"
    #: It can be loaded now, and stays for this request until its lease ends.
    HIT = "hit"
    #: It is on its way into the primary tier: it counts as part of the prefix, and the request asks again.
    HIT_PENDING = "pending"
    #: Some tier has not answered yet: ask again.
    RETRY = "retry"


@attrs.frozen
class PrefixLookup:
    """How much of a request's prefix is there."""

    #: Leading blocks that can be loaded now. They are leased to the request.
    ready: int
    #: Blocks after them that may be had soon. If there are any, wait a step and ask again, or take what is ready: at
    #: the manager's own deadline they are misses, so that asking again comes to an end.
    later: int = 0


class LoadStoreSpec(Protocol):
    """Where blocks are, in the words of one medium: data, without handles, for it goes from process to process."""

    @property
    def medium(self) -> str:
        """Which kind of place it is: `engine`, `cpu`."""

    def __len__(self) -> int: ...


@attrs.frozen
class EngineSpec:
    """Blocks in an engine's own pages."""

    #: Of each block: its cache group, and its pages in the order of tokens, as many as a chunk has of the group. A page
    #: that is not to be touched, since the engine has it or never had it, is -1; what lacks a page can be loaded into
    #: what is there, and is never stored.
    groups: Sequence[int]
    pages: Sequence[Sequence[int]]
    medium: str = "engine"

    def __len__(self) -> int:
        return len(self.pages)


@attrs.frozen
class Ticket:
    """One load or store that was prepared and is to be completed; after a reset it means nothing any more."""

    epoch: int
    number: int


@attrs.frozen
class PrepareLoadOutput:
    """Blocks that are pinned until the load is completed."""

    ticket: Ticket
    source: LoadStoreSpec


@attrs.frozen
class PrepareStoreOutput:
    """Places for blocks, which nobody sees before the store is completed."""

    ticket: Ticket
    #: Of those that were offered, in their order, the ones that are to be stored; the others are there, or not wanted.
    keys: Sequence[OffloadKey]
    #: Where each of them goes.
    target: LoadStoreSpec
    #: What had to go for them.
    evicted: Sequence[OffloadKey]


@attrs.frozen
class OffloadingEvent:
    """What changed in which blocks can be had; in the order in which it happened."""

    what: Literal["stored", "removed", "cleared"]
    #: Nothing for `cleared`, which is of all.
    keys: Sequence[OffloadKey]
    medium: str
    #: Why they are gone: `evicted`, `failed`, `corrupt`, `deleted`; empty for what was stored.
    cause: str = ""


class OffloadingManager(Protocol):
    """Keeps track of which blocks are where; moves nothing itself, and never waits.

    Threads may share it. All calls take many keys; a call for one is a call with a list of one. Lists are of the
    order of tokens, and a key that is twice in one list counts once.
    """

    def begins(self, req: ReqContext) -> Literal["new", "all"]:
        """A request is there. `new`: offer its blocks as they are computed; `all`: also those that it found."""

    def lookup(self, key: OffloadKey, req: ReqContext) -> LookupResult:
        """What is known of one block."""

    def lookup_many(self, keys: Sequence[OffloadKey], req: ReqContext) -> list[LookupResult]:
        """What is known of each of these blocks; leases those that are hits."""

    def lookup_prefix(self, keys: Sequence[OffloadKey], req: ReqContext) -> PrefixLookup:
        """How many of these blocks, from the first on, are there; leases those that are ready."""

    def touch(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """The engine had these itself: they were used, although nobody loads them. Unknown ones do not matter."""

    def prepare_load(self, keys: Sequence[OffloadKey], req: ReqContext) -> PrepareLoadOutput | None:
        """Pin these and say where they are; None if one of them is not there, and then nothing is pinned."""

    def complete_load(self, ticket: Ticket, failed: Collection[OffloadKey] = ()) -> None:
        """The load has ended; what failed is forgotten, so that it is computed anew and not tried for ever."""

    def prepare_store(self, keys: Sequence[OffloadKey], req: ReqContext) -> PrepareStoreOutput | None:
        """Find room for those of these blocks that are not there; None if there is none, and then nothing changed.

        What is offered is never evicted for it.
        """

    def complete_store(self, ticket: Ticket, failed: Collection[OffloadKey] = ()) -> None:
        """The store has ended: what succeeded can be looked up from now on, and what failed was never there.

        The second call for a ticket, and one from before a reset, changes nothing.
        """

    def ended(self, req: ReqContext) -> None:
        """The request asks for nothing any more; what it has prepared may still be completed."""

    def poll(self) -> None:
        """Once in each step of the engine: what tiers have done is taken in, and what is overdue is given up."""

    def busy(self) -> bool:
        """Whether the engine must go on calling `poll` although it has no request."""

    def take_events(self) -> list[OffloadingEvent]:
        """What changed since the last call."""

    def statistics(self) -> Sequence[Sample]:
        """Values of `tensorway.offload.METRICS`."""

    def reset(self) -> None:
        """Forget everything, for the weights are others now; tickets that are out mean nothing any more."""

    def close(self, deadline: float = 5.0) -> None:
        """End; the second call does nothing."""


@attrs.frozen
class TransferResult:
    """What became of one job of a worker."""

    job: int
    #: Empty if it succeeded; else one of `tensorway.offload.CAUSES`.
    cause: str = ""
    #: For people.
    why: str = ""
    #: Positions in the specs of what failed; all of them if it is empty and there is a cause.
    failed: Sequence[int] = ()
    nbytes: int = 0
    seconds: float = 0.0


class OffloadingWorker(Protocol):
    """Copies, beside one rank's memory. One thread uses it; only `wait` and `close` wait."""

    def store(self, job: int, source: LoadStoreSpec, target: LoadStoreSpec) -> None:
        """Begin to copy pages of the engine away; they must not change before the job has ended."""

    def load(self, job: int, source: LoadStoreSpec, target: LoadStoreSpec) -> None:
        """Begin to copy blocks into pages of the engine."""

    def poll(self) -> list[TransferResult]:
        """Jobs that have ended since the last call, each once; never raises for what became of one."""

    def wait(self, jobs: Collection[int], deadline: float) -> None:
        """Wait until these have ended, however they end; raises `DeadlineExceeded`. `poll` tells of them still."""

    def statistics(self) -> Sequence[Sample]:
        """Values of `tensorway.offload.METRICS`."""

    def close(self, deadline: float = 5.0) -> None:
        """End; no page of the engine is touched afterwards. The second call does nothing."""


@attrs.frozen
class OffloadContext:
    """What an offloading backend is made with, on either side."""

    #: This engine: the same in all its processes, another one after a restart.
    engine: str
    #: What the factory is to return: an `OffloadingManager` or an `OffloadingWorker`.
    role: Literal["manager", "worker"]
    #: The KV memory of each rank. Addresses mean something for the worker's own rank only.
    ranks: Sequence[RankGeometry]
    rank: int = 0
    #: Pages of an engine that one block of offloading has, in each cache group.
    pages_per_block: int = 1
    #: What makes bytes of equal keys equal: model, revision, dtype and so on. Another fact is another store.
    facts: Mapping[str, str] = attrs.field(factory=dict)
    #: What other backends are made with that tiers may need, such as a `rendezvous` and a `transport`.
    services: Mapping[str, Any] = attrs.field(factory=dict)
    #: For a worker whose pages are on a device that it cannot reach itself.
    copier: Copier | None = None
    #: Seconds that opening may take.
    deadline: float = 60.0
