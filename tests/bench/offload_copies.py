"""What copying blocks to and from host memory costs, beside one memcpy of the same bytes.

    python tests/bench/offload_copies.py [--short]

Bytes per second of the thread's own CPU time, as a share of what one memmove of as many bytes gets right before and
after: the machine is shared, so that seconds on the wall say little, and what is printed are medians over rounds. First
the copies alone: blocks of one length in random order out of pages of an engine that are four times as many, gathered
into rows, and scattered from them; rows follow each other, or are in random order, too. The engine's memory is of small
pages, or of huge ones where the kernel gives them. Then whole blocks through what a worker does with a job, planning
included, of a model's pages with all heads, and with a half of them, as a rank of two has. There rows are in the order
of pages unless it is said, as a manager gives them while there is room.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle

import numpy as np

from tensorway import memory
from tensorway.memory import Region
from tensorway.offload import EngineSpec
from tensorway.transport.blocks import BlockTable
from tensorway_cpu.canonical import canonical
from tensorway_cpu.common import CPULoadStoreSpec
from tensorway_cpu.copies import copy
from tensorway_cpu.pages import Move, RankPages, What
from tensorway_kv.layouts import Cache, Parallel, attention, rank_geometry

MOVED = 64 << 20
POOL = 4 * MOVED


def filled(nbytes: int) -> Region:
    """Memory that is all there: what was never written to is one page of zeros for the kernel."""
    buffer = memory.shared(nbytes)
    np.frombuffer(buffer, np.uint8)[:] = 1
    return Region.of(buffer)


def of_engine(nbytes: int, huge: bool) -> Region:
    """The same in memory of one process."""
    private = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(private, np.uint8)
    array[:] = 1
    return Region.of(array)


def spent(work: Callable[[], object]) -> float:
    """Seconds of this thread's CPU."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def share(work: Callable[[], int], target: Region, source: Region, rounds: int) -> tuple[float, float]:
    """The median of what one memmove takes over what `work` takes, for as many bytes; and bytes per second.

    Each memmove is of the next part of either memory, so that no more of it is in the caches than of what is copied.
    """
    ratios, rates = [], []
    nbytes = work()
    parts = cycle(range(min(target.nbytes, source.nbytes) // nbytes))
    for _ in range(rounds):
        beside = [spent(partial(whole, target, source, nbytes, next(parts)))]
        took = spent(work)
        beside.append(spent(partial(whole, target, source, nbytes, next(parts))))
        ratios.append(sum(beside) / 2 / took)
        rates.append(nbytes / took)
    return statistics.median(ratios), statistics.median(rates)


def whole(target: Region, source: Region, nbytes: int, part: int) -> None:
    """One memmove of a part."""
    ctypes.memmove(target.address + part * nbytes, source.address + part * nbytes, nbytes)


def alone(rows: Region, pages: Region, what: str, rounds: int) -> None:
    """The copies alone."""
    rng = np.random.default_rng(1)
    for length, wanted in ((4 << 10, None), (16 << 10, 0.7), (64 << 10, 0.85), (1 << 20, 0.95)):
        count = MOVED // length
        chosen, others = (rng.permutation(POOL // length)[:count] for _ in range(2))
        in_a_row = np.arange(count)
        of_rows, of_pages = (BlockTable((one.address,), length, length, POOL // length) for one in (rows, pages))
        bar = f" (wanted: {wanted:.2f})" if wanted else ""
        for how, move, target, source in (
            (f"gathered{bar}", Move(of_rows, of_pages, in_a_row, chosen), rows, pages),
            (f"scattered{bar}", Move(of_pages, of_rows, chosen, in_a_row), pages, rows),
            ("to rows in random order", Move(of_rows, of_pages, others, chosen), rows, pages),
            ("from rows in random order", Move(of_pages, of_rows, chosen, others), pages, rows),
        ):
            ratio, rate = share(partial(copy, [move]), target, source, rounds)
            print(f"{length >> 10:>5} KiB, {what}: {ratio:5.2f} of a memcpy, {rate / 1e9:5.1f} GB/s {how}")


def as_jobs(rounds: int) -> None:
    """What a worker does with a job: planning and copying, in one thread."""
    heads, width, tokens, layers, blocks = 8, 256, 16, 16, 32
    for tp, what in ((1, "all heads"), (2, "half of the heads")):
        for pages in ("layer", "group"):
            cache = Cache(range(layers), attention(heads, width), tokens, pages=pages)
            parallel, pool = Parallel(tp), 4 * blocks
            places = filled(pool * layers * 2 * heads * width * tokens // tp)
            at = [places.address]

            def base(name: str, nbytes: int, at: list[int] = at) -> int:
                at[0] += nbytes
                return at[0] - nbytes

            mine = rank_geometry([cache], parallel, 0, blocks=pool, base=base)
            others = [
                rank_geometry([cache], parallel, rank, blocks=pool, base=lambda *_: 4096) for rank in range(1, tp)
            ]
            canon = canonical([mine, *others], 1, "NHD")
            rows = filled(pool * canon.row_bytes)
            worker = RankPages(canon, [mine, *others], 0, rows, pool)
            chosen = np.random.default_rng(2).permutation(pool)[:blocks]
            for order, ids in (("", np.arange(blocks)), (", rows at random", np.flip(chosen))):
                sides = EngineSpec(np.zeros(blocks, int), chosen[:, None]), CPULoadStoreSpec.of(ids.tolist())
                for way in ("store", "load"):
                    ratio, rate = share(partial(job, worker, sides, way), rows, places, rounds)
                    print(
                        f"{canon.nbytes[0] >> 20} MiB blocks, {what}, a page for each {pages}, {way}{order}: "
                        f"{ratio:5.2f} of a memcpy, {rate / 1e9:.1f} GB/s"
                    )


def job(worker: RankPages, sides: tuple[EngineSpec, CPULoadStoreSpec], what: What) -> int:
    """One job, whole."""
    blocks, refused = worker.checked(*(sides if what == "store" else sides[::-1]), what)
    assert not len(refused)
    return copy(worker.moves(blocks, what))


def main() -> None:
    """Print all rows."""
    rounds = 7 if "--short" in sys.argv else 31
    rows = filled(POOL)
    for what, huge in (("huge pages", True), ("small pages", False)):
        alone(rows, of_engine(POOL, huge), what, rounds)
    as_jobs(rounds)


if __name__ == "__main__":
    main()
