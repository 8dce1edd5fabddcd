"""One mover as the engine sees it: its process, what it was asked, what it reported, and how it ended.

Room `transport`; may import the ground and its own room. `contained` starts one after the other of these.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import attrs
import msgspec

from tensorway import errors
from tensorway.errors import TensorwayError, TransferFailed
from tensorway.transport import mover, sockets
from tensorway.transport.contract import Notification

#: What an answer may take beyond the time that the request itself was given.
PATIENCE: Final = 10.0
#: Posts that may be unanswered; behind them, posting waits.
MAX_POSTS: Final = 16
#: What an end that has begun may take until it is helped: the kernel may write a core file.
_ENDING_SECONDS: Final = 1.0
_BOOT: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from tensorway.transport.mover import main; "
    "main(int(sys.argv[3]), int(sys.argv[4]))"
)
_ANEW: Final = "Connect to the peer anew; what the library said is on stderr."


@attrs.define(eq=False)
class Link:
    """A connection that a mover has to a peer."""

    name: str
    life: Life = attrs.field(repr=False)
    lane: str = ""
    number: int = 0
    lost: str = ""


@attrs.define(eq=False)
class Request:
    """What the mover was asked, and what came back; of a post, also how it goes on."""

    asked: str
    seconds: float
    until: float
    slots: threading.BoundedSemaphore | None = None
    value: Any = None
    error: TensorwayError | None = None
    life: Life | None = attrs.field(default=None, repr=False)
    done: bool = False
    settled: bool = False
    over: threading.Event = attrs.field(factory=threading.Event, repr=False)

    def answer(self, value: Any, error: TensorwayError | None, *, dead: bool = False) -> None:
        """The answer is here, or never will be."""
        if self.over.is_set():
            return
        self.value, self.error = value, error or self.error
        if self.slots is not None:
            self.done = self.done or value is True
            # A post that raised has begun nothing; one whose mover died may have, until that is reaped.
            self.settled = self.settled or value is True or (error is not None and not dead)
            self.slots.release()
        self.over.set()


class Life:
    """One mover, from its start to its end."""

    def __init__(self, owner: str, numbers: itertools.count[int]) -> None:
        ours, theirs = sockets.kept(socket.socketpair)
        self.incarnation = ""
        #: How it ended; empty while it has not.
        self.ended = ""
        #: Whether its end is meant.
        self.wanted = False
        #: Why it could not begin, if that was said.
        self.cause: TensorwayError | None = None
        #: Notifications that it has reported, that it knows to be fetched, and when it was last told to look for more.
        self.heard = self.fetched = 0
        self.looked = -math.inf
        self.look: Request | None = None
        self.links: weakref.WeakValueDictionary[int, Link] = weakref.WeakValueDictionary()
        self.slots = threading.BoundedSemaphore(MAX_POSTS)
        self._numbers = numbers
        self._owner = owner
        self._verdict = ""
        self._reaped = False
        self._requests: dict[int, Request] = {}
        self._lock = threading.Lock()
        self._channel = mover.Channel(ours)
        # A mover that hangs takes nothing from its socket; who sends to it must not wait for ever.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(PATIENCE), 0))
        path = json.dumps([str(entry) for entry in sys.path])
        command = [sys.executable, "-c", _BOOT, owner, path, str(theirs.fileno()), str(os.getpid())]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True
            )
        except BaseException:
            sockets.close(ours)
            raise
        finally:
            sockets.close(theirs)

    def add(self, link: Link) -> None:
        """A link that it has now, to be told if it ends; it may have."""
        with self._lock:
            self.links[link.number] = link
            link.lost = self.ended

    def remove(self, link: Link) -> bool:
        """Whether it had the link until now, and is there."""
        with self._lock:
            return self.links.pop(link.number, None) is not None and not self.ended

    def submit(self, request: Request, message: mover.Request, files: Sequence[int] = ()) -> int:
        """Send a request; returns its number. If the mover has ended, the request has failed when this returns."""
        number, request.life = next(self._numbers), self
        with self._lock:
            if self.ended:
                request.answer(None, self.failure(request.asked))
                return number
            self._requests[number] = request
        try:
            self._channel.send((number, message), files)
        except BlockingIOError:
            self.kill(f"took nothing for {PATIENCE:g} s and was killed")
        except OSError:
            pass  # it has ended, and the thread that reads says so to all requests at once
        return number

    def call(
        self, message: mover.Request, asked: str, seconds: float = 0.0, files: Sequence[int] = ()
    ) -> tuple[int, Any]:
        """Send a request and wait for its answer; returns its number, and the answer or raises it."""
        request = Request(asked, seconds, time.monotonic() + seconds)
        number = self.submit(request, message, files)
        while not request.over.wait(max(0.0, request.until - time.monotonic()) + 0.01):
            self.check(request)
        if request.error is not None:
            raise request.error
        return number, request.value

    def check(self, request: Request) -> None:
        """Kill the mover if it should have answered by now."""
        if not request.over.is_set() and time.monotonic() > request.until:
            self.kill(f"did not answer within {request.seconds:.3g} s and was killed")

    def kill(self, verdict: str) -> None:
        """End it; the thread that reads finds out."""
        with self._lock:
            self._verdict = self._verdict or verdict
            if not self._reaped:  # or its number may be another's by now
                self._signal()
                try:
                    # A process that it started may hold the other end, too, and then there would be no end to read.
                    self._channel.stream.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it is at its end already

    def read(self, heard: deque[Notification]) -> None:
        """Take what the mover reports until it ends."""
        try:
            while (message := self._channel.receive()) is not None:
                self._take(mover.REPORTS.decode(message), heard)
        except (msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError) as error:
            self.kill(f"sent what is no message ({str(error)[:80]}) and was killed")

    def bury(self) -> None:
        """See that it is dead, and say so: at once that it has failed, and that it has let go when it is reaped."""
        until = time.monotonic() + _ENDING_SECONDS
        while (gone := self._exited()) is False and time.monotonic() < until:
            time.sleep(0.002)
        with self._lock:
            if gone is not None:
                self._signal()  # before it is reaped, while its number is its own; all of its session
            self._reaped = True
            self._verdict = self._verdict or ("closed its connection and was killed" if gone is False else "")
        if self._verdict:
            self._fail(self._verdict)
        self._fail(_how(self.process.wait()))
        sockets.close(self._channel.stream)
        for request in self._requests.values():
            request.settled = True
        self._requests.clear()

    def failure(self, asked: str) -> TransferFailed:
        """The error for what was asked of a mover that has ended."""
        return TransferFailed(asked, f"{self.ended[:1].upper()}{self.ended[1:]}.", _ANEW)

    def _fail(self, how: str) -> None:
        with self._lock:
            self.ended = self.ended or f"{self._owner} {how}"
            links = list(self.links.values())
        for link in links:
            link.lost = link.lost or self.ended
        for request in list(self._requests.values()):
            if not request.done and request.error is None:
                request.error = self.failure(request.asked)
            request.answer(None, request.error, dead=True)

    def _take(self, report: mover.Report, heard: deque[Notification]) -> None:
        if isinstance(report, mover.Note):
            self.heard += 1
            heard.append(Notification(report.peer, report.incarnation, report.payload))
        elif isinstance(report, mover.Lost):
            if (link := self.links.get(report.link)) is not None:
                link.lost = link.lost or report.reason
        elif isinstance(report, mover.Ended):
            request = self._requests[report.number]
            if report.error is not None:
                request.error = _error(report.error)
            request.done, request.settled = request.error is None, report.settled
            if request.settled and request.over.is_set():
                del self._requests[report.number]
        else:
            request = self._requests[report.number]
            request.answer(report.value, _error(report.error) if report.error else None)
            if request.slots is None or request.settled:
                del self._requests[report.number]

    def _exited(self) -> bool | None:
        """Whether it has ended; None if this process ignores SIGCHLD, and the kernel has reaped it."""
        try:
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.process.pid, options) is not None
        except ChildProcessError:
            return None

    def _signal(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # nothing is left of it


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"ended by signal {-status}"


def _error(told: Sequence[str]) -> TensorwayError:
    name, *lines = told
    kind: Any = getattr(errors, name, None)
    known = isinstance(kind, type) and issubclass(kind, TensorwayError)
    error: TensorwayError = kind(*lines) if known else TransferFailed(*lines)
    return error
