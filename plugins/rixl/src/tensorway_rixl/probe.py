"""Can NIXL for ROCm be used here? Runs in a child process.

May import tensorway's ground, tensorway-nixl and its own package.
"""

from __future__ import annotations

import attrs

from tensorway.native import Absent
from tensorway.platforms import report
from tensorway.types import ProbeResult
from tensorway_nixl.loopback import prove
from tensorway_rixl.library import LIBRARY, impostor


def probe() -> ProbeResult:
    """Load the library, let it read its own memory through UCX, and say whether a ROCm device is here.

    Without a device it still moves host memory, so that is no reason to refuse it.
    """
    result, rocm = prove(LIBRARY), report("rocm")
    if rocm.usable:
        return result
    if result.usable:
        return attrs.evolve(result, reason=f"{result.reason}; no ROCm device, so host memory only")
    if isinstance(LIBRARY.result(), Absent) and impostor() is None:
        return attrs.evolve(result, reason=f"{result.reason}; and {rocm.reason}")
    return result
