"""The policy `incremental`: starts from the placement that is there and makes the few changes that pay most.

May import this dist's ground. A layer is improved step by step. A step is the exchange of one slot of the slowest rank
with one of another rank, or one more replica of an expert of the slowest rank in the slot of an expert that has others
(or in an empty one). A layer that steps do not lead far enough is packed anew, if the budget has room for that. Layers
do not depend on each other.
"""

from __future__ import annotations

import numpy as np

from tensorway_eplb.deepseek import Deepseek
from tensorway_eplb.grains import grains
from tensorway_eplb.placement import Loads, Placement
from tensorway_eplb.policy import Budget, Topology, check_question
from tensorway_eplb.policy_options import DeepseekOptions, IncrementalOptions
from tensorway_eplb.steps import LayerState, improve


class Incremental:
    """Keeps to the budget, whatever it is."""

    def __init__(self, options: IncrementalOptions, context: object = None) -> None:
        self.options = options

    def place(self, loads: Loads, current: Placement, topology: Topology, budget: Budget) -> Placement:
        """The current placement, improved until it is balanced, the budget is spent, or no step pays any more."""
        loads = check_question(loads, current, topology)
        load = grains(loads, current.map.shape[1])
        speed = np.array(topology.speeds)
        most = current.map.size if budget.receives_per_layer is None else budget.receives_per_layer
        rows = current.map.astype(np.int64)
        states = [LayerState(row, of, speed, current.slots) for row, of in zip(rows, load, strict=True)]
        for state in states:
            state.place_lost()
            improve(state, most, self.options)
        self._repack(states, most, loads, current, topology)
        return Placement(rows.astype(np.int32), current.num_logical, current.ranks, current.epoch + 1)

    def _repack(
        self, states: list[LayerState], most: int, loads: Loads, current: Placement, topology: Topology
    ) -> None:
        """Pack those layers anew that the steps leave far behind: loads of quite another kind, or experts in order."""
        times = np.array([state.times.max() for state in states])
        ideal = np.array([state.ideal for state in states])
        behind = np.flatnonzero(times * (1 - self.options.repack) > ideal)
        if not len(behind) or current.map.shape[1] < current.num_logical:
            return
        part = Placement(current.map[behind], current.num_logical, current.ranks)
        options = DeepseekOptions(mode="global", relabel=True)
        fresh = Deepseek(options).place(loads[behind], part, topology, Budget())
        for layer, row in zip(behind, fresh.map, strict=True):
            state = states[layer]
            before = state.row.copy()
            state.restore(row.astype(np.int64))
            improve(state, most, self.options)
            if state.receives > most or state.times.max() > times[layer] * (1 - self.options.repack):
                state.restore(before)

    def close(self) -> None:
        """Nothing is held."""
