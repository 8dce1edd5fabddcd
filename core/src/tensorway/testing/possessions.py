"""What this process holds, for tests of what must not stay: open files by kind, and threads.

Room `testing`; may import the standard library and `waiting`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tensorway.testing.waiting import settled


def open_files() -> Counter[str]:
    """How many of each kind or path are open; pipes and sockets without their numbers."""
    found: Counter[str] = Counter()
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # it was the listing itself
            found[str(each.readlink()).partition(":")[0]] += 1
    return found


def fewest() -> tuple[int, int]:
    """Threads, those of libraries among them, and open files: of some looks, for what ended is seen a moment more."""
    gc.collect()
    threads, files = [], []
    for _ in range(10):
        threads.append(len(list(Path("/proc/self/task").iterdir())))
        files.append(open_files().total())
        time.sleep(0.02)
    return min(threads), min(files)


def kept_growing(looks: Iterable[Sequence[int]]) -> bool:
    """Whether a count grew from each look to the next; a library may begin something once, whenever it likes."""
    return any(all(a < b for a, b in itertools.pairwise(counts)) for counts in zip(*looks, strict=True))


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


def left_of(use: Callable[[], object], seconds: float, more_threads: int = 0) -> list[list[str]]:
    """What is left of using something, if something is both times: a library may open a thing once, whenever."""
    found = []
    for _ in range(2):
        gc.collect()
        grown = grown_since(more_threads)
        use()
        gc.collect()
        if not (left := settled(grown, seconds)):
            return []
        found.append(left)
    return found
