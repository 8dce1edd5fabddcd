"""Memory for tensors that are fetched: taken again when those that lay in it are gone.

May import nothing but the standard library. The first touch of fresh memory costs more than the bytes that are put
there: a page at a time, the kernel has to find and clear it. So what has been touched is kept, up to a limit, and is
asked for in huge pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import weakref
from collections import deque
from typing import Final

#: Bytes that are kept while nothing lies in them.
_IDLE: Final = 256 << 20
#: Mappings are multiples of this, which is a huge page.
_STEP: Final = 2 << 20


class Landing:
    """Lends memory. Threads may share it."""

    def __init__(self, idle: int = _IDLE) -> None:
        self._lock = threading.Lock()
        self._limit = idle
        #: What nothing lies in any more, the longest first.
        self._kept: list[mmap.mmap] = []
        #: Filled by the garbage collector, in whatever thread it runs, which may hold the lock.
        self._returned: deque[mmap.mmap] = deque()

    def take(self, nbytes: int) -> ctypes.Array[ctypes.c_ubyte]:
        """So many bytes or some more, with anything in them; lent as long as this is there, or any view of it.

        No view of a memoryview would hold that one; of an array of ctypes, each holds the array.
        """
        with self._lock:
            self._collect()
            fitting = [block for block in self._kept if nbytes <= len(block) <= max(_STEP, 2 * nbytes)]
            block = min(fitting, key=len, default=None)
            if block is not None:
                self._kept.remove(block)
        self._settle()
        if block is None:
            block = mmap.mmap(-1, -(-nbytes // _STEP) * _STEP, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                block.madvise(mmap.MADV_HUGEPAGE)
        lent = (ctypes.c_ubyte * len(block)).from_buffer(block)
        # Not what a process does last: then the memory goes anyway.
        weakref.finalize(lent, self._come_back, block).atexit = False
        return lent

    def _come_back(self, block: mmap.mmap) -> None:
        self._returned.append(block)
        self._settle()

    def _settle(self) -> None:
        """Keep what came back, or let it go; never waits: whoever holds the lock does this again without it."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def _collect(self) -> None:
        while self._returned:
            self._kept.append(self._returned.popleft())
        while sum(map(len, self._kept)) > self._limit:
            self._kept.pop(0)
