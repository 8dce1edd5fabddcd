"""Can NIXL be used here? Runs in a child process. May import tensorway's ground and its own package."""

from __future__ import annotations

import importlib.util

import attrs

from tensorway.native import Absent
from tensorway.types import ProbeResult
from tensorway_nixl.library import LIBRARY, packages
from tensorway_nixl.loopback import prove


def probe() -> ProbeResult:
    """Load NIXL and let it read its own memory through UCX."""
    result = prove(LIBRARY)
    if isinstance(LIBRARY.result(), Absent):
        # Installing what is installed already changes nothing.
        broken = next((package for package in packages() if importlib.util.find_spec(package)), None)
        if broken:
            dist = broken.replace("_", "-")
            return attrs.evolve(result, remedy=f"pip install --force-reinstall --no-deps {dist}")
    return result
