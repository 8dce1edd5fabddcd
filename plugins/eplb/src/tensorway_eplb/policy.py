"""What a placement policy is asked and answers. Whoever writes one implements `PlacementPolicy`, and nothing else.

May import the core's ground, numpy and `placement`. `ask` is how everybody else asks one: it checks the answer.
"""

from __future__ import annotations

from typing import Any, Protocol

import attrs
import numpy as np

from tensorway.errors import PlacementInvalid, TensorwayError
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

    #: Rows that all ranks together may receive from others in one layer; None for as many as it takes. An expert that
    #: nobody holds any more is loaded from a copy, not received.
    receives_per_layer: int | None = None

    def __attrs_post_init__(self) -> None:
        if self.receives_per_layer is not None and self.receives_per_layer < 0:
            raise PlacementInvalid(
                f"A budget of {self.receives_per_layer} receives was given.", "It is below zero.", "Give 0 or more."
            )


class PlacementPolicy(Protocol):
    """Decides which rank holds which expert. The same question must have the same answer on every rank."""

    def place(self, loads: Loads, current: Placement, topology: Topology, budget: Budget) -> Placement:
        """A placement for these loads ([layers, experts]), with the shape of the current one and its epoch plus one.

        Every expert that `current` holds has a slot in it, and so may those that it has lost: they are loaded from a
        copy.
        """
        ...


def check_question(loads: Any, current: Placement, topology: Topology) -> Loads:
    """The loads as floats; raises `PlacementInvalid` for what no policy can answer."""
    asked = f"A policy was asked to place {current.num_logical} experts of {current.layers} layers."
    try:
        given = np.asarray(loads, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise PlacementInvalid(asked, f"The loads are no numbers: {error}.", "Give [layers, experts].") from None
    if given.shape != (current.layers, current.num_logical):
        raise PlacementInvalid(
            asked, f"The loads have shape {given.shape}.", "Give one load for each layer and expert."
        )
    if not np.isfinite(given).all() or (given < 0).any():
        raise PlacementInvalid(asked, "A load is negative, infinite or not a number.", "Give what was counted.")
    if len(topology.nodes) != current.ranks:
        true = f"The topology has {len(topology.nodes)} ranks, and the placement {current.ranks}."
        raise PlacementInvalid(asked, true, "Describe the ranks of the placement.")
    return given


def ask(policy: PlacementPolicy, loads: Any, current: Placement, topology: Topology, budget: Budget) -> Placement:
    """Ask a policy, whoever wrote it, and check its answer: raises `PlacementInvalid` for one that cannot be used."""
    loads = check_question(loads, current, topology)
    name = type(policy).__name__
    asked, to_do = f"The policy {name} was asked for a placement.", "Report this to the policy's author."
    try:
        answer: object = policy.place(loads, current, topology, budget)
    except TensorwayError:
        raise
    except Exception as error:
        raise PlacementInvalid(asked, f"It raised {type(error).__name__}: {error}.", to_do) from error
    if not isinstance(answer, Placement):
        raise PlacementInvalid(asked, f"It answered with a {type(answer).__name__}.", to_do)
    shapes = [(of.map.shape, of.num_logical, of.ranks) for of in (answer, current)]
    if shapes[0] != shapes[1] or answer.epoch != current.epoch + 1:
        true = f"Its answer is {shapes[0]} of epoch {answer.epoch}; what is there is {shapes[1]} of {current.epoch}."
        raise PlacementInvalid(asked, true, to_do)
    dropped = np.argwhere((answer.counts() == 0) & (current.counts() > 0))
    if len(dropped):
        layer, expert = map(int, dropped[0])
        raise PlacementInvalid(asked, f"It drops expert {expert} of layer {layer}, which a rank holds.", to_do)
    return answer
