"""Lower tiers that do what a test says, and managers over them. May import the core's offload room and this package."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tensorway.metrics import Sample
from tensorway.offload import LookupResult, OffloadingEvent, OffloadKey, OfTenant, Outcome, ReqContext, make_offload_key
from tensorway_offload.lower import Done, Row
from tensorway_offload.manager import Manager
from tensorway_offload.manager_options import ManagerOptions


class Rows(list[int]):
    """A `LoadStoreSpec` that is nothing but rows."""

    medium = "rows"


class Plain:
    """The plainest policy: what was used longest ago goes first, and of one call its tail."""

    def __init__(self) -> None:
        self.order: OrderedDict[OffloadKey, None] = OrderedDict()
        #: Calls by name, with their keys, for whoever wants to see them.
        self.heard: list[tuple[str, list[OffloadKey]]] = []

    def _hear(self, what: str, keys: Sequence[OffloadKey]) -> None:
        self.heard.append((what, list(keys)))

    def used(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        self._hear("used", keys)
        for key in reversed(keys):
            if key in self.order:
                self.order.move_to_end(key)

    def wanted(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        self._hear("wanted", keys)

    def stored(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        self._hear("stored", keys)
        self.order.update(dict.fromkeys(reversed(keys)))

    def ended(self, keys: Sequence[OffloadKey], req: ReqContext) -> None:
        """See `EvictionPolicy`."""
        self._hear("ended", keys)

    def removed(self, keys: Sequence[OffloadKey]) -> None:
        """See `EvictionPolicy`."""
        self._hear("removed", keys)
        for key in keys:
            self.order.pop(key, None)

    def victims(self) -> Iterator[OffloadKey]:
        """See `EvictionPolicy`."""
        return iter(self.order)

    def evicted(self, keys: Sequence[OffloadKey]) -> None:
        """See `EvictionPolicy`."""
        self._hear("evicted", keys)
        for key in keys:
            del self.order[key]

    def reset(self) -> None:
        """See `EvictionPolicy`."""
        self._hear("reset", ())
        self.order.clear()


class Scripted:
    """Tiers below a manager whose every answer is a test's; implements `Lower`."""

    def __init__(
        self,
        answer: Callable[[OffloadKey], LookupResult] = lambda key: LookupResult.HIT,
        outcome: Callable[[OffloadKey], Outcome | None] = lambda key: "done",
        *,
        whole: bool = False,
        takes: bool = True,
    ) -> None:
        """`outcome`: what becomes of a block in a job; a job of which it says None of a block goes on."""
        self.answer, self.outcome = answer, outcome
        self.whole, self.takes = whole, takes
        #: Jobs that have not ended: what they are, and their rows.
        self.jobs: dict[int, tuple[str, list[Row]]] = {}
        self.asked: list[list[OffloadKey]] = []
        self.over: list[str] = []
        self.resets = self.closed = self._number = 0

    def wants_all(self, req: ReqContext) -> bool:
        """See `Lower`."""
        return self.whole

    def ask(self, keys: Sequence[OffloadKey], req: ReqContext) -> list[LookupResult]:
        """See `Lower`."""
        self.asked.append(list(keys))
        return [self.answer(key) for key in keys]

    def promote(self, rows: Sequence[Row], req: ReqContext) -> int:
        """See `Lower`."""
        return self._begin("promoted", rows)

    def cascade(self, rows: Sequence[Row], req: ReqContext) -> int | None:
        """See `Lower`."""
        return self._begin("cascaded", rows) if self.takes else None

    def poll(self) -> list[Done]:
        """See `Lower`."""
        found = []
        for number, (what, rows) in list(self.jobs.items()):
            outcomes: Mapping[OffloadKey, Any] = {key: self.outcome(key) for key, _ in rows}
            if None not in outcomes.values():
                del self.jobs[number]
                found.append(Done(number, "promoted" if what == "promoted" else "cascaded", outcomes))
        return found

    def ended(self, req: ReqContext) -> None:
        """See `Lower`."""
        self.over.append(req.request)

    def delete(self, which: Sequence[OffloadKey] | OfTenant) -> None:
        """See `Lower`."""

    def busy(self) -> bool:
        """See `Lower`."""
        return bool(self.jobs)

    def take_events(self) -> list[OffloadingEvent]:
        """See `Lower`."""
        return []

    def statistics(self) -> Sequence[Sample]:
        """See `Lower`."""
        return []

    def reset(self) -> None:
        """See `Lower`."""
        self.resets += 1

    def close(self, deadline: float = 5.0) -> bool:
        """See `Lower`."""
        self.closed += 1
        return not self.jobs

    def _begin(self, what: str, rows: Sequence[Row]) -> int:
        self._number += 1
        self.jobs[self._number] = (what, list(rows))
        return self._number


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def blocks(count: int, first: int = 0, salt: str = "") -> list[OffloadKey]:
    """Keys of so many blocks, the same in each call."""
    return [make_offload_key(number.to_bytes(16, "big"), salt=salt) for number in range(first, first + count)]


def manager(
    capacity: int, lower: Scripted | None = None, *, policy: Any = None, clock: Clock | None = None, **options: Any
) -> Manager:
    """A manager of rows, whose clock stands still unless it is given one."""
    return Manager(
        medium="rows",
        capacity=capacity,
        spec=Rows,
        policy=policy or Plain(),
        options=ManagerOptions(**options),
        lower=lower,
        engine="test",
        clock=clock or Clock(),
    )
