"""Can files be kept here? In general, and in the folder that was named. Pure Python, so it runs in the host's process.

May import tensorway's ground and this dist's disk.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from tensorway.types import ProbeResult
from tensorway_fs.disk import Disk, is_full

_BYTES = 4096


def probe() -> ProbeResult:
    """What is needed is checked when a folder is known."""
    if not hasattr(os, "preadv") or not hasattr(os, "posix_fallocate"):
        return ProbeResult.failed("this system cannot read into buffers at an offset", "Take another tier.")
    return ProbeResult.passed("nothing else is needed")


def writable(disk: Disk, folder: Path) -> ProbeResult:
    """Write a page to a folder, and say how much room is left."""
    path = folder / f"probe-{secrets.token_hex(8)}"
    try:
        file = disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            disk.fallocate(file, _BYTES)
            disk.write(file, [bytes(_BYTES)], 0)
        finally:
            disk.close(file)
            disk.unlink(path)
        free = os.statvfs(folder)
    except OSError as error:
        remedy = "Make room on it." if is_full(error) else "Let this user write there, or mount it anew."
        return ProbeResult.failed(f"{folder} cannot be written to: {error.strerror}", remedy)
    return ProbeResult.passed(f"{folder} can be written to", free_bytes=free.f_bavail * free.f_frsize)
