"""Work on the disk beside the engine: threads that may hang, and requests that end all the same, with their pages safe.

May import the core's ground. Every touch of a page is under its job's lock, and none
follows the job's end: so a job ends when its time is over, however long a file system takes for what its thread asked.
"""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

import attrs

from tensorway._logging import logger
from tensorway.errors import TensorwayError

_log = logger("kv")
Direction = Literal["load", "save"]
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class Failed(Exception):
    """A job cannot be done, for a cause that metrics name."""

    def __init__(self, cause: str, why: str) -> None:
        super().__init__(cause, why)
        self.cause, self.why = cause, why


class _Over(Exception):
    """The job has ended while its thread worked."""


@attrs.define(eq=False)
class Job:
    """One request's load or save."""

    request: str
    direction: Direction
    #: When its time is over.
    until: float
    #: Tokens from the first on that are good, or saved.
    good: int
    #: How it ended: a cause, empty for success, and why.
    ended: tuple[str, str] | None = None
    #: A cause for which it is to end as soon as nobody touches a page.
    unwanted: tuple[str, str] | None = None
    begun: float = attrs.field(factory=time.monotonic)
    nbytes: int = 0
    files: int = 0
    #: Files that were not believed, by cause.
    refused: Counter[str] = attrs.field(factory=Counter)
    _lock: threading.Lock = attrs.field(factory=threading.Lock)

    @contextmanager
    def touching(self) -> Iterator[None]:
        """While pages are read or written; raises if the job has ended."""
        with self._lock:
            if self.ended is not None or self.unwanted is not None:
                raise _Over
            yield

    def check(self) -> None:
        """Raise if the job has ended."""
        if self.ended is not None or self.unwanted is not None:
            raise _Over

    def run(self, work: Callable[[Job], None]) -> None:
        """Do it, and say how it ended; on a thread of the pool."""
        if self.ended is not None:
            return
        try:
            work(self)
            outcome = ("", "")
        except _Over:
            return
        except Failed as failure:
            outcome = (failure.cause, failure.why)
        except OSError as error:
            outcome = (cause_of(error), f"{error.strerror or error}")
        except TensorwayError as error:
            outcome = ("refused", error.true)
        except Exception as error:  # a thread of the pool serves other requests, too
            _log.exception("a request's blocks could not be moved")
            outcome = ("failed", repr(error))
        with self._lock:
            self._settle(self.unwanted or outcome)

    def give_up(self, cause: str, why: str) -> None:
        """Nobody wants it any more: its thread stops before the next page, and `finished` says when it has."""
        self.unwanted = self.unwanted or (cause, why)

    def finished(self, now: float, wait: float = 0.0) -> bool:
        """Whether it has ended, and no page of it is touched any more."""
        if self.ended is None and now >= self.until:
            done = "loaded" if self.direction == "load" else "saved"
            self.give_up("deadline", f"it was not {done} in time; {self.good} tokens were")
        if self.ended is None and self.unwanted is not None and self._acquire(wait):
            self._settle(self.unwanted)
            self._lock.release()
        return self.ended is not None

    def _settle(self, outcome: tuple[str, str]) -> None:
        """The first of its thread and of whoever gave it up says how it ended."""
        if self.ended is None:
            self.ended = outcome

    def _acquire(self, wait: float) -> bool:
        return self._lock.acquire(timeout=wait) if wait > 0 else self._lock.acquire(blocking=False)


def cause_of(error: OSError) -> str:
    """The metrics' word for what a file system says."""
    if error.errno in _FULL:
        return "full"
    return "forbidden" if error.errno in _FORBIDDEN else "failed"


class Pool:
    """A few threads that begin when they are needed. They end with the process, also those that hang."""

    def __init__(self, threads: int, name: str) -> None:
        self._most, self._name = threads, name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def do(self, work: Callable[[], None]) -> None:
        """As soon as a thread is free."""
        self._work.put(work)
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._serve, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self, until: float) -> None:
        """End the threads; those that hang are left."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
