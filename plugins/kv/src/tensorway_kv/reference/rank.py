"""One rank of the reference engine: its share of the attention, its pages, and the mover beside them.

May import the core and this package's model and cache. Whoever computes a step says in which order: `begin` on all
ranks before the first `attend`, so that nothing is overwritten before every mover knows the step's plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import attrs
import numpy as np
from numpy.typing import NDArray

import tensorway
from tensorway.errors import DeadlineExceeded
from tensorway.kv import KVContext, Mover, Planner, RankGeometry, Result
from tensorway.metrics import Sample
from tensorway.rendezvous import Rendezvous
from tensorway_kv.reference.cache import Order, Pages
from tensorway_kv.reference.model import ModelShape, Shard

Array = NDArray[Any]

#: Seconds that an engine rests after a step in which nothing was computed, so that others have the processor.
IDLE: Final = 5e-4


@attrs.frozen
class EngineOptions:
    """How an engine is laid out, and what it may do at once."""

    tp: int = 1
    blocks: int = 128
    page_tokens: int = 16
    order: Order = "NHD"
    #: Tokens that one step computes, of all requests together.
    chunk: int = 128
    #: Whether layers are sent, and awaited, while they are computed, if the connector can; else whole requests.
    layerwise: bool = False
    #: Seconds that a connector may say `later`, and that one layer may be awaited.
    patience: float = 10.0


@attrs.frozen
class Row:
    """Tokens of one request that a step computes."""

    blocks: tuple[int, ...]
    first: int
    stop: int


@attrs.frozen
class Work:
    """What one step is, for every rank."""

    plan: bytes = b""
    rows: tuple[Row, ...] = ()
    #: Whether rows build on blocks that are still on their way.
    awaited: bool = False


class Ranks(Protocol):
    """All ranks of an engine, wherever they run; answers are in the order of ranks."""

    def begin(self, work: Work) -> None:
        """Give every mover the step's plan."""
        ...

    def attend(self, layer: int, hidden: Array) -> list[Array]:
        """Write the layer's keys and values of all rows, and say what each rank's heads see."""
        ...

    def end(self) -> list[list[Result]]:
        """What movers have to say."""
        ...

    def statistics(self) -> list[Sample]:
        """What movers have counted."""
        ...


class Worker:
    """One rank."""

    def __init__(self, shard: Shard, pages: Pages, mover: Mover | None, options: EngineOptions) -> None:
        self._shard, self.pages, self.mover, self._patience = shard, pages, mover, options.patience
        layerwise = options.layerwise and mover is not None and mover.capabilities.layerwise
        self._layerwise: Any = mover if layerwise else None
        self._work = Work()

    def begin(self, work: Work) -> None:
        """The next step."""
        self._work = work
        if self.mover is not None:
            self.mover.submit(work.plan)

    def attend(self, layer: int, hidden: Array) -> Array:
        """What this rank's heads see of the rows' tokens, which lie one behind the other in `hidden`."""
        if self._layerwise is not None and self._work.awaited:
            try:
                self._layerwise.before_layer(layer, self._patience)
            except DeadlineExceeded:
                pass  # what is computed now is worth nothing, and only the planner can say so
        queries, keys, values = self._shard.projected(layer, hidden.astype(np.float64))
        seen, at = [], 0
        for row in self._work.rows:
            own = slice(at, at + row.stop - row.first)
            at = own.stop
            self.pages.write(layer, row.blocks, row.first, keys[own], values[own])
            seen.append(self._shard.attended(queries[own], *self.pages.read(layer, row.blocks, row.stop), row.first))
        if self._layerwise is not None:
            self._layerwise.after_layer(layer)
        return np.concatenate(seen).astype(np.float32)

    def end(self) -> list[Result]:
        """What the mover has to say."""
        return self.mover.poll() if self.mover is not None else []

    def statistics(self) -> list[Sample]:
        """What the mover has counted."""
        return list(self.mover.statistics()) if self.mover is not None else []

    def close(self, deadline: float = 5.0) -> None:
        """End the mover."""
        if self.mover is not None:
            self.mover.close(deadline)


class LocalRanks:
    """Ranks in this process, one after the other."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers

    def begin(self, work: Work) -> None:
        """See `Ranks`."""
        for worker in self.workers:
            worker.begin(work)

    def attend(self, layer: int, hidden: Array) -> list[Array]:
        """See `Ranks`."""
        return [worker.attend(layer, hidden) for worker in self.workers]

    def end(self) -> list[list[Result]]:
        """See `Ranks`."""
        return [worker.end() for worker in self.workers]

    def statistics(self) -> list[Sample]:
        """See `Ranks`."""
        return [sample for worker in self.workers for sample in worker.statistics()]


@attrs.frozen
class Connection:
    """By which connector an engine hands over, and under which name others know the engine."""

    engine: str
    connector: str = "handover"
    options: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    deadline: float = 30.0

    def planner(self, rendezvous: Rendezvous, shape: ModelShape, ranks: int, geometry: RankGeometry) -> Planner:
        """The side of the scheduler."""
        found: Planner = self._made(KVContext(
            self.engine, rendezvous, "planner", ranks, 0, geometry, shape.facts, self.deadline
        ))  # fmt: skip
        return found

    def mover(self, rendezvous: Rendezvous, shape: ModelShape, ranks: int, rank: int, geometry: RankGeometry) -> Mover:
        """The side of one rank."""
        found: Mover = self._made(KVContext(
            self.engine, rendezvous, "mover", ranks, rank, geometry, shape.facts, self.deadline
        ))  # fmt: skip
        return found

    def _made(self, context: KVContext) -> Any:
        return tensorway.create("kv_connector", self.connector, dict(self.options), context)


def parts_of(shape: ModelShape, options: EngineOptions, rank: int = 0) -> tuple[Shard, Pages]:
    """What a rank has before it has a mover."""
    pages = Pages(
        shape, blocks=options.blocks, page_tokens=options.page_tokens, order=options.order, rank=rank, ranks=options.tp
    )
    return Shard(shape, rank, options.tp), pages
