"""The fabric `local`: between endpoints of one process by memmove, between processes of one host by `process_vm_readv`.

Room `transport`; may import the ground and its own room. The embedded default: pure Python and ctypes, nothing to
install. The bytes are copied once, by the process that asks, in the thread that posts; the peer need not run for it.
What the peer has in memory of `tensorway.memory.shared` is mapped here (`shm`), and copied by memmove as well.
A Unix socket in the abstract namespace carries notifications, tells when the peer is gone, and proves by the kernel's
word whose it is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading
import time
import weakref
from array import array
from typing import Annotated, Final

import attrs
import msgspec

from tensorway._logging import logger
from tensorway.decoding import UNREADABLE
from tensorway.errors import (
    DeadlineExceeded,
    DescriptionInvalid,
    PeerLost,
    TensorwayError,
    TransferFailed,
    Unsupported,
)
from tensorway.memory import Region
from tensorway.platforms import boot_id
from tensorway.transport import sockets
from tensorway.transport.blocks import BlockTable, covered
from tensorway.transport.contract import DISCONNECTED, Capabilities, Description, Notification, Operation
from tensorway.transport.ears import FULL_PAUSE, MAX_NOTIFICATION, NOTE, Ears, Hello, knock, whose
from tensorway.transport.iovec import IOV_MAX, copied_by_kernel, move
from tensorway.transport.shm import Board, Mapped, Shared, View

_log = logger("transport")
#: So that the socket's address, of 108 bytes at most, can hold it.
_MAX_INCARNATION: Final = 64
_ENDED: Final = "its process closed the connection or ended"


class _Blob(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The local part of a description."""

    #: One kernel and one process namespace: numbers of processes mean the same here and there.
    boot: str
    namespace: str
    pid: int
    #: Where the endpoint's incarnation lies in the peer's memory, so that reading it proves that reading works.
    canary: Annotated[int, msgspec.Meta(gt=0)]
    #: What of its memory can be mapped.
    shared: Shared | None = None


_DECODE_BLOB: Final = msgspec.msgpack.Decoder(_Blob).decode


@attrs.define(eq=False)
class _Link:
    """A connection to one peer."""

    #: The peer's name, for what is said to people.
    name: str
    pid: int
    channel: socket.socket = attrs.field(repr=False)
    same_process: bool
    incarnation: str
    lane: str
    #: The peer's shared memory; None if there is none, and as soon as the peer is lost, whose memory it holds.
    mapped: Mapped | None = attrs.field(default=None, repr=False)
    lost: str = ""


@attrs.define(eq=False)
class _Prepared:
    """A route."""

    link: _Link
    local: BlockTable
    remote: BlockTable
    #: The remote table where it is mapped here.
    view: View | None = None
    #: Of memory within this process: the peer's epoch in which all of the remote table was registered.
    epoch: int = -1


#: What to do when the kernel refuses to copy between processes.
PERMISSION: Final = (
    "Run both as one user with kernel.yama.ptrace_scope=0, or give the reader CAP_SYS_PTRACE "
    "(in a container: --cap-add SYS_PTRACE)."
)
_DEREGISTERED: Final = "Not all of the peer's memory is registered there any more."
_FREED: Final = "Keep memory alive while it is registered; deregister before it is freed."


