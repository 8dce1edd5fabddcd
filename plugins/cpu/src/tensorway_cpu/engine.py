"""Manager and workers of one engine in one process, for engine builders: many keys stored or loaded in one call.

May import the core and this package. It waits, where an engine with steps would not: such an engine calls manager and
workers itself, in the same order.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final

import attrs

import tensorway
from tensorway.errors import DeadlineExceeded
from tensorway.offload import (
    EngineSpec,
    LoadStoreSpec,
    OffloadContext,
    OffloadingManager,
    OffloadingWorker,
    OffloadKey,
    ReqContext,
    key_group,
)

_TURN: Final = 1e-3
#: Of one rank, for each block its pages.
Pages = Sequence[Sequence[int]]


class Offloading:
    """One engine's offloading. Page numbers are the same on all ranks, as one block table says them."""

    def __init__(self, manager: OffloadingManager, workers: Sequence[OffloadingWorker]) -> None:
        self.manager, self.workers = manager, tuple(workers)
        self._numbers = itertools.count(1)

    @classmethod
    def open(cls, context: OffloadContext, options: Mapping[str, Any] | None = None, name: str = "cpu") -> Offloading:
        """Manager and a worker for each rank; `context` is of any role."""
        made: list[Any] = []
        try:
            made.append(tensorway.create("offloading", name, options, attrs.evolve(context, role="manager")))
            for rank in range(len(context.ranks)):
                each = attrs.evolve(context, role="worker", rank=rank)
                made.append(tensorway.create("offloading", name, options, each))
        except BaseException:
            _close(made, 5.0)
            raise
        return cls(made[0], made[1:])

    def prefix(self, keys: Sequence[OffloadKey], req: ReqContext, deadline: float = 10.0) -> int:
        """How many leading blocks can be loaded, when all tiers have answered; they are leased to the request."""
        until = time.monotonic() + deadline
        while True:
            found = self.manager.lookup_prefix(keys, req)
            if not found.later or time.monotonic() >= until:
                return found.ready
            time.sleep(_TURN)
            self.manager.poll()

    def store(
        self, keys: Sequence[OffloadKey], pages: Pages, req: ReqContext, deadline: float = 30.0
    ) -> list[OffloadKey]:
        """Store blocks that the engine has in these pages; those of them that are there afterwards, in their order."""
        prepared = self.manager.prepare_store(keys, req)
        if prepared is None:
            return []
        at = dict(zip(keys, pages, strict=True))
        source = _engine(prepared.keys, [at[key] for key in prepared.keys])
        failed = self._carried_out("store", prepared.keys, source, prepared.target, deadline)
        self.manager.complete_store(prepared.ticket, failed)
        offered = set(prepared.keys)
        return [key for key in dict.fromkeys(keys) if key not in failed and (key in offered or self._has(key, req))]

    def load(self, keys: Sequence[OffloadKey], pages: Pages, req: ReqContext, deadline: float = 30.0) -> int:
        """Load blocks into these pages; how many of them are good, from the first on. The engine computes the rest."""
        prepared = self.manager.prepare_load(keys, req)
        if prepared is None:
            return 0
        failed = self._carried_out("load", keys, prepared.source, _engine(keys, pages), deadline)
        self.manager.complete_load(prepared.ticket, failed)
        return next((place for place, key in enumerate(keys) if key in failed), len(keys))

    def ended(self, req: ReqContext) -> None:
        """The request asks for nothing any more."""
        self.manager.ended(req)
        self.manager.poll()

    def close(self, deadline: float = 5.0) -> None:
        """End workers, and the manager after them."""
        _close([self.manager, *self.workers], deadline)

    def __enter__(self) -> Offloading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _has(self, key: OffloadKey, req: ReqContext) -> bool:
        return self.manager.lookup_prefix([key], req).ready == 1

    def _carried_out(
        self, what: str, keys: Sequence[OffloadKey], source: LoadStoreSpec, target: LoadStoreSpec, deadline: float
    ) -> set[OffloadKey]:
        """Let all workers copy; the keys that failed at any of them. A worker that is late keeps its pages busy."""
        job, failed, until = next(self._numbers), set[OffloadKey](), time.monotonic() + deadline
        for worker in self.workers:
            (worker.store if what == "store" else worker.load)(job, source, target)
        for worker in self.workers:
            worker.wait([job], max(0.0, until - time.monotonic()))
            for result in worker.poll():
                if result.cause and result.job == job:
                    failed |= {keys[place] for place in result.failed} if result.failed else set(keys)
        self.manager.poll()
        return failed


def _engine(keys: Sequence[OffloadKey], pages: Pages) -> EngineSpec:
    return EngineSpec([key_group(key) for key in keys], pages)


def _close(made: Sequence[Any], deadline: float) -> None:
    until = time.monotonic() + deadline
    late: DeadlineExceeded | None = None
    for each in reversed(made):
        try:
            each.close(max(0.1, until - time.monotonic()))
        except DeadlineExceeded as error:  # the others are to be closed as well
            late = error
    if late is not None:
        raise late
