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

#: What to do about a peer that is lost.
ANEW: Final = "Connect to it anew when it is back."
#: After a transfer failed, NIXL has told of its first part that did; UCX ends the others when it closes the connection.
_GRACE: Final = 0.2

_log = _logging.logger("nixl")


class Jobs:
    """The transfers of one agent. A job belongs to one thread at a time."""

    def __init__(self, agent: Agent, lock: threading.RLock, unused: Callable[[Remote], None]) -> None:
        self._agent = agent
        self._lock = lock
        self._unused = unused

    def start(self, job: Job) -> Job | None:
        """Post it; None when it is done at once."""
        with self._lock:
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
        if job.handle is not None and job.error is None:
            try:
                self.done(job)
            except TensorwayError:
                return False
        if job.handle is not None and time.monotonic() >= job.quiet_at and not self._in_progress(job):
            self._finish(job)
        return job.handle is None

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
        remote.lost = remote.lost or f"its connection broke ({error})"
        return PeerLost(asked, f"The peer is lost: {remote.lost}.", ANEW)
    true = f"NIXL could not do it ({type(error).__name__}: {error})."
    return TransferFailed(asked, true, "NIXL's reason is on stderr; NIXL_LOG_LEVEL=INFO shows more.")
