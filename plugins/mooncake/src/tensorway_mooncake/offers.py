"""What this dist offers, as its metadata says. May import tensorway's ground and its own package; loads no Mooncake."""

from __future__ import annotations

from typing import Any

from tensorway.types import HookContext, Offer
from tensorway_mooncake.options import MooncakeOptions
from tensorway_mooncake.probe import probe


def transport(ctx: HookContext) -> Offer:
    """The `mooncake` transport: host memory over TCP."""
    return Offer(
        name="mooncake",
        kind="transport",
        summary="Moves host memory over Mooncake's Transfer Engine: TCP between processes and hosts.",
        probe=probe,
        factory=construct,
        options=MooncakeOptions,
        devices=frozenset({"cpu"}),
        capabilities=frozenset({"read", "write", "notify"}),
        # Below all others: it opens ports to the network without authentication, so who needs it asks for it by name.
        priority=3,
    )


def construct(options: MooncakeOptions, context: object) -> object:
    """An endpoint over Mooncake; loads it, here or in a mover."""
    from tensorway.transport import Endpoint
    from tensorway_mooncake.fabric import MooncakeFabric

    if options.contained:
        import attrs

        from tensorway.transport.contained import contain
        from tensorway_mooncake.engine import address_of

        # Here, because a mover knows no runtime that could be asked.
        given = {**attrs.asdict(options), "host": address_of(options.host)}
        return contain("mooncake", "tensorway_mooncake.offers:fabric", given, options.name)
    return Endpoint(MooncakeFabric(options), options.name)


def fabric(**options: Any) -> object:
    """The fabric alone, of options as plain data: what a mover makes."""
    from tensorway_mooncake.fabric import MooncakeFabric

    return MooncakeFabric(MooncakeOptions(**options))
