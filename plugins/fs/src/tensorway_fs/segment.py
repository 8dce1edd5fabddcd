"""One segment file: what a process knows of it, and how it is written by the one process that holds its lock.

May import attrs and this dist's disk, namespaces and records. Order is all of the safety: blocks are written before
their entries, entries before anybody is told. Who is killed between two of these leaves free places.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import attrs

from tensorway_fs.disk import Buffer, Disk
from tensorway_fs.namespace import Named, read_head, tell_removed
from tensorway_fs.records import DIRECT, ENTRY, PAGE, STATE, STATE_BYTES, TOMBSTONE, Head, State, entry

#: What lies between a block and the next place.
_PADDING: Final = bytes(PAGE)


@attrs.define(eq=False)
class Segment:
    """What one process knows of a segment, its own or another's."""

    path: Path
    head: Head
    #: What each place has, as far as it is known.
    keys: list[bytes | None]
    #: The process's own number for it.
    ident: int = -1
    state: State = attrs.field(factory=State)
    #: Places that were read since they were written, by this process.
    hot: bytearray = attrs.field(factory=bytearray)
    #: Whether it may hold entries that were never synced: another process wrote them, or one that was killed.
    unsynced: bool = True
    #: Whether this process writes it, and so knows all of it.
    ours: bool = False

    def __attrs_post_init__(self) -> None:
        if not self.hot:
            self.hot = bytearray(self.head.places)


@attrs.frozen
class Block:
    """One to be written."""

    key: bytes
    data: memoryview
    digest: int


@attrs.frozen
class Run:
    """Places, one behind the other, that one thread may write to."""

    writer: Writer
    first: int
    count: int


class Writer:
    """The open end of a segment whose lock this process holds. Its counters are guarded by who owns it."""

    def __init__(self, disk: Disk, segment: Segment, file: int, direct: int | None, next_place: int) -> None:
        self.segment = segment
        self._disk, self._file, self._direct = disk, file, direct
        self._next, self._writing, self._failed, self._closed = next_place, 0, False, False

    @property
    def full(self) -> bool:
        """Whether no place is left."""
        return self._failed or self._next >= self.segment.head.places

    @property
    def idle(self) -> bool:
        """Whether nobody writes."""
        return not self._writing

    def begin(self, place: int) -> None:
        """Go on with this place: those before it were used by another process."""
        self._next = place

    def take(self, wish: int) -> Run | None:
        """Up to so many places; None if there is none."""
        count = 0 if self._failed else min(wish, self.segment.head.places - self._next)
        if count <= 0:
            return None
        run = Run(self, self._next, count)
        self._next += count
        self._writing += count
        return run

    def end(self) -> None:
        """No more places are taken; who writes yet gives the last one back."""
        self._failed = True

    def give(self, run: Run, *, failed: bool) -> bool:
        """These are written, or cannot be; whether the segment is to be sealed now."""
        self._writing -= run.count
        self._failed |= failed
        return self.full and self.idle

    def write(self, run: Run, blocks: Sequence[Block]) -> None:
        """Write blocks and then their entries; raises `OSError`, and then none of them is there."""
        head = self.segment.head
        try:
            self._write_blocks(run, blocks)
            now = int(time.time())
            table = [
                entry(head, run.first + at, block.key, block.digest, len(block.data), now)
                for at, block in enumerate(blocks)
            ]
            self._disk.write(self._file, [b"".join(table)], PAGE + run.first * ENTRY)
            self._tell(sealed=False)
        except OSError:
            self._bury(run)
            raise

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        self._disk.fdatasync(self._file)

    def seal(self, *, sync: bool) -> None:
        """Nothing more comes: others need not look at it again. The lock ends."""
        try:
            if sync:
                self._disk.fdatasync(self._file)
            self._tell(sealed=True)
        finally:
            self.close()

    def close(self) -> None:
        """Give the lock back; another process may go on where this one ended."""
        if self._closed:
            return
        self._closed = True
        if self._direct is not None:
            self._disk.close(self._direct)
        self._disk.unlock(self._file)
        self._disk.close(self._file)

    def _write_blocks(self, run: Run, blocks: Sequence[Block]) -> None:
        head = self.segment.head
        buffers: list[Buffer] = []
        for block in blocks:
            buffers.append(block.data)
            rest = head.kind.stride - len(block.data)
            if rest:
                buffers.append(_PADDING[:rest])
        large = len(blocks) * head.kind.stride >= DIRECT
        if self._direct is not None and large and len(buffers) == len(blocks):
            try:
                self._disk.write(self._direct, buffers, head.at(run.first))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # These buffers do not begin where the disk could read them itself.
            else:
                return
        self._disk.write(self._file, buffers, head.at(run.first))

    def _tell(self, *, sealed: bool) -> None:
        segment = self.segment
        segment.state = State(segment.state.changes + 1, self._next, sealed)
        self._disk.write(self._file, [segment.state.encoded()], STATE)

    def _bury(self, run: Run) -> None:
        """Entries of which some may have been written."""
        try:
            self._disk.write(self._file, [TOMBSTONE * run.count], PAGE + run.first * ENTRY)
        except OSError:
            # The disk takes nothing: what is there has checksums.
            self._failed = True


