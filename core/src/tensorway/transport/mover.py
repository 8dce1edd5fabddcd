"""The mover: a process of its own that runs a fabric for another one, and may die of it. `contained` is the other side.

Room `transport`; may import the ground and its own room. Started as a fresh interpreter with the engine's `sys.path`.
Requests are handled by whichever thread has its turn at the channel; what a fabric has under way is watched by one
more thread, which blocks while there is nothing to watch. It ends with its engine, however that ends.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import functools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import attrs
import msgspec

from tensorway.errors import TensorwayError, TransferFailed
from tensorway.memory import Region, libc
from tensorway.references import resolve
from tensorway.transport.blocks import BlockTable
from tensorway.transport.contract import Capabilities, Description, Fabric, Notification, Operation
from tensorway.transport.mappings import AddressSpace, Piece, Taken
from tensorway.transport.transfer import pauses

#: A message is a description (8 MiB at most) or the ids of one post, and a little more.
MAX_MESSAGE: Final = 32 << 20
#: Notifications that the engine has not fetched; the others stay with the fabric, which knows how to refuse more.
WINDOW: Final = 4096
#: For so long after the engine asked for notifications they are looked for, this often.
ATTENTION: Final = 2.0
_PERIOD: Final = 2e-3
#: How often it is looked whether a peer is lost with which nothing is under way.
_REST: Final = 1.0
#: What an attachment answers when its address is in use here.
TAKEN: Final = "taken"
_PR_SET_PDEATHSIG: Final = 1
#: What the kernel sends when the engine has ended; its number, 10, is also the seconds that are left then.
_ORPHANED: Final = signal.SIGUSR1
_THREADS: Final = 4
_LENGTH: Final = 4
_ANCILLARY: Final = socket.CMSG_SPACE(4 * 253)


class Message(msgspec.Struct, array_like=True, tag=True, forbid_unknown_fields=True):
    """One way or the other; a fabric's links, routes and registrations are called by the request that made them."""


class Open(Message):
    """Make the fabric and open it. Answers its name and capabilities."""

    factory: str
    options: dict[str, Any]
    name: str
    incarnation: str


class Attach(Message):
    """Map these pieces of the files that come with this, and register the region."""

    address: int
    nbytes: int
    device: str
    pieces: list[Piece]


class Detach(Message):
    """Deregister, and unmap."""

    handle: int


class Describe(Message):
    """Answers the fabric's part of the description."""


class Connect(Message):
    """Answers the lane."""

    transport: str
    name: str
    incarnation: str
    regions: list[tuple[int, int, str]]
    blob: bytes
    seconds: float


class Disconnect(Message):
    """Let go of a peer."""

    link: int


class Prepare(Message):
    """Prepare two tables, each as the fields of a `BlockTable`."""

    link: int
    local: tuple[tuple[int, ...], int, int, int, str, bool]
    remote: tuple[tuple[int, ...], int, int, int, str, bool]


class Forget(Message):
    """Nobody has these routes any more."""

    routes: list[int]


class Post(Message):
    """Start moving. Answers whether all is done; if not, `Ended` follows."""

    operation: Operation
    route: int
    local: bytes
    remote: bytes
    seconds: float


class Send(Message):
    """Send a notification."""

    link: int
    payload: bytes
    seconds: float


class Look(Message):
    """Look for notifications, now and for a while; so many have been fetched in all."""

    fetched: int


class Close(Message):
    """Close the fabric and end."""


Request = Open | Attach | Detach | Describe | Connect | Disconnect | Prepare | Forget | Post | Send | Look | Close


class Answer(Message):
    """What came of a request: a value, or the class and the lines of an error."""

    number: int
    value: Any = None
    error: tuple[str, str, str, str] | None = None


class Ended(Message):
    """A post that was under way is done or has failed; it has let go of its memory when `settled`."""

    number: int
    settled: bool
    error: tuple[str, str, str, str] | None = None


class Lost(Message):
    """Why a peer is lost."""

    link: int
    reason: str


class Note(Message):
    """A notification that arrived."""

    peer: str
    incarnation: str
    payload: bytes


Report = Answer | Ended | Lost | Note
REQUESTS: Final = msgspec.msgpack.Decoder(tuple[int, Request])
REPORTS: Final = msgspec.msgpack.Decoder(Report)


