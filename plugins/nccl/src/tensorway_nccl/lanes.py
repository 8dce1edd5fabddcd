"""What a session asks of the library that moves rows: pairs of members, and one round of a pair at a time.

May import `tensorway.errors`; imports no library. There is a communicator for each pair of members, and not one for
all: NCCL ends a communicator as a whole, and a member that is lost must take nothing with it but its own moves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import attrs

from tensorway._logging import logger
from tensorway.errors import DeadlineExceeded, PeerLost, TensorwayError

_log = logger("nccl")
#: Seconds for an aborted round to leave the device; a kernel that looks at its abort flag takes milliseconds.
LET_GO: Final = 10.0
#: Between two looks at something that is under way: short at first, since most rounds take milliseconds.
_SHORTEST: Final = 50e-6
_LONGEST: Final = 2e-3


@attrs.frozen
class Piece:
    """Bytes of one row."""

    address: int
    nbytes: int


class Stuck(Exception):
    """A round was given up, and the device has not let go of its rows."""


class Pair:
    """This member and another. One worker at a time is in `exchange`; `stop` may come from any thread."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.stopped = threading.Event()
        self._why = ""

    def exchange(self, sends: Sequence[Piece], receives: Sequence[Piece], until: float) -> None:
        """Send these and receive those, in this order; the other does the same the other way round.

        Returns when all is where it should be. After an error the pair is of no use, and its rows are nobody's but the
        caller's; if that cannot be said, it is `Stuck`.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of everything; nobody is in `exchange`. The second call does nothing."""
        raise NotImplementedError

    def stop(self, why: str) -> None:
        """Let `exchange` end soon, with an error."""
        self._why = self._why or why
        self.stopped.set()

    def wait(self, over: Callable[[], bool], until: float) -> None:
        """Look again and again; raises `PeerLost` when the pair is stopped and `DeadlineExceeded` when it is late."""
        pause, asked = _SHORTEST, f"Rows were to be moved between this member and {self.peer}."
        while not over():
            if self.stopped.is_set():
                raise PeerLost.because(asked, self._why)
            if time.monotonic() >= until:
                raise DeadlineExceeded(
                    asked, "The round was not over in time.", "Give `timeout_s` more, if the network is that slow."
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)


class Lane(Protocol):
    """One way to the library. `invite` makes a pair from the lower rank's side, `follow` from the other's."""

    #: Kinds of memory that it moves.
    devices: frozenset[str]
    #: This member's address, where others may come; known when the group is formed.
    host: str

    @property
    def name(self) -> str:
        """What the option calls it."""
        ...

    def invite(self, peer: str) -> tuple[bytes, Pair]:
        """A pair, and what the other needs for its own end. Does not wait."""
        ...

    def follow(self, peer: str, invitation: bytes) -> Pair:
        """The other end. Does not wait."""
        ...

    def close(self) -> None:
        """Let go of what is not a pair's."""
        ...


def ran(pair: Pair, sends: Sequence[Piece], receives: Sequence[Piece], until: float) -> tuple[str, bool]:
    """Run a round; what went wrong, and whether its rows are free."""
    try:
        pair.exchange(sends, receives, until)
    except Stuck as error:
        _log.error("Rows that are moved between this member and %s stay out of use: %s", pair.peer, error)
        return str(error), False
    except TensorwayError as error:
        return error.true, True
    except Exception as error:  # a library may raise anything; what is on the device then is not known
        _log.exception("A round between this member and %s has failed.", pair.peer)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", False
    return "", True
