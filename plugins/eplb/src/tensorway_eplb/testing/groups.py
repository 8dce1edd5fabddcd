"""Groups of processes with an engine each, as a test enters and drives them.

May import the core, its `testing` and this dist. What a process does is in `engine`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensorway.testing.ranks import Ranks
from tensorway_eplb.placement import Map, Placement
from tensorway_eplb.testing import engine
from tensorway_eplb.testing.engine import Model, Report


def entered(ranks: Ranks, processes: Sequence[int], path: str, model: Model) -> Placement:
    """These processes as a group with the linear placement, which is returned."""
    ranks.grow(max(processes) + 1)
    start = Placement.linear(model.layers, model.experts, len(processes), model.slots)
    ranks.enter(processes, engine.join, path, 0, model, start)
    return start


def together(ranks: Ranks, processes: Sequence[int], rows: Map, deadline: float) -> list[Report]:
    """All of them rebalance at once; what each says of it."""
    return ranks.each(processes, engine.rebalance, rows, deadline)


def swapped(start: Placement, first: int, second: int) -> Map:
    """The same placement with two slots of every layer exchanged."""
    rows: Map = start.map.copy()
    rows[:, [first, second]] = rows[:, [second, first]]
    return rows
