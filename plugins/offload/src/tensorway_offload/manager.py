"""The manager of any primary tier: which blocks are where, who may read them, and which of them go.

May import the core and this dist. It keeps no bytes and moves none: rows are numbers, and a backend makes of them what
its worker understands. One lock is around every call, for a call is of many blocks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Literal

from tensorway.errors import Closed, OptionsInvalid
from tensorway.exports import export
from tensorway.metrics import Counters, Sample
from tensorway.offload import (
    METRICS,
    EvictionPolicy,
    LoadStoreSpec,
    LookupResult,
    OffloadingEvent,
    OffloadKey,
    PrefixLookup,
    PrepareLoadOutput,
    PrepareStoreOutput,
    ReqContext,
    Ticket,
)
from tensorway_offload.blocks import Blocks
from tensorway_offload.lower import Lower
from tensorway_offload.manager_options import ManagerOptions

#: Rows are numbers of 31 bits.
_MOST_ROWS = (1 << 31) - 1


class Manager:
    """Implements `OffloadingManager` and `Lender` of the core. Threads may share it."""

    def __init__(
        self,
        *,
        medium: str,
        capacity: int,
        spec: Callable[[Sequence[int]], LoadStoreSpec],
        policy: EvictionPolicy,
        options: ManagerOptions,
        lower: Lower | None = None,
        engine: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`capacity` rows of `medium`; `spec` says where rows are, in the words of the backend's worker."""
        if not 0 <= capacity <= _MOST_ROWS:
            raise OptionsInvalid(
                f"Offloading to {medium} was to have {capacity} rows.",
                f"There can be none, or up to {_MOST_ROWS}.",
                "Give it less memory, or larger blocks.",
            )
        self._medium, self._spec, self._clock, self._lower = medium, spec, clock, lower
        self._policy = policy
        self._lock = threading.Lock()
        self._closed = False
        #: After `close`: whether nothing below can touch a row any more. If not, the rows must stay mapped.
        self.quiet = False
        self._counters = Counters(METRICS, backend=medium, engine=engine)
        self._labels = {"backend": medium, "engine": engine}
        self._blocks = Blocks(medium, capacity, policy, options, lower, self._counters)
        export("manager", self.statistics, METRICS)

    def begins(self, req: ReqContext) -> Literal["new", "all"]:
        """See `OffloadingManager`."""
        with self._lock:
            request = self._blocks.request(req, self._now("A request was to begin."))
            return "all" if self._blocks.wants_all(request) else "new"

    def lookup(self, key: OffloadKey, req: ReqContext) -> LookupResult:
        """See `OffloadingManager`."""
        return self.lookup_many([key], req)[0]

    def lookup_many(self, keys: Sequence[OffloadKey], req: ReqContext) -> list[LookupResult]:
        """See `OffloadingManager`."""
        with self._lock:
            results = self._blocks.look(keys, req, self._now("Blocks were to be looked up."))
        return results

    def lookup_prefix(self, keys: Sequence[OffloadKey], req: ReqContext) -> PrefixLookup:
        """See `OffloadingManager`."""
        with self._lock:
            return self._blocks.look_prefix(keys, req, self._now("Blocks were to be looked up."))

    def touch(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `OffloadingManager`."""
        with self._lock:
            self._blocks.touch(keys, req, self._now("Blocks were to be touched."))

    def prepare_load(self, keys: Sequence[OffloadKey], req: ReqContext) -> PrepareLoadOutput | None:
        """See `OffloadingManager`. A key that is given twice has one row, which is in `source` twice."""
        with self._lock:
            begun = self._blocks.begin_load(keys, req, self._now("Blocks were to be loaded."))
        return None if begun is None else PrepareLoadOutput(begun[0], self._spec(begun[1]))

    def complete_load(self, ticket: Ticket, failed: Collection[OffloadKey] = ()) -> None:
        """See `OffloadingManager`."""
        with self._lock:
            if not self._closed:
                self._blocks.end_load(ticket, failed)

    def prepare_store(self, keys: Sequence[OffloadKey], req: ReqContext) -> PrepareStoreOutput | None:
        """See `OffloadingManager`."""
        with self._lock:
            begun = self._blocks.begin_store(keys, req, self._now("Blocks were to be stored."))
        if begun is None:
            return None
        ticket, new, rows, evicted = begun
        return PrepareStoreOutput(ticket, new, self._spec(rows), evicted)

    def complete_store(self, ticket: Ticket, failed: Collection[OffloadKey] = ()) -> None:
        """See `OffloadingManager`."""
        with self._lock:
            if not self._closed:  # or it would go on to tiers that have ended, from rows that are not mapped any more
                self._blocks.end_store(ticket, failed, self._clock())

    def ended(self, req: ReqContext) -> None:
        """See `OffloadingManager`."""
        with self._lock:
            if not self._closed:
                self._blocks.ended(req)

    def poll(self) -> None:
        """See `OffloadingManager`."""
        with self._lock:
            if not self._closed:
                self._blocks.poll(self._clock())

    def busy(self) -> bool:
        """See `OffloadingManager`."""
        with self._lock:
            return not self._closed and self._lower is not None and self._lower.busy()

    def take_events(self) -> list[OffloadingEvent]:
        """See `OffloadingManager`; those of lower tiers come after our own."""
        with self._lock:
            return [*self._blocks.told.take(), *(self._lower.take_events() if self._lower is not None else ())]

    def statistics(self) -> Sequence[Sample]:
        """See `OffloadingManager`; with those of the policy, if it has any, and of lower tiers."""
        with self._lock:
            gauges = Counters(METRICS, **self._labels)
            self._blocks.count(gauges)
            ours = [*self._counters.samples(), *gauges.samples()]
            policy = getattr(self._policy, "statistics", None)
            others = [*(policy() if policy is not None else ())]
            others += self._lower.statistics() if self._lower is not None else ()
            return [*ours, *(sample.labelled(**self._labels) for sample in others)]

    def reset(self) -> None:
        """See `OffloadingManager`. Rows under a copy stay out of use until it has ended."""
        with self._lock:
            if not self._closed:
                self._blocks.reset()

    def lend(self, keys: Sequence[OffloadKey], seconds: float) -> list[int | None]:
        """See `Lender`; for no longer than the options allow."""
        with self._lock:
            if self._closed:
                return [None] * len(keys)
            return self._blocks.lending.lend(keys, seconds, self._clock())

    def returned(self, keys: Sequence[OffloadKey]) -> None:
        """See `Lender`."""
        with self._lock:
            self._blocks.lending.returned(keys)

    def close(self, deadline: float = 5.0) -> None:
        """See `OffloadingManager`. `quiet` says afterwards whether the rows may go."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            # Not under the lock: a tier that ends may wait for a thread of its own which borrows from here, or returns.
            self.quiet = self._lower is None or self._lower.close(deadline)

    def _now(self, asked: str) -> float:
        """What time it is; whatever is overdue by then has been given up."""
        if self._closed:
            raise Closed(asked, f"The manager of {self._medium} was closed.", "Make a new one.")
        now = self._clock()
        self._blocks.expire(now)
        return now
