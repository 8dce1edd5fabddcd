"""What routers were told of blocks in the store, so that they are told once that it is there and once that it is gone.

May import the core's contract. One thread uses it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Final

from tensorway.kv import Event

#: Blocks that are remembered; of what was told before, nobody hears that it is gone.
_MOST: Final = 1 << 17
#: Events that wait for somebody who asks for them.
_EVENTS: Final = 1 << 12


class Announced:
    """Blocks by group and name, and the events that nobody has asked for yet."""

    def __init__(self, block_tokens: int) -> None:
        self._tokens = block_tokens
        self._known: OrderedDict[tuple[int, bytes], tuple[bytes, str]] = OrderedDict()
        self._events: deque[Event] = deque(maxlen=_EVENTS)

    def stored(self, names: Sequence[bytes], hashes: Sequence[bytes], salt: str, group: int) -> None:
        """These blocks of a group are there."""
        fresh = [(name, block) for name, block in zip(names, hashes, strict=True) if (group, name) not in self._known]
        self._known.update(((group, name), (block, salt)) for name, block in fresh)
        if fresh:
            self._tell("stored", tuple(block for _, block in fresh), group, salt)
        while len(self._known) > _MOST:
            self._known.popitem(last=False)

    def removed(self, name: bytes, group: int) -> None:
        """A block is gone."""
        known = self._known.pop((group, name), None)
        if known is not None:
            self._tell("removed", (known[0],), group, known[1])

    def cleared(self) -> None:
        """Nothing of what was told can be had any more."""
        self._known.clear()
        self._events.append(Event("cleared", medium="files"))

    def events(self) -> list[Event]:
        """What nobody has been told yet."""
        out = list(self._events)
        self._events.clear()
        return out

    def _tell(self, what: str, hashes: tuple[bytes, ...], group: int, salt: str) -> None:
        last = self._events[-1] if self._events else None
        if last is not None and (last.what, last.group, last.salt) == (what, group, salt):
            hashes = last.hashes + hashes
            self._events.pop()
        self._events.append(
            Event("stored" if what == "stored" else "removed", hashes, group, "files", self._tokens, salt)
        )
