"""The lane `direct`: rounds over NCCL itself, in calls that do not wait, each pair on a stream of its own.

Imported by `session` when it is chosen; imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from tensorway.errors import TensorwayError, TransferFailed
from tensorway_nccl import direct
from tensorway_nccl.lanes import LET_GO, Pair, Piece, Stuck
from tensorway_nccl.runtime import Runtime

_PAUSE: Final = 1e-3


class DirectLane:
    """See `lanes.Lane`."""

    name: Final = "direct"

    def __init__(
        self, library: Any, runtime: Runtime, max_ctas: int | None, devices: frozenset[str] = frozenset({"cuda"})
    ) -> None:
        self.devices = devices
        self.host = ""
        self._library = library
        self._runtime = runtime
        self._max_ctas = max_ctas

    def invite(self, peer: str) -> tuple[bytes, Pair]:
        """An id of NCCL's: it opens a port here, where the other will come."""
        identity = direct.unique_id(self._library)
        return identity, DirectPair(peer, self._library, self._runtime, identity, 0, self._max_ctas)

    def follow(self, peer: str, invitation: bytes) -> Pair:
        """The other end."""
        return DirectPair(peer, self._library, self._runtime, invitation, 1, self._max_ctas)

    def close(self) -> None:
        """The library and the runtime stay in the process."""


class DirectPair(Pair):
    """A communicator of two ranks, made by the first round."""

    def __init__(
        self, peer: str, library: Any, runtime: Runtime, identity: bytes, rank: int, max_ctas: int | None
    ) -> None:
        super().__init__(peer)
        self._library = library
        self._runtime = runtime
        self._identity = identity
        self._rank = rank
        self._max_ctas = max_ctas
        self._communicator: direct.Communicator | None = None
        self._stream: int | None = None

    def exchange(self, sends: Sequence[Piece], receives: Sequence[Piece], until: float) -> None:
        """One group of NCCL's; over when the stream is idle, and the communicator knows of no error."""
        self._runtime.enter()
        try:
            communicator, stream = self._joined(until)
            communicator.enqueue(1 - self._rank, sends, receives, stream)
            self.wait(lambda: communicator.settled() and self._runtime.idle(stream), until)
        except TensorwayError:
            self._let_go()
            raise

    def close(self) -> None:
        """Abort the communicator: NCCL's own end would wait for the other."""
        if self._communicator is not None or self._stream is not None:
            self._runtime.enter()
            self._let_go()

    def _joined(self, until: float) -> tuple[direct.Communicator, int]:
        if self._stream is None:
            self._stream = self._runtime.stream()
        if self._communicator is None:
            self._communicator = direct.Communicator.join(self._library, self._identity, self._rank, 2, self._max_ctas)
            self.wait(self._communicator.settled, until)
        return self._communicator, self._stream

    def _let_go(self) -> None:
        """Abort, and see that nothing of it is on the device any more."""
        if self._communicator is not None:
            self._communicator.abort()
            self._communicator = None
        if (stream := self._stream) is None:
            return
        self._stream = None
        until = time.monotonic() + LET_GO
        try:
            while not self._runtime.idle(stream):
                if time.monotonic() >= until:
                    raise Stuck(f"The device has not let go of an aborted round within {LET_GO:g} s.")
                time.sleep(_PAUSE)
        except TransferFailed as error:
            raise Stuck(error.true) from error
        self._runtime.destroy(stream)
