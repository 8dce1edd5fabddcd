"""The transport `faulty` of this process: `local`, whose posts go wrong as a test says, engine by engine.

May import the core and its testing.
"""

from __future__ import annotations

import functools

import attrs

from tensorway.plugins import register
from tensorway.testing.faults import Faults, FaultyFabric
from tensorway.transport.endpoint import Endpoint
from tensorway.transport.local import LocalFabric
from tensorway.types import Offer, ProbeResult


@attrs.frozen
class FaultyOptions:
    """Options of the transport `faulty`."""

    #: Under which name the test finds its fabrics.
    of: str = ""


class FaultyFabrics:
    """Fabrics of the engines of this process, in the order in which they were made."""

    def __init__(self) -> None:
        self._made: dict[str, list[FaultyFabric]] = {}
        register(
            Offer(
                name="faulty",
                kind="transport",
                summary="Goes wrong as a test says.",
                probe=lambda: ProbeResult.passed("it is only a test"),
                probe_in="host",
                factory=self._construct,
                options=FaultyOptions,
                devices={"cpu"},
                capabilities={"read", "write", "notify"},
                priority=1,
            )
        )

    def of(self, name: str) -> list[FaultyFabric]:
        """Those that were made with this name: one for each rank."""
        return self._made[name]

    def _construct(self, options: FaultyOptions, context: object) -> Endpoint:
        fabric = FaultyFabric(LocalFabric(), Faults(seed=len(self._made), delay=0.05))
        self._made.setdefault(options.of, []).append(fabric)
        return Endpoint(fabric)


@functools.cache
def faulty() -> FaultyFabrics:
    """Those of this process, in which a transport is registered once."""
    return FaultyFabrics()
