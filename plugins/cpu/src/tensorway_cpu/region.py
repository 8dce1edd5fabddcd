"""Host memory for rows, which the manager and the workers of one engine have in common on one host.

May import the core. Whoever comes first makes a memory file, which the kernel frees with its last process, whatever
they die of; a small file in shared memory says where it is, under a name that is the engine's life, until all have
found it. Names that nobody holds any more are swept by who comes next.
"""

from __future__ import annotations

import os
import stat
import struct
import time
import uuid
from pathlib import Path
from typing import Final

import attrs

from tensorway import memory
from tensorway._logging import logger
from tensorway.errors import DeadlineExceeded, Incompatible, MemoryInvalid, PeerLost
from tensorway.memory import Region, SharedFile
from tensorway.offload import OffloadContext
from tensorway_cpu.canonical import Canon
from tensorway_cpu.names import folder_of_names, hold, is_at, is_stale, name_of, remove, sweep
from tensorway_cpu.options import CPUOptions
from tensorway_cpu.pinning import Pinned, pin, settle
from tensorway_cpu.probe import available_bytes

_log = logger("offload")
_MAGIC: Final = b"TWROWS\x00\x01"
#: Magic; process and start time of who made it; number, device and inode of its memory file; bytes; bytes of a row;
#: rows; what a row is; how many there will be.
_HEADER: Final = struct.Struct("<8sIQIQQQQQ16sI")
#: Where each of these writes its process, when it has found the memory.
_SLOTS: Final = 128
_SLOT: Final = struct.Struct("<I")
_TURN: Final = 0.01
#: Memory that somebody may still write to, and that stays for as long as the process does.
_kept: Final[list[memoryview]] = []


@attrs.frozen
class _Said:
    """The header."""

    pid: int
    started: int
    number: int
    device: int
    inode: int
    nbytes: int
    row_bytes: int
    rows: int
    mark: bytes
    members: int


class Rows:
    """Rows in memory."""

    def __init__(
        self, buffer: memoryview, row_bytes: int, blocks: int, path: Path, name: int, pinned: Pinned | None
    ) -> None:
        """`path` and `name`: of the file that says where they are, which is open."""
        self.row_bytes, self.blocks, self._path = row_bytes, blocks, path
        self._buffer: memoryview | None = buffer
        self._region, self._name, self._pinned = Region.of(buffer), name, pinned

    @property
    def memory(self) -> Region:
        """All of them."""
        return self._region

    def row(self, number: int, nbytes: int) -> memoryview:
        """The first bytes of a row."""
        assert self._buffer is not None and 0 <= number < self.blocks and nbytes <= self.row_bytes
        begin = number * self.row_bytes
        return self._buffer[begin : begin + nbytes]

    def close(self, still_used: bool = False) -> None:
        """Let go of them; `still_used`: somebody may still write there, so they stay mapped. Again changes nothing."""
        if self._buffer is None:
            return
        if still_used:
            _log.warning("Rows in host memory are closed while they may still be written to; they stay mapped.")
            _kept.append(self._buffer)
        elif self._pinned is not None:
            self._pinned.undo()
        self._buffer, self._pinned = None, None
        self._region = Region(self._region.address, self._region.nbytes)
        if is_stale(self._name):  # nobody else has come, or all have gone
            remove(self._path, self._name)
        os.close(self._name)


def open_rows(options: CPUOptions, context: OffloadContext, canon: Canon) -> Rows:
    """The rows of this engine's life: found, or made. Raises within the context's deadline."""
    until = time.monotonic() + context.deadline
    folder, member = folder_of_names(), 0 if context.role == "manager" else 1 + context.rank
    sweep(folder)
    path = folder / name_of(context.engine)
    wanted = _Wanted(canon, options, canon.fingerprint(context.facts), 1 + len(context.ranks), member)
    while True:
        found = _join(path, wanted) or _make(path, wanted)
        if found is not None:
            buffer, said, name = found
            try:
                settle(buffer, huge_pages=options.huge_pages, populate=options.populate, until=until)
                pinned = pin(buffer, said.row_bytes, options.pin)
            except BaseException:
                remove(path, name)
                os.close(name)
                raise
            return Rows(buffer, said.row_bytes, said.rows, path, name, pinned)
        if time.monotonic() >= until:
            raise DeadlineExceeded(
                f"Rows of engine {context.engine} were to be found or made.",
                f"{path} is neither there nor can it be made, after {context.deadline:g} s.",
                "See who else changes that folder.",
            )
        time.sleep(_TURN)


@attrs.frozen
class _Wanted:
    """What a process expects of rows, or makes them by."""

    canon: Canon
    options: CPUOptions
    mark: bytes
    members: int
    member: int

    def rows(self) -> int | None:
        """How many, if the options say it."""
        if self.options.capacity_blocks is not None:
            return self.options.capacity_blocks
        given = self.options.capacity_bytes
        return None if given is None else given // self.canon.row_bytes


def _join(path: Path, wanted: _Wanted) -> tuple[memoryview, _Said, int] | None:
    """What somebody else has made; None if nobody has, or it went while it was looked at."""
    asked = f"Rows were to be shared by way of {path}."
    try:
        number = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        to_do = "Remove it if nobody needs it, or let it be this user's own."
        raise MemoryInvalid(asked, f"It cannot be opened: {error.strerror}.", to_do) from error
    try:
        if not hold(number) or not is_at(path, number):
            os.close(number)
            return None
        said = _read(number, asked)
        _compare(said, wanted, asked)
        buffer = memory.shared_by(_memory_of(said, asked), said.nbytes)
        _arrive(path, number, wanted, asked)
    except BaseException:
        os.close(number)
        raise
    return buffer, said, number


