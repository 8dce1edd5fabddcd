"""A whole cycle of a large group: policy, plan and moving, ours against the anchor's, by rates that were measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import attrs
from eplb_plan import by_loop
from eplb_policy import EXPERTS, LAYERS, PER_NODE, RANKS, SLOTS, loads_over_time

import tensorway
from tensorway_eplb.placement import Loads, Placement
from tensorway_eplb.plan import TransferPlan
from tensorway_eplb.policy import Budget, PlacementPolicy, Topology, ask

DRIFT = 0.1
#: One expert of DeepSeek-V3 in one layer, with its scales.
ROW_BYTES = 44_000_000


@attrs.frozen
class Way:
    """One policy and one way to plan, over a series of loads; means of one cycle."""

    balance: float
    #: All rows that ranks receive, and those of the busiest rank.
    rows: float
    busiest: float
    policy_seconds: float
    plan_seconds: float

    def seconds(self, rate: float) -> float:
        """Of a cycle whose ranks move so many bytes a second each."""
        return self.policy_seconds + self.plan_seconds + self.busiest * ROW_BYTES / rate


def timed(call: Callable[[], object]) -> float:
    """CPU seconds of a call: the machine is shared, and nothing waits in it."""
    started = time.process_time()
    call()
    return time.process_time() - started


def follow(backend: str, series: list[Loads], start: Placement, ours: bool) -> Way:
    """Let a policy go on from its own last answer."""
    policy: PlacementPolicy = tensorway.create("placement_policy", backend)
    topology, current = Topology.flat(RANKS, PER_NODE), start
    balance, rows, busiest, asking, planning = [], [], [], [], []
    for loads in series:
        began = time.process_time()
        new = ask(policy, loads, current, topology, Budget())
        asking.append(time.process_time() - began)
        plan = TransferPlan.make(current, new, topology)
        received = [
            sum(len(fetch.experts) for layer in plan.rank(rank).layers for fetch in layer.fetches)
            for rank in range(RANKS)
        ]
        rows.append(sum(received))
        busiest.append(max(received))
        balance.append(new.balancedness(loads))
        make = partial(TransferPlan.make, current, new, topology)
        planning.append(
            timed(make) + timed(partial(plan.rank, 0)) if ours else timed(partial(by_loop, current, new, 0))
        )
        current = new
    return Way(*map(statistics.mean, (balance, rows, busiest)), *map(statistics.median, (asking, planning)))


def show(short: bool, ours_rate: float, anchor_rate: float) -> None:
    """Both ways, and what the issue asks for. The rates are bytes a second that each rank receives and commits."""
    first, *series = loads_over_time(DRIFT, 2 if short else 5)
    linear = Placement.linear(LAYERS, EXPERTS, RANKS, SLOTS)
    start = ask(
        tensorway.create("placement_policy", "deepseek"), first, linear, Topology.flat(RANKS, PER_NODE), Budget()
    )
    anchor = follow("deepseek", series, start, ours=False)
    ours = follow("incremental", series, start, ours=True)
    print(
        f"a cycle of {LAYERS} layers of {EXPERTS} experts on {RANKS} ranks of {SLOTS} slots, loads drift by {DRIFT:g}"
    )
    for name, way, rate in (("anchor", anchor, anchor_rate), ("ours", ours, ours_rate)):
        print(
            f"  {name:7} balance {way.balance:.4f}, {way.rows:7.0f} rows, busiest rank {way.busiest:5.0f}; "
            f"policy {way.policy_seconds:.3f} s, plan {way.plan_seconds * 1e3:.0f} ms CPU; at {rate / 1e9:.2f} GB/s "
            f"and {ROW_BYTES / 1e6:.0f} MB a row {way.seconds(rate):.2f} s"
        )
    fewer, better = anchor.rows / ours.rows, ours.balance - anchor.balance
    print(f"  bytes {fewer:.1f} x fewer (wanted >= 8), balance {better:+.4f} (wanted >= -0.003)")
    print(f"  policy {ours.policy_seconds:.2f} s (< 2), plan of all ranks {ours.plan_seconds * 1e3:.0f} ms (< 120)")
    print(f"  the whole cycle {anchor.seconds(anchor_rate) / ours.seconds(ours_rate):.1f} x faster (wanted >= 10)")