def create(disk: Disk, folder: Path, head: Head, *, direct: bool, sync: bool) -> Writer:
    """A new segment with all its room, locked; raises `OSError`, and then there is no file."""
    path = folder / head.name
    file = disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        disk.flock(file)
        disk.fallocate(file, head.nbytes)
        disk.write(file, [head.encoded()], 0)
        if sync:
            disk.fdatasync(file)
            disk.sync_folder(folder)
        other = _open_direct(disk, path) if direct else None
    except BaseException:
        disk.close(file)
        disk.unlink(path)
        raise
    segment = Segment(path, head, [None] * head.places, unsynced=False, ours=True)
    return Writer(disk, segment, file, other, 0)


def adopt(disk: Disk, segment: Segment, *, direct: bool) -> Writer | None:
    """Go on with a segment that nobody writes any more; None if somebody does. `segment.keys` are to be read anew."""
    try:
        file = disk.open(segment.path, os.O_RDWR)
    except OSError:  # it is gone, or not ours to write
        return None
    try:
        if not disk.flock(file) or not disk.status_of(file).st_nlink:
            disk.close(file)
            return None
        other = _open_direct(disk, segment.path) if direct else None
    except BaseException:
        disk.close(file)
        raise
    return Writer(disk, segment, file, other, segment.head.places)


@contextmanager
def claimed(disk: Disk, named: Named) -> Iterator[bool]:
    """Whether a file may be removed, and that nobody begins to write it meanwhile; raises `OSError` if it is gone."""
    file = disk.open(named.path, os.O_RDWR)
    try:
        regular = stat.S_ISREG(disk.status_of(file).st_mode)
        yield regular and (bool(disk.flock(file)) or _is_sealed(disk, named, file))
    finally:
        disk.unlock(file)
        disk.close(file)


def _is_sealed(disk: Disk, named: Named, file: int) -> bool:
    """Of a file that cannot be locked here: nobody writes it any more, or it is none of ours."""
    return not isinstance(read_head(disk, named, file), str) and read_state(disk, file).sealed


def read_state(disk: Disk, file: int) -> State:
    """What a segment's writer says it has done."""
    raw = bytearray(STATE_BYTES)
    disk.read(file, [memoryview(raw)], STATE)
    return State.decoded(raw)


def read_table(disk: Disk, file: int, first: int, count: int) -> bytearray:
    """Entries as they are; free ones where the file has ended."""
    table = bytearray(count * ENTRY)
    disk.read(file, [memoryview(table)], PAGE + first * ENTRY)
    return table


def bury(disk: Disk, path: Path, places: Sequence[int], *, sync: bool) -> None:
    """Mark entries dead. Whoever may write a segment may do it: it is the only change that an entry ever sees."""
    _mark_dead(disk, path, places, sync=sync)
    tell_removed(disk, path)


def _mark_dead(disk: Disk, path: Path, places: Sequence[int], *, sync: bool) -> None:
    file = disk.open(path, os.O_RDWR)
    try:
        for place in places:
            disk.write(file, [TOMBSTONE], PAGE + place * ENTRY)
        if sync:
            disk.fdatasync(file)
    finally:
        disk.close(file)


def _open_direct(disk: Disk, path: Path) -> int | None:
    try:
        return disk.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None  # this file system has no such thing
