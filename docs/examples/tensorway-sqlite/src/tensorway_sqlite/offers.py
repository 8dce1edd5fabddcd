"""What this dist offers: one function for each backend in the entry points of pyproject.toml.

Importing this module loads no native library, neither torch nor numpy. The probe and the factory may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway import HookContext, Offer

from tensorway_sqlite.options import SqliteOffloadTierOptions
from tensorway_sqlite.probe import probe

if TYPE_CHECKING:
    from tensorway.offload import TierContext

    from tensorway_sqlite.backend import SqliteOffloadTier


def offload_tier(ctx: HookContext) -> Offer:
    """The hook, called once. Its name and that of its argument are the contract (`tensorway.hookspecs`)."""
    return Offer(
        name="sqlite",
        kind="offload_tier",
        summary="Keeps blocks in a SQLite file, which engines of one host share.",
        probe=probe,
        probe_in="host",
        factory=construct,
        options=SqliteOffloadTierOptions,
        # What buffers of a call are in; a tier is given host memory.
        devices={"cpu"},
        # What it promises beyond the minimum. Promise what you test: a user may ask for it by name.
        capabilities=(),
        # `auto` takes the highest that works. 50 is the middle; A tier has to be named, with its file.
        priority=0,
    )


def construct(options: SqliteOffloadTierOptions, context: TierContext) -> SqliteOffloadTier:
    """The factory: `options` are validated already, `context` is what the caller of `tensorway.create` gave.

    Imports the backend, and with it the library, only now.
    """
    from tensorway_sqlite.backend import SqliteOffloadTier

    return SqliteOffloadTier(options, context)
