"""What this dist offers, as its metadata says. May import tensorway's ground, and of its own package the options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, Offer, ProbeResult
from tensorway_kv.options import HandoverOptions

if TYPE_CHECKING:
    from tensorway.kv import KVContext
    from tensorway_kv.mover import HandoverMover
    from tensorway_kv.planner import HandoverPlanner


def handover(ctx: HookContext) -> Offer:
    """The connector `handover`: whoever needs blocks reads them where they lie, or has them written."""
    return Offer(
        name="handover",
        kind="kv_connector",
        summary="The engine that needs blocks reads them where they lie, or has them written, over any transport.",
        probe=probe,
        probe_in="host",
        factory=construct_handover,
        options=HandoverOptions,
        devices={"cpu", "cuda", "rocm", "xpu"},
        capabilities={"pull", "push", "layerwise", "bidirectional"},
        priority=60,
    )


def probe() -> ProbeResult:
    """What is needed beyond this dist, the transport says that it takes."""
    return ProbeResult.passed("nothing else is needed")


def construct_handover(options: HandoverOptions, context: KVContext) -> HandoverPlanner | HandoverMover:
    """The side that the context's role says; see `tensorway.kv.KVContext`."""
    if context.role == "planner":
        from tensorway_kv.planner import HandoverPlanner

        return HandoverPlanner(options, context)
    from tensorway_kv.mover import HandoverMover

    return HandoverMover(options, context)
