"""What an endpoint counts: a row for each peer that it has moved bytes with.

Room `transport`; may import its own room. Peers come and go for as long as a process lives, and some are called
differently each time: so the rows of those that are gone become one in the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from typing import Final

from tensorway.transport.transfer import Transfer

#: Peers that have a row of their own; more only if more are connected at once.
MAX_ROWS: Final = 1024
#: The row of those that had none left. The name of a peer has no space, so no peer is called like that.
OTHERS: Final = "other peers"
_BYTES: Final = {"read": "read_bytes", "write": "write_bytes"}


class Counts:
    """The rows of one endpoint, which locks. What was counted once stays in the sum of all rows."""

    def __init__(self) -> None:
        self._rows: dict[str, defaultdict[str, float]] = {}

    def add(self, transfer: Transfer) -> bool:
        """Count a transfer that is over; whether that made one row too many, and it is time to `fold`."""
        peer = transfer.route.peer.description.name
        row = self._rows.get(peer)
        if new := row is None:
            row = self._rows[peer] = defaultdict(float)
        row["posting_seconds"] += transfer.posting_seconds
        row["seconds"] += transfer.seconds
        if transfer.error is not None:
            row[f"failed_{type(transfer.error).__name__}"] += 1
        else:
            pieces = transfer.pieces
            row["transfers"] += 1
            row[_BYTES[transfer.operation]] += pieces * transfer.route.local.block_bytes
            row["pieces"] += pieces
        return new and len(self._rows) > MAX_ROWS

    def fold(self, connected: Container[str]) -> None:
        """Add the oldest rows to that of the others, but none of a peer that is connected."""
        surplus = len(self._rows) - MAX_ROWS
        gone = [peer for peer in self._rows if peer != OTHERS and peer not in connected][:surplus]
        for peer in gone:
            others = self._rows.setdefault(OTHERS, defaultdict(float))
            for key, value in self._rows.pop(peer).items():
                others[key] += value

    def rows(self) -> dict[str, dict[str, float]]:
        """A copy of all rows."""
        return {peer: dict(row) for peer, row in self._rows.items()}
