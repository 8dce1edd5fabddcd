"""What this dist offers, as its metadata says. May import tensorway's ground and its own package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, Offer
from tensorway_fs.options import FsOptions
from tensorway_fs.probe import probe

if TYPE_CHECKING:
    from tensorway.offload import TierContext
    from tensorway_fs.plain import FilesTier
    from tensorway_fs.tier import SegmentTier


def offload_tier(ctx: HookContext) -> Offer:
    """The tier `fs`: blocks on a disk of this host."""
    return Offer(
        name="fs",
        kind="offload_tier",
        summary="Keeps KV blocks in preallocated segment files, which engines of one host share.",
        probe=probe,
        probe_in="host",
        factory=construct,
        options=FsOptions,
        capabilities={"persistent", "shared", "deletes"},
        # Whoever has a folder says where it is.
        priority=20,
    )


def construct(options: FsOptions, context: TierContext) -> SegmentTier | FilesTier:
    """Open the folder."""
    from tensorway_fs.opening import open_tier

    return open_tier(options, context)
