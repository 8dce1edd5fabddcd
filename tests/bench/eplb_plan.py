"""What a transfer plan costs: all ranks at once, against a loop that each rank repeats layer by layer.

    python tests/bench/eplb_plan.py [--short]

58 layers of 256 experts and 32 redundant ones on 32 ranks of 9 slots, on 4 nodes; once all slots change, once 12 % do.
The loop is how engines plan today: inside the mover, on each rank, and twice for each layer, for what it sends and for
what it receives; it does less, for it knows no nodes, no order of local copies, no staging and no digest. Both are
timed one after the other in this process, and medians of the pairs' ratios are what is printed: the machine is shared.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from tensorway_eplb.placement import EMPTY, Placement
from tensorway_eplb.plan import TransferPlan
from tensorway_eplb.policy import Topology
from tensorway_eplb.waves import waves

LAYERS, EXPERTS, RANKS, SLOTS = 58, 256, 32, 9
Links = dict[tuple[int, int], int]


def placements() -> tuple[Placement, Placement, Placement]:
    """One, another, and one that has most of the first."""
    random = np.random.default_rng(1)
    rows = [
        [random.permutation([*range(EXPERTS), *random.choice(EXPERTS, RANKS * SLOTS - EXPERTS)]) for _ in range(LAYERS)]
        for _ in range(2)
    ]
    near = np.array(rows[0])
    for row in near:
        some = random.choice(RANKS * SLOTS, RANKS * SLOTS * 12 // 100, replace=False)
        row[some] = np.roll(row[some], 1)
    first, second, third = (Placement(np.array(each), EXPERTS, RANKS) for each in (*rows, near))
    return first, second, third


def links(old: list[int], new: list[int]) -> Links:
    """Who brings which expert from whom, in one layer: each holder serves about as many of those that want it."""
    holders: dict[int, list[int]] = {}
    for slot, expert in enumerate(old):
        ranks = holders.setdefault(expert, [])
        if slot // SLOTS not in ranks:
            ranks.append(slot // SLOTS)
    seekers: dict[int, list[int]] = {}
    for slot, expert in enumerate(new):
        rank = slot // SLOTS
        if expert != EMPTY and rank not in holders[expert] and rank not in seekers.setdefault(expert, []):
            seekers[expert].append(rank)
    return {
        (rank, expert): holders[expert][index * len(holders[expert]) // len(ranks)]
        for expert, ranks in seekers.items()
        for index, rank in enumerate(ranks)
    }


def by_loop(old: Placement, new: Placement, me: int) -> tuple[list[Links], list[Links]]:
    """One rank's sends and receives of all layers."""
    sends, receives = [], []
    for layer in range(LAYERS):
        found = links(old.map[layer].tolist(), new.map[layer].tolist())
        sends.append({move: source for move, source in found.items() if source == me})
        found = links(old.map[layer].tolist(), new.map[layer].tolist())
        receives.append({move: source for move, source in found.items() if move[0] == me})
    return sends, receives


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Print two rows for each kind of step."""
    pairs = 5 if "--short" in sys.argv else 31
    topology = Topology.flat(RANKS, 8)
    old, far, near = placements()
    for new in (far, near):
        plan = TransferPlan.make(old, new, topology)
        share = (old.map != new.map).mean()
        calls = (partial(TransferPlan.make, old, new, topology), partial(plan.rank, 3), partial(by_loop, old, new, 3))
        times = [tuple(seconds(call) for call in calls) for _ in range(pairs + 1)][1:]
        own = statistics.median((make + part) / loop for make, part, loop in times)
        every = statistics.median((make + RANKS * part) / (RANKS * loop) for make, part, loop in times)
        best = [f"{min(each) * 1e3:.1f}" for each in zip(*times, strict=True)]
        print(
            f"{share:.0%} of the slots change: the plan of all ranks and one rank's part of it take {own:.2f} x the "
            f"loop of one rank, the plan and all parts {every:.2f} x the loops of all   "
            f"(plan, part, loop: {', '.join(best)} ms at best, {pairs} pairs)"
        )
    for rows in (4, 1):
        started = time.perf_counter()
        steps = len(waves(old, far, topology, rows))
        print(f"With {rows} staging rows: {steps} steps, found in {(time.perf_counter() - started) * 1e3:.0f} ms.")


if __name__ == "__main__":
    main()
