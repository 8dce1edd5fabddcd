"""What a tier below the primary one is: seven calls, each of many blocks, that may block and may fail.

Room `offload`; may import the rooms below and `base`. Whoever asks a tier does so on threads of its own, with
deadlines, a breaker and quotas: a tier need not be asynchronous, and need not know who asks. What it returns is checked
by nobody after it: so it checks itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Protocol

import attrs

from tensorway.memory import Region
from tensorway.metrics import Sample
from tensorway.offload.base import OffloadKey
from tensorway.types import ProbeResult

#: What became of one block of a call. `done`: stored or read, also if it had been there; `missing`: it is not there;
#: `corrupt`: it was, but not whole or not what was stored, and it is gone now; `full`: no room is left for it;
#: `failed`: something else, which may go away; `late`: the deadline came first.
Outcome = Literal["done", "missing", "corrupt", "full", "failed", "late"]
OUTCOMES: Final[tuple[Outcome, ...]] = ("done", "missing", "corrupt", "full", "failed", "late")


@attrs.frozen
class TierCapabilities:
    """What a tier can do beyond keeping blocks for a while."""

    #: What was stored is there after all processes have ended.
    persistent: bool = False
    #: Others see it too: engines on this host, or on any.
    shared: bool = False
    #: It can be written to; one that cannot, such as other engines' memory, is only asked.
    writable: bool = True
    #: Blocks can be deleted one by one, or all of a tenant.
    deletes: bool = True
    #: Calls that it serves well at once.
    calls: int = 4
    #: Bytes at which buffers should begin for it to be fast.
    alignment: int = 1


@attrs.frozen
class OfTenant:
    """All blocks of one tenant, as keys name it."""

    tenant: bytes


class Tier(Protocol):
    """Blocks by key. Threads share it. A call ends by its deadline in seconds, or a little later, whatever happens."""

    capabilities: TierCapabilities

    def probe(self, deadline: float) -> ProbeResult:
        """Whether it can be used now: asked after failures, before it is used again."""

    def contains(self, keys: Sequence[OffloadKey], deadline: float) -> list[bool]:
        """Which of these it has."""

    def put(self, items: Sequence[tuple[OffloadKey, memoryview]], deadline: float) -> list[Outcome]:
        """Store each block, all of it or nothing; one that is there need not be written again."""

    def get(self, items: Sequence[tuple[OffloadKey, memoryview]], deadline: float) -> list[Outcome]:
        """Read each block into its buffer, which is as long as what was stored; of another length it is `corrupt`.

        What a buffer holds means nothing unless the outcome is `done`, and no buffer is written to after the call.
        """

    def delete(self, which: Sequence[OffloadKey] | OfTenant, deadline: float) -> int:
        """Remove these, or all of a tenant; how many there were. A tier that cannot raises `Unsupported`."""

    def stats(self) -> Sequence[Sample]:
        """Values of `tensorway.offload.METRICS`."""

    def close(self, deadline: float = 5.0) -> None:
        """End; what was stored is kept as far as `persistent` says. The second call does nothing."""


class Lender(Protocol):
    """The primary tier, for tiers that let others read its memory. Threads may share it."""

    def lend(self, keys: Sequence[OffloadKey], seconds: float) -> list[int | None]:
        """Pin these, each for so long; in which row each one is, None for one that is not there."""

    def returned(self, keys: Sequence[OffloadKey]) -> None:
        """These are not needed any more; once for each time that they were lent."""


@attrs.frozen
class TierContext:
    """What a tier is made with."""

    #: This engine, as others may be told of it.
    engine: str
    #: What must be equal for bytes of equal keys to be equal: facts and the layout of a block, as one digest. Blocks of
    #: another fingerprint are not there.
    fingerprint: bytes
    #: Bytes of a block of each cache group.
    nbytes: Sequence[int]
    #: What the fingerprint was made of, for people.
    facts: Mapping[str, str] = attrs.field(factory=dict)
    #: The rows that the primary tier keeps blocks in, and how long each is; None where tiers need not know it.
    memory: Region | None = None
    row_bytes: int = 0
    lender: Lender | None = None
    #: What other backends are made with that a tier may need, such as a `rendezvous` and a `transport`.
    services: Mapping[str, Any] = attrs.field(factory=dict)
    #: Seconds that opening may take.
    deadline: float = 60.0
