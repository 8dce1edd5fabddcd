"""What this dist offers, as its metadata says. May import tensorway's ground and its own package; no obstore."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, Offer
from tensorway_object.options import ObjectOptions
from tensorway_object.probe import probe

if TYPE_CHECKING:
    from tensorway.offload import TierContext
    from tensorway_object.tier import ObjectTier


def offload_tier(ctx: HookContext) -> Offer:
    """The tier `object`: for blocks that outlive hosts, and that engines anywhere share."""
    return Offer(
        name="object",
        kind="offload_tier",
        summary="Keeps KV blocks in S3, GCS, Azure or whatever obstore reaches, one object for each.",
        probe=probe,
        factory=construct,
        options=ObjectOptions,
        capabilities={"persistent", "shared", "deletes"},
        # Whoever has a bucket says which; `auto` chooses none.
        priority=20,
    )


def construct(options: ObjectOptions, context: TierContext) -> ObjectTier:
    """Open the bucket and see whether it can be used, which takes a request or two."""
    from tensorway_object.tier import ObjectTier

    return ObjectTier.open(options, context)
