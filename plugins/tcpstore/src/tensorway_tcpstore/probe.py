"""Can a TCPStore be used here? Runs in a child process. May import tensorway's ground; imports torch inside."""

from __future__ import annotations

import importlib.util
from typing import Final

from tensorway.types import ProbeResult

_INSTALL: Final = 'pip install "tensorway[tcpstore]"'


def probe() -> ProbeResult:
    """Load torch and look at what its TCPStore can do; opens no port and asks nobody."""
    if importlib.util.find_spec("torch") is None:
        return ProbeResult.failed("torch is not installed", _INSTALL)
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # a library may raise anything while it is imported
        described = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        remedy = "pip install --force-reinstall --no-deps torch"
        return ProbeResult.failed(f"torch is installed but does not load ({described})", remedy)
    version = str(torch.__version__)
    store = getattr(dist, "TCPStore", None) if dist.is_available() else None
    if store is None:
        return ProbeResult.failed(
            f"torch {version} was built without torch.distributed", "Install a torch that has it.", torch=version
        )
    if not hasattr(store, "list_keys"):
        return ProbeResult.failed(f"the TCPStore of torch {version} cannot list its keys", _INSTALL, torch=version)
    return ProbeResult.passed(f"the TCPStore of torch {version}", torch=version)
