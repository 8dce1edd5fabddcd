"""`TensorwayEplbPolicy`: a `placement_policy` of Tensorway where vLLM asks its own.

May import torch, numpy, the core and `tensorway-eplb`. Every rank asks, with the same loads, and does what it is told:
so policies answer alike on all ranks, and a communicator of ours compares what they are told, layer by layer.
"""

from __future__ import annotations

from typing import Any, Final

import attrs
import numpy as np
import torch

import tensorway
from tensorway.errors import ExpertLost
from tensorway_eplb.placement import EMPTY, Map, Placement
from tensorway_eplb.policy import Budget, PlacementPolicy, Topology, ask
from tensorway_vllm.eplb.options import EplbOptions

_KIND: Final = "placement_policy"


class TensorwayEplbPolicy:
    """See `vllm.distributed.eplb.policy.AbstractEplbPolicy`, where this is a class method of a class."""

    def __init__(self, options: EplbOptions) -> None:
        self._name, self._given = options.policy, options.policy_options
        self._budget = Budget(options.receives_per_layer)
        #: By the number of groups that the model routes experts in. Made now, so that what cannot be made is refused.
        self._made: dict[int, PlacementPolicy] = {}
        self._policy(1)

    def rebalance_experts(
        self,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Where experts are to be: the logical expert of each slot, [layers, num_replicas], for loads by expert."""
        loads = weight.detach().cpu().numpy().astype(np.float64)
        layers, experts = loads.shape
        old = None if old_global_expert_indices is None else old_global_expert_indices.cpu().numpy()
        current = Placement(_sized(old, layers, experts, num_replicas), experts, num_ranks)
        topology = Topology.flat(num_ranks, max(1, num_ranks // num_nodes))
        placed = ask(self._policy(num_groups), loads, current, topology, self._budget)
        if lost := placed.lost:
            layer, expert = lost[0]
            # vLLM would go on, with whatever is in its buffer where this expert should be.
            raise ExpertLost(
                f"The policy {self._name} was asked for a placement by vLLM.",
                f"It leaves expert {expert} of layer {layer} out, and {len(lost) - 1} more.",
                "Take another policy, or report this to the policy's author.",
            )
        return torch.from_numpy(placed.map.astype(np.int64))

    def _policy(self, num_groups: int) -> PlacementPolicy:
        """The policy; one that groups experts is told the model's groups, unless the operator said how many."""
        if num_groups not in self._made:
            given = dict(self._given)
            if "num_groups" not in given and _takes_groups(self._name):
                given["num_groups"] = num_groups
            self._made[num_groups] = tensorway.create(_KIND, self._name, given)
        return self._made[num_groups]


def _takes_groups(name: str) -> bool:
    winner = tensorway.decide(_KIND, name).winner
    options: Any = winner.offer.options if winner is not None and winner.offer is not None else None
    return attrs.has(options) and "num_groups" in attrs.fields_dict(options)


def _sized(old: np.ndarray[Any, Any] | None, layers: int, experts: int, slots: int) -> Map:
    """The map that is there, for as many slots as there will be: ranks leave and come at the end."""
    if old is None:
        return np.tile(np.arange(slots, dtype=np.int32) % experts, (layers, 1))
    missing = max(0, slots - old.shape[1])
    return np.pad(old[:, :slots], ((0, 0), (0, missing)), constant_values=EMPTY).astype(np.int32)
