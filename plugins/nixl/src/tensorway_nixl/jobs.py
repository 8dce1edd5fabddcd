"""Transfers of NIXL: started, asked after, and released when they are over and not before.

May import tensorway's ground, `agent` and `links`. NIXL cannot cancel, and crashes on a handle that was released: a
handle is therefore released once, here, and forgotten with that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from tensorway import _logging
from tensorway.errors import PeerLost, TensorwayError, TransferFailed
from tensorway_nixl.agent import Agent
from tensorway_nixl.links import Job, Remote

#: Seconds for which a process that ends waits for what it has under way.
_DRAIN: Final = 10.0
_PAUSE: Final = 1e-3
#: After a transfer failed, NIXL has told of its first part that did; UCX ends the others when it closes the connection.
_GRACE: Final = 0.2

_log = _logging.logger("nixl")


class Jobs:
    """The transfers of one agent. Threads may share a job."""

    def __init__(self, agent: Agent, lock: threading.RLock, unused: Callable[[Remote], None]) -> None:
        self._agent = agent
        self._lock = lock
        self._unused = unused
        self._ending = False

    def start(self, job: Job) -> Job | None:
        """Post it; None when it is done at once."""
        with self._lock:
            if self._ending:
                raise TransferFailed(job.asked, "This process is ending.", "Wait for transfers before it ends.")
            job.remote.jobs += 1
            self._agent.begin(job)
        try:
            state = self._agent.native.postXferReq(job.handle, b"")
        except Exception as error:  # NIXL's exceptions have no common base
            self._fail(job, error)
            if self._in_progress(job):  # a part of it was posted
                return job
            self._finish(job)
            raise job.error from error  # type: ignore[misc]
        if state == self._agent.bindings.NIXL_IN_PROG:
            return job
        self._finish(job)
        return None

    def done(self, job: Job) -> bool:
        """Ask NIXL, which makes progress by it."""
        with job.lock:
            if job.error is None and job.handle is not None:
                try:
                    state = self._agent.native.getXferStatus(job.handle)
                except Exception as error:  # NIXL's exceptions have no common base
                    self._fail(job, error)
                else:
                    if state == self._agent.bindings.NIXL_IN_PROG:
                        return False
                    self._finish(job)
            if job.error is not None:
                raise job.error
            return True

    def settled(self, job: Job) -> bool:
        """Whether NIXL has said how it ended. To release what has not ended would stop nothing."""
        with job.lock:
            if job.handle is not None and job.error is None:
                try:
                    self.done(job)
                except TensorwayError:
                    return False
            if job.handle is not None and time.monotonic() >= job.quiet_at and not self._in_progress(job):
                self._finish(job)
            return job.handle is None

    def drain(self) -> None:
        """Start nothing any more, and wait until nothing is under way, or has been for too long.

        A peer aborts if it is answering a read over TCP when the reader's end of the connection closes: its UCX takes
        it for a fatal error that it cannot send. Nothing that the peer could set avoids it; so a reader has to stay
        until it has its answers.
        """
        with self._lock:
            self._ending = True
        until = time.monotonic() + _DRAIN
        while jobs := tuple(self._agent.jobs):
            for job in jobs:
                self.settled(job)
            if time.monotonic() >= until:
                return
            time.sleep(_PAUSE)

    def _in_progress(self, job: Job) -> bool:
        try:
            return bool(self._agent.native.getXferStatus(job.handle) == self._agent.bindings.NIXL_IN_PROG)
        except Exception:  # whatever it says, it is not that
            return False

    def _fail(self, job: Job, error: Exception) -> None:
        job.quiet_at = time.monotonic() + _GRACE
        job.error = told(error, job.remote, job.asked)

    def _finish(self, job: Job) -> None:
        """It is over: release it, and what waited for it."""
        handle, job.handle, job.keep = job.handle, None, None
        try:
            self._agent.native.releaseXferReq(handle)
        except Exception as error:  # it is over all the same; what is left of it is NIXL's
            _log.debug("NIXL did not release a transfer: %r", error)
        with self._lock:
            self._agent.end(job)
            job.remote.jobs -= 1
            self._unused(job.remote)


def told(error: Exception, remote: Remote, asked: str) -> TensorwayError:
    """Our word for what NIXL raised; its text is only a code."""
    if type(error).__name__ == "nixlRemoteDisconnectError":
        what = "its connection broke" if remote.met else "no connection to it came about"
        remote.lost = remote.lost or f"{what} ({error})"
        return PeerLost.because(asked, remote.lost)
    true = f"NIXL could not do it ({type(error).__name__}: {error})."
    if type(error).__name__ == "nixlNotFoundError":  # what a peer deregisters, NIXL here remembers
        why = "it is not registered, or a region that has gone since began inside of it"
        to_do = "Register each piece that is read as a region of its own, and keep it registered."
        return TransferFailed(asked, f"NIXL does not find that memory ({error}): {why}.", to_do)
    return TransferFailed(asked, true, "NIXL's reason is on stderr; NIXL_LOG_LEVEL=INFO shows more.")
