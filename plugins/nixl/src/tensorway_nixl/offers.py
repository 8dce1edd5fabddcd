"""What this dist offers, as its metadata says. May import tensorway's ground and its own package; loads no NIXL."""

from __future__ import annotations

from tensorway.types import HookContext, Offer
from tensorway_nixl.options import NixlOptions
from tensorway_nixl.probe import probe


def transport(ctx: HookContext) -> Offer:
    """The `nixl` transport: UCX between hosts, processes and devices."""
    return Offer(
        name="nixl",
        kind="transport",
        summary="Moves blocks over NIXL: UCX between processes, hosts and devices.",
        probe=probe,
        factory=construct,
        options=NixlOptions,
        devices=frozenset({"cpu", "cuda"}),
        capabilities=frozenset({"read", "write", "notify"}),
        # Below `local`, until its known defects are mended (docs/backends/nixl.md): who needs it asks for it by name.
        priority=5,
    )


def construct(options: NixlOptions, context: object) -> object:
    """An endpoint over NIXL; loads it."""
    from tensorway.transport import Endpoint
    from tensorway_nixl.fabric import NixlFabric

    return Endpoint(NixlFabric(options=options), options.name)
