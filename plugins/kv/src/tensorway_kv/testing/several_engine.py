"""Engines with the connector `several` as real processes: how their sides are opened, for `testing.engine`.

May import the core, its `testing` and this dist. Functions with a `Rank` first are called in those processes.
"""

from __future__ import annotations

from typing import Any

import tensorway
from tensorway.kv import KVContext
from tensorway.testing.ranks import Rank
from tensorway_kv.testing.engine import Engine, Options
from tensorway_kv.testing.memory import Shaped, memory_of


def open_several_planner(rank: Rank, engine: str, shape: Shaped, options: Options) -> None:
    """Begin a life of an engine, whose connector is `several`."""
    geometry = memory_of(shape, 0)[0]
    context = KVContext(engine, rank.rendezvous(), "planner", shape.tp, 0, geometry, {"model": "tiny"})
    rank.notes["planner"] = tensorway.create("kv_connector", "several", options, context)


def open_several_mover(rank: Rank, engine: str, shape: Shaped, number: int, options: Options) -> None:
    """Hold memory beside it."""
    geometry, rank.notes["memory"] = memory_of(shape, number)
    context = KVContext(engine, rank.rendezvous(), "mover", shape.tp, number, geometry, {"model": "tiny"})
    rank.notes["mover"] = tensorway.create("kv_connector", "several", options, context)


class SeveralEngine(Engine):
    """An engine of `testing.engine` whose connector is `several`, with these options and no others."""

    def open(self, opening: Any = open_several_mover) -> Engine:
        """Begin its life."""
        self.planner.call(open_several_planner, self.name, self.shape, self.options)
        for number, mover in enumerate(self.movers):
            mover.start(opening, self.name, self.shape, number, self.options)
        for mover in self.movers:
            mover.result()
        return self
