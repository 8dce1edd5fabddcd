"""Can Ray be used from here? Enters no cluster: one may start after this process. May import the ground."""

from __future__ import annotations

import importlib.util
from typing import Final

from tensorway.types import ProbeResult

INSTALL: Final = 'pip install "tensorway[ray]"'
#: The oldest with which the tests were run: before it, Ray asks something else of a transport for tensors.
_OLDEST: Final = (2, 56)


def probe() -> ProbeResult:
    """Load Ray and look at its version."""
    if importlib.util.find_spec("ray") is None:
        return ProbeResult.failed("ray is not installed", INSTALL)
    try:
        import ray

        version = str(ray.__version__)
        old = tuple(int(number) for number in version.split(".")[:2]) < _OLDEST
    except Exception as error:  # a library may raise anything while it is imported
        described = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return ProbeResult.failed(f"ray is installed but does not load ({described})", INSTALL)
    if old:
        oldest = ".".join(map(str, _OLDEST))
        return ProbeResult.failed(f"ray {version} is older than {oldest}", INSTALL, ray=version)
    return ProbeResult.passed(f"ray {version}", ray=version)
