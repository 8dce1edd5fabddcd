"""What this process holds, for tests of what must not stay: open files by kind, and threads.

Room `testing`; may import the standard library only.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path


def open_files() -> Counter[str]:
    """How many of each kind or path are open; pipes and sockets without their numbers."""
    found: Counter[str] = Counter()
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # it was the listing itself
            found[str(each.readlink()).partition(":")[0]] += 1
    return found


def grown_since(more_threads: int = 0) -> Callable[[], list[str]]:
    """What says how much more is open, and whether more than so many threads more run, than at this moment.

    Less is fine: what a library opens for a while may have been counted.
    """
    files, threads = open_files(), threading.active_count() + more_threads

    def grown() -> list[str]:
        now, running = open_files(), threading.active_count()
        much = now.total() > files.total() or running > threads
        return [f"{now - files} are open, and {running} threads run, not {threads}"] if much else []

    return grown
