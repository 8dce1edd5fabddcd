"""What this dist offers, as its metadata says. May import tensorway's ground and its own package."""

from __future__ import annotations

from tensorway.types import HookContext, Offer
from tensorway_cpu.options import CPUOptions
from tensorway_cpu.probe import probe


def offloading(ctx: HookContext) -> Offer:
    """The `cpu` offloading; in this release it is probed and not yet constructed, so it has no factory."""
    return Offer(
        name="cpu",
        kind="offloading",
        summary="Keeps KV blocks in host memory, pinned for an accelerator or shared between processes.",
        probe=probe,
        probe_in="host",
        options=CPUOptions,
        devices=frozenset({"cpu", "cuda", "rocm", "xpu"}),
    )