def _make(path: Path, wanted: _Wanted) -> tuple[memoryview, _Said, int] | None:
    """Rows of our own; None if somebody else was faster."""
    rows, row_bytes = _count(wanted), wanted.canon.row_bytes
    buffer = memory.shared(rows * row_bytes)
    found = SharedFile.of(Region.of(buffer))
    assert found is not None
    file, (pid, started) = found[0], (os.getpid(), _started(os.getpid()))
    assert started is not None
    said = _Said(
        pid, started, file.number, file.device, file.inode, len(buffer), row_bytes, rows, wanted.mark, wanted.members
    )
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        number = os.open(new, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise _no_name(path, error) from error
    try:
        # It gets its name when all of it is there and held: nobody sees half of it, and nobody sweeps it away.
        if hold(number):
            os.ftruncate(number, _SLOTS + wanted.members * _SLOT.size)
            os.pwrite(number, _HEADER.pack(_MAGIC, *attrs.astuple(said)), 0)
            os.link(new, path)
            _arrive(path, number, wanted, "")
            return buffer, said, number
    except (FileExistsError, FileNotFoundError):  # another was faster; or who sweeps took it for left behind
        pass
    except OSError as error:
        os.close(number)
        raise _no_name(path, error) from error
    except BaseException:
        os.close(number)
        raise
    finally:
        new.unlink(missing_ok=True)
    os.close(number)
    return None


def _no_name(path: Path, error: OSError) -> MemoryInvalid:
    return MemoryInvalid(
        f"Rows were to be shared by way of {path}.",
        f"It cannot be written: {error.strerror}.",
        "See whether that folder has room, and may be written to.",
    )


def _count(wanted: _Wanted) -> int:
    row_bytes, available = wanted.canon.row_bytes, available_bytes()
    rows = wanted.rows()
    if rows is None:
        rows = (available or 0) // 2 // row_bytes
    asked = f"Host memory for {rows} blocks of {row_bytes:,} bytes was to be made."
    if rows < 1:
        raise MemoryInvalid(asked, "That is room for none.", "Set `capacity_blocks` or `capacity_bytes`.")
    if available is not None and rows * row_bytes > available:
        true = f"That is {rows * row_bytes:,} bytes; this process may have {available:,} more."
        raise MemoryInvalid(asked, true, "Set a smaller capacity, or look at the memory limit.")
    return rows


def _read(number: int, asked: str) -> _Said:
    status = os.fstat(number)
    to_do = "Remove it if nobody needs it."
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise MemoryInvalid(asked, "It is not this user's own file, or others may write to it.", to_do)
    data = os.pread(number, _HEADER.size, 0)
    if len(data) != _HEADER.size or data[: len(_MAGIC)] != _MAGIC:
        raise MemoryInvalid(asked, "It is damaged, or of another version.", to_do)
    said = _Said(*_HEADER.unpack(data)[1:])
    if status.st_size != _SLOTS + said.members * _SLOT.size or said.nbytes != said.rows * said.row_bytes:
        raise MemoryInvalid(asked, "Its numbers contradict each other.", to_do)
    return said


def _compare(said: _Said, wanted: _Wanted, asked: str) -> None:
    rows = wanted.rows()
    for what, theirs, ours in (
        ("layout and facts", said.mark.hex(), wanted.mark.hex()),
        ("bytes of a row", said.row_bytes, wanted.canon.row_bytes),
        ("number of rows", said.rows, said.rows if rows is None else rows),
        ("number of processes", said.members, wanted.members),
    ):
        if theirs != ours:
            true = f"The {what} of who made them is {theirs}, ours {ours}."
            raise Incompatible(asked, true, "Make manager and workers with the same options, ranks and facts.")


def _memory_of(said: _Said, asked: str) -> int:
    """The memory file, open here."""
    place = f"/proc/{said.pid}/fd/{said.number}"
    try:
        if _started(said.pid) != said.started:
            raise FileNotFoundError
        number = os.open(place, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        why = f"process {said.pid}, which made them, is gone, or not in this process' namespace"
        raise PeerLost(asked, f"{why[0].upper()}{why[1:]}.", "Start all processes of the engine anew.") from error
    status = os.fstat(number)
    if (status.st_dev, status.st_ino) != (said.device, said.inode):
        os.close(number)
        raise PeerLost(asked, f"Process {said.pid} has closed them.", "Start all processes of the engine anew.")
    return number


def _arrive(path: Path, number: int, wanted: _Wanted, asked: str) -> None:
    """Say that we are here; who is the last removes the name, which nobody needs any more."""
    at = _SLOTS + wanted.member * _SLOT.size
    (there,) = _SLOT.unpack(os.pread(number, _SLOT.size, at))
    if there:
        who = f"rank {wanted.member - 1}" if wanted.member else "the manager"
        to_do = "Give each life of an engine a name of its own, in `OffloadContext.engine`."
        raise MemoryInvalid(asked, f"Process {there} has been there as {who}.", to_do)
    os.pwrite(number, _SLOT.pack(os.getpid()), at)
    slots = os.pread(number, wanted.members * _SLOT.size, _SLOTS)
    if all(pid for (pid,) in _SLOT.iter_unpack(slots)):
        remove(path, number)


def _started(pid: int) -> int | None:
    """When a process began, in ticks of the kernel; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])
