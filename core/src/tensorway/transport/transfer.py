"""One transfer: pending, then done or failed, and released when the fabric has let go of its memory.

Room `transport`; may import the ground and its own room. `wait` it, poll it or `await` it; threads may share it. A
transfer that failed or came too late is quarantined: its memory is kept, and not reported released, until the fabric
cannot write to it any more.
"""

from __future__ import annotations

import asyncio
import enum
import os
import threading
import time
from array import array
from collections.abc import Callable, Generator
from typing import Any, Final

import attrs

from tensorway.errors import Closed, DeadlineExceeded, PeerLost, TensorwayError, TransferCancelled, TransferFailed
from tensorway.transport.contract import Fabric, Operation, Route

#: Seconds for which one look may wait until a notification can be sent.
_SLICE: Final = 0.02
#: Waiting: for so long without a pause, then pauses that double from the first to the last. A small read over TCP takes
#: 50 to 150 us; and the shortest sleep there is takes more than 50, whatever it is told.
_SPIN: Final = 200e-6
_FIRST_PAUSE: Final = 20e-6
_LAST_PAUSE: Final = 500e-6


class State(enum.Enum):
    """What became of a transfer."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


_PENDING: Final = State.PENDING


@attrs.define(eq=False)
class Transfer:
    """Blocks on their way. Made by `Transport.read` and `write`."""

    route: Route
    operation: Operation
    local_ids: array[int] = attrs.field(repr=False)
    remote_ids: array[int] = attrs.field(repr=False)
    notify: bytes | None
    #: When it is too late, on the clock of `time.monotonic`.
    deadline: float
    _fabric: Fabric = attrs.field(repr=False)
    #: When it was asked for, and by which process: its maker knows both.
    _started: float
    _pid: int = attrs.field(repr=False)
    state: State = State.PENDING
    #: Why it failed.
    error: TensorwayError | None = None
    #: Seconds spent in the fabric's `post`, and from the first post to the end.
    posting_seconds: float = 0.0
    seconds: float = 0.0
    _posted: int = attrs.field(default=0, init=False)
    _jobs: list[Any] = attrs.field(factory=list, init=False, repr=False)
    _lock: threading.RLock = attrs.field(factory=threading.RLock, init=False, repr=False)

    @property
    def nbytes(self) -> int:
        """How many bytes it moves."""
        return len(self.local_ids) * self.route.local.block_bytes * self.route.local.width

    @property
    def pieces(self) -> int:
        """How many pieces of memory that is, before neighbors are joined."""
        return len(self.local_ids) * self.route.local.width

    @property
    def pending(self) -> bool:
        """Whether it is still under way."""
        return self.state is _PENDING

    @property
    def released(self) -> bool:
        """Whether its local memory may be used again: nothing will be written to it any more."""
        self._check_process()
        with self._lock:
            return self.state is not _PENDING and self._settle()

    def poll(self) -> State:
        """Move it on by one step and say where it is; raises nothing, but `Closed` in a forked child."""
        self._check_process()
        with self._lock:
            self._move()
            return self.state

    def advance(self) -> bool:
        """`poll`, then `released`, for the endpoint, which has checked the process already."""
        with self._lock:
            self._move()
            return self.state is not _PENDING and self._settle()

    def wait(self, deadline: float | None = None) -> None:
        """Return when it is done; raise what it failed with.

        If `deadline` is sooner than its own, raise `DeadlineExceeded` then, and the transfer goes on.
        """
        if self.state is _PENDING:  # most are done when they have been started
            self._wait(deadline)
        self._check_process()
        if self.error is not None:
            raise self.error

    def __await__(self) -> Generator[Any, None, None]:
        return self._finish().__await__()

    def cancel(self) -> None:
        """Give it up. It has failed then; `released` says when its memory may be used again."""
        self._check_process()
        with self._lock:
            if self.pending:
                self._fail(TransferCancelled(self._asked(), "It was cancelled by who started it.", "Nothing is owed."))

    def _wait(self, deadline: float | None) -> None:
        until = None if deadline is None else time.monotonic() + deadline
        waits, moved = pauses(), self._moved()
        while self.poll() is _PENDING:
            if moved != (moved := self._moved()):
                waits = pauses()
            if until is not None and time.monotonic() >= until:
                raise self._too_late(f"It is still under way after {deadline:g} s; it goes on until its own deadline.")
            if pause := next(waits):
                time.sleep(pause)
            else:
                os.sched_yield()  # who makes the progress may need this very core

    async def _finish(self) -> None:
        waits, moved = pauses(), self._moved()
        while self.poll() is _PENDING:
            if moved != (moved := self._moved()):
                waits = pauses()
            await asyncio.sleep(next(waits))
        if self.error is not None:
            raise self.error

    def _move(self) -> None:
        if self.state is _PENDING:
            try:
                self._step()
            except TensorwayError as error:
                self._fail(error)
            except Exception as error:  # a defect of the fabric must not leave a transfer that never ends
                true = f"The fabric raised {type(error).__name__}: {error}"
                self._fail(TransferFailed(self._asked(), true, "Report this to the transport's author."))

    def _step(self) -> None:
        """Look at what is under way, post what fits, end when nothing is left."""
        if self._jobs:
            self._drop(self._finished)
        peer = self.route.peer
        if reason := peer.lost:
            raise PeerLost.because(self._asked(), reason)
        if (left := self.deadline - time.monotonic()) <= 0:
            raise self._too_late("It was not done by its deadline.")
        if self._posted < len(self.local_ids):
            self._post(left)
        moved = not self._jobs and self._posted == len(self.local_ids)
        if moved and (self.notify is None or self._sent(self.notify, left)):
            self._end(State.DONE)

    def _sent(self, payload: bytes, left: float) -> bool:
        # In slices: while this waits, it holds the lock that `wait`, `cancel` and the endpoint's thread need.
        try:
            self._fabric.send(self.route.peer.link, payload, min(left, _SLICE))
        except DeadlineExceeded:
            if left <= _SLICE:
                raise
            return False
        return True

    def _post(self, left: float) -> None:
        limits = self._fabric.capabilities
        blocks = max(1, limits.max_pieces // self.route.local.width)
        for _ in range(limits.max_in_flight - len(self._jobs)):
            if (rest := len(self.local_ids) - self._posted) <= 0:
                return
            local, remote = self.local_ids, self.remote_ids
            if rest != len(local) or rest > blocks:  # most fit into one post, and are not copied for it
                part = slice(self._posted, self._posted + blocks)
                local, remote = local[part], remote[part]
            started = time.perf_counter()
            job = self._fabric.post(self.operation, self.route.prepared, local, remote, left)
            self.posting_seconds += time.perf_counter() - started
            self._posted += len(local)
            if job is not None:
                self._jobs.append(job)

    def _check_process(self) -> None:
        # Before the lock: in a forked child a thread that is not there may hold it for ever.
        if os.getpid() != self._pid:
            raise Closed(
                self._asked(), "It belongs to the process that this one was forked from.", "Start workers by spawn."
            )

    def _moved(self) -> tuple[int, int]:
        """Changes when the transfer makes progress; only then is it worth looking again at once."""
        return self._posted, len(self._jobs)

    def _finished(self, job: Any) -> bool:
        return self._fabric.done(job) and self._fabric.settled(job)

    def _settle(self) -> bool:
        if self._jobs:
            self._drop(self._let_go)
        return not self._jobs

    def _drop(self, over: Callable[[Any], bool]) -> None:
        # One by one: if the fabric raises at one, those that it has let go of are gone, and never asked about again.
        for index in reversed(range(len(self._jobs))):
            if over(self._jobs[index]):
                del self._jobs[index]

    def _let_go(self, job: Any) -> bool:
        try:
            return self._fabric.settled(job)
        except Exception:  # a fabric that cannot tell may still write: the memory stays in quarantine
            return False

    def _fail(self, error: TensorwayError) -> None:
        self.error = error
        self._end(State.FAILED)

    def _end(self, state: State) -> None:
        self.seconds = time.monotonic() - self._started
        self.state = state

    def _too_late(self, true: str) -> DeadlineExceeded:
        return DeadlineExceeded(
            self._asked(),
            true,
            "See whether the peer runs (tensorway doctor there); give a longer deadline if it is busy.",
        )

    def _asked(self) -> str:
        return f"A {self.operation} of {self.nbytes:,} bytes with peer {self.route.peer.name} was asked for."


def pauses() -> Generator[float, None, None]:
    """How long to wait before each look: not at all at first, since most transfers end soon, then longer and longer."""
    until = time.monotonic() + _SPIN
    while time.monotonic() < until:
        yield 0.0
    pause = _FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, _LAST_PAUSE)
