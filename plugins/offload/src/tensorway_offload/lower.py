"""What a manager asks of the tiers below its primary one: all of them together, without waiting for any.

May import the core's offload room. The manager owns the rows: it reserves them before a promotion, pins them during a
cascade, and hears by `poll` when nobody touches them any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import attrs

from tensorway.metrics import Sample
from tensorway.offload import LookupResult, OffloadingEvent, OffloadKey, OfTenant, Outcome, ReqContext

#: A block, and the row of the primary tier that it is in or is to come into.
Row = tuple[OffloadKey, int]


@attrs.frozen
class Done:
    """A promotion or cascade that has ended: no row of it is touched any more."""

    job: int
    what: Literal["promoted", "cascaded"]
    #: Of each block that could be asked for. Of a promotion, what is not `done` is in no tier that could be asked.
    outcomes: Mapping[OffloadKey, Outcome]


class Lower(Protocol):
    """Tiers, the fastest first. One thread at a time uses it, and nothing waits but `close`."""

    def wants_all(self, req: ReqContext) -> bool:
        """Whether a tier wants all blocks of a request, also those that it found."""

    def ask(self, keys: Sequence[OffloadKey], req: ReqContext) -> list[LookupResult]:
        """For each block `HIT` if a tier has it, `MISS`, or `RETRY` while none has answered.

        May be asked again in each step, and then costs little. A request that was told RETRY for as long as the
        deadline is told MISS; so is one whose promotion of that block has failed.
        """

    def promote(self, rows: Sequence[Row], req: ReqContext) -> int:
        """Begin to read blocks that were hits into these rows; a number for `Done`."""

    def cascade(self, rows: Sequence[Row], req: ReqContext) -> int | None:
        """Begin to write these rows to the tiers; None if no tier takes any of it, and the rows are free at once."""

    def poll(self) -> list[Done]:
        """What has ended since the last call."""

    def ended(self, req: ReqContext) -> None:
        """Forget what is remembered of a request."""

    def delete(self, which: Sequence[OffloadKey] | OfTenant) -> None:
        """Begin to remove these from all tiers that can."""

    def busy(self) -> bool:
        """Whether `poll` must go on being called: a promotion or a cascade is under way."""

    def take_events(self) -> list[OffloadingEvent]:
        """What was stored in tiers and removed from them since the last call."""

    def statistics(self) -> Sequence[Sample]:
        """Values of `tensorway.offload.METRICS`, of every tier."""

    def reset(self) -> None:
        """What was asked means nothing any more; what is under way is still told by `poll`. Tiers keep what they have:
        other weights have another fingerprint."""

    def close(self, deadline: float = 5.0) -> bool:
        """End all tiers; whether no thread of theirs can touch a row any more. If not, the rows must stay mapped."""
