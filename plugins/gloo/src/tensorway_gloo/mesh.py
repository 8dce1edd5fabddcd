"""Connections among the members of one group in one epoch: a process group of our own, and who waits on it.

Imported by `formation` and `session`; imports torch. What torch 2.13 does, and all of this module follows from:

* A send or receive of gloo says that it is complete only to who waits for it: so each wait has a thread.
* A wait that times out closes every connection of its process group: so no wait does, and that is how a group is ended.
* When a peer dies, a message that is half on its way is not told: its wait would never return. Messages that have not
  begun are. So what is waited for is an empty message behind the rows, or one that comes back, and never a row.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, Final

import torch

from tensorway._logging import logger

_log = logger("gloo")
#: Longer than any wait of ours; a group is always ended before.
_FOREVER: Final = timedelta(days=7)
_AT_ONCE: Final = timedelta(milliseconds=1)
#: Of a receive that nobody serves; no row ever has this tag.
NEVER_SENT: Final = (1 << 31) - 1
EMPTY: Final = torch.empty(0, dtype=torch.uint8)

#: What was waited for, and what went wrong: empty if nothing did.
Arrival = tuple[Any, str]


class Mesh:
    """See above. One thread at a time uses it; `arrived` is filled by others."""

    def __init__(self, process_group: Any, members: int, me: int) -> None:
        #: What is complete, or has failed.
        self.arrived: SimpleQueue[Arrival] = SimpleQueue()
        self._process_group = process_group
        self._peers = tuple(rank for rank in range(members) if rank != me)
        self._waiters = _Waiters(self.arrived)
        self._told: deque[Any] = deque(maxlen=1024)
        self._pid = os.getpid()

    def send(self, tensor: torch.Tensor, peer: int, tag: int) -> Any:
        """Start to send; raises `RuntimeError` if the connection is gone."""
        return self._process_group.send([tensor], peer, tag)

    def receive(self, tensor: torch.Tensor, peer: int, tag: int) -> Any:
        """Start to receive; likewise."""
        return self._process_group.recv([tensor], peer, tag)

    def tell(self, peer: int, tag: int) -> None:
        """Send an empty message that nobody waits for; nothing is done about a connection that is gone."""
        try:
            # gloo must not lose it while it is queued; by the time that it is dropped here, it has long left.
            self._told.append(self.send(EMPTY, peer, tag))
        except RuntimeError as error:
            _log.debug("Rank %d was not told: %s", peer, said(error))

    def watch(self, subject: object, work: Any) -> None:
        """Let `subject` arrive when this receive of an empty message is over."""
        self._waiters.take((subject, work))

    def close(self, seconds: float = 2.0) -> None:
        """Cut all connections: on return nothing reads or writes any row. The second call does nothing."""
        process_group, self._process_group = self._process_group, None
        if process_group is None:
            return
        if os.getpid() != self._pid:
            # Its threads are the parent's, and its destructor would wait for them for ever: it must not run.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(process_group))
            return
        _cut(process_group, self._peers)
        self._waiters.close(seconds)


def _cut(process_group: Any, peers: Sequence[int]) -> None:
    for peer in peers:
        try:
            # Times out, and gloo then closes the connections to all; unless the peer was faster and closed this one.
            process_group.recv([EMPTY], peer, NEVER_SENT).wait(_AT_ONCE)
        except RuntimeError as error:
            _log.debug("The connection to rank %d is closed: %s", peer, said(error))


class _Waiters:
    """Threads that wait, one for everything that is under way at once; idle ones are used again."""

    def __init__(self, arrived: SimpleQueue[Arrival]) -> None:
        self._arrived = arrived
        self._jobs: SimpleQueue[tuple[object, Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._threads: list[threading.Thread] = []

    def take(self, job: tuple[object, Any]) -> None:
        with self._lock:
            spare = self._idle > 0
            self._idle -= spare
        if not spare:
            thread = threading.Thread(target=self._work, name=f"tensorway-gloo-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put(job)

    def close(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if late := sum(thread.is_alive() for thread in self._threads):
            _log.warning("%d threads still wait for gloo after %g s; they end with the process.", late, seconds)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            subject, work = job
            failed = ""
            try:
                work.wait(_FOREVER)
            except RuntimeError as error:
                failed = said(error)
            with self._lock:
                self._idle += 1
            self._arrived.put((subject, failed))
            del job, subject, work  # or an idle thread keeps the last rows alive


def said(error: BaseException) -> str:
    """What gloo said, without the place in its own source in front and the advice behind."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", " ".join(str(error).split()))
    return text.partition(". This is typically")[0][:160] or type(error).__name__
