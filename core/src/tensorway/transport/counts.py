"""What an endpoint counts: a row for each peer that it has moved bytes with.

Room `transport`; may import its own room. Peers come and go for as long as a process lives, and some are called
differently each time: so the rows of those that are gone become one in the end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from typing import Final

from tensorway.metrics import Counters, Metric, Sample, vocabulary
from tensorway.transport.contract import Peer
from tensorway.transport.transfer import Transfer

#: `endpoint` is its name and `peer` that of the other; `cause` is `none` for what succeeded, else the error's class.
METRICS: Final = vocabulary(
    Metric("transport_bytes_total", "counter", ("peer", "operation"), "Bytes of transfers that are done."),
    Metric("transport_transfers_total", "counter", ("peer", "cause"), "Transfers that are over, by why they failed."),
    Metric("transport_pieces_total", "counter", ("peer",), "Blocks of transfers that are done."),
    Metric("transport_seconds_total", "counter", ("peer",), "From the call to the end of each transfer, added up."),
    Metric("transport_posting_seconds_total", "counter", ("peer",), "The part of it that posting took."),
    Metric("transport_pending", "gauge", ("peer",), "Transfers that are under way."),
    Metric("transport_quarantined", "gauge", ("peer",), "Failed transfers whose memory the fabric has not let go of."),
    Metric("transport_peers", "gauge", ("state",), "Peers that are connected, and those of them that are lost."),
)

#: Peers that have a row of their own; more only if more are connected at once.
MAX_ROWS: Final = 1024
#: The row of those that had none left. The name of a peer has no space, so no peer is called like that.
OTHERS: Final = "other peers"
_BYTES: Final = {"read": "read_bytes", "write": "write_bytes"}
_FAILED: Final = "failed_"


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
            row[f"{_FAILED}{type(transfer.error).__name__}"] += 1
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


def samples(
    rows: Mapping[str, Mapping[str, float]], transfers: Iterable[Transfer], peers: Iterable[Peer], **labels: str
) -> list[Sample]:
    """Rows of counts, and what is true now, as values of `METRICS`."""
    found = Counters(METRICS, **labels)
    for peer, row in rows.items():
        for name, value in row.items():
            if name == "transfers" or name.startswith(_FAILED):
                cause = name.removeprefix(_FAILED) if name != "transfers" else "none"
                found.add("transport_transfers_total", value, peer=peer, cause=cause)
            elif name in _BYTES.values():
                found.add("transport_bytes_total", value, peer=peer, operation=name.removesuffix("_bytes"))
            else:
                found.add(f"transport_{name}_total", value, peer=peer)
    for transfer in transfers:
        name = "transport_pending" if transfer.pending else "transport_quarantined"
        found.add(name, peer=transfer.route.peer.description.name)
    states = Counter("lost" if peer.lost else "connected" for peer in peers)
    for state in ("connected", "lost"):
        found.set("transport_peers", states[state], state=state)
    return found.samples()
