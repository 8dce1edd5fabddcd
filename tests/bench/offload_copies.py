"""What copying blocks to and from host memory costs, beside one memcpy of the same bytes.

    python tests/bench/offload_copies.py [--short]

Bytes per second of the thread's own CPU time, as a share of what one memmove of as many bytes gets right before and
after: the machine is shared, so that seconds on the wall say little, and what is printed are medians over rounds. First
the copies alone: blocks of one length in random order out of a pool that is four times as large. Then whole blocks
through what a worker does with a job, planning included, of a model's pages with all heads, and with a half of them, as
a rank of two has. Rows are in the order of pages unless it is said, as a manager gives them while there is room.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

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


def spent(work: Callable[[], object]) -> float:
    """Seconds of this thread's CPU."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def share(work: Callable[[], int], target: Region, source: Region, rounds: int) -> tuple[float, float]:
    """The median of what one memmove takes over what `work` takes, for as many bytes; and bytes per second."""
    ratios, rates = [], []
    nbytes = work()
    for _ in range(rounds):
        before = spent(lambda: ctypes.memmove(target.address, source.address, nbytes))
        took = spent(work)
        after = spent(lambda: ctypes.memmove(target.address, source.address, nbytes))
        ratios.append((before + after) / 2 / took)
        rates.append(nbytes / took)
    return statistics.median(ratios), statistics.median(rates)


def alone(first: Region, second: Region, rounds: int) -> None:
    """The copies alone."""
    rng = np.random.default_rng(1)
    for length, wanted in ((4 << 10, None), (16 << 10, 0.7), (64 << 10, 0.85), (1 << 20, 0.95)):
        count = MOVED // length
        chosen = rng.permutation(POOL // length)[:count]
        others = rng.permutation(POOL // length)[:count]
        in_a_row = np.arange(count)
        frm, to = (BlockTable((one.address,), length, length, POOL // length) for one in (first, second))
        for what, to_ids, frm_ids in (
            ("gathered", in_a_row, chosen),
            ("scattered", chosen, in_a_row),
            ("both", others, chosen),
        ):
            move = Move(to, frm, to_ids, frm_ids)
            ratio, rate = share(partial(copy, [move]), second, first, rounds)
            bar = f" (wanted: {wanted:.2f})" if wanted and what != "both" else ""
            print(f"{length >> 10:>5} KiB {what:>9}: {ratio:5.2f} of a memcpy{bar}, {rate / 1e9:.1f} GB/s")


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
    alone(filled(POOL), filled(POOL), rounds)
    as_jobs(rounds)


if __name__ == "__main__":
    main()
