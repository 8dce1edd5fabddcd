"""Can object stores be spoken to from here? Asks none: which one is meant is in the options. May import the ground."""

from __future__ import annotations

from tensorway.native import Absent
from tensorway.types import ProbeResult
from tensorway_object.library import LIBRARY


def probe() -> ProbeResult:
    """Load the library."""
    result = LIBRARY.result()
    if isinstance(result, Absent):
        return ProbeResult.failed(result.reason, result.remedy)
    version = str(result.symbols["version"])
    return ProbeResult.passed(f"obstore {version}", obstore=version)
