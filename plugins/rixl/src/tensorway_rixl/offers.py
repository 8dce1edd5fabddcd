"""What this dist offers, as its metadata says. May import tensorway's ground and tensorway-nixl; loads no library."""

from __future__ import annotations

from typing import Any

from tensorway.types import HookContext, Offer
from tensorway_nixl.options import NixlOptions
from tensorway_rixl.probe import probe


def transport(ctx: HookContext) -> Offer:
    """The `rixl` transport: UCX between hosts, processes and AMD devices."""
    return Offer(
        name="rixl",
        kind="transport",
        summary="Moves blocks over NIXL built for ROCm: UCX between processes, hosts and AMD devices.",
        probe=probe,
        factory=construct,
        options=NixlOptions,
        devices=frozenset({"cpu", "rocm"}),
        capabilities=frozenset({"read", "write", "notify"}),
        # Below `nixl`: where both can be used there is no AMD device, and the newer library is the better one.
        priority=60,
    )


def construct(options: NixlOptions, context: object) -> object:
    """An endpoint over NIXL for ROCm; loads it, here or in a mover."""
    from tensorway.transport import Endpoint
    from tensorway_nixl.fabric import NixlFabric
    from tensorway_rixl.library import LIBRARY

    if options.contained:
        import attrs

        from tensorway.rendezvous.hosts import pinned
        from tensorway.transport.contained import contain

        # Here, because a mover knows no runtime that could be asked.
        given = {**attrs.asdict(options), "host": pinned(options.policy)}
        return contain("rixl", "tensorway_rixl.offers:fabric", given, options.name)
    # torch for ROCm calls its devices cuda.
    media = frozenset({"cpu", "cuda", "rocm"})
    return Endpoint(NixlFabric(LIBRARY, options, "rixl", media), options.name)


def fabric(**options: Any) -> object:
    """The fabric alone, of options as plain data and for host memory: what a mover makes."""
    from tensorway_nixl.fabric import NixlFabric
    from tensorway_rixl.library import LIBRARY

    return NixlFabric(LIBRARY, NixlOptions.from_plain(options), "rixl", frozenset({"cpu"}))
