"""What this dist offers, as its metadata says. May import tensorway's ground and its own package; loads no NIXL."""

from __future__ import annotations

from typing import Any

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
        # Above `local`, which reaches this host only.
        priority=70,
    )


def construct(options: NixlOptions, context: object) -> object:
    """An endpoint over NIXL; loads it, here or in a mover."""
    from tensorway.transport import Endpoint
    from tensorway_nixl.fabric import NixlFabric

    if options.contained:
        import attrs

        from tensorway.rendezvous.hosts import pinned
        from tensorway.transport.contained import contain

        # Here, because a mover knows no runtime that could be asked.
        given = {**attrs.asdict(options), "host": pinned(options.policy)}
        return contain("nixl", "tensorway_nixl.offers:fabric", given, options.name)
    return Endpoint(NixlFabric(options=options), options.name)


def fabric(**options: Any) -> object:
    """The fabric alone, of options as plain data: what a mover makes."""
    from tensorway_nixl.fabric import NixlFabric

    return NixlFabric(options=NixlOptions.from_plain(options))
