"""Memory of `tensorway.memory.shared` that a peer has registered, mapped here, so that a copy needs no kernel.

Room `transport`; may import the ground and its own room. A `Board` is the peer's side: it says which files its shared
regions lie in, and holds a word for each that is zero once that is deregistered. `Mapped` is the reader's side: the
same files, found by their numbers in the peer's process, and mapped. What the peer says is believed of nothing that
could hurt: a file is touched only if it is one that `shared` makes, and mapped only as far as it reaches and can never
be made shorter, since touching what is gone would end this process.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import stat
import weakref
from bisect import bisect_right
from collections.abc import Iterable
from operator import eq
from typing import Annotated, Final

import attrs
import msgspec

from tensorway._logging import logger
from tensorway.errors import MemoryInvalid
from tensorway.memory import PAGE, Region, SharedFile, libc, map_file, shared
from tensorway.transport.blocks import BlockTable
from tensorway.transport.description import MAX_REGIONS
from tensorway.transport.sockets import unforked

_log = logger("transport")
#: Files of one peer that are mapped; regions in others are copied by the kernel.
MAX_FILES: Final = 1024
_WORD: Final = 8
#: How the kernel calls a file of `shared`, which no file that has a path is called.
_CALLED: Final = "/memfd:tensorway (deleted)"

_Whole = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class File(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A part of a shared file: its descriptor in the peer, which file it is, where the part is in memory and in it."""

    number: _Whole
    inode: _Whole
    address: _Whole
    offset: _Whole
    nbytes: _Whole


