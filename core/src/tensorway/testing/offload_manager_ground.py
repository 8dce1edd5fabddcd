"""What the suite of managers stands on: how a manager is made, waited for, and asked what is there.

Room `testing`; the tests are in `offload_managers` and `offload_promotions`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Final

import pytest

import tensorway
from tensorway.offload import (
    LookupResult,
    OffloadContext,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    Tier,
)
from tensorway.testing.connector_memory import Memory, Shape
from tensorway.testing.offload_below import Shelves
from tensorway.testing.offload_ground import request
from tensorway.testing.offload_ledger import Ledger
from tensorway.testing.suite import Suite
from tensorway.testing.waiting import eventually

CAPACITY: Final = 8
HIT, MISS = LookupResult.HIT, LookupResult.MISS

Open = Callable[..., OffloadingManager]


class ManagerGround(Suite):
    """What tests of a manager need."""

    #: The backend's name, as `tensorway.create("offloading", name)` takes it.
    name: str
    options: ClassVar[dict[str, object]] = {}
    #: Seconds that a lease lasts with these options; 0 if that is not to be tested.
    lease: ClassVar[float] = 0.0
    #: Seconds after which everything that comes from tiers below must be known, whatever they do.
    patience: ClassVar[float] = 60.0
    #: Runs of the model, and calls of each.
    runs: ClassVar[int] = 60
    calls: ClassVar[int] = 40
    #: What decides the runs; None for others each time. It is printed.
    seed: ClassVar[int | None] = None

    def options_for(self, capacity: int) -> dict[str, object]:
        """Options with room for so many blocks; override it if yours is not called `capacity_blocks`."""
        return {**self.options, "capacity_blocks": capacity}

    def make(self, capacity: int) -> OffloadingManager:
        """A manager with room for so many blocks; override it for one that is not installed."""
        context = OffloadContext(f"suite-{uuid.uuid4().hex}", "manager", (Memory(Shape(), 0).geometry,))
        manager: Any = tensorway.create("offloading", self.name, self.options_for(capacity), context)
        assert manager is not None
        return manager  # type: ignore[no-any-return]

    def make_over(self, capacity: int, tier: Tier) -> OffloadingManager | None:
        """The same over one tier; None if there is no way to give it one."""
        return None

    def pass_time(self, seconds: float) -> None:
        """It is so much later; override it for a manager with a clock of its own."""
        time.sleep(seconds)

    @pytest.fixture
    def open_manager(self) -> Iterator[Open]:
        """Managers, closed at the end of the test."""
        opened: list[OffloadingManager] = []

        def make(capacity: int = CAPACITY) -> OffloadingManager:
            opened.append(self.make(capacity))
            return opened[-1]

        yield make
        for each in opened:
            each.close()

    @pytest.fixture
    def manager(self, open_manager: Open) -> OffloadingManager:
        """One with room for eight blocks."""
        return open_manager()

    # -- helpers

    def over(self, tier: Shelves, capacity: int = CAPACITY) -> Iterator[OffloadingManager]:
        """A manager over a tier, closed afterwards."""
        manager = self.make_over(capacity, tier)
        if manager is None:
            pytest.skip("no tier can be put below it")
        try:
            yield manager
        finally:
            tier.release()
            manager.close()

    def settled(self, manager: OffloadingManager, keys: Sequence[OffloadKey], req: ReqContext) -> int:
        """How many are ready, when nothing is to come any more."""

        until = time.monotonic() + self.patience
        while (found := manager.lookup_prefix(keys, req)).later:
            assert time.monotonic() < until, f"{found} for ever"
            self.step(manager)
        return found.ready

    def quiet(self, manager: OffloadingManager) -> None:
        """Wait until it has nothing to do."""
        eventually(lambda: not manager.busy(), self.patience, "it is busy for ever", partial(self.step, manager))

    def step(self, manager: OffloadingManager) -> None:
        time.sleep(0.002)
        manager.poll()


def begun(manager: OffloadingManager, name: str) -> ReqContext:
    """A request that is there."""
    req = request(name)
    assert manager.begins(req) in ("new", "all")
    return req


def stored(out: PrepareStoreOutput | None) -> PrepareStoreOutput:
    """An output that is there."""
    assert out is not None, "there is room, and it was refused"
    return out


def put(ledger: Ledger, keys: Sequence[OffloadKey], req: ReqContext) -> None:
    """Store these, until they can be looked up."""
    assert ledger.prepare_store(keys, req) is not None, "there is room, and it was refused"
    ledger.complete(ledger.jobs[-1])
    ledger.end(req)


def here(manager: OffloadingManager, keys: Sequence[OffloadKey]) -> list[bool]:
    """Which of these can be loaded, without keeping them."""
    req = begun(manager, "is it here")
    found = [result is HIT for result in manager.lookup_many(keys, req)]
    manager.ended(req)
    return found


def told(manager: OffloadingManager) -> list[tuple[str, list[OffloadKey]]]:
    """Events since the last time, those of one kind that follow each other as one."""
    merged: list[tuple[str, list[OffloadKey]]] = []
    for event in manager.take_events():
        if merged and merged[-1][0] == event.what:
            merged[-1][1].extend(event.keys)
        else:
            merged.append((event.what, list(event.keys)))
    return merged
