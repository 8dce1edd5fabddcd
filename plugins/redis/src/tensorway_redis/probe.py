"""Can Redis be spoken to from here? Asks no server: one may start after this process. May import the ground."""

from __future__ import annotations

import importlib.util
from typing import Final

from tensorway.types import ProbeResult

_INSTALL: Final = 'pip install "tensorway[redis]"'
#: The oldest client whose connections can be told how long to wait.
_OLDEST: Final = 5


def probe() -> ProbeResult:
    """Load the client package and look at its version."""
    if importlib.util.find_spec("redis") is None:
        return ProbeResult.failed("redis is not installed", _INSTALL)
    try:
        import redis

        version = str(redis.__version__)
        old = int(version.partition(".")[0]) < _OLDEST
    except Exception as error:  # a library may raise anything while it is imported
        described = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return ProbeResult.failed(f"redis is installed but does not load ({described})", _INSTALL)
    if old:
        return ProbeResult.failed(f"the client redis {version} is older than {_OLDEST}", _INSTALL, redis=version)
    return ProbeResult.passed(f"the client redis {version}", redis=version)
