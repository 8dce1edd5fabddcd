"""`tensorway eplb plan`: what one rebalance would change, move and cost, and whether the gate would let it happen.

May import this dist. Nothing is moved; the new placement is saved where `--output` says.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorway.cli.charts import Chart, Series, draw, drawable
from tensorway.cli.reports import writable, write
from tensorway_eplb.command import inputs
from tensorway_eplb.gate import Gate
from tensorway_eplb.placement import Loads, Placement
from tensorway_eplb.plan import TransferPlan
from tensorway_eplb.policy import Topology, ask

if TYPE_CHECKING:
    from tensorway.cli.output import Output

#: So many links are listed, the busiest first.
_LINKS = 8


def run(given: argparse.Namespace, out: Output) -> int:
    """Plan, and say what came of it."""
    if given.plot is not None:
        drawable(given.plot)
    output = None if given.dry_run else given.output
    if output is not None:
        writable(output, "--output")
    loads = inputs.snapshot(given.loads)
    asked = inputs.question(given, loads)
    policy = inputs.policy(given.policy)
    started = time.perf_counter()
    new = ask(policy, loads, asked.start, asked.topology, asked.budget)
    seconds = time.perf_counter() - started
    answer = _answer(given, loads, asked, new) | {"policy_seconds": round(seconds, 6)}
    if given.plot is not None:
        draw(given.plot, "Rebalance", pictures(loads, asked.start, new, asked.topology))
        answer["plot"] = str(given.plot)
    if output is not None:
        write(output, new.encoded(), "--output")
        answer["output"] = str(output)
    out.json("tensorway.eplb-plan/1", answer)
    _print(answer, out)
    return 0


def _answer(given: argparse.Namespace, loads: Loads, asked: inputs.Question, new: Placement) -> dict[str, Any]:
    start, topology = asked.start, asked.topology
    everywhere = np.ones((start.layers, start.num_logical), dtype=bool)
    plan = TransferPlan.make(start, new, topology, copies=everywhere)
    moved = None if given.row_bytes is None else plan.bytes_per_link(given.row_bytes)
    takes = None if given.row_bytes is None or given.rate is None else plan.seconds(given.row_bytes, given.rate)
    before, after = (of.balancedness(loads, topology.speeds) for of in (start, new))
    lost = len(start.lost) - len(new.lost)
    decision = Gate(min_gain=given.min_gain).decide(
        before, after, rows=int((start.map != new.map).sum()), lost=lost, work=given.work, seconds=takes
    )
    rows = plan.rows
    nodes = np.array(topology.nodes)
    across = nodes[:, None] != nodes
    return {
        "layers": start.layers,
        "experts": start.num_logical,
        "ranks": start.ranks,
        "slots": start.slots,
        "nodes": len(set(topology.nodes)),
        "policy": given.policy,
        "balancedness": {"before": before, "after": after},
        "rows": {
            "slots": start.map.size,
            "within_rank": rows.local,
            "same_node": rows.same_node,
            "across_nodes": rows.remote,
            "from_copies": rows.loaded,
        },
        "most_receives_per_layer": int(np.bincount(plan.moves.fetches.layer, minlength=1).max()),
        "bytes": None
        if moved is None
        else {"same_node": int(moved[~across].sum()), "across_nodes": int(moved[across].sum())},
        "links": [] if moved is None else _links(moved),
        "seconds": takes,
        "gate": {
            "rebalance": decision.rebalance,
            "code": decision.code,
            "reason": decision.reason,
            "gain": decision.gain,
            "saved": decision.saved,
            "spent": decision.spent,
        },
        "plot": "",
        "output": "",
    }


def _links(moved: Any) -> list[dict[str, int]]:
    """The links that carry anything, the busiest first."""
    order = np.argsort(-moved, axis=None, kind="stable")
    pairs = (divmod(int(at), len(moved)) for at in order if moved.flat[at])
    return [{"source": source, "target": target, "bytes": int(moved[source, target])} for source, target in pairs]


def _print(answer: dict[str, Any], out: Output) -> None:
    rows, balance, gate = answer["rows"], answer["balancedness"], answer["gate"]
    received = rows["same_node"] + rows["across_nodes"]
    out.line(
        f"{answer['layers']} layers of {answer['experts']} experts, on {answer['ranks']} ranks of "
        f"{answer['slots']} slots, {answer['nodes']} nodes. Policy {answer['policy']}."
    )
    out.line(f"balancedness   {balance['before']:.4f} -> {balance['after']:.4f}")
    out.line(f"rows received  {received:,} of {rows['slots']:,} slots ({received / rows['slots']:.1%})")
    out.line(f"               {rows['same_node']:,} within a node, {rows['across_nodes']:,} across nodes,")
    out.line(f"               at most {answer['most_receives_per_layer']:,} in one layer")
    out.line(f"rows copied    {rows['within_rank']:,} within their rank, {rows['from_copies']:,} from a copy outside")
    if answer["bytes"] is not None:
        carried = answer["bytes"]
        out.line(
            f"bytes          {_si(carried['same_node'])} within nodes, {_si(carried['across_nodes'])} across nodes"
        )
        for link in answer["links"][:_LINKS]:
            out.line(f"               rank {link['source']:>3} -> {link['target']:>3}  {_si(link['bytes'])}")
        if len(answer["links"]) > _LINKS:
            out.line(f"               and {len(answer['links']) - _LINKS:,} links more, of less")
    if answer["seconds"] is not None:
        out.line(f"time           {answer['seconds']:.3g} s, for what the busiest rank sends or receives")
    out.text(f"gate           {'rebalance' if gate['rebalance'] else 'no rebalance'}: {gate['reason']}", hang=15)
    for what, to in (("saved as", answer["output"]), ("drawn in", answer["plot"])):
        if to:
            out.line(f"{what:<15}{to}")


def _si(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def pictures(loads: Loads, start: Placement, new: Placement, topology: Topology) -> list[Chart]:
    """How balanced each layer is before and after, and what each rank has to do over all layers."""
    speed = np.array(topology.speeds)
    times, balance = [], []
    for placement in (start, new):
        time_of = placement.rank_loads(loads) / speed
        ideal = loads.sum(axis=1) / speed.sum()
        times.append(time_of.sum(axis=0) / max(ideal.sum(), np.finfo(float).tiny))
        slowest = time_of.max(axis=1)
        balance.append(np.divide(ideal, slowest, out=np.ones_like(ideal), where=slowest > 0))

    def lines(values: list[Any]) -> tuple[Series, ...]:
        before, after = (tuple(map(float, row)) for row in values)
        return Series("before", before, aside=True), Series("after", after)

    return [
        Chart("Balancedness of each layer", "layer", lines(balance), up="balancedness, 1 is ideal", span=(0, 1)),
        Chart("Time of each rank", "rank", lines(times), up="time, by the ideal time", span=(0, 1), joined=False),
    ]
