"""The fabric `local`: between endpoints of one process by memmove, between processes of one host by `process_vm_readv`.

Room `transport`; may import the ground and its own room. The embedded default: pure Python and ctypes, nothing to
install. The bytes are copied once, by the process that asks, in the thread that posts; the peer need not run for it.
A Unix socket in the abstract namespace carries notifications, tells when the peer is gone, and proves by the kernel's
word whose it is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import selectors
import socket
import struct
import threading
import time
import weakref
from array import array
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import attrs
import msgspec

from tensorway.errors import (
    DeadlineExceeded,
    DescriptionInvalid,
    PeerLost,
    TensorwayError,
    TransferFailed,
    Unsupported,
)
from tensorway.memory import Region
from tensorway.transport.blocks import BlockTable, covered
from tensorway.transport.contract import Capabilities, Description, Notification, Operation
from tensorway.transport.description import identifier
from tensorway.transport.iovec import behind, iovec, move

#: What one call of the kernel takes.
_IOV_MAX: Final = 1024
_MAX_NOTIFICATION: Final = 65_536
#: Notifications that nobody has fetched; beyond that senders wait.
_MAX_QUEUED: Final = 65_536
#: Peers that may be connected to one endpoint.
_MAX_SENDERS: Final = 4096
#: So that the socket's address, of 108 bytes at most, can hold it.
_MAX_INCARNATION: Final = 64
_FULL_PAUSE: Final = 500e-6
_CREDENTIALS: Final = struct.Struct("3i")
_NOTE: Final = b"n"
_ENDED: Final = "its process closed the connection or ended"


class _Blob(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The local part of a description."""

    #: One kernel and one process namespace: numbers of processes mean the same here and there.
    boot: str
    namespace: str
    pid: int
    #: Where the endpoint's incarnation lies in the peer's memory, so that reading it proves that reading works.
    canary: Annotated[int, msgspec.Meta(gt=0)]


