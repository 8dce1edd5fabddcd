"""What a rebalance takes, beside a copy of as many bytes in the same processes.

Of the dist only an entry point refers to this module, and `tensorway bench` runs it; it may import all of the dist.
Each round goes to another placement and back, on ranks in processes of their own, and all rows are compared. Beside it
every rank copies the bytes that it receives within its own memory, all at the same time; the slowest rank counts. How
engines do it today is measured by tests/bench/eplb.py, which needs torch, NIXL and minutes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

import numpy as np

from tensorway.testing.ranks import Rank, Ranks
from tensorway_eplb.placement import Map, Placement
from tensorway_eplb.plan import TransferPlan
from tensorway_eplb.policy import Topology
from tensorway_eplb.testing import engine
from tensorway_eplb.testing.engine import Model
from tensorway_tools.benchmark import Benchmark, Row, Run

_TENSORS: Final = (("w13", 256 << 10), ("w2", 128 << 10), ("w2_scale", 2 << 10))
_ROW: Final = sum(nbytes for _, nbytes in _TENSORS)
_DEADLINE: Final = 120.0


def rows(run: Run) -> Iterator[Row]:
    """Over `local`, which every machine has."""
    for count in (2, 4):
        model = Model(
            layers=run.either(16, 2), experts=8 * count, slots=8, tensors=_TENSORS, patience=10.0, copies=False
        )
        start = Placement.linear(model.layers, model.experts, count, model.slots)
        there = Placement(np.roll(start.map, model.slots, axis=1), model.experts, count)
        plan = TransferPlan.make(start, there, Topology.flat(count))
        with Ranks(count) as ranks:
            ranks.enter(range(count), engine.join, "/bench/rebalance", 0, model, start, seconds=_DEADLINE)
            yield _measured(run, ranks, (there.map, start.map), plan)
            ranks.each(range(count), engine.leave, seconds=_DEADLINE)


def _measured(run: Run, ranks: Ranks, maps: tuple[Map, Map], plan: TransferPlan) -> Row:
    count = len(ranks)
    moved = plan.rows.same_node + plan.rows.remote
    each = moved // count * _ROW
    pairs = []
    for _ in range(run.either(10, 5) + 1):
        took = 0.0
        for to in maps:
            reports = ranks.each(range(count), engine.rebalance, to, _DEADLINE, seconds=_DEADLINE)
            assert not any(report.error or report.wrong for report in reports), reports
            took += max(report.seconds for report in reports)
        copied = sum(max(ranks.each(range(count), _copied, each, seconds=_DEADLINE)) for _ in maps)
        pairs.append((took, copied))
    ours, reference = zip(*pairs[1:], strict=True)  # the first connects
    name = f"{count} ranks over local, {moved} rows of {_ROW >> 10} KiB, there and back"
    return Row(name, "a copy of as many bytes by each rank", ours, reference, nbytes=2 * moved * _ROW)


def _copied(rank: Rank, nbytes: int) -> float:
    """Seconds of a copy within a rank."""
    if "copies" not in rank.notes:
        rank.notes["copies"] = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    source, target = rank.notes["copies"]
    started = time.perf_counter()
    target[:] = source
    return time.perf_counter() - started


BENCH: Final = Benchmark("Rebalances of expert weights between ranks, beside a copy of as many bytes.", rows)
