"""What placement policies move and reach, side by side: the incremental one against DeepSeek's, with and without names.

    python tests/bench/eplb_policy.py [--short]

58 layers of 256 experts with 32 replicas on 32 ranks in 4 nodes; the loads of a layer follow Zipf's law (0.6) and drift
between rebalances by a log-normal factor. Each policy goes on from its own last answer. Rows and balance are the same
on every machine; seconds are CPU seconds of this process, and their ratio is to DeepSeek's in the same run.
"""

from __future__ import annotations

import sys
import time

import numpy as np

import tensorway
from tensorway_eplb.placement import Loads, Placement
from tensorway_eplb.plan import TransferPlan
from tensorway_eplb.policy import Budget, Topology, ask

LAYERS, EXPERTS, RANKS, SLOTS, PER_NODE = 58, 256, 32, 9, 8
#: What is compared: name, backend, options, budget.
POLICIES = (
    ("deepseek", "deepseek", {}, None),
    ("deepseek, relabeled", "deepseek", {"relabel": True}, None),
    ("deepseek, 4 groups, relabeled", "deepseek", {"relabel": True, "num_groups": 4}, None),
    ("incremental", "incremental", {}, None),
    ("incremental, budget 32", "incremental", {}, 32),
)


def loads_over_time(drift: float, sets: int) -> list[Loads]:
    """The first loads, and what becomes of them."""
    rng = np.random.default_rng(1)
    weights = 1e4 / np.arange(1, EXPERTS + 1) ** 0.6
    found = [np.array([rng.permutation(weights) for _ in range(LAYERS)])]
    for _ in range(sets):
        found.append(found[-1] * np.exp(rng.normal(0, drift, found[0].shape)))
    return found


def compare(drift: float, sets: int) -> None:
    """All policies at one drift."""
    first, *series = loads_over_time(drift, sets)
    topology = Topology.flat(RANKS, PER_NODE)
    linear = Placement.linear(LAYERS, EXPERTS, RANKS, SLOTS)
    start = ask(tensorway.create("placement_policy", "deepseek"), first, linear, topology, Budget())
    base: tuple[float, float] | None = None
    for name, backend, options, budget in POLICIES:
        policy, current = tensorway.create("placement_policy", backend, options), start
        after, moved, across, seconds = [], [], [], []
        for loads in series:
            started = time.process_time()
            new = ask(policy, loads, current, topology, Budget(budget))
            seconds.append(time.process_time() - started)
            rows = TransferPlan.make(current, new, topology).rows
            after.append(new.balancedness(loads))
            moved.append((rows.remote + rows.same_node) / new.map.size)
            across.append(rows.remote / new.map.size)
            current = new
        base = base or (float(np.mean(moved)), float(np.mean(seconds)))
        print(
            f"drift {drift}: {name:<30} balance {np.mean(after):.4f}, rows {np.mean(moved):6.1%} "
            f"(across nodes {np.mean(across):6.1%}), {base[0] / np.mean(moved):5.2f} x fewer; "
            f"{np.mean(seconds):.3f} s, {np.mean(seconds) / base[1]:.0f} x DeepSeek's"
        )


def main() -> None:
    """Print all rows."""
    short = "--short" in sys.argv
    for drift in (0.1, 0.3) if short else (0.1, 0.3, 0.6):
        compare(drift, 2 if short else 5)


if __name__ == "__main__":
    main()