class Channel:
    """Messages with their length in front over a stream socket, and open files with them."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self._unread = bytearray()
        self._files: deque[int] = deque()
        self._sending = threading.Lock()

    def send(self, message: object, files: Sequence[int] = ()) -> None:
        """Send one message; raises `OSError`."""
        body = msgspec.msgpack.encode(message)
        frame = memoryview(len(body).to_bytes(_LENGTH, "big") + body)
        with self._sending:
            sent = socket.send_fds(self.stream, [frame], files) if files else 0
            self.stream.sendall(frame[sent:])

    def receive(self) -> bytes | None:
        """The next message, or None at the end; raises `ValueError` for what is none. For one thread at a time."""
        while True:
            if len(self._unread) >= _LENGTH:
                length = int.from_bytes(self._unread[:_LENGTH], "big")
                if length > MAX_MESSAGE:
                    raise ValueError(f"a message of {length:,} bytes")
                if len(self._unread) >= _LENGTH + length:
                    message = bytes(self._unread[_LENGTH : _LENGTH + length])
                    del self._unread[: _LENGTH + length]
                    return message
            try:
                data, ancillary, _, _ = self.stream.recvmsg(1 << 16, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            except OSError:  # closed here, or reset by an end with something unread
                return None
            for _, kind, content in ancillary:
                if kind == socket.SCM_RIGHTS:
                    self._files.extend(array("i", content[: len(content) // 4 * 4]))
            if not data:
                return None
            self._unread += data

    def take(self, count: int) -> list[int]:
        """The files that came with a message."""
        return [self._files.popleft() for _ in range(count)]


@attrs.define(eq=False)
class _Job:
    """A post that is under way."""

    number: int
    link: int
    inner: Any
    over: bool = False


class Mover:
    """The fabric, and what the engine has of it by number."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._turn = threading.Lock()
        self._fabric: Fabric
        self._space = AddressSpace()
        self._made: dict[int, Any] = {}
        self._links: set[int] = set()
        #: Those of them of which it has been said of late that they are lost.
        self._lost: set[int] = set()
        self._jobs: dict[int, _Job] = {}
        self._wake = threading.Condition()
        self._ears = threading.RLock()
        self._attentive_until = 0.0
        self._arrived: deque[Notification] = deque()
        self._pushed = self._fetched = 0

    def run(self) -> None:
        """Serve until the engine is gone; never returns."""
        for work in (*[self._serve] * _THREADS, self._watch):
            threading.Thread(target=_or_end, args=(work,), daemon=True).start()
        _or_end(self._serve)

    # -- requests

    def _serve(self) -> None:
        while True:
            with self._turn:
                try:
                    message = self._channel.receive()
                    if message is None:
                        self._leave()
                    number, request = REQUESTS.decode(message)
                    files = self._channel.take(len(request.pieces)) if isinstance(request, Attach) else []
                except BaseException as error:
                    sys.stderr.write(f"tensorway's mover ends: its engine sent what is no request ({error!r})\n")
                    os._exit(1)
            if isinstance(request, (Open, Attach, Connect, Close)):
                # They may take seconds each, and would hold up the others if all threads were at them.
                work = functools.partial(self._handle, number, request, files)
                threading.Thread(target=_or_end, args=(work,), daemon=True).start()
            else:
                self._handle(number, request, files)

    def _handle(self, number: int, request: Request, files: list[int]) -> None:
        try:
            answer = Answer(number, getattr(self, f"_{type(request).__name__.lower()}")(number, request, files))
        except BaseException as error:  # also SystemExit: it goes to the engine
            route = self._made.get(request.route, (None,)) if isinstance(request, Post) else (None,)
            self._look_for_loss({route[0] or getattr(request, "link", None)})
            answer = Answer(number, error=_told(error))
        finally:
            for file in files:
                os.close(file)
        self._channel.send(answer)
        if isinstance(request, Close):
            self._leave()

    def _open(self, number: int, request: Open, files: list[int]) -> tuple[str, Capabilities]:
        fabric = resolve(request.factory)(**request.options)
        fabric.open(request.name, request.incarnation)
        self._fabric = fabric
        return fabric.name, fabric.capabilities

    def _attach(self, number: int, request: Attach, files: list[int]) -> str | None:
        try:
            self._space.add(number, request.pieces, files)
        except Taken:
            return TAKEN
        try:
            self._made[number] = self._fabric.attach(Region(request.address, request.nbytes, request.device))
        except BaseException:
            self._space.drop(number)
            raise
        return None

    def _detach(self, number: int, request: Detach, files: list[int]) -> None:
        self._fabric.detach(self._made.pop(request.handle))
        self._space.drop(request.handle)

    def _describe(self, number: int, request: Describe, files: list[int]) -> bytes:
        return self._fabric.describe()

    def _connect(self, number: int, request: Connect, files: list[int]) -> str:
        regions = tuple(Region(*row) for row in request.regions)
        seen = Description(request.transport, request.name, request.incarnation, regions, request.blob)
        link = self._fabric.connect(seen, request.seconds)
        self._made[number] = link
        with self._wake:
            self._links.add(number)
            self._wake.notify()
        return self._fabric.lane(link)

    def _disconnect(self, number: int, request: Disconnect, files: list[int]) -> None:
        self._links.discard(request.link)
        self._lost.discard(request.link)
        self._fabric.disconnect(self._made.pop(request.link))

    def _prepare(self, number: int, request: Prepare, files: list[int]) -> None:
        tables = BlockTable(*request.local), BlockTable(*request.remote)
        self._made[number] = request.link, self._fabric.prepare(self._made[request.link], *tables)

    def _forget(self, number: int, request: Forget, files: list[int]) -> None:
        for route in request.routes:
            self._made.pop(route, None)

    def _post(self, number: int, request: Post, files: list[int]) -> bool:
        link, prepared = self._made[request.route]
        ids = array("q", request.local), array("q", request.remote)
        inner = self._fabric.post(request.operation, prepared, *ids, request.seconds)
        if inner is None:
            return True
        with self._wake:
            self._jobs[number] = _Job(number, link, inner)
            self._wake.notify()
        return False

    def _send(self, number: int, request: Send, files: list[int]) -> None:
        self._fabric.send(self._made[request.link], request.payload, request.seconds)

    def _look(self, number: int, request: Look, files: list[int]) -> None:
        self._fetched = max(self._fetched, request.fetched)
        self._hear()
        with self._wake:
            self._attentive_until = time.monotonic() + ATTENTION
            self._wake.notify()

    def _close(self, number: int, request: Close, files: list[int]) -> None:
        self._fabric.close()

    def _leave(self) -> NoReturn:
        """End. What is under way may end before, if the library sees to that: some abort a peer that answers it."""
        if self._jobs:
            signal.alarm(_ORPHANED)
            atexit._run_exitfuncs()
        # Not sys.exit: whatever else a library does in its teardown is nobody's concern any more.
        os._exit(0)

    # -- what happens by itself

    def _watch(self) -> None:
        waits, known, due = pauses(), 0, 0.0
        while True:
            if (now := time.monotonic()) >= due:
                due = now + _REST
                self._lost.clear()  # it is said again: what was said before the engine had the link is not known there
                self._look_for_loss(set(self._links))
            if time.monotonic() < self._attentive_until:
                try:
                    self._hear()
                except TensorwayError:  # the next request to look will say so
                    self._attentive_until = 0.0
            moved = self._look_at_jobs()
            with self._wake:
                if not self._jobs:
                    rest = _REST if self._links else None
                    self._wake.wait(_PERIOD if time.monotonic() < self._attentive_until else rest)
            if moved or len(self._jobs) > known:
                waits = pauses()
            known = len(self._jobs)
            if known and (pause := next(waits)):
                time.sleep(pause)

    def _look_at_jobs(self) -> bool:
        jobs = list(self._jobs.values())
        self._look_for_loss({job.link for job in jobs if not job.over})
        return 0 < sum(self._moved(job) for job in jobs)

    def _moved(self, job: _Job) -> bool:
        """Report what has changed about a job: how it ended, that it has let go, or both at once."""
        before, failure = job.over, None
        if not job.over:
            try:
                job.over = self._fabric.done(job.inner)
            except Exception as error:  # how it ended, as the fabric says it
                job.over, failure = True, _told(error)
        try:
            settled = job.over and self._fabric.settled(job.inner)
        except Exception:  # a fabric that cannot tell may still write: the memory stays in quarantine
            settled = False
        if settled:
            del self._jobs[job.number]
        if job.over == before and not settled:
            return False
        self._channel.send(Ended(job.number, settled, failure))
        return True

    def _look_for_loss(self, links: set[Any]) -> None:
        for number in links - self._lost:
            if (link := self._made.get(number)) is not None and (reason := self._fabric.lost(link)):
                self._lost.add(number)
                self._channel.send(Lost(number, reason))

    def _hear(self) -> None:
        with self._ears:  # held while they are sent, too, so that they keep their order
            if not self._arrived:
                self._arrived.extend(self._fabric.receive())
            while self._arrived and self._pushed - self._fetched < WINDOW:
                note = self._arrived.popleft()
                self._pushed += 1
                self._channel.send(Note(note.peer, note.incarnation, note.payload))


