"""Engines with the connector `several` as real processes: how their sides are opened, for `testing.engine`.

May import the core, its `testing` and this dist. Functions with a `Rank` first are called in those processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import tensorway
from tensorway.kv import KVContext
from tensorway.testing.ranks import Rank
from tensorway_kv.testing.engine import Deployment, Engine, Options
from tensorway_kv.testing.memory import JUNK, Ids, Shaped, memory_of, salted


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


class SeveralDeployment(Deployment):
    """A deployment in which engines may have several connectors."""

    def several(self, name: str, shape: Shaped, children: list[Options], **options: Any) -> SeveralEngine:
        """One more engine, with these children."""
        count = 1 + shape.tp
        self.ranks.grow(self.used + count)
        indices = list(range(self.used, self.used + count))
        self.used += count
        given = {"path": self.options["path"], "children": children, **options}
        made = SeveralEngine(name, shape, self.ranks, indices, given)
        self.engines.append(made)
        made.open()
        return made


def verify_parts(rank: Rank, blocks: Ids, parts: Sequence[tuple[int, int, int]]) -> int:
    """See that these tokens are there, each part of another request, and nothing else was written; how many bytes."""
    held = rank.notes["memory"]
    expected = np.full(len(held.memory), JUNK, np.uint8)
    for start, stop, salt in parts:
        for _, places, names in held.places(blocks, range(start, stop)):
            expected[places] = salted(names, salt)
    np.testing.assert_array_equal(held.memory, expected)
    return int((expected != JUNK).sum())
