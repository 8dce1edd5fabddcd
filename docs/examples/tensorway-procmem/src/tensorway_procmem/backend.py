"""The fabric of transport `procmem`: the memory of a process of this machine is a file, `/proc/PID/mem`.

So a read is a `pread` and a write a `pwrite`, done by the process that asks; the peer need not run for it. A named pipe
carries notifications, and tells when the peer is gone: nobody reads from it any more then. Whoever may open the memory
of a process may do anything with it, so the kernel lets only the same user do so, and only where ptrace is allowed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
import stat
import struct
import tempfile
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import attrs
from tensorway.errors import AddressInvalid, DeadlineExceeded, DescriptionInvalid, PeerLost, TransferFailed
from tensorway.memory import Region
from tensorway.transport import BlockTable, Capabilities, Notification
from tensorway.transport.contract import Description, Operation

from tensorway_procmem.options import ProcmemTransportOptions

#: A process, and where the incarnation of its endpoint lies in its memory.
_BLOB = struct.Struct("<IQ")
#: Before each notification: bytes of the name, of the incarnation, of the payload.
_HEAD = struct.Struct("<HHH")
#: So many bytes go into a pipe as a whole, or not at all.
_WHOLE = select.PIPE_BUF
_ENDED = "its process closed the pipe or ended"


@attrs.define(eq=False)
class Link:
    """A peer: its memory, and the pipe to it."""

    name: str
    memory: int
    pipe: int
    lost: str = ""


class ProcmemFabric:
    """Moves memory of processes of one machine and one user."""

    name = "procmem"
    #: A notification goes into the pipe as a whole, with who sends it.
    capabilities = Capabilities(
        media=frozenset({"cpu"}), max_notification=_WHOLE // 2, max_in_flight=1, synchronous=True
    )

    def __init__(self, options: ProcmemTransportOptions) -> None:
        self.options = options

    def open(self, name: str, incarnation: str) -> None:
        """Make the pipe, and put into memory what proves to a reader that he reads the right process."""
        self._identity = name.encode(), incarnation.encode()
        self._canary = ctypes.create_string_buffer(incarnation.encode())
        self._path = _pipe_of(incarnation, f"Endpoint {name} was opened.")
        os.mkfifo(self._path, 0o600)
        # For writing, too: so it is never at its end, whoever comes and goes.
        self._pipe = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._heard = b""

    def attach(self, region: Region) -> None:
        """The kernel needs no registration, and `Endpoint` lets nobody ask for what is not registered."""

    def detach(self, handle: None) -> None:
        """See `attach`."""

    def describe(self) -> bytes:
        """What a peer needs to find this process, beside name and incarnation."""
        return _BLOB.pack(os.getpid(), ctypes.addressof(self._canary))

    def connect(self, description: Description, seconds: float) -> Link:
        """Open the peer's pipe and memory, and read its incarnation there."""
        asked = f"Peer {description.name} was to be reached over procmem."
        if len(description.blob) != _BLOB.size:
            raise DescriptionInvalid(asked, "Its description names no process.", "Give it unchanged.")
        pid, canary = _BLOB.unpack(description.blob)
        link = Link(description.name, -1, -1)
        try:
            # Where the pipe is comes from the incarnation, never from the peer's words: those might name any file.
            link.pipe = os.open(_pipe_of(description.incarnation, asked), os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            found = os.fstat(link.pipe)
            if not stat.S_ISFIFO(found.st_mode) or found.st_uid != os.getuid():
                raise DescriptionInvalid(asked, "Its pipe is no pipe of this user.", "Connect to no stranger.")
            link.memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            incarnation = description.incarnation.encode()
            if os.pread(link.memory, len(incarnation) + 1, canary) != incarnation + b"\0":
                raise DescriptionInvalid(asked, f"Process {pid} is not that peer.", "Connect to what is running now.")
        except OSError as error:
            self.disconnect(link)
            if error.errno in (errno.EACCES, errno.EPERM):
                to_do = "Run both as one user, with kernel.yama.ptrace_scope=0 or CAP_SYS_PTRACE."
                raise TransferFailed(asked, f"Its memory cannot be opened: {error.strerror}.", to_do) from error
            raise PeerLost(asked, f"It is not there: {error.strerror}.", "Connect to what is running now.") from error
        except BaseException:
            self.disconnect(link)
            raise
        return link

    def lane(self, link: Link) -> str:
        """The path that bytes really take."""
        return "procfs"

    def disconnect(self, link: Link) -> None:
        """Let go of the peer."""
        link.lost = link.lost or "it was disconnected here"
        for descriptor in (link.memory, link.pipe):
            if descriptor >= 0:
                os.close(descriptor)
        link.memory = link.pipe = -1

    def lost(self, link: Link) -> str:
        """Whether nobody reads from the peer's pipe any more; the kernel sees to that, however a process ends."""
        if not link.lost:
            poller = select.poll()
            poller.register(link.pipe, 0)
            link.lost = _ENDED if poller.poll(0) else ""
        return link.lost

    def prepare(self, link: Link, local: BlockTable, remote: BlockTable) -> tuple[Link, BlockTable, BlockTable]:
        """There is nothing to prepare for files."""
        return link, local, remote

    def post(
        self,
        operation: Operation,
        prepared: tuple[Link, BlockTable, BlockTable],
        local_ids: array[int],
        remote_ids: array[int],
        seconds: float,
    ) -> None:
        """Copy, now."""
        link, local, remote = prepared
        asked, why = f"A {operation} with peer {link.name} was asked for.", ""
        move = os.preadv if operation == "read" else os.pwritev
        try:
            for here, there, size in _pieces(local.vector(local_ids), remote.vector(remote_ids)):
                view = memoryview((ctypes.c_char * size).from_address(here)).cast("B")
                while view and not why:
                    moved = move(link.memory, [view], there)
                    why, view, there = "" if moved else "its memory ends there", view[moved:], there + moved
        except OSError as error:
            why = str(error.strerror)
        # Asked afterwards: the process may have ended while it was copied from, and what came is then nobody's data.
        if self.lost(link):
            raise PeerLost.because(asked, link.lost)
        if why:
            raise TransferFailed(asked, f"Not all of the peer's memory is there: {why}.", "Connect to it anew.")

    def done(self, job: None) -> bool:
        """Every post is done when it returns."""
        return True

    def settled(self, job: None) -> bool:
        """Every post has let go when it returns."""
        return True

    def send(self, link: Link, payload: bytes, seconds: float) -> None:
        """Put one notification into the peer's pipe; waits while that is full."""
        asked, until = f"Peer {link.name} was to be notified over procmem.", time.monotonic() + seconds
        sizes = _HEAD.pack(*map(len, (*self._identity, payload)))
        note = b"".join((sizes, *self._identity, payload))
        while not self.lost(link):
            try:
                os.write(link.pipe, note)
                return
            except BlockingIOError:
                left = until - time.monotonic()
                if left <= 0:
                    true, to_do = (
                        f"Its pipe stayed full for {seconds:g} s.",
                        "See whether it fetches its notifications.",
                    )
                    raise DeadlineExceeded(asked, true, to_do) from None
                time.sleep(min(left, 1e-3))
            except OSError as error:
                link.lost = f"its pipe broke: {error.strerror}"
        raise PeerLost.because(asked, link.lost)

    def receive(self) -> list[Notification]:
        """What has arrived."""
        notes = []
        try:
            while data := os.read(self._pipe, 65_536):
                self._heard += data
        except BlockingIOError:
            pass  # nothing more is there
        while len(self._heard) >= _HEAD.size:
            name, incarnation, payload = _HEAD.unpack_from(self._heard)
            at = _HEAD.size + name + incarnation
            if len(self._heard) < at + payload:
                break
            middle, end = _HEAD.size + name, at + payload
            who = self._heard[_HEAD.size : middle].decode("utf-8", "replace")
            life = self._heard[middle:at].decode("ascii", "replace")
            notes.append(Notification(who, life, self._heard[at:end]))
            self._heard = self._heard[end:]
        return notes

    def close(self) -> None:
        """End; peers see that nobody reads from the pipe."""
        os.close(self._pipe)
        self._path.unlink(missing_ok=True)


def _pieces(mine: array[int], theirs: array[int]) -> Iterator[tuple[int, int, int]]:
    """Address here, address there, bytes; both sides have the same bytes, joined to pieces of their own."""
    ours, others = iter(zip(mine[0::2], mine[1::2], strict=True)), zip(theirs[0::2], theirs[1::2], strict=True)
    here = left = 0
    for there, size in others:
        while size:
            if not left:
                here, left = next(ours)
            step = min(size, left)
            yield here, there, step
            here, there, size, left = here + step, there + step, size - step, left - step


def _pipe_of(incarnation: str, asked: str) -> Path:
    """Where the pipe of an endpoint is: in a folder that is this user's alone."""
    folder = Path(tempfile.gettempdir(), f"tensorway-procmem-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise AddressInvalid(asked, f"{folder} is somebody else's, or others may write to it.", "Remove it.")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", incarnation):
        raise DescriptionInvalid(asked, "Its incarnation is no name.", "Give the description unchanged.")
    return folder / f"{incarnation}.pipe"