def _or_end(work: Callable[[], object]) -> None:
    """Do what no mover can do without: if that fails, it ends, and the engine gets another."""
    try:
        work()
    except BrokenPipeError:
        return  # the engine is gone, and who reads finds out
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _told(error: BaseException) -> tuple[str, str, str, str]:
    if not isinstance(error, TensorwayError):
        true = f"The fabric raised {type(error).__name__}: {str(error)[:2000]}"
        error = TransferFailed("A contained fabric was called.", true, "Report this to the transport's author.")
    return type(error).__name__, error.asked, error.true, error.to_do


def main(file: int, parent: int) -> None:
    """Serve the engine at the other end of the socket `file`; never returns."""
    # It is gone at once if it is idle; else a library may let what it reads arrive. The C library's own `alarm` is what
    # the signal calls: that bounds the time though a library hangs and keeps the interpreter.
    libc().signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc().signal(_ORPHANED, ctypes.cast(libc().alarm, ctypes.c_void_p))
    libc().prctl(_PR_SET_PDEATHSIG, _ORPHANED, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it ended before it could be watched
    # What a crash was in the middle of: the only trace of it that there will be.
    faulthandler.enable()
    stream = socket.socket(fileno=file)
    stream.set_inheritable(False)
    Mover(Channel(stream)).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
