"""Proof that Mooncake works here: one engine reads 4 KiB of another's memory over TCP.

May import tensorway's ground and its own package. For probes, in their child process: a Mooncake that does not fit
the machine may abort it, and engines take their time to end.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any, Final

from tensorway.errors import TensorwayError
from tensorway.memory import Region
from tensorway.native import Absent
from tensorway.types import ProbeResult
from tensorway_mooncake import engine as engines
from tensorway_mooncake.library import load, version

_NBYTES: Final = 4096
_HERE: Final = "127.0.0.1"
#: Mooncake cannot cancel, and the engines of a probe end with its process.
_abandoned: Final[list[object]] = []


def prove(seconds: float = 5.0) -> ProbeResult:
    """Load Mooncake and let it move bytes, for at most `seconds`; what goes wrong is in the result."""
    loaded = load()
    if isinstance(loaded, Absent):
        return ProbeResult.failed(f"Mooncake cannot be loaded: {loaded.reason}", loaded.remedy)
    release = version()
    try:
        _read_another(seconds)
    except (TensorwayError, OSError, ValueError) as error:
        true = error.true if isinstance(error, TensorwayError) else str(error)
        reason = f"Mooncake {release} loads but cannot read over TCP ({true})"
        return ProbeResult.failed(reason, _REMEDY, version=release)
    reason = f"Mooncake {release} read the memory of a second engine over TCP"
    return ProbeResult.passed(reason, version=release, lane="tcp")


_REMEDY: Final = "See that lo is up, and that ports 15000 to 17000 are not all taken; MC_LOG_LEVEL=INFO shows more."


def _read_another(seconds: float) -> None:
    reader, owner = engines.create(_HERE), engines.create(_HERE)
    target = ctypes.create_string_buffer(_NBYTES)
    source = ctypes.create_string_buffer(os.urandom(_NBYTES), _NBYTES)
    _abandoned.extend((reader, owner, target, source))
    for engine, page in ((reader, target), (owner, source)):
        engine.register(Region(ctypes.addressof(page), _NBYTES, owner=page))
    segment = f"{owner.address}:{owner.port}"
    handle = reader.submit("read", segment, ctypes.addressof(target), ctypes.addressof(source), _NBYTES)
    if handle == 0 or _ended(reader, handle, seconds) != engines.DONE:
        raise TimeoutError(f"the read failed, or did not end within {seconds:g} s")
    if source.raw != target.raw:
        raise ValueError("the bytes that arrived differ from those that were sent")


def _ended(engine: Any, handle: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while (status := int(engine.check(handle))) == engines.PENDING and time.monotonic() < deadline:
        time.sleep(0.001)
    return status
