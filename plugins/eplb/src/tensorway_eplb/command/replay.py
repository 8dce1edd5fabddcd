"""`tensorway eplb replay`: a series of loads through several policies side by side, each on a chain of its own.

May import this dist. A policy sees one set of loads after the other and starts from its own last answer, so its
balance before each answer is what an engine would have seen with it.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from tensorway.cli.charts import Chart, Series, draw, drawable
from tensorway_eplb.command import inputs
from tensorway_eplb.placement import Loads
from tensorway_eplb.plan import TransferPlan
from tensorway_eplb.policy import PlacementPolicy, ask

if TYPE_CHECKING:
    from tensorway.cli.output import Output


@attrs.frozen
class Step:
    """What one policy did with one set of loads."""

    #: The balance of its last answer under these loads, and of its new one.
    before: float
    after: float
    #: Rows that ranks receive, and those of them that come from another node.
    received: int
    across_nodes: int
    #: What the policy itself took.
    seconds: float


def run(given: argparse.Namespace, out: Output) -> int:
    """Run every policy over the series, and put the results side by side."""
    if given.plot is not None:
        drawable(given.plot)
    loads = inputs.series(given.loads)
    asked = inputs.question(given, loads)
    names = [name.strip() for name in given.policies.split(",") if name.strip()]
    policies = {name: inputs.policy(name) for name in names or ["incremental"]}
    found = {}
    for name, policy in policies.items():
        out.progress(f"Replaying {len(loads)} sets of loads through {name} ...")
        found[name] = chain(policy, loads, asked)
    if given.plot is not None:
        draw(given.plot, "Policies side by side", _charts(found, asked.start.map.size))
    answer = {
        "layers": asked.start.layers,
        "experts": asked.start.num_logical,
        "ranks": asked.start.ranks,
        "slots": asked.start.slots,
        "sets": len(loads),
        "policies": [_row(name, steps, asked.start.map.size) for name, steps in found.items()],
        "plot": "" if given.plot is None else str(given.plot),
    }
    out.json("tensorway.eplb-replay/1", answer)
    _print(answer, out)
    return 0


def chain(policy: PlacementPolicy, loads: Loads, asked: inputs.Question) -> list[Step]:
    """One policy over all sets of loads, from the common start."""
    current, steps = asked.start, []
    everywhere = np.ones((current.layers, current.num_logical), dtype=bool)
    for now in loads:
        started = time.perf_counter()
        new = ask(policy, now, current, asked.topology, asked.budget)
        seconds = time.perf_counter() - started
        rows = TransferPlan.make(current, new, asked.topology, copies=everywhere).rows
        before, after = (of.balancedness(now, asked.topology.speeds) for of in (current, new))
        steps.append(Step(before, after, rows.remote + rows.same_node, rows.remote, seconds))
        current = new
    return steps


def _row(name: str, steps: list[Step], slots: int) -> dict[str, Any]:
    # The first answer leaves the common start, however that was made; what a policy costs from day to day comes after.
    usual = steps[1:] or steps

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    return {
        "policy": name,
        "before": mean([step.before for step in usual]),
        "after": mean([step.after for step in usual]),
        "received": mean([step.received / slots for step in usual]),
        "across_nodes": mean([step.across_nodes / slots for step in usual]),
        "seconds": mean([step.seconds for step in usual]),
        "steps": [attrs.asdict(step) for step in steps],
    }


def _print(answer: dict[str, Any], out: Output) -> None:
    width = max(len("policy"), *(len(row["policy"]) for row in answer["policies"]))
    out.line(f"{'policy':<{width}}  before   after  received  across nodes  seconds")
    for row in answer["policies"]:
        out.line(
            f"{row['policy']:<{width}}  {row['before']:.4f}  {row['after']:.4f}  {row['received']:>8.1%}"
            f"  {row['across_nodes']:>12.1%}  {row['seconds']:>7.3f}"
        )
    first = "" if answer["sets"] == 1 else ", without the first set, which meets the common start"
    out.text(f"Means over the sets of loads{first}. Received: rows that ranks receive, of all slots.")
    if answer["plot"]:
        out.line(f"drawn in {answer['plot']}")


def _charts(found: dict[str, list[Step]], slots: int) -> list[Chart]:
    share = (0.0, 1.0)

    def lines(value: str, by: int = 1) -> tuple[Series, ...]:
        return tuple(Series(name, tuple(getattr(step, value) / by for step in steps)) for name, steps in found.items())

    return [
        Chart("Until the policy answers", "set of loads", lines("before"), up="balancedness that serving sees"),
        Chart("After the policy's answer", "set of loads", lines("after"), up="balancedness, 1 is ideal"),
        Chart("What moves", "set of loads", lines("received", slots), up="rows received, of all slots", span=share),
    ]
