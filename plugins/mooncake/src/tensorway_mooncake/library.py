"""Mooncake itself, loaded at the first call of `load`: late, once, and without a trace on the host process.

May import tensorway's ground. Importing Mooncake starts a Go runtime (its client for etcd), which takes over signals;
and it logs by glog, to standard error, before it is asked to.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tensorway import settings
from tensorway.native import Absent, Loaded, NativeLibrary

#: Our names -> Mooncake's.
SYMBOLS: Final = {
    "Engine": "engine:TransferEngine",
    "Notify": "engine:TransferNotify",
    "Opcode": "engine:TransferOpcode",
}
ENVIRONMENT: Final = {
    # The word "tcp" in `initialize` chooses nothing: where there is an RDMA device, Mooncake would use it.
    "MC_FORCE_TCP": "1",
    # Mooncake logs a line for each transfer.
    "MC_LOG_LEVEL": "ERROR",
    # What makes no progress for so many seconds ends, and its connection with it: so no quarantine lasts for ever.
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "30",
    "MC_TCP_STATUS_TIMEOUT_SEC": "30",
    # A blocking call, which only notifications use, spins for as long as this; 5 is the least that Mooncake takes.
    "MC_TRANSFER_TIMEOUT": "5",
}
#: Variables with which Mooncake is not what was tested here, with what they do.
REFUSED: Final = {
    "MC_LOG_DIR": "with which Mooncake aborts the process that imports it",
    "MC_USE_TENT": "which makes Mooncake use another engine, with other rules",
    "MC_LEGACY_RPC_PORT_BINDING": "with which Mooncake chooses its ports by a rule that was not tried",
}
#: The dists that bring the package `mooncake`.
DISTS: Final = (
    "mooncake-transfer-engine-non-cuda",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
)
#: What Mooncake links against and no wheel brings: the packages of Debian and of Fedora that do.
_SYSTEM: Final = {
    "libibverbs.so.1": ("libibverbs1", "libibverbs"),
    "libnuma.so.1": ("libnuma1", "numactl-libs"),
    "libcurl.so.4": ("libcurl4", "libcurl"),
}
#: Bytes that hold a `struct sigaction` on every platform.
_SIGACTION_BYTES: Final = 256
#: glog's flag for the least severity that is logged, and its word for "fatal errors only".
_GLOG_FLAG: Final = "_ZN3fLI17FLAGS_minloglevelE"
_FATAL: Final = 3

_loading: Final = threading.Lock()
_quiet: list[bool] = []


def lacking() -> Absent | None:
    """What Mooncake needs of the system, also without RDMA, and is not there, if Mooncake is."""
    if importlib.util.find_spec("mooncake") is None:
        return None
    names = [name for name in _SYSTEM if not _loads(name)]
    if not names:
        return None
    debian, fedora = (" ".join(packages) for packages in zip(*(_SYSTEM[name] for name in names), strict=True))
    return Absent(
        f"mooncake is installed, and what it needs of the system is not: {', '.join(names)}",
        f"apt-get install {debian} (Debian, Ubuntu), or dnf install {fedora} (Fedora, RHEL)",
    )


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


LIBRARY: Final = NativeLibrary(
    name="Mooncake",
    modules=("mooncake",),
    symbols=SYMBOLS,
    remedy='pip install "tensorway[mooncake]"',
    environment=ENVIRONMENT,
    explain=lacking,
)


def load() -> Loaded | Absent:
    """Mooncake, or why it cannot be had; leaves signals and standard error to the host process."""
    for variable, effect in REFUSED.items():
        if settings.get(variable) is not None:
            return Absent(f"{variable} is set, {effect}", f"Unset {variable}.")
    with _loading:
        if not _quiet:
            # Another level is the user's, who wants to read what Mooncake logs; ours may be inherited.
            _quiet.append(settings.get("MC_LOG_LEVEL") in (None, ENVIRONMENT["MC_LOG_LEVEL"]))
        with _signals_preserved():
            result = LIBRARY.result()
        if isinstance(result, Loaded):
            silence()
        return result


def silence() -> None:
    """Let glog say what is fatal and nothing else; every other failure is one of our errors."""
    if _quiet != [True]:
        return
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
        path = next(line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libglog" in line)
        ctypes.c_int.in_dll(ctypes.CDLL(path), _GLOG_FLAG).value = _FATAL
    except (OSError, StopIteration, ValueError):
        return  # a build that has glog elsewhere goes on logging


def version() -> str:
    """The version of the dist that brings `mooncake`; empty where no metadata says."""
    for dist in DISTS:
        try:
            return importlib.metadata.version(dist)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def patience() -> float:
    """Seconds after which an operation must be over, whatever the peer does: four times what Mooncake gives it."""
    text = settings.get("MC_TCP_PROGRESS_TIMEOUT_SEC") or ""
    # What is no number above zero is no setting for Mooncake either.
    seconds = int(text) if text.isascii() and text.isdigit() else 0
    return 4.0 * (seconds or int(ENVIRONMENT["MC_TCP_PROGRESS_TIMEOUT_SEC"]))


@contextmanager
def _signals_preserved() -> Iterator[None]:
    """Go's runtime takes SIGSEGV, SIGBUS, SIGFPE and SIGURG; give them back, in whatever thread this is.

    Only its client for etcd would need them, and a transport that meets its peers directly never calls it.
    """
    libc = ctypes.CDLL(None)
    before = {}
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGURG, signal.SIGPIPE, signal.SIGHUP):
        before[number] = ctypes.create_string_buffer(_SIGACTION_BYTES)
        libc.sigaction(int(number), None, before[number])
    try:
        yield
    finally:
        for number, action in before.items():
            libc.sigaction(int(number), action, None)
