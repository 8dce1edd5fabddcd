"""What this dist offers, as its metadata says. May import tensorway's ground, and of its own package the options.

A policy's module is imported when one is constructed, and not before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tensorway.types import HookContext, NoOptions, Offer, ProbeResult
from tensorway_offload.policies.options import ForesightOptions, TinyLfuOptions

if TYPE_CHECKING:
    from tensorway.offload import EvictionPolicy, PolicyContext


def probe() -> ProbeResult:
    """Orders of keys have no device and no peer."""
    return ProbeResult.passed("nothing else is needed")


def lru(ctx: HookContext) -> Offer:
    """The eviction policy `lru`: no surprises."""
    return _policy("lru", "Lru", 50, "What was used longest ago goes first, and of one prefix its tail.")


def arc(ctx: HookContext) -> Offer:
    """The eviction policy `arc`: adapts between recency and frequency."""
    summary = "Adapts between what was used once and what was used more often, by what comes back."
    return _policy("arc", "Arc", 30, summary)


def s3fifo(ctx: HookContext) -> Offer:
    """The eviction policy `s3fifo`: three queues."""
    summary = "A short queue that most blocks only pass through, and a long one for what is used again."
    return _policy("s3fifo", "S3Fifo", 30, summary)


def sieve(ctx: HookContext) -> Offer:
    """The eviction policy `sieve`: one queue with a hand."""
    summary = "One queue, and a hand that spares once what was used since it last came by."
    return _policy("sieve", "Sieve", 20, summary)


def tinylfu(ctx: HookContext) -> Offer:
    """The eviction policy `tinylfu`: by how often blocks are asked for."""
    summary = "What was asked for less often goes first, with a window for what is new."
    return _policy("tinylfu", "TinyLfu", 20, summary, TinyLfuOptions)


def foresight(ctx: HookContext) -> Offer:
    """The eviction policy `foresight`: the one that `auto` takes."""
    summary = "Learns when prompts are gone on from; where that does not help, recency."
    return _policy("foresight", "Foresight", 60, summary, ForesightOptions)


def _policy(name: str, owner: str, priority: int, summary: str, options: type = NoOptions) -> Offer:
    """A policy is the class `owner` of the module of its name; one without options takes none."""

    def construct(given: object, context: PolicyContext) -> EvictionPolicy:
        """See `tensorway.offload.PolicyContext`."""
        policy: Any = getattr(import_module(f"tensorway_offload.policies.{name}"), owner)
        made: EvictionPolicy = policy(context) if options is NoOptions else policy(given, context)
        return made

    return Offer(
        name=name,
        kind="eviction_policy",
        summary=summary,
        probe=probe,
        probe_in="host",
        factory=construct,
        options=options,
        priority=priority,
    )
