"""One connection to a TCPStore, and the thread that uses it.

May import the standard library. A call of TCPStore waits without a limit for a server that is stopped, and so does its
constructor; a lookup of names inside of it can take many seconds. So nobody calls it but this thread, and callers wait
for the thread as long as they want to.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any


class Late(Exception):
    """The thread did not do it in time."""


class _Job:
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work
        self.ended = threading.Event()
        self.began = self.dropped = False
        self.answer: Any = None
        self.error: Exception | None = None


class Worker:
    """Connects as soon as it is made. Threads may share it; their calls are done one after the other."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._made = time.monotonic()
        self.connected = False
        #: Set when it has connected, or cannot.
        self.settled = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="tensorway-tcpstore", daemon=True)
        self._thread.start()

    @property
    def connecting_for(self) -> float:
        """Seconds since it began to connect; 0 when it has."""
        return 0.0 if self.connected else time.monotonic() - self._made

    def run(self, work: Callable[[Any], Any], until: float) -> Any:
        """Do something with the store; raises what it raises, and `Late`."""
        job = _Job(work)
        self._jobs.put(job)
        if not job.ended.wait(max(0.0, until - time.monotonic())):
            job.dropped = True
            raise Late(job.began)
        if job.error is not None:
            raise job.error
        return job.answer

    def end(self, seconds: float = 0.0) -> None:
        """Disconnect, when what is under way is done; wait so long for that."""
        self._jobs.put(None)
        self._thread.join(seconds)

    def _serve(self) -> None:
        try:
            store, failed = self._connect(), None
            self.connected = True
        except Exception as error:
            store, failed = None, error
        self.settled.set()
        while (job := self._jobs.get()) is not None:
            if job.dropped:
                continue
            job.began = True
            try:
                if failed is not None:
                    raise failed
                job.answer = job.work(store)
            except Exception as error:
                job.error = error
            job.ended.set()
            del job  # or it would keep its answer until the next comes
