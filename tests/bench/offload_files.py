"""What the tier `fs` costs: blocks a second beside a file for each block, and bytes beside plain sequential files.

    python tests/bench/offload_files.py [--short] [--folder DIRECTORY]

A file for each block is laid out as the study describes vLLM 0.32: `<3 hex>/<2 hex>_g0/<hash>.bin`, written elsewhere
and renamed, past the page cache. The plain file is preallocated, and written and read in order, a block a call. All
read and write in turns, and what is printed are medians of ratios within a turn: disk and processors are shared, and
seconds of one turn say little about those of another. CPU is of the calling thread. Cold means that the page cache was
emptied of the files after they were synced. The last table is how long a folder takes to open.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tensorway.offload import TierContext, make_offload_key
from tensorway_fs.options import FsOptions
from tensorway_fs.tier import SegmentTier

MIB = 1 << 20
DEADLINE = 600.0
CONTEXT = TierContext("bench", b"bench", (MIB,))


def keys(name: object, count: int) -> list:
    """Of blocks that nobody has."""
    return [make_offload_key(hashlib.sha256(f"{name}-{number}".encode()).digest()) for number in range(count)]


def buffers(count: int, nbytes: int) -> list[memoryview]:
    """Memory as a primary tier has it: one mapping, rows at whole pages, and not all zeros."""
    whole = memoryview(mmap.mmap(-1, count * nbytes))
    whole[:] = os.urandom(MIB) * (count * nbytes // MIB) if count * nbytes >= MIB else os.urandom(count * nbytes)
    return [whole[at * nbytes : (at + 1) * nbytes] for at in range(count)]


def timed(act: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of this thread's CPU."""
    wall, cpu = time.perf_counter(), time.thread_time()
    act()
    return time.perf_counter() - wall, time.thread_time() - cpu


@contextlib.contextmanager
def tier(folder: Path, **options: object) -> Iterator[SegmentTier]:
    """A tier on a folder of its own."""
    made = SegmentTier(FsOptions(folder=str(folder), **options), CONTEXT)
    try:
        yield made
    finally:
        made.close()


def done(outcomes: list[str]) -> None:
    """What was measured has happened."""
    assert set(outcomes) == {"done"}, set(outcomes)


def file_for_each(folder: Path, names: list[bytes], blocks: list[memoryview]) -> None:
    """The other layout."""
    for name, block in zip(names, blocks, strict=True):
        text = name.hex()
        shelf = folder / text[:3] / f"{text[3:5]}_g0"
        shelf.mkdir(parents=True, exist_ok=True)
        fresh = shelf / f"{text}.tmp"
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o644)
        try:
            os.write(file, block)
        finally:
            os.close(file)
        fresh.rename(shelf / f"{text}.bin")


def small_blocks(folder: Path, nbytes: int, rounds: int, count: int) -> None:
    """Blocks a second, both layouts in turns, in calls of many blocks and of one."""
    blocks = buffers(count, nbytes)
    found: dict[str, list[tuple[float, float]]] = {"a file each": [], "segments": [], "segments, one a call": []}
    with tier(folder / "segments") as made:
        done(made.put(list(zip(keys("first", count), blocks, strict=True)), DEADLINE))
        for turn in range(rounds):
            names = keys(f"{nbytes}-{turn}", count)
            found["a file each"].append(timed(lambda names=names: file_for_each(folder / "files", names, blocks)))
            items = list(zip(names, blocks, strict=True))
            found["segments"].append(timed(lambda items=items: done(made.put(items, DEADLINE))))
            items = list(zip(keys(f"{nbytes}-{turn}-one", count), blocks, strict=True))
            found["segments, one a call"].append(
                timed(lambda items=items: [done(made.put([item], DEADLINE)) for item in items])
            )
    shutil.rmtree(folder / "files")
    shutil.rmtree(folder / "segments")
    for what, rows in found.items():
        ratios = [
            [old[kind] / new[kind] for old, new in zip(found["a file each"], rows, strict=True)] for kind in (0, 1)
        ]
        wall, cpu = (statistics.median(row[kind] for row in rows) for kind in (0, 1))
        print(
            f"{nbytes >> 10} KiB, {what}: {count / wall:,.0f} stores/s, {cpu / count * 1e6:.0f} us CPU each; "
            f"{statistics.median(ratios[0]):.1f} times a file each by time ({min(ratios[0]):.1f} to "
            f"{max(ratios[0]):.1f}), {statistics.median(ratios[1]):.1f} by CPU"
        )