class Share(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A registered region that lies in a shared file, and the word that the board holds as long as it is registered."""

    address: _Whole
    nbytes: _Whole
    slot: _Whole
    word: _Whole


class Shared(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a description says about shared memory."""

    board: File
    files: Annotated[list[File], msgspec.Meta(max_length=MAX_FILES)]
    shares: Annotated[list[Share], msgspec.Meta(max_length=MAX_REGIONS)]


@attrs.frozen(eq=False)
class _Row:
    """A region on the board."""

    region: Region
    file: SharedFile
    #: So that the memory stays, however it was registered: peers that have it mapped cannot see that it was freed.
    keep: object
    word: int


class Board:
    """The shared regions that an endpoint has registered. Whoever calls holds a lock."""

    def __init__(self) -> None:
        self._memory: memoryview | None = None
        self._rows: dict[int, _Row] = {}
        self._free: list[int] = []
        self._last = 0

    def add(self, region: Region) -> int | None:
        """The slot of a region from now on; None if it is no shared memory, and only the kernel can copy it."""
        found = SharedFile.of(region)
        if found is None or not (self._free or len(self._rows) < MAX_REGIONS):
            return None
        try:
            words = self._words()
        except MemoryInvalid:  # no file is left, or no memory
            return None
        slot = self._free.pop() if self._free else len(self._rows)
        self._last += 1  # a word means one registration for ever: another in the same slot has another
        self._rows[slot] = _Row(region, *found, self._last)
        words[slot] = self._last
        return slot

    def remove(self, slot: int) -> None:
        """It is not registered any more; peers see that before they believe what they copied."""
        self._words()[slot] = 0
        del self._rows[slot]
        self._free.append(slot)

    def describe(self) -> Shared | None:
        """What peers need to map what is registered now; None if that is nothing."""
        parts: dict[int, tuple[SharedFile, int, int]] = {}
        shares = []
        for slot, row in self._rows.items():
            low, high = row.region.address // PAGE * PAGE, -(-row.region.end // PAGE) * PAGE
            _, *known = parts.get(row.file.address, (None, low, high))
            if row.file.address in parts or len(parts) < MAX_FILES:
                parts[row.file.address] = row.file, min(low, known[0]), max(high, known[1])
                shares.append(Share(row.region.address, row.region.nbytes, slot, row.word))
        if not shares or (found := SharedFile.of(Region.of(self._memory))) is None:
            return None
        board = found[0]
        end = board.address + board.nbytes
        return Shared(_part(board, board.address, end), [_part(*row) for row in parts.values()], shares)

    def _words(self) -> memoryview:
        if self._memory is None:
            self._memory = shared(MAX_REGIONS * _WORD)
        return self._memory.cast("Q")


def _part(file: SharedFile, low: int, high: int) -> File:
    return File(file.number, file.inode, low, low - file.address, high - low)


@attrs.frozen
class _Window:
    """A region of the peer, and how far from there it lies here."""

    start: int
    end: int
    shift: int
    slot: int
    word: int


@attrs.frozen(eq=False)
class View:
    """A block table of the peer at its addresses here, and what the board must hold for it."""

    table: BlockTable
    slots: tuple[int, ...]
    words: tuple[int, ...]


class Mapped:
    """Shared memory of one peer, mapped here; unmapped when nobody refers to it. Raises `OSError` if there is none."""

    def __init__(self, pid: int, said: Shared) -> None:
        self._board = _Mapping(pid, said.board)
        self._words = (ctypes.c_uint64 * (said.board.nbytes // _WORD)).from_address(self._board.here)
        self._mappings: dict[int, _Mapping] = {}
        for file in {file.address: file for file in said.files}.values():
            try:
                self._mappings[file.address] = _Mapping(pid, file)
            except OSError as error:  # gone, or none that may be mapped: the kernel copies what lies there
                # As text: who keeps the error keeps this frame, and what is mapped.
                _log.debug("Shared memory of process %d is not mapped: %s", pid, str(error))
        starts = sorted(self._mappings)
        self._windows = []
        for share in said.shares:
            before, end = bisect_right(starts, share.address), share.address + share.nbytes
            mapping = self._mappings[starts[before - 1]] if before else None
            if mapping is not None and end <= mapping.end and share.slot < len(self._words):
                self._windows.append(_Window(share.address, end, mapping.shift, share.slot, share.word))

    def whole(self, regions: Iterable[Region]) -> bool:
        """Whether each of these regions is mapped."""
        known = {(window.start, window.end) for window in self._windows}
        needed = {(region.address, region.end) for region in regions}
        return bool(needed) and needed <= known

    def view(self, table: BlockTable) -> View | None:
        """The table as it lies here; None if not all of it does."""
        bases: list[int] = []
        needed: dict[tuple[int, int], None] = {}
        for start, length in table.extents():
            window = next((row for row in self._windows if row.start <= start and start + length <= row.end), None)
            if window is None:
                return None
            bases.append(start + window.shift)
            needed[window.slot, window.word] = None
        slots, words = zip(*needed, strict=True)
        return View(attrs.evolve(table, bases=tuple(bases)), slots, words)

    def registered(self, view: View) -> bool:
        """Whether all that the view shows is still what the peer registered."""
        return all(map(eq, map(self._words.__getitem__, view.slots), view.words))


class _Mapping:
    """A part of a peer's file, mapped here."""

    def __init__(self, pid: int, said: File) -> None:
        with unforked:
            file = _opened(pid, said)
            try:
                self.here = _mapped(file, said)
            finally:
                os.close(file)
            # A forked child has no use for it, and would hold the peer's memory; nor has a core file.
            for advice in (mmap.MADV_DONTFORK, mmap.MADV_DONTDUMP):
                libc().madvise(self.here, said.nbytes, advice)
        weakref.finalize(self, _unmap, os.getpid(), self.here, said.nbytes).atexit = False
        self.shift, self.end = self.here - said.address, said.address + said.nbytes


def _mapped(file: int, said: File) -> int:
    if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise OSError("It could be made shorter while it is read.")
    if said.offset + said.nbytes > os.fstat(file).st_size:
        raise OSError("It does not reach as far.")
    return map_file(said.nbytes, file, said.offset)


def _unmap(pid: int, address: int, nbytes: int) -> None:
    if os.getpid() == pid:  # in a forked child something else may lie there
        libc().munmap(address, nbytes)


def _opened(pid: int, said: File) -> int:
    """The peer's file, to be read and written.

    Opening some files blocks, or does something. So nothing is opened but what is known to be a file of `shared`:
    by what the kernel calls it, then by its device and inode, through a descriptor that can do nothing else.
    """
    place = f"/proc/{pid}/fd/{said.number}"
    if os.readlink(place) != _CALLED:  # noqa: PTH115
        raise OSError("It is no memory of shared.")
    looked_at = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(looked_at)
        if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) != (_device(), said.inode):
            raise OSError("Its number is another file's by now.")
        return os.open(f"/proc/self/fd/{looked_at}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(looked_at)


@functools.cache
def _device() -> int:
    """The device of memory files: the kernel has one for all."""
    file = os.memfd_create("tensorway", os.MFD_CLOEXEC)
    try:
        return os.fstat(file).st_dev
    finally:
        os.close(file)
