"""The tiers below a primary one, put together: asked, read from and written to without anybody waiting for them.

May import the core's offload room and this package. `Below` is `lower.Lower`; it does its work in the calls of the one
thread that uses it, and what waits is on lanes.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from tensorway._logging import logger
from tensorway.errors import OptionsInvalid
from tensorway.metrics import Sample
from tensorway.offload import LookupResult, OffloadingEvent, OffloadKey, OfTenant, ReqContext
from tensorway_offload.answers import Answers, Known
from tensorway_offload.cascades import Cascade, Outlet
from tensorway_offload.guarded import Guarded, Item
from tensorway_offload.limits import BelowOptions, NamedTier
from tensorway_offload.lower import Done, Row
from tensorway_offload.promotions import Promotions
from tensorway_offload.told import Told

_log = logger("offload")
#: What a medium is called that is none of ours.
_PRIMARY: Final = frozenset({"engine", "cpu"})


class Below:
    """Tiers, the fastest first."""

    def __init__(
        self,
        tiers: Sequence[NamedTier],
        row: Callable[[OffloadKey, int], memoryview | None],
        options: BelowOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`row`: the bytes of a row that this block is in, or comes into: as many as the block has. None if it is no
        block of ours, such as one of a group that there is none of: no tier ever gets it."""
        options = options or BelowOptions()
        _check_names([named.name for named in tiers])
        self._row, self._clock = row, clock
        self._tiers = [Guarded(named, options, clock) for named in tiers]
        self._answers = Answers(self._tiers, options, clock)
        self._outlets = {known: Outlet(known, self._tell, clock) for known in self._answers.known}
        self._promotions = Promotions(self._answers, self._refill if options.refill else None, self._tell)
        self._jobs = itertools.count(1)
        self._cascades: list[Cascade] = []
        self._told = {tier.name: Told(tier.name, options.events) for tier in self._tiers}
        self._closing: list[threading.Thread] | None = None

    def wants_all(self, req: ReqContext) -> bool:
        """Whether a tier wants all blocks of a request, also those that it found."""
        return any(k.tier.limits.whole_requests and k.tier.capabilities.writable for k in self._answers.allowed(req))

    def ask(self, keys: Sequence[OffloadKey], req: ReqContext) -> list[LookupResult]:
        """For each block what is known; tiers are asked all at once, and the first that has it counts.

        `RETRY` while a tier before the first that has it has not answered, up to the deadline.
        """
        self._move_on()
        return self._answers.ask(keys, req)

    def promote(self, rows: Sequence[Row], req: ReqContext) -> int:
        """Begin to read blocks that were hits into these rows; a number for `Done`."""
        job = next(self._jobs)
        self._promotions.begin(job, self._views(rows), req)
        return job

    def cascade(self, rows: Sequence[Row], req: ReqContext) -> int | None:
        """Begin to write these rows to the tiers; None if no tier takes any of it, and the rows are free at once."""
        outlets = [self._outlets[known] for known in self._answers.allowed(req)]
        items = [(key, view.toreadonly()) for key, view in self._views(rows).items()] if outlets else []
        cascade = Cascade(next(self._jobs))
        for outlet in outlets:
            outlet.tier.drop(["refused"] * (len(rows) - len(items)))
            outlet.offer(items, lambda: cascade)
        if not cascade.calls:
            return None
        self._cascades.append(cascade)
        return cascade.job

    def poll(self) -> list[Done]:
        """What has ended since the last call."""
        self._move_on()
        found = [Done(each.job, "promoted", each.outcomes) for each in self._promotions.take()]
        for cascade in [cascade for cascade in self._cascades if not cascade.calls]:
            self._cascades.remove(cascade)
            found.append(Done(cascade.job, "cascaded", cascade.outcomes))
        return found

    def ended(self, req: ReqContext) -> None:
        """Forget what is remembered of a request."""
        self._answers.ended(req)

    def delete(self, which: Sequence[OffloadKey] | OfTenant) -> None:
        """Begin to remove these from all tiers that can. What is being written of them is removed after that."""
        for outlet in self._outlets.values():
            outlet.delete(which)

    def busy(self) -> bool:
        """Whether `poll` must go on being called: a promotion, a cascade or a deletion is under way."""
        return bool(self._cascades or self._promotions.busy or any(each.busy() for each in self._outlets.values()))

    def take_events(self) -> list[OffloadingEvent]:
        """What was stored in tiers and removed from them since the last call; of each tier in its order."""
        return [event for told in self._told.values() for event in told.take()]

    def statistics(self) -> Sequence[Sample]:
        """Values of `tensorway.offload.METRICS`, of every tier; what tiers say themselves is some seconds old."""
        return [sample for tier in self._tiers for sample in tier.statistics()]

    def reset(self) -> None:
        """Forget what was asked and told. What is under way is still told by `poll`."""
        self._answers.reset()

    def close(self, deadline: float = 5.0) -> bool:
        """End all tiers; whether no thread of theirs can touch a row any more. If not, the rows must stay mapped.

        A second call waits again for what hung.
        """
        until = self._clock() + deadline
        for tier in self._tiers:
            tier.stop()
        # Not the whole time: a tier is to be told to end also if one of its calls hangs.
        settled = [tier.settled(self._clock() + (until - self._clock()) / 2) for tier in self._tiers]
        if self._closing is None:
            self._closing = [self._end(tier, until) for tier in self._tiers]
        for thread in self._closing:
            thread.join(max(0.0, until - self._clock()))
        settled = [tier.settled(until) for tier in self._tiers]
        self._move_on()
        for tier, free in zip(self._tiers, settled, strict=True):
            if not free:
                _log.warning("The tier %s did not end in %g s; calls of it are still under way.", tier.name, deadline)
        return all(settled)

    def _end(self, tier: Guarded, until: float) -> threading.Thread:
        def end() -> None:
            try:
                tier.tier.close(max(0.0, until - self._clock()))
            except Exception as error:  # a tier that cannot end must not keep others from it
                _log.warning("The tier %s raised %r when it was closed.", tier.name, error)

        thread = threading.Thread(target=end, name=f"tensorway-tier-{tier.name[:40]}-end", daemon=True)
        thread.start()
        return thread

    def _move_on(self) -> None:
        now = self._clock()
        for tier in self._tiers:
            tier.poll(now)
        for outlet in self._outlets.values():
            outlet.poll(now)

    def _views(self, rows: Sequence[Row]) -> dict[OffloadKey, memoryview]:
        views = ((key, self._row(key, row)) for key, row in rows)
        return {key: view for key, view in views if view is not None}

    def _tell(self, event: OffloadingEvent) -> None:
        self._told[event.medium].add(event.what, event.keys, event.cause)

    def _refill(self, before: Sequence[Known], items: Sequence[Item], req: ReqContext) -> None:
        """Write what a slower tier gave to those before it. Nobody waits for it, and no row is held."""
        for known in before:
            self._outlets[known].offer(items, lambda: Cascade(0))


def _check_names(names: Sequence[str]) -> None:
    wrong = [name for name in names if not name or name in _PRIMARY or names.count(name) > 1]
    if wrong:
        raise OptionsInvalid(
            f"Tiers were to be called {', '.join(map(repr, names))}.",
            f"{wrong[0]!r} is empty, is there twice, or is what the primary tier or the engine is called.",
            "Give each tier a name of its own: requests and metrics call it that.",
        )
