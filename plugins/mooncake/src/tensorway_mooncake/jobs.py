"""Transfers over Mooncake: cut into operations, handed over so many at a time, asked after until all are over.

May import tensorway's ground, the transport's block tables and `engine`. Mooncake looks at the first task of a batch
only, so each operation is a batch of its own; it fails, and goes on failing, when a peer has more than about two
thousand of them; and it cannot cancel, so an operation whose end nobody knows may still write.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator
from typing import Final

import attrs

from tensorway.errors import PeerLost, TensorwayError, TransferFailed
from tensorway.transport.blocks import BlockTable
from tensorway.transport.contract import Operation
from tensorway_mooncake.engine import DONE, FAILED, PENDING, Engine

#: Operations with one peer that may be under way.
WINDOW: Final = 512
#: Seconds to find out whether a peer still listens, when an operation with it failed.
_KNOCK: Final = 0.25
_PAUSE: Final = 0.01


@attrs.define(eq=False)
class Remote:
    """One incarnation of a peer; all links to it share it."""

    name: str
    incarnation: str
    address: str
    port: int
    canary: int
    secret: bytes = attrs.field(repr=False)
    links: int = 0
    #: Operations with it that are under way.
    active: int = 0
    #: Why it is lost; empty while it is not known to be.
    lost: str = ""
    lock: threading.Lock = attrs.field(factory=threading.Lock, repr=False)

    @property
    def segment(self) -> str:
        """Mooncake's word for a peer."""
        return f"{self.address}:{self.port}"

    @property
    def identity(self) -> tuple[object, ...]:
        """All that was said of it."""
        return self.incarnation, self.name, self.address, self.port, self.canary, self.secret


@attrs.define(eq=False)
class Prepared:
    """A pair of tables of one peer."""

    remote: Remote
    local: BlockTable
    far: BlockTable


#: Local address, remote address, bytes.
_Piece = tuple[int, int, int]


@attrs.define(eq=False)
class Job:
    """Operations that belong together. It belongs to one thread at a time."""

    remote: Remote
    operation: Operation
    asked: str
    #: What was not handed to Mooncake so far, and the handles of what was and is not over.
    waiting: deque[_Piece] = attrs.field(repr=False)
    active: deque[int] = attrs.field(factory=deque, repr=False)
    error: TensorwayError | None = None
    #: When it was given up while operations of it were under way.
    given_up: float | None = None


class Jobs:
    """The transfers of one engine."""

    def __init__(self, engine: Engine, patience: float) -> None:
        self._engine = engine
        #: Seconds after which an operation that was given up must be over.
        self._patience = patience

    def start(self, job: Job) -> Job | None:
        """Hand over what fits; None when there was nothing."""
        self._hand_over(job)
        if job.error is not None and not job.active:
            raise job.error
        return job if job.active or job.waiting else None

    def done(self, job: Job) -> bool:
        """Whether all of it is over; raises what failed."""
        self._collect(job)
        self._hand_over(job)
        if job.error is not None:
            raise job.error
        return not job.active and not job.waiting

    def settled(self, job: Job) -> bool:
        """Whether Mooncake has let go of it. Asked of one that is not done, it gives up what was not handed over."""
        job.waiting.clear()
        self._collect(job)
        if not job.active:
            return True
        job.given_up = job.given_up or time.monotonic()
        if time.monotonic() - job.given_up > self._patience:
            self._engine.poison(
                f"an operation with {job.remote.name} is not over {self._patience:g} s after it was given up"
            )
        return False

    def _collect(self, job: Job) -> None:
        """Ask after what is under way, the oldest first, up to the first that is not over."""
        while job.active:
            status = self._engine.check(job.active[0])
            if status not in (DONE, FAILED):
                if status != PENDING:
                    self._fail(job)
                return
            job.active.popleft()
            with job.remote.lock:
                job.remote.active -= 1
            if status == FAILED:
                self._fail(job)

    def _hand_over(self, job: Job) -> None:
        remote, engine = job.remote, self._engine
        while job.waiting and job.error is None:
            with remote.lock:
                if remote.active >= WINDOW:
                    return
                remote.active += 1
            handle = 0
            try:
                handle = engine.submit(job.operation, remote.segment, *job.waiting[0])
            except TensorwayError as error:
                job.error = error
            finally:
                if handle == 0:
                    with remote.lock:
                        remote.active -= 1
            if handle == 0:
                self._fail(job)
                return
            job.waiting.popleft()
            job.active.append(handle)

    def _fail(self, job: Job) -> None:
        job.waiting.clear()
        if job.error is not None:
            return
        job.remote.lost = job.remote.lost or knock(job.remote, _KNOCK, linger=_KNOCK)
        if job.remote.lost:
            job.error = PeerLost.because(job.asked, job.remote.lost)
        else:
            true = f"Mooncake failed a part of it and does not say why; {job.remote.segment} refuses no connection."
            to_do = "See that the peer's memory is still registered, and that it runs; MC_LOG_LEVEL=INFO shows more."
            job.error = TransferFailed(job.asked, true, to_do)


def knock(remote: Remote, seconds: float, linger: float = 0.0) -> str:
    """Why nobody can be at the peer's port; empty when somebody is, or when there is no answer in time.

    A process that is being killed still takes connections for a moment, and then resets them; for that it lingers.
    """
    until = time.monotonic() + linger
    while True:
        try:
            with socket.create_connection((remote.address, remote.port), seconds) as trial:
                if (left := until - time.monotonic()) <= 0:
                    return ""
                trial.settimeout(left)
                trial.recv(1)  # it ends at once when the peer does; a peer that is there waits for us to speak
        except TimeoutError:
            return ""
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH):
                return f"{remote.segment} cannot be reached ({os.strerror(error.errno)})"
            if error.errno != errno.ECONNRESET:
                return ""
        time.sleep(_PAUSE)


def pieces(local: BlockTable, far: BlockTable, local_ids: array[int], far_ids: array[int]) -> Iterator[_Piece]:
    """What to move; neighbors here that are neighbors there are one piece, which is what makes Mooncake faster."""
    nbytes, joins = local.block_bytes, local.dense and far.dense
    for here, there in zip(local.starts(local_ids), far.starts(far_ids), strict=True):
        start = source = length = 0
        for ours, others in zip(here, there, strict=True):
            if joins and length and ours == start + length and others == source + length:
                length += nbytes
                continue
            if length:
                yield start, source, length
            start, source, length = ours, others, nbytes
        if length:
            yield start, source, length
