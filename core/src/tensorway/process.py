"""What a process has, and may have: memory, open files. Ground: may import the standard library only."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Literal


def resident_bytes(pid: int | Literal["self"] = "self", most: bool = False) -> int:
    """Bytes of a process that are in memory; or `most`, at any time so far."""
    rows = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines())
    return int(dict(rows)["VmHWM" if most else "VmRSS"].split()[0]) << 10


def raise_limit_of_files() -> None:
    """Let this process open as many files as it may: the usual 1024 is for those that do not know better."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