class LocalFabric:
    """Moves host memory within one machine; see `contract.Fabric`."""

    name = "local"
    capabilities = Capabilities(
        media=frozenset({"cpu"}),
        max_notification=MAX_NOTIFICATION,
        max_pieces=IOV_MAX,
        max_in_flight=1,
        synchronous=True,
    )

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        for call in ("process_vm_readv", "process_vm_writev"):
            getattr(self._libc, call).restype = ctypes.c_ssize_t
        self._canary = ctypes.create_string_buffer(1)
        #: Held while memory of ours is copied within this process, or is registered or deregistered.
        self._memory = threading.Lock()
        self._regions: list[Region] = []
        self._board = Board()
        self._epoch = 0

    def open(self, name: str, incarnation: str) -> None:
        """Listen under the incarnation, and start the thread that hears what peers send."""
        self._hello = msgspec.msgpack.encode(Hello(name, incarnation))
        self._canary = ctypes.create_string_buffer(incarnation.encode())
        self._ears = Ears(incarnation, self._notice)
        _by_incarnation[incarnation] = self

    def attach(self, region: Region) -> tuple[Region, int | None]:
        """The kernel needs no registration; peers that touch memory themselves do, before they touch it."""
        with self._memory:
            self._regions.append(region)
            return region, self._board.add(region)

    def detach(self, handle: tuple[Region, int | None]) -> None:
        """From now on the memory may be freed: no peer of this process is copying it, and none will."""
        region, slot = handle
        with self._memory:
            self._regions.remove(region)
            self._epoch += 1
            if slot is not None:
                self._board.remove(slot)

    def describe(self) -> bytes:
        """Who this is on this machine, and what of its memory can be mapped."""
        with self._memory:
            shared = self._board.describe()
        return msgspec.msgpack.encode(_Blob(*_machine(), os.getpid(), ctypes.addressof(self._canary), shared))

    def connect(self, description: Description, seconds: float) -> _Link:
        """Connect to the peer's socket, check by the kernel whose it is, and read its incarnation from its memory."""
        asked = f"Peer {description.name} was to be reached over transport local."
        blob = _decode(description, asked)
        (channel,) = sockets.kept(sockets.unix_socket)
        channel.settimeout(seconds)
        try:
            knock(channel, description.incarnation, time.monotonic() + seconds)
            pid, ours = whose(channel)
            if pid != blob.pid or not ours:
                user = "" if ours else " of another user"
                true = f"Its socket belongs to process {pid}{user}, not to {blob.pid}."
                raise DescriptionInvalid(asked, true, "Connect to no stranger.")
            channel.sendall(self._hello)
            channel.setblocking(False)
            within = pid == os.getpid()
            link = _Link(
                description.name, pid, channel, within, description.incarnation, "memmove" if within else "cma"
            )
            self._prove(link, blob.canary, description.incarnation.encode(), asked)
            if blob.shared is not None and not within:
                self._map(link, blob.shared, description)
        except TensorwayError:
            sockets.close(channel)
            raise
        except (ConnectionError, FileNotFoundError) as error:
            sockets.close(channel)
            raise PeerLost(asked, f"Nobody listens for it: {error}.", "Connect to what is running now.") from error
        except TimeoutError as error:
            sockets.close(channel)
            true = f"It did not answer within {seconds:g} s."
            raise DeadlineExceeded(asked, true, "See whether it is stopped, or give a longer deadline.") from error
        except BaseException:
            sockets.close(channel)
            raise
        return link

    def lane(self, link: _Link) -> str:
        """`memmove` within a process; between two `shm` if all that the peer has registered is mapped here, else `cma`.

        That is cross-memory attach, by the kernel. What is mapped is copied by memmove whatever the lane is called.
        """
        return link.lane

    def disconnect(self, link: _Link) -> None:
        """Close the connection."""
        link.lost = link.lost or DISCONNECTED
        link.mapped = None
        self._ears.unwatch(link.channel)
        sockets.close(link.channel)

    def lost(self, link: _Link) -> str:
        """Whether the peer's end of the connection is closed.

        The kernel does that for a process that ends, however it ends.
        """
        if not link.lost:
            try:
                if link.channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
                    link.lost = _ENDED
            except (BlockingIOError, InterruptedError):
                pass  # nothing to read on an open connection: it is there
            except ConnectionResetError:  # it ended with something of ours unread
                link.lost = _ENDED
            except OSError as error:
                link.lost = link.lost or f"its connection broke: {error.strerror}"
        if link.lost:
            link.mapped = None
        return link.lost

    def prepare(self, link: _Link, local: BlockTable, remote: BlockTable) -> _Prepared:
        """Where the peer's blocks lie here, if they do; else a piece costs less than looking one up."""
        mapped = link.mapped
        return _Prepared(link, local, remote, None if mapped is None else mapped.view(remote))

    def post(
        self, operation: Operation, prepared: _Prepared, local_ids: array[int], remote_ids: array[int], seconds: float
    ) -> None:
        """Copy, now."""
        link, local, remote = prepared.link, prepared.local, prepared.remote
        there = True
        if link.same_process:
            self._move_within(operation, prepared, local_ids, remote_ids)
        elif prepared.view is not None:
            there = self._move_mapped(operation, prepared, prepared.view, local_ids, remote_ids)
        else:
            self._copy(operation, link, local.vector(local_ids), remote.vector(remote_ids))
        asked = f"A {operation} with peer {link.name} was asked for."
        if self.lost(link):
            # Its number may have become another process's while we copied: what we have is then nobody's data.
            raise PeerLost.because(asked, link.lost)
        if not there:
            raise TransferFailed(asked, _DEREGISTERED, _FREED)

    def done(self, job: object) -> bool:
        """Every post is done when it returns."""
        return True

    def settled(self, job: object) -> bool:
        """Every post has let go when it returns."""
        return True

    def send(self, link: _Link, payload: bytes, seconds: float) -> None:
        """Send one message; waits while the peer's queue is full."""
        asked, deadline = f"Peer {link.name} was to be notified over local.", time.monotonic() + seconds
        while True:
            try:
                link.channel.send(NOTE + payload)
                return
            except (BlockingIOError, InterruptedError):
                if time.monotonic() >= deadline:
                    true = f"The peer's queue stayed full for {seconds:g} s."
                    raise DeadlineExceeded(asked, true, "See whether it runs and fetches its notifications.") from None
                time.sleep(FULL_PAUSE)
            except OSError as error:
                link.lost = link.lost or f"its connection broke: {error.strerror}"
                raise PeerLost.because(asked, link.lost) from error

    def receive(self) -> list[Notification]:
        """What has arrived."""
        return self._ears.receive()

    def close(self) -> None:
        """Stop listening; peers see their connections close."""
        self._ears.close()

    # -- moving bytes

    def _move_within(
        self, operation: Operation, prepared: _Prepared, local_ids: array[int], remote_ids: array[int]
    ) -> None:
        """Where the kernel would refuse memory that is gone, this process would end: so look before."""
        asked = f"A {operation} with peer {prepared.link.name} was asked for."
        there = _by_incarnation.get(prepared.link.incarnation)
        if there is None:
            raise PeerLost.because(asked, prepared.link.lost or _ENDED)
        with there._memory:
            if prepared.epoch != there._epoch:
                if not covered(prepared.remote, there._regions):
                    raise TransferFailed(asked, _DEREGISTERED, _FREED)
                prepared.epoch = there._epoch
            move(operation, prepared.local, prepared.remote, local_ids, remote_ids)

    def _move_mapped(
        self, operation: Operation, prepared: _Prepared, view: View, local_ids: array[int], remote_ids: array[int]
    ) -> bool:
        """Whether the memory was there all the time.

        Nothing is raised here: an error would keep this frame, and by it the mapping, as long as somebody has it.
        """
        mapped = prepared.link.mapped
        if mapped is None or not mapped.registered(view):
            return False
        move(operation, prepared.local, view.table, local_ids, remote_ids)
        return mapped.registered(view)

    def _copy(self, operation: Operation, link: _Link, mine: array[int], theirs: array[int]) -> None:
        call = self._libc.process_vm_readv if operation == "read" else self._libc.process_vm_writev
        if not copied_by_kernel(call, link.pid, mine, theirs):
            raise self._failed(operation, link, ctypes.get_errno())

    def _map(self, link: _Link, shared: Shared, description: Description) -> None:
        """Take the fast lane as far as it goes; from now on the peer's end is watched, so that its memory is let go."""
        try:
            link.mapped = Mapped(link.pid, shared)
        except OSError as error:  # not this kernel, not this user, or not that file
            _log.debug(
                "The shared memory of peer %s is not mapped: %s", link.name, str(error), extra={"peer": link.name}
            )
            return
        if link.mapped.whole(description.regions):
            link.lane = "shm"
        self._ears.watch(link.channel, link)

    def _notice(self, link: _Link) -> None:
        """A peer whose memory is mapped has ended, or sends although nobody asked."""
        if not self.lost(link):
            link.lost, link.mapped = "it sent what is no message", None
        self._ears.unwatch(link.channel)

    def _prove(self, link: _Link, canary: int, incarnation: bytes, asked: str) -> None:
        """Read the incarnation out of the peer's memory: the capability is proven, and so is that it is this peer."""
        seen = ctypes.create_string_buffer(len(incarnation))
        if link.same_process:
            own = _by_incarnation.get(incarnation.decode())
            if own is None or ctypes.addressof(own._canary) != canary:
                raise DescriptionInvalid(
                    asked, "No endpoint of this process has its address.", "Connect to what runs now."
                )
            return
        size = len(incarnation)
        self._copy("read", link, array("Q", [ctypes.addressof(seen), size]), array("Q", [canary, size]))
        if seen.raw != incarnation:
            raise DescriptionInvalid(asked, "Its memory does not hold its incarnation.", "Connect to what runs now.")

    def _failed(self, operation: Operation, link: _Link, code: int) -> PeerLost | TransferFailed:
        asked, name = f"A {operation} with peer {link.name}, process {link.pid}, was asked for.", os.strerror(code)
        if code == errno.ESRCH:
            link.lost = link.lost or "its process ended"
            return PeerLost.because(asked, link.lost)
        if code == errno.EPERM:
            return TransferFailed(asked, f"The kernel refused it: {name}.", PERMISSION)
        if code == errno.EFAULT:
            return TransferFailed(
                asked, f"{name}: memory that was registered is not there, here or at the peer.", _FREED
            )
        return TransferFailed(asked, f"{name} (errno {code}).", "Look this up in the kernel's process_vm_readv(2).")


