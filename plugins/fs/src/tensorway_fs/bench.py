"""What the tier `fs` costs: small blocks beside a file for each block, and large ones beside plain sequential files.

Of the dist only an entry point refers to this module, and `tensorway bench` runs it; it may import the core and its own
dist. A file for each block is laid out as vLLM 0.32 lays it out: `<3 hex>/<2 hex>_g0/<hash>.bin`, written elsewhere and
renamed, past the page cache. The plain file is preallocated, and written and read in order, a block a call. The page
cache is emptied of the files before each. It measures the disk of the temporary folder, which TMPDIR names.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tensorway.offload import OffloadKey, TierContext, make_offload_key
from tensorway_fs.options import FsOptions
from tensorway_fs.tier import SegmentTier
from tensorway_tools.benchmark import Benchmark, Row, Run

MIB: Final = 1 << 20
DEADLINE: Final = 600.0
_CONTEXT: Final = TierContext("bench", b"bench", (MIB,))


def rows(run: Run) -> Iterator[Row]:
    """Small blocks, then large ones."""
    rounds, count = run.either(7, 5), run.either(512, 64)
    for nbytes in (16 << 10, 64 << 10):
        with tempfile.TemporaryDirectory() as folder:
            yield from _small_blocks(Path(folder), nbytes, rounds, count)
    for direct in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            yield from _large_blocks(Path(folder), rounds, run.either(256, 16), direct=direct)


def keys(name: object, count: int) -> list[OffloadKey]:
    """Of blocks that nobody has."""
    return [make_offload_key(hashlib.sha256(f"{name}-{number}".encode()).digest()) for number in range(count)]


def timed(act: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


@contextlib.contextmanager
def tier(folder: Path, **options: Any) -> Iterator[SegmentTier]:
    """A tier on a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    made = SegmentTier(FsOptions(folder=str(folder), **options), _CONTEXT)
    try:
        yield made
    finally:
        made.close()


def done(outcomes: Sequence[str]) -> bool:
    """What was measured has happened."""
    assert set(outcomes) == {"done"}, set(outcomes)
    return True


def forget(folder: Path) -> None:
    """Empty the page cache of all files below."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def _buffers(count: int, nbytes: int) -> list[memoryview]:
    """Memory as a primary tier has it: one mapping, rows at whole pages, and not all zeros."""
    whole = memoryview(mmap.mmap(-1, count * nbytes))
    some = os.urandom(min(MIB, nbytes * count))
    for at in range(0, count * nbytes, len(some)):
        whole[at : at + len(some)] = some[: count * nbytes - at]
    return [whole[at * nbytes : (at + 1) * nbytes] for at in range(count)]


def _file_for_each(folder: Path, names: list[OffloadKey], blocks: list[memoryview]) -> None:
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


def _small_blocks(folder: Path, nbytes: int, rounds: int, count: int) -> Iterator[Row]:
    """Stores in calls of many blocks and of one, beside the other layout, in turns."""
    blocks = _buffers(count, nbytes)
    ways: dict[str, list[float]] = {"in one call": [], "one a call": []}
    files: list[float] = []
    with tier(folder / "segments") as made:
        done(made.put(list(zip(keys("first", count), blocks, strict=True)), DEADLINE))
        for turn in range(rounds + 1):
            names = keys(f"{nbytes}-{turn}", count)
            each = timed(lambda names=names: _file_for_each(folder / "files", names, blocks))  # type: ignore[misc]
            items = list(zip(names, blocks, strict=True))
            whole = timed(lambda items=items: done(made.put(items, DEADLINE)))  # type: ignore[misc]
            items = list(zip(keys(f"{nbytes}-{turn}-one", count), blocks, strict=True))
            single = timed(lambda items=items: [done(made.put([item], DEADLINE)) for item in items])  # type: ignore[misc]
            if turn:  # the first makes folders and segments
                files.append(each)
                ways["in one call"].append(whole)
                ways["one a call"].append(single)
    for how, took in ways.items():
        name = f"storing {count} blocks of {nbytes >> 10} KiB, {how}"
        yield Row(name, "a file for each block", tuple(took), tuple(files), nbytes=count * nbytes)


class _Plain:
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


def _large_blocks(folder: Path, rounds: int, count: int, *, direct: bool) -> Iterator[Row]:
    """Beside a plain file, written to the disk for certain and read cold."""
    blocks, into, beside = _buffers(count, MIB), _buffers(count, MIB), _buffers(count, MIB)
    found: dict[str, list[tuple[float, float]]] = {"writing": [], "reading": []}
    for turn in range(rounds + 1):
        home = folder / f"turn-{turn}"
        home.mkdir()
        plain = _Plain(home / "plain", count * MIB, direct=direct)
        with tier(home / "tier", direct=direct, durability="strict", segment_bytes=(count + 2) * 16 * MIB) as made:
            done(made.put([(keys("first", 1)[0], blocks[0])], DEADLINE))  # makes the segment, as the file is made
            items = list(zip(keys(turn, count), blocks, strict=True))
            wanted = [(key, buffer) for (key, _), buffer in zip(items, into, strict=True)]
            acts: dict[str, list[Callable[[], object]]] = {
                "writing": [lambda m=made, i=items: done(m.put(i, DEADLINE)), lambda p=plain: p.write(blocks)],  # type: ignore[misc]
                "reading": [lambda m=made, w=wanted: done(m.get(w, DEADLINE)), lambda p=plain: p.read(beside)],  # type: ignore[misc]
            }
            for what, pair in acts.items():
                forget(home)
                took = {which: timed(pair[which]) for which in ((0, 1) if turn % 2 else (1, 0))}
                if turn:
                    found[what].append((took[0], took[1]))
            assert all(one == other for one, other in zip(into, blocks, strict=True)), "other bytes were read"
        os.close(plain.file)
        shutil.rmtree(home)
    how = "past the page cache" if direct else "through the page cache"
    for what, pairs in found.items():
        ours, reference = zip(*pairs, strict=True)
        yield Row(
            f"{what} {count} blocks of 1 MiB {how}", "a plain file, in order", ours, reference, nbytes=count * MIB
        )


BENCH: Final = Benchmark("Blocks in files, beside a file for each block and beside a plain file.", rows)
