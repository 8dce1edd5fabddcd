"""Names by which processes of one engine find each other: small files that who uses them holds, so that others can see.

May import the core's ground only, for the probe looks at them, too. A file that nobody holds a lock on is of processes
that are gone, whatever they died of, and is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_SHARED: Final = Path("/dev/shm")
_PREFIX: Final = "tensorway-cpu-"


def folder_of_names() -> Path:
    """Shared memory, or where temporary files are."""
    return _SHARED if os.access(_SHARED, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def name_of(engine: str) -> str:
    """Nothing of what an engine is called becomes a path."""
    return f"{_PREFIX}{os.geteuid()}-{hashlib.blake2b(engine.encode(), digest_size=16).hexdigest()}"


def stale(folder: Path | None = None) -> list[Path]:
    """Names of ours that nobody holds any more."""
    return [path for path, _ in _unheld(folder or folder_of_names())]


def sweep(folder: Path | None = None) -> list[Path]:
    """Remove these; they are of processes that were killed before all had found each other."""
    removed = []
    for path, number in _unheld(folder or folder_of_names()):
        if remove(path, number):
            removed.append(path)
    return removed


def _unheld(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        try:
            number = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # gone by now, or not ours
            continue
        try:
            if os.fstat(number).st_uid == os.geteuid() and is_stale(number):
                yield path, number
        finally:
            os.close(number)


def is_stale(number: int) -> bool:
    """Whether nobody else holds the file."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove(path: Path, number: int) -> bool:
    """Remove an open file's name, if it has it still."""
    if not is_at(path, number):
        return False
    path.unlink(missing_ok=True)
    return True


def hold(number: int) -> bool:
    """Whether the file is ours as well as others' from now on, until this process ends or closes it."""
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # somebody sees whether it is stale
        return False
    return True


def is_at(path: Path, number: int) -> bool:
    """Whether the open file is still the one of this name."""
    here = os.fstat(number)
    try:
        there = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
