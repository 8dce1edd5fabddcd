"""Can Mooncake be used here? Runs in a child process. May import tensorway's ground and its own package."""

from __future__ import annotations

from tensorway.types import ProbeResult


def probe() -> ProbeResult:
    """Load Mooncake and let one engine read the memory of another over TCP."""
    from tensorway_mooncake.loopback import prove

    return prove()