class _Hello(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The first message on a connection."""

    name: str
    incarnation: str


@attrs.define(eq=False)
class _Link:
    """A connection to one peer."""

    #: The peer's name, for what is said to people.
    name: str
    pid: int
    channel: socket.socket = attrs.field(repr=False)
    same_process: bool
    incarnation: str
    lost: str = ""


@attrs.define(eq=False)
class _Prepared:
    """A route."""

    link: _Link
    local: BlockTable
    remote: BlockTable
    #: Of memory within this process: the peer's epoch in which all of the remote table was registered.
    epoch: int = -1


#: What to do when the kernel refuses to copy between processes.
PERMISSION: Final = (
    "Run both as one user with kernel.yama.ptrace_scope=0, or give the reader CAP_SYS_PTRACE "
    "(in a container: --cap-add SYS_PTRACE)."
)
_FREED: Final = "Keep memory alive while it is registered; deregister before it is freed."


class LocalFabric:
    """Moves host memory within one machine; see `contract.Fabric`."""

    name = "local"
    capabilities = Capabilities(
        media=frozenset({"cpu"}),
        max_notification=_MAX_NOTIFICATION,
        max_pieces=_IOV_MAX,
        max_in_flight=1,
        synchronous=True,
    )

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        for call in ("process_vm_readv", "process_vm_writev"):
            getattr(self._libc, call).restype = ctypes.c_ssize_t
        self._canary = ctypes.create_string_buffer(1)
        self._links: weakref.WeakSet[_Link] = weakref.WeakSet()
        self._queue: deque[Notification] = deque()
        #: Held while memory of ours is copied within this process, or is registered or deregistered.
        self._memory = threading.Lock()
        self._regions: list[Region] = []
        self._epoch = 0
        self._senders: dict[socket.socket, _Hello | None] = {}
        self._closed = False

    def open(self, name: str, incarnation: str) -> None:
        """Listen under the incarnation, and start the thread that hears what peers send."""
        self._hello = msgspec.msgpack.encode(_Hello(name, incarnation))
        self._canary = ctypes.create_string_buffer(incarnation.encode())
        (self._listener,) = _kept(_unix_socket)
        self._listener.bind(_address(incarnation))
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake_in, self._wake_out = _kept(socket.socketpair)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._listen, name="tensorway-local-ears", daemon=True)
        self._thread.start()
        _by_incarnation[incarnation] = self

    def attach(self, region: Region) -> Region:
        """The kernel needs no registration; peers of this process do, before they touch memory themselves."""
        with self._memory:
            self._regions.append(region)
        return region

    def detach(self, handle: Region) -> None:
        """From now on the memory may be freed: no peer of this process is copying it, and none will."""
        with self._memory:
            self._regions.remove(handle)
            self._epoch += 1

    def describe(self) -> bytes:
        """Who this is on this machine."""
        return msgspec.msgpack.encode(_Blob(*_machine(), os.getpid(), ctypes.addressof(self._canary)))

    def connect(self, description: Description, seconds: float) -> _Link:
        """Connect to the peer's socket, check by the kernel whose it is, and read its incarnation from its memory."""
        asked = f"Peer {description.name} was to be reached over transport local."
        blob = _decode(description, asked)
        (channel,) = _kept(_unix_socket)
        channel.settimeout(seconds)
        try:
            _knock(channel, _address(description.incarnation), time.monotonic() + seconds)
            pid, uid, _ = _CREDENTIALS.unpack(
                channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            if pid != blob.pid or uid not in (os.getuid(), 0):
                raise DescriptionInvalid(
                    asked,
                    f"Its socket belongs to process {pid} of user {uid}, not to {blob.pid}.",
                    "Connect to no stranger.",
                )
            channel.sendall(self._hello)
            channel.setblocking(False)
            link = _Link(description.name, pid, channel, pid == os.getpid(), description.incarnation)
            self._prove(link, blob.canary, description.incarnation.encode(), asked)
        except TensorwayError:
            _close(channel)
            raise
        except (ConnectionError, FileNotFoundError) as error:
            _close(channel)
            raise PeerLost(asked, f"Nobody listens for it: {error}.", "Connect to what is running now.") from error
        except TimeoutError as error:
            _close(channel)
            true = f"It did not answer within {seconds:g} s."
            raise DeadlineExceeded(asked, true, "See whether it is stopped, or give a longer deadline.") from error
        except BaseException:
            _close(channel)
            raise
        self._links.add(link)
        return link

    def lane(self, link: _Link) -> str:
        """`memmove` within a process, `cma` (cross-memory attach) between two."""
        return "memmove" if link.same_process else "cma"

    def disconnect(self, link: _Link) -> None:
        """Close the connection."""
        link.lost = link.lost or "it was disconnected here"
        _close(link.channel)

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
                link.lost = f"its connection broke: {error.strerror}"
        return link.lost

    def prepare(self, link: _Link, local: BlockTable, remote: BlockTable) -> _Prepared:
        """Nothing is worth keeping: a piece costs less than looking one up."""
        return _Prepared(link, local, remote)

    def post(
        self, operation: Operation, prepared: _Prepared, local_ids: array[int], remote_ids: array[int], seconds: float
    ) -> None:
        """Copy, now."""
        link, local, remote = prepared.link, prepared.local, prepared.remote
        if link.same_process:
            self._move_within(operation, prepared, local_ids, remote_ids)
        else:
            self._copy(operation, link, local.vector(local_ids), remote.vector(remote_ids))
        if self.lost(link):
            # Its number may have become another process's while we copied: what we have is then nobody's data.
            asked = f"A {operation} with peer {link.name} was asked for."
            raise PeerLost.because(asked, link.lost)

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
                # One byte in front, because an empty message would look like the end of the connection.
                link.channel.send(_NOTE + payload)
                return
            except (BlockingIOError, InterruptedError):
                if time.monotonic() >= deadline:
                    true = f"The peer's queue stayed full for {seconds:g} s."
                    raise DeadlineExceeded(asked, true, "See whether it runs and fetches its notifications.") from None
                time.sleep(_FULL_PAUSE)
            except OSError as error:
                link.lost = link.lost or f"its connection broke: {error.strerror}"
                raise PeerLost.because(asked, link.lost) from error

    def receive(self) -> list[Notification]:
        """What has arrived."""
        arrived = []
        while self._queue:
            arrived.append(self._queue.popleft())
        return arrived

    def close(self) -> None:
        """Stop listening; peers see their connections close."""
        self._closed = True
        self._wake_out.send(b"x")
        self._thread.join(5)
        self._close_files()

    def _close_files(self) -> None:
        for channel in (self._listener, self._wake_in, self._wake_out, *self._senders):
            _close(channel)
        self._selector.close()

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
                    raise TransferFailed(asked, "Not all of the peer's memory is registered there any more.", _FREED)
                prepared.epoch = there._epoch
            move(operation, prepared.local, prepared.remote, local_ids, remote_ids)

    def _copy(self, operation: Operation, link: _Link, mine: array[int], theirs: array[int]) -> None:
        call = self._libc.process_vm_readv if operation == "read" else self._libc.process_vm_writev
        while mine:
            ours, others = mine[: 2 * _IOV_MAX], theirs[: 2 * _IOV_MAX]
            moved = call(link.pid, iovec(ours), len(ours) // 2, iovec(others), len(others) // 2, 0)
            if moved <= 0:
                raise self._failed(operation, link, ctypes.get_errno())
            # Fewer bytes than asked for: one side had more pieces, or the kernel's limit for one call was reached.
            mine, theirs = behind(mine, moved), behind(theirs, moved)

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

    # -- hearing

    def _listen(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is not self._wake_in:
                    self._hear(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        try:
            (channel,) = _kept(lambda: self._listener.accept()[:1])
        except OSError:  # who knocked went away; or this process has no file left, and they stay at the door
            time.sleep(_FULL_PAUSE)
            return
        credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(credentials)[1] not in (os.getuid(), 0) or len(self._senders) >= _MAX_SENDERS:
            _close(channel)
            return
        channel.setblocking(False)
        self._senders[channel] = None
        self._selector.register(channel, selectors.EVENT_READ)

    def _hear(self, channel: socket.socket) -> None:
        """One message; anything that is not one costs its sender the connection, and nobody else anything."""
        try:
            message = channel.recv(_MAX_NOTIFICATION + 2)  # longer ones are cut, not split
            if not 0 < len(message) <= _MAX_NOTIFICATION + 1:
                raise ConnectionResetError
            sender = self._senders[channel]
            if sender is None:
                self._senders[channel] = _greeting(message)
            elif message[:1] == _NOTE:
                self._enqueue(Notification(sender.name, sender.incarnation, message[1:]))
            else:
                raise ConnectionResetError
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            self._selector.unregister(channel)
            del self._senders[channel]
            _close(channel)

    def _enqueue(self, notification: Notification) -> None:
        # While nobody fetches, nobody is heard: the senders' queues fill, and their deadlines tell them.
        while len(self._queue) >= _MAX_QUEUED and not self._closed:
            time.sleep(_FULL_PAUSE)
        self._queue.append(notification)


def _greeting(message: bytes) -> _Hello:
    hello = msgspec.msgpack.decode(message, type=_Hello)
    if not (identifier(hello.name) and identifier(hello.incarnation)):
        raise ConnectionResetError
    return hello


def _knock(channel: socket.socket, address: bytes, deadline: float) -> None:
    while True:
        try:
            channel.connect(address)
            return
        except BlockingIOError:  # as many as may wait for it to accept them wait: it is stopped, or very busy
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            time.sleep(_FULL_PAUSE)


def _address(incarnation: str) -> bytes:
    return b"\0tensorway-local-" + incarnation.encode()


def _machine() -> tuple[str, str]:
    """The running kernel, and the namespaces in which process numbers and abstract sockets mean something."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return boot, " ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net"))  # noqa: PTH115


def _decode(description: Description, asked: str) -> _Blob:
    try:
        blob = msgspec.msgpack.decode(description.blob, type=_Blob)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise DescriptionInvalid(asked, f"Its local part cannot be read: {error}.", "Give it unchanged.") from None
    if len(description.incarnation) > _MAX_INCARNATION:
        raise DescriptionInvalid(asked, "Its incarnation is longer than one of local's.", "Give it unchanged.")
    if (blob.boot, blob.namespace) != _machine():
        true = "It is on another machine, or in a container with processes of its own."
        raise Unsupported(asked, true, "Choose a transport that crosses machines: tensorway why transport auto.")
    return blob


#: The endpoints of this process, so that a description of one can be told from one that only says so.
_by_incarnation: weakref.WeakValueDictionary[str, LocalFabric] = weakref.WeakValueDictionary()


#: Every socket that a forked child would inherit, and what is held while there is one that is not yet among them.
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_forking = threading.Lock()


def _kept(make: Callable[[], tuple[socket.socket, ...]]) -> tuple[socket.socket, ...]:
    """New sockets, of which a child that is forked from now on knows; `make` must not wait."""
    with _forking:
        made = make()
        _sockets.update(made)
        return made


def _close(channel: socket.socket) -> None:
    """Close it, and not while somebody forks: between forgetting the file and closing it, a child would inherit it."""
    with _forking:
        channel.close()


def _unix_socket() -> tuple[socket.socket]:
    return (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),)


def _close_inherited() -> None:
    """In a forked child: a copy of a socket would hide from peers that the parent has ended."""
    _forking.release()
    for channel in list(_sockets):
        channel.close()
    for fabric in list(_by_incarnation.values()):
        fabric._close_files()
    _by_incarnation.clear()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_close_inherited)
