"""Any order of calls that a manager's contract allows, found and made short by hypothesis.

Room `testing`; the only module that imports hypothesis. What must hold is in `offload_ledger`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

import hypothesis
from hypothesis import HealthCheck, Phase, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tensorway.offload import OffloadingManager, OffloadKey, ReqContext
from tensorway.testing.offload_ground import chain
from tensorway.testing.offload_ledger import Ledger

CAPACITY: Final = 5
PHASES: Final = (Phase.generate, Phase.shrink)
_KEYS: Final = [*chain("model", 8), *chain("model", 3, salt="tenant")]
_REQUESTS: Final = [ReqContext(name, salt) for name, salt in (("a", ""), ("b", ""), ("c", "tenant"))]

# Numbers of keys and requests, because what is shown of a run is read by people.
_key = strategies.integers(0, len(_KEYS) - 1)
_any_keys = strategies.lists(_key, max_size=7)
_keys = strategies.lists(_key, max_size=6, unique=True)
_request = strategies.integers(0, len(_REQUESTS) - 1)
_number = strategies.integers(0, 1 << 16)


class ManagerModel(RuleBasedStateMachine):
    """A manager with room for five blocks, and its books."""

    make: Callable[[], OffloadingManager]

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(type(self).make(), CAPACITY)
        self._others = 0

    @rule(keys=_any_keys, req=_request)
    def look_up(self, keys: list[int], req: int) -> None:
        """A request asks."""
        self.ledger.look_up(_named(keys), _REQUESTS[req])

    @rule(keys=_any_keys, req=_request)
    def prepare_store(self, keys: list[int], req: int) -> None:
        """A request offers blocks."""
        self.ledger.prepare_store(_named(keys), _REQUESTS[req])

    @rule(count=strategies.integers(1, CAPACITY), req=_request)
    def store_others(self, count: int, req: int) -> None:
        """Blocks that nobody has had, so that others must go."""
        self._others += count
        fresh = chain("others", count, start=self._others)
        if self.ledger.prepare_store(fresh, _REQUESTS[req]) is not None:
            self.ledger.complete(self.ledger.jobs[-1])

    @rule(keys=_keys, req=_request)
    def prepare_load(self, keys: list[int], req: int) -> None:
        """A request loads what it may not have looked up."""
        self.ledger.prepare_load(_named(keys), _REQUESTS[req])

    @rule(count=strategies.integers(1, CAPACITY), req=_request, loads=strategies.booleans())
    def find_what_is_there(self, count: int, req: int, loads: bool) -> None:
        """The usual case: looked up, and loaded, or not yet."""
        keys = list(self.ledger.ready)[:count]
        self.ledger.look_up(keys, _REQUESTS[req])
        if loads:
            self.ledger.prepare_load(keys, _REQUESTS[req])

    @rule(which=_number, failed=strategies.sets(_number, max_size=3))
    def complete(self, which: int, failed: set[int]) -> None:
        """A job ends, and some of it has failed; said again, it changes nothing."""
        if not self.ledger.jobs:
            return
        job = self.ledger.jobs[which % len(self.ledger.jobs)]
        may = self.ledger.failing(job)
        self.ledger.complete(job, {may[number % len(may)] for number in failed} if may else ())
        manager = self.ledger.manager
        (manager.complete_store if job.stores else manager.complete_load)(job.ticket, list(job.rows))

    @rule(keys=_any_keys, req=_request)
    def touch(self, keys: list[int], req: int) -> None:
        """The engine used its own."""
        self.ledger.begin(_REQUESTS[req])
        self.ledger.manager.touch(_named(keys), _REQUESTS[req])

    @rule(req=_request)
    def end(self, req: int) -> None:
        """A request is over; it may come back under its name."""
        self.ledger.end(_REQUESTS[req])

    @rule(never=strategies.integers(0, 5))
    def reset(self, never: int) -> None:
        """Seldom."""
        if not never:
            self.ledger.reset()

    @invariant()
    def events_agree(self) -> None:
        """After each call."""
        self.ledger.manager.poll()
        self.ledger.compare_events()

    def teardown(self) -> None:
        """At the end nothing is lost: as many blocks as there is room for can be stored."""
        try:
            if sys.exc_info()[0] is not None:
                return  # a call has failed, and that is what is to be shown
            self.ledger.settle(_REQUESTS)
            req = ReqContext("at last")
            fresh = chain("at last", CAPACITY)
            assert self.ledger.prepare_store(fresh, req) is not None
            self.ledger.settle([req])
            self.ledger.look_up(fresh, req)
        finally:
            self.ledger.manager.close()


def _named(keys: list[int]) -> list[OffloadKey]:
    return [_KEYS[number] for number in keys]


def run(make: Callable[[], OffloadingManager], seed: int, examples: int, steps: int) -> None:
    """So many runs of so many calls each, which the seed decides; the shortest one that fails is shown."""
    machine: Any = hypothesis.seed(seed)(type("AnyOrder", (ManagerModel,), {"make": staticmethod(make)}))
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=PHASES,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(machine, settings=settings)
    except Exception as error:
        raise AssertionError(f"seed {seed} repeats it: {error}") from error
