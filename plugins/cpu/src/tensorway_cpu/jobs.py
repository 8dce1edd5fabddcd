"""Work beside the engine: jobs of two directions, each in its order, in slices that several threads do.

May import the core's errors and logging. A job of a direction begins when the one before it has ended, so that what is
copied twice is copied in order; loads go before stores, for a request waits for them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Final

import attrs

from tensorway._logging import logger
from tensorway.errors import DeadlineExceeded, MemoryInvalid, TensorwayError
from tensorway_cpu.pages import What

_log = logger("offload")
_ORDER: Final[tuple[What, ...]] = ("load", "store")


@attrs.define(eq=False)
class Slice:
    """A part of a job that one thread does."""

    #: How many bytes were copied.
    work: Callable[[], int]
    #: Which positions of the job it is of.
    positions: Sequence[int]


@attrs.define(eq=False)
class Job:
    """One load or store; whoever polls owns it when it has ended."""

    number: int
    what: What
    slices: deque[Slice]
    #: Blocks that it was asked for.
    blocks: int
    #: Positions that failed, also those that never began; the first cause, and why.
    failed: list[int] = attrs.field(factory=list)
    cause: str = ""
    why: str = ""
    nbytes: int = 0
    running: int = 0
    begun: float = attrs.field(factory=time.monotonic)
    seconds: float = 0.0

    def fails(self, positions: Sequence[int], cause: str, why: str) -> None:
        """These are not copied."""
        self.failed += positions
        if not self.cause:
            self.cause, self.why = cause, why


class Jobs:
    """Jobs and their threads, which begin when they are needed."""

    def __init__(self, threads: int) -> None:
        self._most, self._threads = threads, list[threading.Thread]()
        self._waiting: dict[What, deque[Job]] = {what: deque() for what in _ORDER}
        self._ended: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, job: Job) -> None:
        """Behind the others of its direction."""
        with self._changed:
            self._waiting[job.what].append(job)
            self._settle(job.what)
            while len(self._threads) < min(self._most, len(job.slices)):
                name = f"tensorway-cpu-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._serve, name=name, daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()

    def blocks(self, what: What) -> int:
        """How many are under way."""
        with self._changed:
            return sum(job.blocks for job in self._waiting[what])

    def take(self) -> list[Job]:
        """What has ended since the last call."""
        with self._changed:
            ended, self._ended = self._ended, []
            return ended

    def wait(self, numbers: Collection[int], deadline: float) -> None:
        """Until none of these is under way."""
        wanted = set(numbers)
        with self._changed:
            if not self._changed.wait_for(lambda: not wanted & self._under_way(), deadline):
                raise DeadlineExceeded(
                    f"{len(wanted)} jobs were waited for.",
                    f"{len(wanted & self._under_way())} of them have not ended after {deadline:g} s.",
                    "Leave their pages alone until `poll` has told of them.",
                )

    def close(self, deadline: float) -> None:
        """Nothing new begins; returns when no thread copies any more, or raises `DeadlineExceeded`."""
        until = time.monotonic() + deadline
        with self._changed:
            self._closed = True
            for what, waiting in self._waiting.items():
                for job in waiting:
                    while job.slices:
                        job.fails(job.slices.popleft().positions, "lost", "The worker was closed.")
                self._settle(what)
            self._changed.notify_all()
            idle = self._changed.wait_for(lambda: not self._under_way(), deadline)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if not idle:
            raise DeadlineExceeded(
                "A worker was to be closed.",
                f"A thread of it still copies after {deadline:g} s.",
                "Leave the pages of its jobs alone, and their memory mapped.",
            )

    def _under_way(self) -> set[int]:
        return {job.number for waiting in self._waiting.values() for job in waiting}

    def _serve(self) -> None:
        while (taken := self._next()) is not None:
            job, part = taken
            try:
                nbytes, cause, why = part.work(), "", ""
            except MemoryInvalid as error:
                nbytes, cause, why = 0, "refused", error.true
            except TensorwayError as error:
                nbytes, cause, why = 0, "failed", error.true
            except Exception as error:  # a copier is the engine's, and may raise anything: one job fails for it
                _log.exception("blocks could not be copied")
                nbytes, cause, why = 0, "failed", f"{type(error).__name__}: {error}."
            with self._changed:
                job.running -= 1
                job.nbytes += nbytes
                if cause:
                    job.fails(part.positions, cause, why)
                self._settle(job.what)
                self._changed.notify_all()

    def _next(self) -> tuple[Job, Slice] | None:
        """A slice of the first job of a direction, as soon as there is one; None at the end."""
        with self._changed:
            while not self._closed:
                for what in _ORDER:
                    waiting = self._waiting[what]
                    if waiting and waiting[0].slices:
                        waiting[0].running += 1
                        return waiting[0], waiting[0].slices.popleft()
                self._changed.wait()
            return None

    def _settle(self, what: What) -> None:
        """Jobs at the head of which nothing is left have ended."""
        waiting = self._waiting[what]
        while waiting and not waiting[0].slices and not waiting[0].running:
            job = waiting.popleft()
            job.seconds = time.monotonic() - job.begun
            self._ended.append(job)
