"""Which process this is, as segments say it to people: its number, when it began, and since which start of the host.

May import this dist's records.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tensorway_fs.records import Owner

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
#: Of what is behind the program's name in /proc/PID/stat, where the start is.
_STARTED: Final = 19


def myself() -> Owner:
    """This process."""
    return Owner(os.getpid(), _started(os.getpid()), _boot())


def lives(owner: Owner) -> bool:
    """Whether that process is here and lives; its lock says it more surely, where files can be locked."""
    return bool(owner.started) and owner.boot == _boot() and owner.started == _started(owner.pid)


def _boot() -> bytes:
    try:
        return bytes.fromhex(_BOOT.read_text("ascii").strip().replace("-", ""))
    except (OSError, ValueError):  # no such thing in this container
        return bytes(16)


def _started(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[_STARTED])
    except (OSError, ValueError, IndexError):
        return 0
