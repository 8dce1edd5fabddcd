"""Can blocks be kept in host memory here, and how much? Pure Python, so it runs in the host's process.

May import tensorway's ground and this package's names.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from pathlib import Path
from typing import Final

from tensorway.types import ProbeResult
from tensorway_cpu.names import stale

_SHARED: Final = Path("/dev/shm")
_MIB: Final = 1 << 20


def probe() -> ProbeResult:
    """Map a page and a shared page, and see how much memory the process may have."""
    try:
        _write_and_read(-1)
    except (OSError, ValueError) as error:
        return ProbeResult.failed(f"no memory can be mapped ({error})", "Look at ulimit -v and the memory limit.")
    meminfo = _meminfo()
    limit = memory_limit()
    available = available_bytes()
    shared = _shared_bytes()
    with_shared = "no shared memory" if shared is None else f"{shared // _MIB} MiB of shared memory in {_SHARED}"
    memory = "host memory" if available is None else f"up to {available // _MIB} MiB of host memory"
    return ProbeResult.passed(
        f"{memory}, {with_shared}",
        available_bytes=available,
        limit_bytes=limit,
        shared=shared is not None,
        shared_bytes=shared,
        huge_page_bytes=meminfo.get("Hugepagesize"),
        huge_pages_free=meminfo.get("HugePages_Free"),
        stale_names=len(stale()),
    )


def available_bytes() -> int | None:
    """How much more memory this process may have; None if nobody says it."""
    return min(filter(None, [_meminfo().get("MemAvailable"), memory_limit()]), default=None)


def memory_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The lowest `memory.max` (cgroup v2) from this process's group up to the root; None when there is none."""
    limits = []
    try:
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::")).strip("/")
    except (OSError, StopIteration):
        return None
    for group in [root / path, *(root / path).parents]:
        with contextlib.suppress(OSError, ValueError):  # absent at the root; "max" where nothing limits
            limits.append(int((group / "memory.max").read_text()))
        if group == root:
            break
    return min(limits, default=None)


def _write_and_read(fd: int) -> None:
    with mmap.mmap(fd, mmap.PAGESIZE) as page:
        page[:4] = b"KV\x00\xff"
        if page[:4] != b"KV\x00\xff":
            raise OSError("a mapped page does not keep what is written to it")


def _shared_bytes() -> int | None:
    """Free bytes of shared memory, or None when this process cannot use any."""
    try:
        with tempfile.TemporaryFile(dir=_SHARED) as file:
            # Not truncate: a page of a full file system that exists on paper only kills who touches it (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, mmap.PAGESIZE)
            _write_and_read(file.fileno())
        state = os.statvfs(_SHARED)
    except OSError:
        return None
    return state.f_bavail * state.f_frsize


def _meminfo() -> dict[str, int]:
    """/proc/meminfo: bytes where it says kB, counts where it says nothing."""
    values = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            number, _, unit = rest.strip().partition(" ")
            if number.isdigit():
                values[name] = int(number) * (1024 if unit == "kB" else 1)
    return values
