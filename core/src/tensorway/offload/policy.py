"""In which order blocks may go: all that a policy decides. It never touches a block, a pin or a count.

Room `offload`; may import the rooms below and `base`. The manager owns which blocks are there and which of them are in
use; a policy hears of them in batches and yields victims when room is needed. So it can be wrong, and nothing breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import attrs

from tensorway.offload.base import OffloadKey, ReqContext


class EvictionPolicy(Protocol):
    """An order of the blocks that can be evicted. One thread at a time uses it.

    It may also have `statistics() -> Sequence[Sample]`: `offload_policy_hits_total`, of itself and of orders that it
    compares itself with. Nobody needs it.

    Lists are in the order of tokens: the first key is the head of a prefix, without which the others are worth nothing.
    Within one request the calls come in the order `used`, `wanted`, `victims` and `evicted` if there is no room,
    `stored`, and these again as it goes on; at last `ended`.
    """

    def used(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """A request has found these here, or they were in use when they were proposed as victims."""

    def wanted(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """A request is about to store these, which were not here; victims may be asked for next."""

    def stored(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """These are here from now on."""

    def ended(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """The request is over; these are all it has asked for, found and stored. Some may be gone."""

    def removed(self, keys: Sequence[OffloadKey]) -> None:
        """These are gone, but not because they were victims."""

    def victims(self) -> Iterator[OffloadKey]:
        """All that is here, what should go first coming first. Nothing changes by looking; nobody looks at the end of
        it without need, and no other call comes meanwhile."""

    def evicted(self, keys: Sequence[OffloadKey]) -> None:
        """These victims are gone."""

    def reset(self) -> None:
        """Everything is gone, and what was learned of it is worth nothing."""


@attrs.frozen
class PolicyContext:
    """What a policy is made with."""

    #: How many blocks there is room for.
    capacity: int
    #: Seconds that only grow; a replay has its own.
    clock: Callable[[], float]
