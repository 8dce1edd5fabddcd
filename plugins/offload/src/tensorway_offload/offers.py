"""What this dist offers, as its metadata says. May import tensorway's ground, and of its own package the options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, NoOptions, Offer, ProbeResult

if TYPE_CHECKING:
    from tensorway.offload import PolicyContext
    from tensorway_offload.policies.lru import Lru


def probe() -> ProbeResult:
    """Orders of keys have no device and no peer."""
    return ProbeResult.passed("nothing else is needed")


def lru(ctx: HookContext) -> Offer:
    """The eviction policy `lru`: no surprises."""
    return Offer(
        name="lru",
        kind="eviction_policy",
        summary="What was used longest ago goes first, and of one prefix its tail.",
        probe=probe,
        probe_in="host",
        factory=construct_lru,
        priority=50,
    )


def construct_lru(options: NoOptions, context: PolicyContext) -> Lru:
    """See `tensorway.offload.PolicyContext`."""
    from tensorway_offload.policies.lru import Lru

    return Lru(context)