def forget(folder: Path) -> None:
    """Empty the page cache of all files below."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


class Plain:
    """One file, in order."""

    def __init__(self, path: Path, nbytes: int, *, direct: bool) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0), 0o644)
        os.posix_fallocate(self.file, 0, nbytes)

    def write(self, blocks: list[memoryview]) -> None:
        """All, and to the disk."""
        at = 0
        for block in blocks:
            at += os.pwrite(self.file, block, at)
        os.fdatasync(self.file)

    def read(self, blocks: list[memoryview]) -> None:
        """All."""
        at = 0
        for block in blocks:
            at += os.preadv(self.file, [block], at)


def large_blocks(folder: Path, rounds: int, count: int, *, direct: bool) -> None:
    """Bytes a second beside a plain file, written to the disk for certain and read cold."""
    blocks, into, beside = buffers(count, MIB), buffers(count, MIB), buffers(count, MIB)
    ratios: dict[str, list[float]] = {"write": [], "read": []}
    rates: dict[str, list[float]] = {"write": [], "read": []}
    cpus: dict[str, list[float]] = {"write": [], "read": []}
    for turn in range(rounds + 1):
        home = folder / f"turn-{turn}"
        (home / "tier").mkdir(parents=True)
        plain = Plain(home / "plain", count * MIB, direct=direct)
        with tier(home / "tier", direct=direct, durability="strict", segment_bytes=(count + 2) * 16 * MIB) as made:
            done(made.put([(keys("first", 1)[0], blocks[0])], DEADLINE))  # makes the segment, as the file is made
            items = list(zip(keys(turn, count), blocks, strict=True))
            acts: dict[str, list[Callable[[], object]]] = {
                "write": [lambda p=plain: p.write(blocks), lambda m=made, i=items: done(m.put(i, DEADLINE))],
                "read": [
                    lambda p=plain: p.read(beside),
                    lambda m=made, i=items: done(m.get([(k, b) for (k, _), b in zip(i, into, strict=True)], DEADLINE)),
                ],
            }
            for what, pair in acts.items():
                forget(home)
                order = [0, 1] if turn % 2 else [1, 0]
                took = {which: timed(pair[which]) for which in order}
                if turn:
                    ratios[what].append(took[0][0] / took[1][0])
                    rates[what].append(count * MIB / took[1][0] / 1e6)
                    cpus[what].append(took[1][1])
            assert all(one == other for one, other in zip(into, blocks, strict=True)), "other bytes were read"
        os.close(plain.file)
        shutil.rmtree(home)
    for what, found in ratios.items():
        print(
            f"1 MiB, {what}, {'past the page cache' if direct else 'through the page cache'}: "
            f"{statistics.median(found):.2f} of a plain file ({min(found):.2f} to {max(found):.2f}), "
            f"{statistics.median(rates[what]):,.0f} MB/s, {statistics.median(cpus[what]) / count * 1e6:.0f} us CPU each"
        )


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
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    given = parser.parse_args()
    rounds, count = (3, 128) if given.short else (9, 512)
    for nbytes in (16 << 10, 64 << 10):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            Path(folder, "segments").mkdir()
            small_blocks(Path(folder), nbytes, rounds, count)
    for direct in (True, False):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            large_blocks(Path(folder), rounds, 64 if given.short else 256, direct=direct)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        opening(Path(folder), 100_000 if given.short else 1_000_000, 3)


if __name__ == "__main__":
    main()
