"""How long a folder of the tier `fs` with many small blocks takes to open, warm and cold.

    python tests/bench/offload_files.py [--short] [--folder DIRECTORY]

What storing and loading take beside plain files is `tensorway bench run offload-files`. Cold means that the page cache
was emptied of the files after they were synced.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tensorway.offload import make_offload_key
from tensorway_fs.bench import DEADLINE, done, forget, keys, tier


def timed(act: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of this thread's CPU."""
    wall, cpu = time.perf_counter(), time.thread_time()
    act()
    return time.perf_counter() - wall, time.thread_time() - cpu


def opening(folder: Path, count: int, rounds: int) -> None:
    """How long a folder with so many small blocks takes to open."""
    with tier(folder, direct=False) as made:
        block = memoryview(bytes(64))
        for first in range(0, count, 10_000):
            names = [
                make_offload_key(hashlib.sha256(b"%d" % number).digest())
                for number in range(first, min(count, first + 10_000))
            ]
            done(made.put([(name, block) for name in names], DEADLINE))
    for cold in (False, True):
        found = []
        for _ in range(rounds):
            if cold:
                forget(folder)

            def act() -> None:
                with tier(folder, direct=False) as made:
                    assert made.contains(keys("none", 1), 1.0) == [False]

            found.append(timed(act))
        wall, cpu = (statistics.median(row[kind] for row in found) for kind in (0, 1))
        print(f"{count:,} blocks: open in {wall:.2f} s, {cpu:.2f} s CPU, {'cold' if cold else 'in the page cache'}")


def main() -> None:
    """Print all rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        opening(Path(folder), 100_000 if given.short else 1_000_000, 3)


if __name__ == "__main__":
    main()
