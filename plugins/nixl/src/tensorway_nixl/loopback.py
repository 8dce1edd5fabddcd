"""Proof that a build of NIXL works here: an agent reads 4 KiB of its own memory through UCX.

May import tensorway's ground and its own package. For probes, in their child process: a NIXL that does not fit the
machine may abort it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tensorway.native import Absent, Loaded, NativeLibrary
from tensorway.types import ProbeResult
from tensorway_nixl.library import keep_quiet

_NBYTES: Final = 4096
#: NIXL cannot cancel: what a transfer that never ended may still write to stays alive for as long as the process.
_abandoned: Final[list[object]] = []


def prove(library: NativeLibrary, seconds: float = 5.0) -> ProbeResult:
    """Load the library and let it move bytes, for at most `seconds`; what goes wrong is in the result."""
    keep_quiet()
    loaded = library.result()
    if isinstance(loaded, Absent):
        return ProbeResult.failed(f"{library.name} cannot be loaded: {loaded.reason}", loaded.remedy)
    release = version(loaded.module)
    title = " ".join(filter(None, [library.name, release, f"({loaded.module})"]))
    steps: list[str] = []
    try:
        _read_own_memory(loaded, seconds, steps.append)
    except Exception as error:  # NIXL's exceptions have no common base, and their text is only a code
        reason = f"{title} loads but cannot {steps[-1]} ({type(error).__name__}: {error})"
        return ProbeResult.failed(reason, _REMEDY, package=loaded.module, version=release)
    ucx = ucx_version()
    reason = f"{title} read its own memory through UCX{f' {ucx}' if ucx else ''}"
    return ProbeResult.passed(reason, package=loaded.module, version=release, ucx=ucx)


_REMEDY: Final = "See that lo is up (UCX needs one interface), and what UCX_TLS, UCX_NET_DEVICES and ~/.nixl.cfg say."


def _read_own_memory(loaded: Loaded, seconds: float, step: Callable[[str], None]) -> None:
    step("create an agent")
    # Without the progress thread, which spins; polling makes the progress here.
    config = loaded.symbols["AgentConfig"](enable_prog_thread=False, backends=[])
    agent = loaded.symbols["Agent"](f"tensorway-probe-{os.getpid()}", config)
    step("create its UCX backend")
    # UCX listens on every interface, and whoever connects is trusted; a probe opens no door to the network.
    agent.create_backend("UCX", {"engine_config": "NET_DEVICES=lo"})
    source = ctypes.create_string_buffer(os.urandom(_NBYTES), _NBYTES)
    target = ctypes.create_string_buffer(_NBYTES)
    step("register memory")
    pages = [(ctypes.addressof(page), _NBYTES, 0) for page in (source, target)]
    registered = agent.register_memory([(*page, "") for page in pages], "DRAM")
    step("read its own memory")
    theirs, ours = (agent.get_xfer_descs([page], "DRAM") for page in pages)
    transfer = agent.initialize_xfer("READ", ours, theirs, agent.name)
    if (state := _finish(agent, transfer, seconds)) != "DONE":
        _abandoned.extend((agent, transfer, source, target))
        raise TimeoutError(f"still {state} after {seconds:g} s")
    if source.raw != target.raw:
        raise ValueError("the bytes that arrived differ from those that were sent")
    agent.release_xfer_handle(transfer)
    agent.deregister_memory(registered)


def _finish(agent: Any, transfer: Any, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    state: str = agent.transfer(transfer)
    while state == "PROC" and time.monotonic() < deadline:
        time.sleep(0.001)
        state = agent.check_xfer_state(transfer)
    return state


def version(package: str) -> str | None:
    """The version of a package of NIXL, where its metadata is there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a build from source, put on the path by hand
        return None


def ucx_version() -> str | None:
    """The version of the UCX that is in this process, asked of the very file that is mapped."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
        path = next(line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/libucp" in line)
        tell = ctypes.CDLL(path).ucp_get_version_string
    except (OSError, StopIteration, AttributeError):
        return None
    tell.restype = ctypes.c_char_p
    return str(tell().decode("ascii", "replace"))
