"""What a placement policy is asked and answers. Whoever writes one implements `PlacementPolicy`, and nothing else.

May import the core's ground, numpy and `placement`.
"""

from __future__ import annotations

from typing import Protocol

import attrs

from tensorway.errors import PlacementInvalid
from tensorway_eplb.placement import Loads, Placement


@attrs.frozen
class Topology:
    """Where the ranks are, and how fast each is."""

    #: The node of each rank: any numbers, equal for ranks that share one.
    nodes: tuple[int, ...]
    #: How much of the same work each rank does in the same time.
    speeds: tuple[float, ...]

    def __attrs_post_init__(self) -> None:
        if not self.nodes or len(self.nodes) != len(self.speeds) or min(self.speeds) <= 0:
            raise PlacementInvalid(
                f"A topology of {len(self.nodes)} ranks was given.",
                f"It has {len(self.speeds)} speeds, or one of them is not above zero.",
                "Give a node and a speed for each rank.",
            )

    @classmethod
    def flat(cls, ranks: int, per_node: int | None = None) -> Topology:
        """Equal ranks; all on one node, or `per_node` on each."""
        return cls(tuple(rank // (per_node or ranks) for rank in range(ranks)), (1.0,) * ranks)


@attrs.frozen
class Budget:
    """What a policy may spend."""

    #: Rows that all ranks together may receive in one layer; None for as many as it takes.
    receives_per_layer: int | None = None


class PlacementPolicy(Protocol):
    """Decides which rank holds which expert. The same question must have the same answer on every rank."""

    def place(self, loads: Loads, current: Placement, topology: Topology, budget: Budget) -> Placement:
        """A placement for these loads ([layers, experts]), with the shape of the current one and its epoch plus one.

        Every expert that `current` holds has a slot in it, and so may those that it has lost: they are loaded from a
        copy.
        """
        ...
