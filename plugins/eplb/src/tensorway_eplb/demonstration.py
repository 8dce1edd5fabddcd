"""What `tensorway demo` shows of a rebalance: ranks in processes of their own, whose expert weights change places.

Of the dist nothing else imports this module; it may import all of the dist, and, being for the command line, the core's
demo. The loads are made up: a few experts of each layer have most of the work.
"""

from __future__ import annotations

import statistics
from typing import Final

import numpy as np

import tensorway
from tensorway.cli.demonstration import Ratio, Shown, Stage, memmove
from tensorway.errors import TensorwayError
from tensorway.testing.ranks import Ranks
from tensorway_eplb.command.plan import pictures
from tensorway_eplb.placement import Loads, Map, Placement
from tensorway_eplb.plan import TransferPlan
from tensorway_eplb.policy import Budget, Topology, ask
from tensorway_eplb.testing import engine
from tensorway_eplb.testing.engine import Model, Report

_RANKS: Final = 4
_TENSORS: Final = (("w13", 256 << 10), ("w2", 128 << 10), ("w2_scale", 2 << 10))
_ROW: Final = sum(nbytes for _, nbytes in _TENSORS)


def show(stage: Stage) -> Shown:
    """What the entry point refers to."""
    options = {"transport": stage.transport}
    model = Model(layers=8, experts=32, slots=10, tensors=_TENSORS, options=options, patience=5.0, copies=False)
    topology = Topology.flat(_RANKS)
    start = Placement.linear(model.layers, model.experts, _RANKS, model.slots)
    loads = np.random.default_rng(1).lognormal(0.0, 1.0, (model.layers, model.experts))
    new = ask(tensorway.create("placement_policy", "auto"), loads, start, topology, Budget())
    stage.say(0.1, f"starting {_RANKS} ranks, {model.experts} experts in each of {model.layers} layers")
    with stage.processes(), Ranks(_RANKS) as ranks:
        ranks.enter(range(_RANKS), engine.join, "demo", 0, model, start, seconds=stage.left())
        rounds = 1 if stage.quick else 2
        seconds, wrong = [], 0
        for number in range(2 * rounds):  # there and back, so that each round moves the same
            stage.say(0.3 + 0.35 * number / rounds, f"every rank moves, round {number + 1} of {2 * rounds}")
            reports = _moved(stage, ranks, (start if number % 2 else new).map)
            wrong += sum(len(report.wrong) for report in reports)
            seconds.append((max(report.seconds for report in reports), number % 2))
        ranks.each(range(_RANKS), engine.leave, seconds=stage.left())
    took = statistics.median(each for each, back in seconds if not back)
    return _shown(stage, start, new, loads, took, right=not wrong)


def _moved(stage: Stage, ranks: Ranks, rows: Map) -> list[Report]:
    """All ranks go to another placement; what each says of it, when every row of it has been compared."""
    deadline = stage.left()
    reports: list[Report] = ranks.each(range(_RANKS), engine.rebalance, rows, deadline, seconds=deadline)
    for rank, report in enumerate(reports):
        if report.error:
            true = f"Rank {rank} raised {report.error}: {' '.join(report.text.split())}"
            raise TensorwayError(stage.asked, true, "Run it again, or with another transport: --backend.")
    return reports


def _shown(stage: Stage, start: Placement, new: Placement, loads: Loads, took: float, *, right: bool) -> Shown:
    topology = Topology.flat(_RANKS)
    rows = TransferPlan.make(start, new, topology).rows
    nbytes = (rows.same_node + rows.remote) * _ROW
    before, after = (of.balancedness(loads) for of in (start, new))
    return Shown(
        stage.transport, _RANKS, nbytes, right,
        (f"{before:.2f} -> {after:.2f}", "balancedness"),
        f"{rows.same_node + rows.remote} rows of expert weights went from rank to rank. The slowest ranks now take "
        f"{before / after:.2f} x the time for the same tokens: that is balancedness, before by after.",
        (Ratio("rebalancing", "a memmove", took, memmove(nbytes)),),
        tuple(pictures(loads, start, new, topology)),
    )  # fmt: skip
