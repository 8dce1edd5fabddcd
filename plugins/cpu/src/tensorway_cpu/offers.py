"""What this dist offers, as its metadata says. May import tensorway's ground, and of its own package the options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway.types import HookContext, Offer
from tensorway_cpu.options import CPUOptions
from tensorway_cpu.probe import probe

if TYPE_CHECKING:
    from tensorway.offload import OffloadContext
    from tensorway_cpu.manager import CPUManager
    from tensorway_cpu.worker import CPUWorker


def offloading(ctx: HookContext) -> Offer:
    """The `cpu` offloading."""
    return Offer(
        name="cpu",
        kind="offloading",
        summary="Keeps KV blocks in host memory, which manager and workers share, and in tiers below it.",
        probe=probe,
        probe_in="host",
        factory=construct,
        options=CPUOptions,
        devices=frozenset({"cpu", "cuda", "rocm", "xpu"}),
    )


def construct(options: CPUOptions, context: OffloadContext) -> CPUManager | CPUWorker:
    """The side that the context's role says; see `tensorway.offload.OffloadContext`."""
    if context.role == "manager":
        from tensorway_cpu.manager import CPUManager

        return CPUManager(options, context)
    from tensorway_cpu.worker import CPUWorker

    return CPUWorker(options, context)
