"""Descriptors of segments for reading: as many as may be open, the least recently used closed first.

May import this dist's disk. Threads share one; a descriptor that somebody uses is closed when the last one is done.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from tensorway_fs.disk import Disk


@attrs.define(eq=False)
class _Handle:
    file: int
    users: int = 0
    dropped: bool = False


class Handles:
    """Open files by path, each for buffered reading or past the page cache."""

    def __init__(self, disk: Disk, most: int) -> None:
        self._disk, self._most = disk, most
        self._open: OrderedDict[tuple[Path, bool], _Handle] = OrderedDict()
        self._lock, self._closed = threading.Lock(), False

    @contextmanager
    def reading(self, path: Path, direct: bool = False) -> Iterator[int]:
        """A descriptor for as long as the block runs."""
        handle = self._take((path, direct))
        try:
            yield handle.file
        finally:
            with self._lock:
                handle.users -= 1
                over = handle.dropped and not handle.users
            if over:
                self._disk.close(handle.file)

    def forget(self, path: Path) -> None:
        """A file that is gone: its room is free once it is closed."""
        with self._lock:
            found = [self._open.pop((path, direct), None) for direct in (False, True)]
            idle = [handle for handle in found if handle is not None and self._drop(handle)]
        for handle in idle:
            self._disk.close(handle.file)

    def close(self) -> None:
        """Close all; what is being read, when that ends."""
        with self._lock:
            self._closed = True
            idle = [handle for handle in self._open.values() if self._drop(handle)]
            self._open.clear()
        for handle in idle:
            self._disk.close(handle.file)

    def _take(self, key: tuple[Path, bool]) -> _Handle:
        with self._lock:
            handle = self._open.get(key)
            if handle is not None:
                self._open.move_to_end(key)
                handle.users += 1
                return handle
        path, direct = key
        fresh = _Handle(self._disk.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0)))
        with self._lock:
            handle = self._open.setdefault(key, fresh)
            handle.users += 1
            extra = [fresh] if handle is not fresh else self._surplus(key)
            if self._closed:  # by another thread, while this one reads: nobody else will close it
                self._open.pop(key).dropped = True
        for each in extra:
            self._disk.close(each.file)
        return handle

    def _surplus(self, but: tuple[Path, bool]) -> list[_Handle]:
        """What is to be closed now, so that not too many are open."""
        idle = []
        for key in [key for key in self._open if key != but][: max(0, len(self._open) - self._most)]:
            handle = self._open.pop(key)
            if self._drop(handle):
                idle.append(handle)
        return idle

    @staticmethod
    def _drop(handle: _Handle) -> bool:
        handle.dropped = True
        return not handle.users
