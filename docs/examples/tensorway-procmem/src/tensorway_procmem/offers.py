"""What this dist offers: one function for each backend in the entry points of pyproject.toml.

Importing this module loads no native library, neither torch nor numpy. The probe and the factory may.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorway import HookContext, Offer

from tensorway_procmem.options import ProcmemTransportOptions
from tensorway_procmem.probe import probe

if TYPE_CHECKING:
    from tensorway.transport import Endpoint


def transport(ctx: HookContext) -> Offer:
    """The hook, called once. Its name and that of its argument are the contract (`tensorway.hookspecs`)."""
    return Offer(
        name="procmem",
        kind="transport",
        summary="Moves memory of processes of one machine through /proc/PID/mem.",
        probe=probe,
        probe_in="host",
        factory=construct,
        options=ProcmemTransportOptions,
        # Memory that it can address: cpu, cuda, rocm, xpu. The fabric's `capabilities.media` says the same.
        devices={"cpu"},
        # What it promises beyond the minimum. Promise what you test: a user may ask for it by name.
        capabilities={"read", "write", "notify"},
        # `auto` takes the highest that works. 50 is the middle; `local` does the same, and faster.
        priority=1,
    )


def construct(options: ProcmemTransportOptions, context: object) -> Endpoint:
    """The factory: `options` are validated already, `context` is what the caller of `tensorway.create` gave.

    Imports the fabric, and with it the library, only now.
    """
    from tensorway.transport import Endpoint

    from tensorway_procmem.backend import ProcmemFabric

    return Endpoint(ProcmemFabric(options), options.name)
