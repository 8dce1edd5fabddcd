"""Can gloo be used here? Runs in a child process. May import tensorway's ground; imports torch inside functions."""

from __future__ import annotations

import importlib.util
from datetime import timedelta
from typing import Any, Final

from tensorway.types import ProbeResult

_INSTALL: Final = 'pip install "tensorway[gloo]"'
#: How long the one-rank group may take.
_TIMEOUT: Final = timedelta(seconds=10)


def probe() -> ProbeResult:
    """Reduce a tensor in a gloo group of one rank."""
    if importlib.util.find_spec("torch") is None:
        return ProbeResult.failed("torch is not installed", _INSTALL)
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # a library may raise anything while it is imported
        remedy = "pip install --force-reinstall --no-deps torch"
        return ProbeResult.failed(f"torch is installed but does not load ({_described(error)})", remedy)
    version = str(torch.__version__)
    if not dist.is_available() or not dist.is_gloo_available():
        return ProbeResult.failed(
            f"torch {version} was built without gloo", "Install a torch that has it.", torch=version
        )
    try:
        total = _sum_over_one_rank()
    except RuntimeError as error:  # gloo: no address for the host's name, no such interface
        reason = f"torch {version} has gloo, and gloo cannot form a group here ({_described(error)})"
        return ProbeResult.failed(reason, "Set GLOO_SOCKET_IFNAME to an interface that is up.", torch=version)
    if total != [1.0, 2.0]:
        return ProbeResult.failed(f"torch {version}: gloo summed [1, 2] to {total}", "Reinstall torch.", torch=version)
    return ProbeResult.passed(f"gloo of torch {version} reduced a tensor in a group of one rank", torch=version)


def _sum_over_one_rank() -> list[float]:
    import torch
    import torch.distributed

    dist: Any = torch.distributed  # which says what is in it in some builds only
    # A group of its own: the default group belongs to the application.
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, _TIMEOUT)
    tensor = torch.tensor([1.0, 2.0])
    group.allreduce([tensor]).wait(_TIMEOUT)
    return [float(value) for value in tensor]


def _described(error: BaseException) -> str:
    # gloo puts the place in its own source in front: "[enforce fail at /.../device.cc:84] ifa != nullptr. Unable ..."
    text = " ".join(str(error).rpartition("] ")[2].split())
    return f"{type(error).__name__}: {text[:120]}"
