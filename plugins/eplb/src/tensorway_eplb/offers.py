"""What this dist offers, as its metadata says. May import tensorway's ground, and of its own package the options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, Offer, ProbeResult
from tensorway_eplb.communicator_options import OneSidedOptions
from tensorway_eplb.policy_options import DeepseekOptions, IncrementalOptions

if TYPE_CHECKING:
    from tensorway.eplb import EplbContext
    from tensorway_eplb.deepseek import Deepseek
    from tensorway_eplb.incremental import Incremental
    from tensorway_eplb.onesided import OneSidedSession


def onesided(ctx: HookContext) -> Offer:
    """The communicator `onesided`: rows are read where they lie, over the transport that is best here."""
    return Offer(
        name="onesided",
        kind="eplb_communicator",
        summary="The receiver reads rows where they lie, over any transport; the sender does nothing.",
        probe=probe,
        probe_in="host",
        factory=construct_onesided,
        options=OneSidedOptions,
        devices={"cpu", "cuda", "rocm", "xpu"},
        priority=60,
    )


def construct_onesided(options: OneSidedOptions, context: EplbContext) -> OneSidedSession:
    """Open a session; see `tensorway.eplb.contract.EplbContext`."""
    from tensorway_eplb.onesided import OneSidedSession

    return OneSidedSession(context, options)


def deepseek(ctx: HookContext) -> Offer:
    """The placement policy `deepseek`: the published balancer, for who wants the balance and not the bytes."""
    return Offer(
        name="deepseek",
        kind="placement_policy",
        summary="DeepSeek's balancer, hierarchical or global: balances anew, whatever has to move for it.",
        probe=probe,
        probe_in="host",
        factory=construct_deepseek,
        options=DeepseekOptions,
        priority=40,
    )


def incremental(ctx: HookContext) -> Offer:
    """The placement policy `incremental`: the one that `auto` takes."""
    return Offer(
        name="incremental",
        kind="placement_policy",
        summary="Improves the placement that is there in the steps that pay most, within a budget of rows.",
        probe=probe,
        probe_in="host",
        factory=construct_incremental,
        options=IncrementalOptions,
        capabilities={"budget"},
        priority=60,
    )


def probe() -> ProbeResult:
    """Policies have no device and no peer; what `onesided` needs, the transport says that it takes."""
    return ProbeResult.passed("nothing else is needed")


def construct_deepseek(options: DeepseekOptions, context: object) -> Deepseek:
    """The policy, with the numpy that it needs."""
    from tensorway_eplb.deepseek import Deepseek

    return Deepseek(options, context)


def construct_incremental(options: IncrementalOptions, context: object) -> Incremental:
    """The policy, with the numpy that it needs."""
    from tensorway_eplb.incremental import Incremental

    return Incremental(options, context)
