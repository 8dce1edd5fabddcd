"""Notifications that arrived and that nobody has fetched yet: kept in order, and no more of them than fit.

May import tensorway's ground, the transport's contract and `wire`. NIXL keeps them without a bound, and has no way to
make a sender wait. So a thread takes them out of NIXL (`pulse`), and what does not fit is dropped and told of.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final

import attrs

from tensorway.errors import TransferFailed
from tensorway.transport.contract import Notification
from tensorway_nixl import wire

#: What one sender may have waiting here.
MAX_MESSAGES: Final = 65_536
MAX_BYTES: Final = 64 << 20


@attrs.define
class _Sender:
    name: str = ""
    messages: int = 0
    nbytes: int = 0
    #: How many did not fit. Nothing behind the first of them is kept, so that what is delivered has no gap.
    dropped: int = 0


class Inbox:
    """What has arrived at one agent. Threads may share it."""

    def __init__(self, fetch: Callable[[], Mapping[str, list[bytes]]]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._waiting: list[Notification] = []
        self._senders: dict[str, _Sender] = {}
        #: Those of whom something was dropped, until somebody has been told.
        self._flooded: list[_Sender] = []

    def pull(self) -> int:
        """Take out of NIXL what is there, as far as it fits; how many messages that were."""
        with self._lock:
            before = sum(sender.messages + sender.dropped for sender in self._senders.values())
            self._pull(MAX_MESSAGES, MAX_BYTES)
            return sum(sender.messages + sender.dropped for sender in self._senders.values()) - before

    def take(self) -> list[Notification]:
        """All that is there; raises `TransferFailed` once for a sender of whom something had to be dropped."""
        with self._lock:
            told = [sender for sender in self._flooded if not sender.messages]
            if told:
                self._flooded.remove(told[0])
                self._senders = {key: row for key, row in self._senders.items() if row is not told[0]}
                raise TransferFailed(
                    f"Notifications of peer {told[0].name} were to be fetched.",
                    f"Nobody fetched those before in time, and {told[0].dropped:,} that did not fit were dropped.",
                    "Fetch them more often, and ask the peer for what is missing.",
                )
            self._pull(1 << 62, 1 << 62)  # they do not wait here, so they need not fit
            taken, self._waiting = self._waiting, []
            for sender in self._flooded:
                sender.messages = sender.nbytes = 0
            self._senders = {key: row for key, row in self._senders.items() if row.dropped}
            return taken

    def _pull(self, most: int, bytes_most: int) -> None:
        for incarnation, messages in self._fetch().items():
            for message in messages:
                note = wire.unframe(incarnation, message)
                if note is None:  # it is of somebody else
                    continue
                sender = self._senders.setdefault(incarnation, _Sender(note.peer))
                size = len(note.payload)
                if sender.dropped or sender.messages >= most or sender.nbytes + size > bytes_most:
                    if not sender.dropped:
                        self._flooded.append(sender)
                    sender.dropped += 1
                    continue
                sender.messages += 1
                sender.nbytes += size
                self._waiting.append(note)
