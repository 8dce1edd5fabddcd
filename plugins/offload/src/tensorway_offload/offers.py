"""What this dist offers, as its metadata says. May import tensorway's ground, and of its own package the options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, NoOptions, Offer, ProbeResult
from tensorway_offload.policies.options import ForesightOptions, TinyLfuOptions

if TYPE_CHECKING:
    from tensorway.offload import PolicyContext
    from tensorway_offload.policies.arc import Arc
    from tensorway_offload.policies.foresight import Foresight
    from tensorway_offload.policies.lru import Lru
    from tensorway_offload.policies.s3fifo import S3Fifo
    from tensorway_offload.policies.sieve import Sieve
    from tensorway_offload.policies.tinylfu import TinyLfu


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


def arc(ctx: HookContext) -> Offer:
    """The eviction policy `arc`: adapts between recency and frequency."""
    return Offer(
        name="arc",
        kind="eviction_policy",
        summary="Adapts between what was used once and what was used more often, by what comes back.",
        probe=probe,
        probe_in="host",
        factory=construct_arc,
        priority=30,
    )


def construct_arc(options: NoOptions, context: PolicyContext) -> Arc:
    """See `tensorway.offload.PolicyContext`."""
    from tensorway_offload.policies.arc import Arc

    return Arc(context)


def s3fifo(ctx: HookContext) -> Offer:
    """The eviction policy `s3fifo`: three queues."""
    return Offer(
        name="s3fifo",
        kind="eviction_policy",
        summary="A short queue that most blocks only pass through, and a long one for what is used again.",
        probe=probe,
        probe_in="host",
        factory=construct_s3fifo,
        priority=30,
    )


def construct_s3fifo(options: NoOptions, context: PolicyContext) -> S3Fifo:
    """See `tensorway.offload.PolicyContext`."""
    from tensorway_offload.policies.s3fifo import S3Fifo

    return S3Fifo(context)


def sieve(ctx: HookContext) -> Offer:
    """The eviction policy `sieve`: one queue with a hand."""
    return Offer(
        name="sieve",
        kind="eviction_policy",
        summary="One queue, and a hand that spares once what was used since it last came by.",
        probe=probe,
        probe_in="host",
        factory=construct_sieve,
        priority=20,
    )


def construct_sieve(options: NoOptions, context: PolicyContext) -> Sieve:
    """See `tensorway.offload.PolicyContext`."""
    from tensorway_offload.policies.sieve import Sieve

    return Sieve(context)


def tinylfu(ctx: HookContext) -> Offer:
    """The eviction policy `tinylfu`: by how often blocks are asked for."""
    return Offer(
        name="tinylfu",
        kind="eviction_policy",
        summary="What was asked for less often goes first, with a window for what is new.",
        probe=probe,
        probe_in="host",
        factory=construct_tinylfu,
        options=TinyLfuOptions,
        priority=20,
    )


def construct_tinylfu(options: TinyLfuOptions, context: PolicyContext) -> TinyLfu:
    """See `tensorway.offload.PolicyContext`."""
    from tensorway_offload.policies.tinylfu import TinyLfu

    return TinyLfu(options, context)


def foresight(ctx: HookContext) -> Offer:
    """The eviction policy `foresight`: the one that `auto` takes."""
    return Offer(
        name="foresight",
        kind="eviction_policy",
        summary="Learns when prompts are gone on from; where that does not help, recency.",
        probe=probe,
        probe_in="host",
        factory=construct_foresight,
        options=ForesightOptions,
        priority=60,
    )


def construct_foresight(options: ForesightOptions, context: PolicyContext) -> Foresight:
    """See `tensorway.offload.PolicyContext`."""
    from tensorway_offload.policies.foresight import Foresight

    return Foresight(options, context)
