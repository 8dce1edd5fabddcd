"""What this dist offers, as its metadata says. May import tensorway's ground and its own package; no torch."""

from __future__ import annotations

from typing import Any

from tensorway.types import HookContext, Offer
from tensorway_gloo.options import GlooOptions
from tensorway_gloo.probe import probe


def eplb_communicator(ctx: HookContext) -> Offer:
    """The `gloo` communicator: rows over TCP, sent and received in pairs."""
    return Offer(
        name="gloo",
        kind="eplb_communicator",
        summary="Moves expert weights over torch.distributed's gloo: TCP from and to host memory.",
        probe=probe,
        factory=construct,
        options=GlooOptions,
        devices=frozenset({"cpu", "cuda", "rocm", "xpu"}),
        # Correct everywhere and fast nowhere: what `auto` takes when nothing else can be used.
        priority=10,
    )


def construct(options: GlooOptions, context: Any) -> object:
    """A session for the group of an `EplbContext`; connects to all its members, so every one of them calls it."""
    from tensorway_gloo.session import GlooSession

    return GlooSession(options, context)
