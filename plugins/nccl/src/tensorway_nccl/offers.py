"""What this dist offers, as its metadata says. May import tensorway's ground and its own package; loads no NCCL."""

from __future__ import annotations

from tensorway.types import HookContext, Offer
from tensorway_nccl.options import NcclOptions
from tensorway_nccl.probe import probe


def eplb_communicator(ctx: HookContext) -> Offer:
    """The `nccl` communicator; in this release it is probed and not yet constructed, so it has no factory."""
    return Offer(
        name="nccl",
        kind="eplb_communicator",
        summary="Moves expert weights between GPUs over NCCL (or RCCL, which has the same interface).",
        probe=probe,
        options=NcclOptions,
        devices=frozenset({"cuda", "rocm"}),
        priority=70,
    )
