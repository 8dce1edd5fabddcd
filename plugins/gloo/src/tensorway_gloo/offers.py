"""What this dist offers, as its metadata says. May import tensorway's ground and its own package; no torch."""

from __future__ import annotations

from tensorway.types import HookContext, Offer
from tensorway_gloo.options import GlooOptions
from tensorway_gloo.probe import probe


def eplb_communicator(ctx: HookContext) -> Offer:
    """The `gloo` communicator; in this release it is probed and not yet constructed, so it has no factory."""
    return Offer(
        name="gloo",
        kind="eplb_communicator",
        summary="Moves expert weights over torch.distributed's gloo (TCP), staged in host memory.",
        probe=probe,
        options=GlooOptions,
        devices=frozenset({"cpu", "cuda", "rocm", "xpu"}),
        # Correct everywhere and fast nowhere: what `auto` takes when nothing else can be used.
        priority=10,
    )
