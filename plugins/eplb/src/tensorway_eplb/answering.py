"""What one member writes for others who asked for it: in the order in which they asked, and a little at a time.

May import the core. A fabric sends in order: what is posted all at once is in front of the word that the first of it
is there, and whoever waits for that word has nothing to do until the last of it is.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import attrs

from tensorway.errors import Closed, DeadlineExceeded, TensorwayError
from tensorway.transport import Peer, Route, State, Transfer, Transport

#: Bytes of one write; a row is never cut. Each one costs a flush, and who sends has no time to spare.
_PIECE: Final = 16 << 20
#: Bytes that may be under way to one member: of the ask that it waits for, and with the next ones as well. Enough to
#: keep a link busy between two looks, and no more than that in front of the word that the first one is done.
FIRST: Final = 48 << 20
NEXT: Final = 8 << 20


@attrs.frozen(eq=False)
class Way:
    """To a member that is connected: where its staging is, for each kind of row by its number."""

    peer: Peer
    routes: Sequence[Route]


@attrs.frozen(eq=False)
class _Piece:
    """Rows of one kind that are written together: which of ours, and to which of theirs."""

    route: Route
    here: array[int]
    there: array[int]

    @property
    def nbytes(self) -> int:
        return len(self.here) * self.route.local.block_bytes


@attrs.define(eq=False)
class Answer:
    """To one ask."""

    #: By then all of it is posted, or none of the rest.
    until: float
    left: deque[_Piece] = attrs.field(factory=deque)
    under_way: list[tuple[Transfer, int]] = attrs.field(factory=list)
    #: Why the rest is not written; empty while it is.
    why: str = ""

    def take(self, way: Way, rows: Iterable[tuple[int, Sequence[int], Sequence[int]]]) -> None:
        """Write these: for each kind by its number, which rows of ours, and to which of theirs."""
        for kind, here, there in rows:
            if kind >= len(way.routes) or len(here) != len(there):
                self.give_up("more was asked for than there is")
                return
            self.left.extend(_pieces(way.routes[kind], here, there))

    def give_up(self, why: str) -> None:
        """Write nothing more."""
        self.why = self.why or why
        self.left.clear()
        for transfer, _ in self.under_way:
            transfer.cancel()

    def advance(self, endpoint: Transport, room: int) -> int:
        """Go on with it while there is room for bytes under way; returns the room that is left."""
        for transfer, _ in self.under_way:
            if transfer.poll() is State.FAILED and transfer.error is not None:
                self.give_up(transfer.error.true)
        self.under_way = [one for one in self.under_way if not one[0].released]
        room -= sum(nbytes for _, nbytes in self.under_way)
        try:
            while self.left and room > 0:
                piece = self.left.popleft()
                seconds = self.until - time.monotonic()
                if seconds <= 0:
                    raise DeadlineExceeded("Rows were to be written.", "The time was up before.", "Give it more.")
                transfer = endpoint.write(piece.route, piece.here, piece.there, deadline=seconds)
                self.under_way.append((transfer, piece.nbytes))
                room -= piece.nbytes
        except Closed:
            raise
        except TensorwayError as error:
            self.give_up(error.true)
        return room

    @property
    def over(self) -> bool:
        """Whether nothing is written any more."""
        return not self.left and not self.under_way


def _pieces(route: Route, here: Sequence[int], there: Sequence[int]) -> Iterator[_Piece]:
    most = max(1, _PIECE // route.local.block_bytes)
    for first in range(0, len(here), most):
        rows = slice(first, first + most)
        yield _Piece(route, array("q", here[rows]), array("q", there[rows]))
