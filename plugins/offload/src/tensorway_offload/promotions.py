"""Reading blocks from tiers into rows: from the tier that said that it has them, else from the next one that did.

May import the core's offload room and this package's guarded tiers and answers. A row that a late call may still write
to is nobody's until that call has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import attrs

from tensorway.offload import OffloadingEvent, OffloadKey, Outcome, ReqContext
from tensorway_offload.answers import Answers, Known
from tensorway_offload.guarded import Item, Reply

#: Bytes of blocks that a tier gave, for the tiers before it.
Refill = Callable[[Sequence[Known], Sequence[Item], ReqContext], None]


@attrs.define(eq=False)
class Promotion:
    """One of them."""

    job: int
    req: ReqContext
    views: Mapping[OffloadKey, memoryview]
    #: Of each block the tiers that are still to be tried.
    left: dict[OffloadKey, list[Known]]
    outcomes: dict[OffloadKey, Outcome] = attrs.field(factory=dict)

    @property
    def over(self) -> bool:
        """Whether nobody touches any of its rows."""
        return len(self.outcomes) == len(self.views)


class Promotions:
    """All that are under way."""

    def __init__(self, answers: Answers, refill: Refill | None, tell: Callable[[OffloadingEvent], None]) -> None:
        self._answers, self._refill, self._tell = answers, refill, tell
        self._over: list[Promotion] = []
        self._jobs: set[int] = set()

    @property
    def busy(self) -> bool:
        """Whether one is under way, or was not told."""
        return bool(self._jobs or self._over)

    def begin(self, job: int, views: Mapping[OffloadKey, memoryview], req: ReqContext) -> None:
        """Read these blocks."""
        left = {key: self._answers.holders(key, req) for key in views}
        promotion = Promotion(job, req, views, left)
        self._jobs.add(job)
        self._read(promotion, list(views), {})

    def take(self) -> list[Promotion]:
        """Those that are over; each once."""
        found, self._over = self._over, []
        return found

    def _read(self, promotion: Promotion, keys: Sequence[OffloadKey], before: Mapping[OffloadKey, Outcome]) -> None:
        """From the next tier of each; with none left, the outcome before is the last."""
        sources: dict[Known, list[OffloadKey]] = {}
        for key in keys:
            while (left := promotion.left[key]) and not left[0].tier.usable:
                left.pop(0)
            if left:
                sources.setdefault(left.pop(0), []).append(key)
            else:
                promotion.outcomes[key] = before.get(key, "missing")
        calls = [
            (known, wanted[start : start + known.tier.limits.batch_blocks])
            for known, wanted in sources.items()
            for start in range(0, len(wanted), known.tier.limits.batch_blocks)
        ]
        for known, some in calls:
            items = [(key, promotion.views[key]) for key in some]
            copies: list[Item] = []
            after = partial(_keep, items, copies) if self._refill is not None else None
            known.tier.load(items, partial(self._ended, promotion, known, some, copies), after)
        self._settle(promotion)

    def _ended(
        self, promotion: Promotion, known: Known, keys: Sequence[OffloadKey], copies: Sequence[Item], reply: Reply
    ) -> None:
        if not reply.free:
            return
        outcomes: dict[OffloadKey, Outcome] = dict(zip(keys, reply.outcomes(len(keys)), strict=True))
        again = []
        for key, outcome in outcomes.items():
            if outcome == "done":
                promotion.outcomes[key] = outcome
                continue
            if outcome in ("missing", "corrupt"):
                known.learn(key, False)
            again.append(key)
        for cause in ("corrupt", "missing"):
            gone = [key for key in again if outcomes[key] == cause]
            if gone:
                known.tier.counters.add("offload_removed_total", len(gone), medium=known.tier.name, cause=cause)
                self._tell(OffloadingEvent("removed", gone, known.tier.name, cause))
        if copies and self._refill is not None:
            before = self._answers.allowed(promotion.req)
            self._refill(before[: before.index(known)] if known in before else (), copies, promotion.req)
        if again:
            self._read(promotion, again, outcomes)
        else:
            self._settle(promotion)

    def _settle(self, promotion: Promotion) -> None:
        if not promotion.over or promotion.job not in self._jobs:
            return
        self._jobs.discard(promotion.job)
        promotion.outcomes = {key: promotion.outcomes[key] for key in promotion.views}
        self._over.append(promotion)
        failed = [key for key, outcome in promotion.outcomes.items() if outcome != "done"]
        self._answers.failed(failed, promotion.req)


def _keep(items: Sequence[Item], copies: list[Item], outcomes: Sequence[Outcome]) -> None:
    """Copy what was read, for the row is the manager's as soon as the promotion is over."""
    for (key, view), outcome in zip(items, outcomes, strict=True):
        if outcome == "done":
            copies.append((key, memoryview(bytes(view))))
