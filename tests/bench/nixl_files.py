"""Blocks to a file and back: NIXL's POSIX backend against a loop of pwrite and preadv over the same random blocks.

    python tests/bench/nixl_files.py [--short] [FOLDER]

Through the page cache, and around it (O_DIRECT) where the file system of FOLDER allows that. Each pair of runs is timed
back to back, and the median of the pairs' ratios is what is printed: the machine is shared.
"""

from __future__ import annotations

import importlib.util
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TOTAL, BLOCKS = 64 << 20, (4096, 16_384, 65_536, 1 << 20)


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(path: Path, block: int, direct: bool, pairs: int, total: int) -> str:
    """A row: what writing and reading take, as ratios to the loop."""
    from tensorway.memory import Region, shared
    from tensorway.transport import BlockTable
    from tensorway_nixl.files import BlockFile

    count = total // block
    memory = shared(total)
    memory[:] = random.Random(1).randbytes(1 << 20) * (total >> 20)
    views = [memory[i * block : (i + 1) * block] for i in range(count)]
    mine, its = (random.Random(seed).sample(range(count), count) for seed in (1, 2))
    table = BlockTable.over(Region.of(memory), block)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0))

    def written() -> None:
        for one, other in zip(mine, its, strict=True):
            os.pwrite(fd, views[one], other * block)

    def fetched() -> None:
        for one, other in zip(mine, its, strict=True):
            os.preadv(fd, [views[one]], other * block)

    with BlockFile(path, block, count, create=True, direct=direct) as file, file.register(memory):
        both = ((lambda: file.write(table, mine, its), written), (lambda: file.read(table, mine, its), fetched))
        cells = []
        for ours, loop in both:
            times = [(seconds(ours), seconds(loop)) for _ in range(pairs + 1)][1:]
            ratio = statistics.median(mine / theirs for mine, theirs in times)
            cells.append(f"{ratio:5.2f} x ({total / min(ours for ours, _ in times) / 1e9:.1f} GB/s at best)")
        queue = file.queue
    os.close(fd)
    way = "around it" if direct else "page cache"
    return f"{queue:5} {way:10} {block >> 10:>5} KiB   write {cells[0]}   read {cells[1]}"


def main() -> None:
    """Print a row per block length and way."""
    from tensorway.errors import TransferFailed
    from tensorway_nixl.library import packages

    if not any(importlib.util.find_spec(name) for name in packages()):
        print("NIXL is not installed here: nothing to compare. pip install nixl-cu12")
        return
    short = "--short" in sys.argv
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    print("time of tensorway_nixl.files, as a multiple of the loop's")
    with tempfile.TemporaryDirectory(dir=folders[0] if folders else None) as folder:
        for direct in (False, True):
            for block in BLOCKS[1:3] if short else BLOCKS:
                try:
                    print(compare(Path(folder) / "blocks", block, direct, 3 if short else 15, TOTAL >> 2 * short))
                except (TransferFailed, OSError) as error:
                    print(f"not {'around the page cache' if direct else 'here'}: {error}")
                    break


if __name__ == "__main__":
    main()