def _machine() -> tuple[str, str]:
    """The running kernel, and the namespaces in which process numbers and abstract sockets mean something."""
    return boot_id(), " ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net"))  # noqa: PTH115


def _decode(description: Description, asked: str) -> _Blob:
    try:
        blob = _DECODE_BLOB(description.blob)
    except UNREADABLE as error:
        raise DescriptionInvalid(asked, f"Its local part cannot be read: {error}.", "Give it unchanged.") from None
    if len(description.incarnation) > _MAX_INCARNATION:
        raise DescriptionInvalid(asked, "Its incarnation is longer than one of local's.", "Give it unchanged.")
    if (blob.boot, blob.namespace) != _machine():
        true = "It is on another machine, or in a container with processes of its own."
        raise Unsupported(asked, true, "Choose a transport that crosses machines: tensorway why transport auto.")
    return blob


#: The endpoints of this process, so that a description of one can be told from one that only says so.
_by_incarnation: weakref.WeakValueDictionary[str, LocalFabric] = weakref.WeakValueDictionary()


def _close_inherited() -> None:
    """In a forked child, behind what `sockets` does there: the fabrics are the parent's."""
    for fabric in list(_by_incarnation.values()):
        fabric._ears.close_files()
    _by_incarnation.clear()


os.register_at_fork(after_in_child=_close_inherited)
