"""What copying blocks to and from host memory costs, beside one memcpy of the same bytes.

Of the dist only an entry point refers to this module, and `tensorway bench` runs it; it may import all of the dist and
`tensorway_kv`, whose pages it copies. Seconds are of the thread's own CPU time. First the copies alone: blocks of one
length in random order out of pages of an engine that are four times as many, gathered into rows, and scattered from
them. The engine's memory is of small pages, or of huge ones where the kernel gives them. Then whole blocks through what
a worker does with a job, planning included, of a model's pages with all heads, and with a half of them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any, Final

import numpy as np

from tensorway import memory
from tensorway.memory import Region
from tensorway.offload import EngineSpec
from tensorway.transport.blocks import BlockTable
from tensorway_cpu.canonical import canonical
from tensorway_cpu.common import CPULoadStoreSpec
from tensorway_cpu.copies import copy
from tensorway_cpu.pages import Move, RankPages, What
from tensorway_tools.benchmark import Benchmark, Row, Run

_MOVED: Final = 64 << 20
_TO: Final = "a memcpy of as many bytes"


def rows(run: Run) -> Iterator[Row]:
    """Copies, then jobs."""
    moved = run.either(_MOVED, _MOVED // 8)
    own = _filled(4 * moved)
    for what, huge in (("huge pages", True), ("small pages", False)):
        yield from _alone(run, own, _of_engine(4 * moved, huge), what, moved)
    yield from _as_jobs(run)


def _filled(nbytes: int) -> Region:
    """Memory that is all there: what was never written to is one page of zeros for the kernel."""
    buffer = memory.shared(nbytes)
    np.frombuffer(buffer, np.uint8)[:] = 1
    return Region.of(buffer)


def _of_engine(nbytes: int, huge: bool) -> Region:
    """The same in memory of one process."""
    private = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(private, np.uint8)
    array[:] = 1
    return Region.of(array)


def _spent(work: Callable[[], object]) -> float:
    """Seconds of this thread's CPU."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def _beside(run: Run, name: str, work: Callable[[], int], target: Region, source: Region) -> Row:
    """What `work` takes, between two memcpys of as many bytes.

    Each memcpy is of the next part of either memory, so that no more of it is in the caches than of what is copied.
    """
    nbytes = work()
    parts = cycle(range(min(target.nbytes, source.nbytes) // nbytes))

    def whole() -> None:
        at = next(parts) * nbytes
        ctypes.memmove(target.address + at, source.address + at, nbytes)

    rounds = [(_spent(whole), _spent(work), _spent(whole)) for _ in range(run.either(15, 5))]
    ours = tuple(took for _, took, _ in rounds)
    return Row(name, _TO, ours, tuple((first + last) / 2 for first, _, last in rounds), "cpu", nbytes)


def _alone(run: Run, own: Region, pages: Region, what: str, moved: int) -> Iterator[Row]:
    """The copies alone."""
    rng = np.random.default_rng(1)
    for length in (4 << 10, 16 << 10, 64 << 10, 1 << 20):
        count = moved // length
        chosen, others = (rng.permutation(4 * count)[:count] for _ in range(2))
        in_a_row = np.arange(count)
        of_rows, of_pages = (BlockTable((one.address,), length, length, 4 * count) for one in (own, pages))
        for how, move, target, source in (
            ("gathered", Move(of_rows, of_pages, in_a_row, chosen), own, pages),
            ("scattered", Move(of_pages, of_rows, chosen, in_a_row), pages, own),
            ("to rows in random order", Move(of_rows, of_pages, others, chosen), own, pages),
            ("from rows in random order", Move(of_pages, of_rows, chosen, others), pages, own),
        ):
            yield _beside(run, f"{length >> 10} KiB, {what}, {how}", partial(copy, [move]), target, source)


def _as_jobs(run: Run) -> Iterator[Row]:
    """What a worker does with a job: planning and copying, in one thread."""
    from tensorway_kv.layouts import Cache, Parallel, attention, rank_geometry

    heads, width, tokens, layers, blocks = 8, 256, 16, 16, 32
    for tp, what in ((1, "all heads"), (2, "half of the heads")):
        for pages in ("layer", "group"):
            cache = Cache(range(layers), attention(heads, width), tokens, pages=pages)
            parallel, pool = Parallel(tp), 4 * blocks
            places = _filled(pool * layers * 2 * heads * width * tokens // tp)
            at = [places.address]

            def base(name: str, nbytes: int, at: list[int] = at) -> int:
                at[0] += nbytes
                return at[0] - nbytes

            mine = rank_geometry([cache], parallel, 0, blocks=pool, base=base)
            ranks = [mine]
            ranks += [
                rank_geometry([cache], parallel, rank, blocks=pool, base=lambda *_: 4096) for rank in range(1, tp)
            ]
            canon = canonical(ranks, 1, "NHD")
            own = _filled(pool * canon.row_bytes)
            worker = RankPages(canon, ranks, 0, own, pool)
            chosen = np.random.default_rng(2).permutation(pool)[:blocks]
            for order, ids in (("", np.arange(blocks)), (", rows at random", np.flip(chosen))):
                sides = EngineSpec([0] * blocks, chosen[:, None].tolist()), CPULoadStoreSpec.of(ids.tolist())
                for way in ("store", "load"):
                    name = f"{canon.nbytes[0] >> 20} MiB blocks, {what}, a page for each {pages}, {way}{order}"
                    yield _beside(run, name, partial(_job, worker, sides, way), own, places)


def _job(worker: RankPages, sides: tuple[EngineSpec, CPULoadStoreSpec], what: What) -> int:
    """One job, whole."""
    given: tuple[Any, Any] = sides if what == "store" else sides[::-1]
    blocks, refused = worker.checked(*given, what)
    assert not len(refused)
    return copy(worker.moves(blocks, what))


def _missing() -> str:
    here = importlib.util.find_spec("tensorway_kv") is not None
    return "" if here else "tensorway-kv is not installed, whose pages are copied: pip install 'tensorway[kv]'"


BENCH: Final = Benchmark("Copies of blocks to and from host memory, beside a memcpy.", rows, _missing)
