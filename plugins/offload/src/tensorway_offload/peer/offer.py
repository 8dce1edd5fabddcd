"""The offer of the tier `peer`. May import tensorway's ground and this package's options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, Offer, ProbeResult
from tensorway_offload.peer.options import PeerOptions

if TYPE_CHECKING:
    from tensorway.offload import TierContext
    from tensorway_offload.peer.tier import PeerTier


def peer(ctx: HookContext) -> Offer:
    """The tier `peer`: what other engines of the deployment have in their memory."""
    return Offer(
        name="peer",
        kind="offload_tier",
        summary="Engines of one deployment read each other's host memory, over any transport.",
        probe=probe,
        probe_in="host",
        factory=construct,
        options=PeerOptions,
        capabilities={"shared"},
        priority=40,
    )


def probe() -> ProbeResult:
    """What is needed beyond this dist, the transport says that it takes."""
    return ProbeResult.passed("nothing else is needed")


def construct(options: PeerOptions, context: TierContext) -> PeerTier:
    """Join the peers."""
    from tensorway_offload.peer.tier import PeerTier

    return PeerTier(options, context)
