"""What other engines' ranks say to ours, and who may say it: members of our directory, in their own names.

May import the core and this package's messages. A message can be here before the directory has said who its sender is;
so those of strangers are kept for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

from tensorway._logging import logger
from tensorway.errors import Closed
from tensorway.rendezvous import Directory
from tensorway.transport import Notification, Transport
from tensorway_kv import messages

_log = logger("kv")
#: Messages of strangers that are kept until the directory says who they are, and for how many seconds.
_STRANGERS: Final = 1024
_PATIENCE: Final = 5.0
#: Senders that are remembered after they left the directory.
_KNOWN: Final = 4096
#: Messages that one look passes on.
_HEARD: Final = 1024
_FAMILIAR: Final = 0.05


class Ears:
    """Messages of one rank. One thread uses it."""

    def __init__(self, endpoint: Transport, own: Directory) -> None:
        self._endpoint, self._own = endpoint, own
        self._messages = messages.Reader()
        self._strangers: deque[tuple[float, Notification]] = deque()
        self._senders: dict[str, tuple[str, int]] = {}
        self._familiar_at = 0.0

    @property
    def refused(self) -> dict[messages.Cause, int]:
        """Messages that were not believed, by cause."""
        return self._messages.refused

    def listen(self, now: float) -> Iterator[tuple[messages.Message, bytes]]:
        """What has arrived from who says that it is from them."""
        if now >= self._familiar_at:
            self._familiar_at = now + _FAMILIAR
            self._meet()
        waiting = [*self._strangers, *((now, note) for note in self._endpoint.notifications())]
        self._strangers.clear()
        heard = 0
        for since, note in waiting:
            sender = self._senders.get(note.incarnation)
            if heard >= _HEARD or (sender is None and now - since < _PATIENCE):
                self._strangers.append((since, note))
                continue
            if sender is None:
                self.refused["foreign"] += 1
                continue
            message = self._messages.decode(note.payload)
            if message is not None and self._is(message, sender):
                heard += 1
                yield message, note.payload
        while len(self._strangers) > _STRANGERS:
            self._strangers.popleft()
            self.refused["foreign"] += 1

    def _is(self, message: messages.Message, sender: tuple[str, int]) -> bool:
        """Whether it comes from who it says that it is from, life and rank."""
        if self._messages.checked(message, sender[0]) is None:
            return False
        if message.rank != sender[1]:
            self.refused["forged"] += 1
            return False
        return True

    def _meet(self) -> None:
        """Who is in our directory, by their endpoints: whose words may be believed."""
        try:
            members = self._own.members().values()
        except Closed as error:  # another process took our place; the planner that is with it will not hear us
            _log.debug("%s", error)
            return
        for member in members:
            life, rank = (member.facts.get(name) for name in ("engine", "rank"))
            if life is None or rank is None or not isinstance(life.value, str) or not str(rank.value).isdecimal():
                continue
            self._senders.pop(member.incarnation, None)
            self._senders[member.incarnation] = (life.value, int(str(rank.value)))
        while len(self._senders) > _KNOWN:
            del self._senders[next(iter(self._senders))]
