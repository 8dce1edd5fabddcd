"""The policy `deepseek`: the balancer that DeepSeek published, from its three steps. May import this dist's ground.

Groups are packed to nodes, the expert with the largest load for each replica gets one more until all slots are used,
and the replicas are packed to ranks. Packing takes the heaviest item first and gives it to the emptiest bin that has
room; ties go to the lowest index. What was published knows ranks of one speed only: where they differ, a bin's target
is in proportion to its speed, and what was packed is improved by the steps of `incremental`. The policy looks at loads
alone: nearly every row has another place afterwards, unless `relabel` gives the packed ranks the numbers under which
most of their rows are there already.
"""

from __future__ import annotations

import math

import attrs
import numpy as np
from numpy.typing import NDArray

from tensorway.errors import PlacementInvalid
from tensorway_eplb.grains import grains, shares
from tensorway_eplb.placement import Loads, Placement
from tensorway_eplb.policy import Budget, Topology, check_question
from tensorway_eplb.policy_options import DeepseekOptions, IncrementalOptions
from tensorway_eplb.relabel import relabeled
from tensorway_eplb.steps import LayerState, improve

Index = NDArray[np.int64]


class Deepseek:
    """Balances anew at each call. A budget is not kept: this policy knows no order in which less would be moved."""

    def __init__(self, options: DeepseekOptions, context: object = None) -> None:
        self.options = options

    def place(self, loads: Loads, current: Placement, topology: Topology, budget: Budget) -> Placement:
        """The balance that the published algorithm finds for these loads."""
        loads = check_question(loads, current, topology)
        if current.map.shape[1] < current.num_logical:
            raise PlacementInvalid(
                f"{current.num_logical} experts were to be packed on {current.ranks} ranks of {current.slots} slots.",
                f"There is room for {current.map.shape[1]}.",
                "Give each rank more slots, or use the policy incremental, which places as many as there is room for.",
            )
        layout = self._layout(current, topology)
        load = grains(loads, current.map.shape[1])
        rows = _by_rank(load, current.slots, layout)
        if self.options.relabel:
            rows = relabeled(rows, current, topology, whole_nodes=len(layout.members) > 1)
        return Placement(
            rows.reshape(current.layers, -1).astype(np.int32), current.num_logical, current.ranks, current.epoch + 1
        )

    def close(self) -> None:
        """Nothing is held."""

    def _layout(self, current: Placement, topology: Topology) -> _Layout:
        nodes = sorted(set(topology.nodes))
        members = tuple(tuple(rank for rank, of in enumerate(topology.nodes) if of == node) for node in nodes)
        groups, mode = self.options.num_groups, self.options.mode
        problems = [
            (current.num_logical % groups != 0, f"{current.num_logical} experts are not {groups} groups of one size"),
            (groups % len(nodes) != 0, f"{groups} groups cannot be shared evenly by {len(nodes)} nodes"),
            (len({len(ranks) for ranks in members}) > 1, "the nodes have different numbers of ranks"),
        ]
        problem = next((text for found, text in problems if found), "")
        if problem and mode == "hierarchical":
            raise PlacementInvalid(
                "A hierarchical balance was asked for.", f"Here {problem}.", "Set num_groups, or mode to auto."
            )
        if problem or mode == "global":
            return _Layout(1, (tuple(range(current.ranks)),), topology.speeds)
        return _Layout(groups, members, topology.speeds)


@attrs.frozen
class _Layout:
    """How the experts are grouped, and the ranks of each node (of one node, for a global balance)."""

    groups: int
    members: tuple[tuple[int, ...], ...]
    speeds: tuple[float, ...]


def _by_rank(load: Loads, slots: int, layout: _Layout) -> Index:
    """The experts of each rank: [layers, ranks, slots]."""
    layers, experts = load.shape
    size = experts // layout.groups
    speed = np.array(layout.speeds)
    of_group = load.reshape(layers, layout.groups, size).sum(axis=2)
    node_speed = np.array([math.fsum(speed[list(ranks)]) for ranks in layout.members])
    groups = pack(of_group, node_speed, layout.groups // len(layout.members))
    rows = np.zeros((layers, len(layout.speeds), slots), dtype=np.int64)
    for node, ranks in enumerate(layout.members):
        local = (groups[:, node, :, None] * size + np.arange(size)).reshape(layers, -1)
        here = np.take_along_axis(load, local, axis=1)
        replicas, share = replicate(here, len(ranks) * slots)
        packed = pack(share, speed[list(ranks)], slots).reshape(layers, -1)
        experts_of = np.take_along_axis(replicas, packed, axis=1)
        if len(set(speed[list(ranks)])) > 1:
            _even_out(experts_of, here, speed[list(ranks)], slots)
        rows[:, list(ranks)] = np.take_along_axis(local, experts_of, axis=1).reshape(layers, len(ranks), slots)
    return rows


def _even_out(rows: Index, load: Loads, speed: Loads, slots: int) -> None:
    """Let fast ranks have more to do than their slots' share, and experts as many replicas as that takes."""
    for row, of in zip(rows, load, strict=True):
        improve(LayerState(row, of, speed, slots), row.size * row.size, IncrementalOptions())


def replicate(load: Loads, slots: int) -> tuple[Index, Loads]:
    """The expert of each replica, every expert once and then the extra ones, and the load of each: [layers, slots]."""
    layers, experts = load.shape
    layer = np.arange(layers)
    replicas = np.empty((layers, slots), dtype=np.int64)
    replicas[:, :experts] = np.arange(experts)
    counts = np.ones((layers, experts))
    share = load.copy()
    for slot in range(experts, slots):
        hottest = share.argmax(axis=1)  # the first of several, which is the lowest index
        replicas[:, slot] = hottest
        counts[layer, hottest] += 1
        share[layer, hottest] = load[layer, hottest] / counts[layer, hottest]
    return replicas, np.take_along_axis(shares(load, counts), replicas, axis=1)


def pack(load: Loads, speed: Loads, room: int) -> Index:
    """The items of each bin, heaviest first: [layers, bins, room]. A bin's target is in proportion to its speed."""
    layers, items = load.shape
    bins = len(speed)
    if room == 1 and (speed == speed[0]).all():  # nothing to balance, so nothing need change its place
        return np.tile(np.arange(items)[:, None], (layers, 1, 1))
    order = np.argsort(-load, axis=1, kind="stable")
    layer = np.arange(layers)
    # All slots will be filled, so a slow bin keeps room for the lightest. Bins of one speed are compared as published.
    lightest = load.min(axis=1)[:, None] if (speed != speed[0]).any() else 0.0
    filled = np.zeros((layers, bins))
    used = np.zeros((layers, bins), dtype=np.int64)
    packed = np.empty((layers, bins, room), dtype=np.int64)
    for position in range(items):
        item = order[:, position]
        weight = load[layer, item]
        after = np.where(used < room, (filled + weight[:, None] + (room - used - 1) * lightest) / speed, np.inf)
        chosen = after.argmin(axis=1)
        packed[layer, chosen, used[layer, chosen]] = item
        filled[layer, chosen] += weight
        used[layer, chosen] += 1
    return packed
