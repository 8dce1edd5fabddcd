"""What this dist offers, as its metadata says. May import tensorway's ground, and of its own package the options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, Offer, ProbeResult
from tensorway_kv.options import HandoverOptions
from tensorway_kv.several.options import SeveralOptions
from tensorway_kv.store.options import SharedStoreOptions

if TYPE_CHECKING:
    from tensorway.kv import KVContext
    from tensorway_kv.mover import HandoverMover
    from tensorway_kv.planner import HandoverPlanner
    from tensorway_kv.several.mover import SeveralMover
    from tensorway_kv.several.planner import SeveralPlanner
    from tensorway_kv.store.mover import SharedStoreMover
    from tensorway_kv.store.planner import SharedStorePlanner


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


def shared_store(ctx: HookContext) -> Offer:
    """The connector `shared-store`: engines that cannot reach each other meet in a folder."""
    return Offer(
        name="shared-store",
        kind="kv_connector",
        summary="Engines that cannot reach each other find blocks by their content in a folder that all see.",
        probe=probe,
        probe_in="host",
        factory=construct_shared_store,
        options=SharedStoreOptions,
        devices={"cpu", "cuda", "rocm", "xpu"},
        # Below `handover`, which needs nobody: whoever has a folder says where.
        priority=20,
    )


def construct_shared_store(options: SharedStoreOptions, context: KVContext) -> SharedStorePlanner | SharedStoreMover:
    """The side that the context's role says."""
    if context.role == "planner":
        from tensorway_kv.store.planner import SharedStorePlanner

        return SharedStorePlanner(options, context)
    from tensorway_kv.store.mover import SharedStoreMover

    return SharedStoreMover(options, context)


def several(ctx: HookContext) -> Offer:
    """The connector `several`: others, in an order. `auto` takes it last, and it says that it needs its children."""
    return Offer(
        name="several",
        kind="kv_connector",
        summary="Other connectors in an order: when one fails, the next goes on where the good tokens end.",
        probe=probe,
        probe_in="host",
        factory=construct_several,
        options=SeveralOptions,
        devices={"cpu", "cuda", "rocm", "xpu"},
        capabilities={"pull"},
        priority=0,
    )


def construct_several(options: SeveralOptions, context: KVContext) -> SeveralPlanner | SeveralMover:
    """The side that the context's role says, with that side of each child."""
    if context.role == "planner":
        from tensorway_kv.several.planner import SeveralPlanner

        return SeveralPlanner(options, context)
    from tensorway_kv.several.mover import SeveralMover

    return SeveralMover(options, context)
