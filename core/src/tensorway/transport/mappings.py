"""Shared memory by its address: which file is behind a region here, and the same file at the same address there.

Room `transport`; may import the ground. Containment needs it: engine and mover see registered memory at one address, so
that no table and no description has to be translated. `backing` is for who has the memory, `AddressSpace` for who is
to have it, too.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from tensorway.errors import MemoryInvalid
from tensorway.memory import PAGE, Region, libc, map_file

_LINE: Final = re.compile(
    r"(?P<start>\w+)-(?P<end>\w+) (?P<mode>\S+) (?P<offset>\w+) (?P<major>\w+):(?P<minor>\w+) "
    r"(?P<inode>\d+) *(?P<path>.*)"
)
#: Files that one region may lie in; a message can carry no more than 253.
MAX_PIECES: Final = 128
TO_DO: Final = (
    "Allocate it with tensorway.memory.shared(nbytes), torch.Tensor.share_memory_() or a file in /dev/shm; "
    "or do without containment."
)

#: Where it begins, how long it is, and where in its file that is.
Piece = tuple[int, int, int]


@attrs.frozen
class _Mapping:
    """A line of /proc/self/maps."""

    start: int
    end: int
    mode: str
    offset: int
    device: int
    inode: int
    path: str


def backing(region: Region) -> tuple[list[Piece], list[int]]:
    """What files a region lies in, with an open descriptor for each, which the caller closes.

    Raises `MemoryInvalid` unless all of it is writable, shared, and in files that can be found.
    """
    pieces: list[Piece] = []
    files: list[int] = []
    try:
        for row in _covering(region):
            if row.mode[1] != "w" or row.mode[3] != "s":
                kind = "private" if row.mode[3] != "s" else "read-only"
                raise _refused(region, f"It is {kind} memory, and another process cannot write to that.")
            files.append(_open(row, region))
            # Huge pages are mapped whole; what is around a region in the same mapping does no harm.
            grain = max(PAGE, os.fstat(files[-1]).st_blksize)
            low, high = max(row.start, region.address // grain * grain), min(row.end, -(-region.end // grain) * grain)
            pieces.append((low, high - low, row.offset + low - row.start))
        if len(pieces) > MAX_PIECES:
            raise _refused(region, f"It lies in {len(pieces)} mappings, and no more than {MAX_PIECES} are handed over.")
    except BaseException:
        for file in files:
            os.close(file)
        raise
    return pieces, files


def _covering(region: Region) -> Iterator[_Mapping]:
    at = region.address
    for row in _mappings():
        if row.end <= at:
            continue
        if row.start > at:
            break
        yield row
        at = row.end
        if at >= region.end:
            return
    raise _refused(region, "Not all of it is mapped in this process.")


def _mappings() -> Iterator[_Mapping]:
    with Path("/proc/self/maps").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if found := _LINE.match(line.rstrip("\n")):
                row = found.groupdict()
                device = os.makedev(int(row["major"], 16), int(row["minor"], 16))
                start, end, offset = (int(row[key], 16) for key in ("start", "end", "offset"))
                yield _Mapping(start, end, row["mode"], offset, device, int(row["inode"]), row["path"])


def _open(row: _Mapping, region: Region) -> int:
    """The mapping's file: by the kernel's own link, by a descriptor that we have, or by its path."""
    own = Path("/proc/self/fd")
    for place in (Path(f"/proc/self/map_files/{row.start:x}-{row.end:x}"), *own.iterdir(), Path(row.path)):
        try:
            if place.parent == own or str(place) == row.path:
                status = place.stat()
                if (status.st_dev, status.st_ino) != (row.device, row.inode):
                    continue
            file = os.open(place, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError:  # not permitted, or gone meanwhile: another way may work
            continue
        if stat.S_ISREG(os.fstat(file).st_mode):
            return file
        os.close(file)
    raise _refused(region, f"Its file ({row.path or 'without a name'}) is not open in this process and cannot be.")


def _refused(region: Region, true: str) -> MemoryInvalid:
    return MemoryInvalid(
        f"{region.nbytes:,} bytes at {region.address:#x} were to be registered with a contained transport.", true, TO_DO
    )


class Taken(Exception):
    """Something else is at an address where shared memory was to be."""


class AddressSpace:
    """Shared memory of another process, in this one at the same addresses."""

    def __init__(self) -> None:
        self._held: dict[int, list[tuple[int, int]]] = {}

    def add(self, number: int, pieces: Sequence[Piece], files: Sequence[int]) -> None:
        """Map the pieces, except what is mapped already for another number; raises `Taken` with nothing changed."""
        done: list[tuple[int, int]] = []
        try:
            for (start, nbytes, offset), file in zip(pieces, files, strict=True):
                for low, high in _without((start, start + nbytes), self._ranges()):
                    _map(low, high - low, file, offset + low - start)
                    done.append((low, high))
        except BaseException:
            for low, high in done:
                libc().munmap(low, high - low)
            raise
        self._held[number] = [(start, start + nbytes) for start, nbytes, _ in pieces]

    def drop(self, number: int) -> None:
        """Unmap what no other number needs."""
        for whole in self._held.pop(number, ()):
            for low, high in _without(whole, self._ranges()):
                libc().munmap(low, high - low)

    def _ranges(self) -> list[tuple[int, int]]:
        return sorted(row for rows in self._held.values() for row in rows)


def _map(address: int, nbytes: int, file: int, offset: int) -> None:
    try:
        map_file(nbytes, file, offset, wish=address)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise Taken from None
        raise
    # It is the engine's, and may be large: not for the core file of a process that is made to crash.
    libc().madvise(address, nbytes, mmap.MADV_DONTDUMP)


def _without(whole: tuple[int, int], taken: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of a range lies in none of the others, which are sorted."""
    at, end = whole
    for low, high in taken:
        if high <= at or low >= end:
            continue
        if low > at:
            yield at, low
        at = max(at, high)
    if at < end:
        yield at, end
