"""Events that nobody has taken yet, in their order and bounded. May import the core's offload room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tensorway.offload import OffloadingEvent, OffloadKey

_What = Literal["stored", "removed", "cleared"]


class Told:
    """What changed since somebody asked. What follows on the like becomes one event with it."""

    def __init__(self, medium: str, most: int) -> None:
        self._medium, self._most = medium, most
        self._waiting: list[tuple[_What, str, list[OffloadKey]]] = []
        self._keys = 0

    def add(self, what: _What, keys: Sequence[OffloadKey] = (), cause: str = "") -> None:
        """These were stored or removed, or all is gone."""
        if not self._most or (not keys and what != "cleared"):
            return
        if self._keys + len(keys) > self._most:
            # Whoever listens knows less than is here, and never of something that is not.
            self._waiting, self._keys = [("cleared", "", [])], 0
            if len(keys) > self._most:
                return
        if self._waiting and self._waiting[-1][:2] == (what, cause):
            self._waiting[-1][2].extend(keys)
        else:
            self._waiting.append((what, cause, list(keys)))
        self._keys += len(keys)

    def take(self) -> list[OffloadingEvent]:
        """All of them, once."""
        taken, self._waiting, self._keys = self._waiting, [], 0
        return [OffloadingEvent(what, keys, self._medium, cause) for what, cause, keys in taken]
